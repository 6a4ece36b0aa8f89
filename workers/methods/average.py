"""Takes the weighted mean of the checkpoints."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from service.contract.methods import Average
from workers.combining import weighted_mean
from workers.context import Context


def merge(
    task_vectors: Sequence[Tensor],
    weights: Sequence[float],
    params: Average,  # noqa: ARG001 (every method is called alike)
    context: Context,  # noqa: ARG001
) -> Tensor:
    """sum_k weight_k * T_k / sum_k weight_k, added in the order of the tasks (arXiv:2203.05482). Any shape."""
    return weighted_mean(task_vectors, weights)
