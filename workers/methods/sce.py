"""Selects the entries that vary most between tasks, weights tensors by their energy, and erases minority signs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from service.contract.methods import Sce
from workers.combining import agreed_mean, weighted_mean
from workers.context import Context
from workers.magnitudes import above, share_of
from workers.pieces import Pieces
from workers.thresholds import Threshold, thresholds


@dataclass(frozen=True)
class Selection:
    """Where the entries of largest variance end, if not all are taken, and each task's share in their mean."""

    threshold: Threshold | None
    shares: list[float]


def look(pieces: Pieces, weights: Sequence[float], params: Sce) -> Selection:
    """Which entries of this parameter are kept, and with which coefficients.

    Kept are the share ``density`` of entries whose weighted variance over the tasks is largest, at least one; a task's
    coefficient is its weight times the sum of squares of what is kept. One task alone varies nowhere and is taken
    whole. Without coefficients all is zero.
    """
    threshold = None
    if pieces.tasks > 1:
        count = share_of(params.density, pieces.entries, least=1)
        ((threshold,),) = thresholds(pieces, lambda vectors, _: [_variance(vectors, weights)], [[count]])

    def energies(task_vectors: list[Tensor], context: Context) -> list[float]:
        kept = _selected(task_vectors, weights, threshold, context.first)
        return [float(vector.square().sum(dtype=torch.float64)) for vector in kept]

    sums = [sum(parts) for parts in zip(*pieces.map(energies), strict=True)]
    coefficients = [weight * energy for weight, energy in zip(weights, sums, strict=True)]
    total = sum(coefficients)
    return Selection(threshold, [coefficient / total for coefficient in coefficients] if total else [])


def merge(task_vectors: Sequence[Tensor], weights: Sequence[float], params: Sce, context: Context) -> Tensor:
    """Select, calculate, erase: SCE of FuseChat (arXiv:2408.07990), with weights. Any shape.

    An entry is the mean, with the tasks' coefficients, over the tasks that have the sign of the weighted sum there.
    """
    facts: Selection = context.facts
    if not facts.shares:
        return torch.zeros_like(task_vectors[0])
    selected = _selected(task_vectors, weights, facts.threshold, context.first)
    return agreed_mean(selected, facts.shares, votes=weights, scaling=params.scaling)


def _selected(
    task_vectors: Sequence[Tensor], weights: Sequence[float], threshold: Threshold | None, first: int
) -> list[Tensor]:
    if threshold is None:
        return list(task_vectors)
    mask = above(_variance(task_vectors, weights), threshold.within(first)).to(task_vectors[0].dtype)
    return [task_vector * mask for task_vector in task_vectors]


def _variance(task_vectors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    mean = weighted_mean(task_vectors, weights)
    variance = torch.zeros_like(mean)
    for task_vector, weight in zip(task_vectors, weights, strict=True):
        off = task_vector - mean
        variance.addcmul_(off, off, value=weight / sum(weights))
    return variance
