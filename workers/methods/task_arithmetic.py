"""Adds task vectors up: the sum that task arithmetic and CAT Merging share."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from service.contract.methods import Cat, TaskArithmetic


def merge(task_vectors: Sequence[Tensor], weights: Sequence[float], params: Cat | TaskArithmetic) -> Tensor:
    """scaling * sum_k weight_k * T_k, added in the order of the tasks (arXiv:2212.04089). Any shape."""
    merged = task_vectors[0] * (params.scaling * weights[0])
    for task_vector, weight in zip(task_vectors[1:], weights[1:], strict=True):
        merged.add_(task_vector, alpha=params.scaling * weight)
    return merged
