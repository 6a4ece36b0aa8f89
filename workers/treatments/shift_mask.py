"""Zeroes the entries where the other tasks' vectors moved most: for a bias, which sees no inputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from service.contract.treatments import ShiftMask
from workers.statistics import Statistic
from workers.treatments.masking import effect, highest, masked, of_others, squares
from workers.treatments.outcome import Removed, Trimmed, check_alike


def trim(
    task_vectors: Sequence[Tensor],
    statistics: Sequence[Statistic | None],  # noqa: ARG001 (every treatment is called alike)
    params: ShiftMask,
) -> Trimmed:
    """Zero in each task vector ``[d]``, on behalf of every other task k, the ``params.rank`` entries of highest score.

    The scores are g_k = sum_{i != k} T_i^2, from the untrimmed task vectors; ties go to the lower index, and an entry
    that no other task moved is not counted as removed (CAT Merging, arXiv:2505.06977, for shifts). Any shape, read as
    ``[d]``.

    Raises:
        BadInput: task vectors differ in shape or type.
        BadTensor: a task vector holds NaN or infinity.
    """
    check_alike(task_vectors)
    energies = squares(task_vectors)
    removed = [_disturbed(energies, k, params) for k in range(len(task_vectors))]
    trimmed = apply_removed(task_vectors, removed, params)
    return Trimmed(trimmed, removed, [effect(b, a) for b, a in zip(task_vectors, trimmed, strict=True)])


def apply_removed(task_vectors: Sequence[Tensor], removed: Sequence[Removed], params: ShiftMask) -> list[Tensor]:
    """The trimmed task vectors, from the untrimmed ones and the recorded masks alone."""
    return masked(task_vectors, removed, restore_norm=params.restore_norm)


def _disturbed(energies: Tensor, k: int, params: ShiftMask) -> Removed:
    scores = of_others(energies, k)
    return highest(scores, params.rank, above=torch.zeros_like(scores))
