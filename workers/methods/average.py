"""Takes the weighted mean of the checkpoints."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from service.contract.methods import Average


def merge(
    task_vectors: Sequence[Tensor],
    weights: Sequence[float],
    params: Average,  # noqa: ARG001 (every method is called alike)
) -> Tensor:
    """sum_k weight_k * T_k / sum_k weight_k, added in the order of the tasks (arXiv:2203.05482). Any shape."""
    total = sum(weights)
    merged = task_vectors[0] * (weights[0] / total)
    for task_vector, weight in zip(task_vectors[1:], weights[1:], strict=True):
        merged.add_(task_vector, alpha=weight / total)
    return merged
