"""The two ways to combine task vectors that have been thinned out: add them, or let signs be elected first."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from service.contract.methods import Combine
from workers.context import Context
from workers.pieces import Pieces, Work

Thin = Work[Sequence[Tensor]]


def combine(
    task_vectors: Sequence[Tensor],
    weights: Sequence[float],
    how: Combine,
    *,
    scaling: float = 1.0,
    factors: Sequence[float] | None = None,
) -> Tensor:
    """The weighted sum (``linear``), or the weighted mean of entries that agree with an elected sign (``ties``).

    Task vectors count as if they had been multiplied by ``factors``, the result by ``scaling``. Any shape.
    """
    if how == "linear":
        known = weights if factors is None else [w * f for w, f in zip(weights, factors, strict=True)]
        return weighted_sum(task_vectors, known, scaling)
    return agreed_mean(task_vectors, weights, factors=factors, scaling=scaling)


def l1_ratios(pieces: Pieces, thin: Thin) -> list[float]:
    """By what each task vector's L1 norm exceeds that of what ``thin`` leaves of it; 0 where nothing is left."""

    def norms(task_vectors: list[Tensor], context: Context) -> list[tuple[float, float]]:
        before = [_l1(vector) for vector in task_vectors]  # thinning changes them
        return list(zip(before, map(_l1, thin(task_vectors, context)), strict=True))

    sums = [[sum(side) for side in zip(*parts, strict=True)] for parts in zip(*pieces.map(norms), strict=True)]
    return [before / after if after else 0.0 for before, after in sums]


def _l1(vector: Tensor) -> float:
    return float(vector.abs().sum(dtype=torch.float64))


def weighted_sum(task_vectors: Sequence[Tensor], weights: Sequence[float], scaling: float = 1.0) -> Tensor:
    """scaling * sum_k weight_k * T_k, added in the order of the tasks. Any shape."""
    total = task_vectors[0] * (scaling * weights[0])
    for task_vector, weight in zip(task_vectors[1:], weights[1:], strict=True):
        total.add_(task_vector, alpha=scaling * weight)
    return total


def weighted_mean(task_vectors: Sequence[Tensor], weights: Sequence[float], scaling: float = 1.0) -> Tensor:
    """scaling * sum_k weight_k * T_k / sum_k weight_k, added in the order of the tasks. Any shape."""
    return weighted_sum(task_vectors, weights, scaling / sum(weights))


def agreed_mean(
    task_vectors: Sequence[Tensor],
    weights: Sequence[float],
    *,
    votes: Sequence[float] | None = None,
    factors: Sequence[float] | None = None,
    scaling: float = 1.0,
) -> Tensor:
    """Per entry, the weighted mean over the tasks that are not zero there and have the elected sign. Any shape.

    The sign of an entry is that of the sum weighted with ``votes``, or else with ``weights``; where the tasks cancel
    exactly, none is elected and the entry is 0: the election and disjoint mean of TIES-Merging (arXiv:2306.01708).
    ``factors`` and ``scaling`` are as in ``combine``. Task vectors are used up.
    """
    sizes = weights if factors is None else [w * f for w, f in zip(weights, factors, strict=True)]
    elected = _in_proportion(task_vectors, sizes if votes is None else votes).sign_()
    for task_vector in task_vectors:
        task_vector.mul_(elected).clamp_min_(0)  # the magnitude, or 0 where the sign is another
    total = _in_proportion(task_vectors, sizes)
    there = _in_proportion([task_vector.sign_() for task_vector in task_vectors], weights)
    # Where no task agrees the total is 0, and any divisor will do; this takes a fraction of what masking takes.
    merged = total.div_(there.clamp_min_(torch.finfo(total.dtype).tiny)).mul_(elected)
    unit = scaling * _unit(sizes) / _unit(weights)
    return merged if unit == 1.0 else merged.mul_(unit)


def _in_proportion(task_vectors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum_k weight_k * T_k in units of the largest weight: where all are equal, equal entries cancel exactly."""
    shares = [weight / _unit(weights) for weight in weights]
    if len(shares) == 1 or shares[0] != 1.0:
        return weighted_sum(task_vectors, shares)
    total = torch.add(task_vectors[0], task_vectors[1], alpha=shares[1])
    for task_vector, share in zip(task_vectors[2:], shares[2:], strict=True):
        total.add_(task_vector, alpha=share)
    return total


def _unit(weights: Sequence[float]) -> float:
    return max(weights) or 1.0
