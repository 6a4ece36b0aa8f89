"""Selects the entries that vary most between tasks, weights tensors by their energy, and erases minority signs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from service.contract.methods import Sce
from workers.combining import agreed_mean, weighted_mean
from workers.context import Context
from workers.magnitudes import above, cut_at, share_of


def merge(
    task_vectors: Sequence[Tensor],
    weights: Sequence[float],
    params: Sce,
    context: Context,  # noqa: ARG001 (every method is called alike)
) -> Tensor:
    """Select, calculate, erase: SCE of FuseChat (arXiv:2408.07990), with weights. Any shape.

    Kept are the share ``density`` of entries whose weighted variance over the tasks is largest, at least one; a task's
    coefficient is its weight times the sum of squares of what is kept; an entry is the mean, with these coefficients,
    over the tasks that have the sign of the weighted sum there. One task alone varies nowhere and is taken whole.
    """
    selected = _selected(task_vectors, weights, params.density) if len(task_vectors) > 1 else list(task_vectors)
    energies = [float(vector.double().square().sum()) for vector in selected]
    coefficients = [weight * energy for weight, energy in zip(weights, energies, strict=True)]
    total = sum(coefficients)
    if total == 0:
        return torch.zeros_like(task_vectors[0])
    shares = [coefficient / total for coefficient in coefficients]
    return agreed_mean(selected, shares, votes=weights).mul_(params.scaling)


def _selected(task_vectors: Sequence[Tensor], weights: Sequence[float], density: float) -> list[Tensor]:
    mean = weighted_mean(task_vectors, weights)
    variance = torch.zeros_like(mean)
    for task_vector, weight in zip(task_vectors, weights, strict=True):
        off = task_vector - mean
        variance.addcmul_(off, off, value=weight / sum(weights))
    flat = variance.flatten()
    mask = above(flat, cut_at(flat, share_of(density, flat.numel(), least=1))).view_as(mean)
    return [task_vector * mask for task_vector in task_vectors]
