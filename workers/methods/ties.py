"""Keeps each task vector's largest entries, elects a sign per entry, and averages the entries that agree with it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from service.contract.methods import Ties
from workers.magnitudes import kth_largest


def merge(task_vectors: Sequence[Tensor], weights: Sequence[float], params: Ties) -> Tensor:
    """Trim, elect, average: TIES-Merging (arXiv:2306.01708), trimming per tensor, with weights. Any shape.

    The sign of an entry is that of the weighted sum of the trimmed task vectors; where they cancel exactly, no sign is
    elected and the entry is 0. The result is ``params.scaling`` times the weighted mean over the tasks whose entry
    survived trimming and has that sign.
    """
    trimmed = [_largest(t, params.density) for t in task_vectors]
    elected = _sum(trimmed, weights).sign_()
    total, weight_there = torch.zeros_like(elected), torch.zeros_like(elected)
    for task_vector, weight in zip(trimmed, weights, strict=True):
        agrees = (task_vector.sign() == elected) & (task_vector != 0)
        total.add_(task_vector * agrees, alpha=weight)
        weight_there.add_(agrees, alpha=weight)
    return torch.where(weight_there > 0, total / weight_there, 0.0) * params.scaling


def _largest(task_vector: Tensor, density: float) -> Tensor:
    """``task_vector`` with zeros outside its largest entries by magnitude: a share ``density``, at least one."""
    sizes = task_vector.abs().flatten()
    count = max(1, math.floor(density * sizes.numel() + 0.5))
    if count >= sizes.numel():
        return task_vector
    threshold = kth_largest(sizes, count)
    kept = sizes > threshold
    tied = (sizes == threshold).nonzero().flatten()
    kept[tied[: count - int(kept.sum())]] = True  # ties go to the lower index
    return task_vector * kept.view_as(task_vector)


def _sum(task_vectors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    total = torch.zeros_like(task_vectors[0])
    for task_vector, weight in zip(task_vectors, weights, strict=True):
        total.add_(task_vector, alpha=weight)
    return total
