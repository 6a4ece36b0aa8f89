"""Adds task vectors up: the sum that task arithmetic and CAT Merging share."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from service.contract.methods import Cat, TaskArithmetic
from workers.combining import weighted_sum
from workers.context import Context


def merge(
    task_vectors: Sequence[Tensor],
    weights: Sequence[float],
    params: Cat | TaskArithmetic,
    context: Context,  # noqa: ARG001 (every method is called alike)
) -> Tensor:
    """scaling * sum_k weight_k * T_k, added in the order of the tasks (arXiv:2212.04089). Any shape."""
    return weighted_sum(task_vectors, weights, params.scaling)
