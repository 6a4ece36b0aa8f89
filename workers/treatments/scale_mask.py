"""Zeroes the entries of a task vector that disturb other tasks most: for a normalization's scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from service.contract.errors import BadInput
from service.contract.treatments import ScaleMask
from workers.statistics import Statistic
from workers.treatments.masking import effect, highest, masked, of_others, squares
from workers.treatments.outcome import Effect, Removed, Trimmed, check_alike, known, share


def trim(task_vectors: Sequence[Tensor], statistics: Sequence[Statistic | None], params: ScaleMask) -> Trimmed:
    """Zero in each task vector ``[d]``, on behalf of every other task k, the ``params.rank`` entries of highest score.

    The scores are g_k = sum_{i != k} T_i^2 * (q_k - balance * q_i), with q the second moment of the normalized inputs
    per dimension, all from the untrimmed task vectors; only positive ones count, unless ``params`` says otherwise, and
    ties go to the lower index (CAT Merging, arXiv:2505.06977, for normalization scales). Any shape, read as ``[d]``.

    Raises:
        BadInput: task vectors differ in shape or type; a statistic is missing, empty, no diagonal, or of another width.
        BadTensor: a task vector or a statistic holds NaN or infinity.
    """
    check_alike(task_vectors)
    moments = _moments(statistics, params, like=task_vectors[0], tasks=len(task_vectors))
    energies = squares(task_vectors)
    removed = [_disturbed(energies, moments, k, params) for k in range(len(task_vectors))]
    trimmed = apply_removed(task_vectors, removed, params)
    effects = [_effect(task_vectors[i], trimmed[i], moments, i) for i in range(len(task_vectors))]
    return Trimmed(trimmed, removed, effects)


def apply_removed(task_vectors: Sequence[Tensor], removed: Sequence[Removed], params: ScaleMask) -> list[Tensor]:
    """The trimmed task vectors, from the untrimmed ones and the recorded masks alone: no statistics needed."""
    return masked(task_vectors, removed, restore_norm=params.restore_norm)


def _moments(statistics: Sequence[Statistic | None], params: ScaleMask, *, like: Tensor, tasks: int) -> Tensor:
    usable = known(statistics, tasks=tasks, width=like.numel())
    if any(s.diagonal is None for s in usable):
        raise BadInput("a normalization scale needs mean squares, and a statistic is a factor")
    divisors = [s.rows if params.moments == "mean" else 1 for s in usable]
    return torch.stack([s.held.to(like.device, torch.float64) / n for s, n in zip(usable, divisors, strict=True)])


def _disturbed(energies: Tensor, moments: Tensor, k: int, params: ScaleMask) -> Removed:
    disturbs = of_others(energies * moments[k], k)
    loses = of_others(energies * moments, k) * params.balance
    # A score counts as positive only where it stands out from the rounding of the two terms that make it.
    noise = (disturbs + loses) * (4 * len(energies) * torch.finfo(torch.float64).eps)
    rank = params.rank if len(energies) > 1 else 0
    return highest(disturbs - loses, rank, above=noise if params.positive_only else None)


def _effect(before: Tensor, after: Tensor, moments: Tensor, i: int) -> Effect:
    conflict = of_others(moments, i)
    flat_before, flat_after = before.flatten().double(), after.flatten().double()
    lost = float(((flat_before - flat_after).square() * moments[i]).sum())
    return replace(
        effect(before, after),
        conflict_before=float((flat_before.square() * conflict).sum()),
        conflict_after=float((flat_after.square() * conflict).sum()),
        own_response_lost=share(lost, float((flat_before.square() * moments[i]).sum())),
        responses=tuple((moments @ flat_before.square()).tolist()),
        responses_left=tuple((moments @ flat_after.square()).tolist()),
    )
