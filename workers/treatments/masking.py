"""Zeroing chosen entries of task vectors: what the two masks have in common."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from service.contract.errors import BadTensor
from workers.treatments.outcome import Effect, Removed, energy, large_share, norm_factor, share


def squares(task_vectors: Sequence[Tensor]) -> Tensor:
    """T_i^2 of every task, ``[K, d]``, in float64.

    Raises:
        BadTensor: an entry is NaN or infinite.
    """
    squared = torch.stack([t.flatten().double().square() for t in task_vectors])
    if not bool(squared.isfinite().all()):
        raise BadTensor("a task vector holds NaN or infinity")
    return squared


def of_others(per_task: Tensor, k: int) -> Tensor:
    """The sum over every task but ``k`` of ``per_task [K, d]``, added in the order of the tasks."""
    total = torch.zeros_like(per_task[k])
    for i, row in enumerate(per_task):
        if i != k:
            total += row
    return total


def highest(scores: Tensor, rank: int, *, above: Tensor | None) -> Removed:
    """The ``rank`` highest of ``scores [d]``, ties to the lower index; only those over ``above``, where given."""
    ordered, indices = scores.sort(descending=True, stable=True)
    ordered, indices = ordered[:rank], indices[:rank]
    if above is not None:
        chosen = ordered > above[indices]
        ordered, indices = ordered[chosen], indices[chosen]
    return Removed(scores=ordered.clone(), mask=indices.clone())


def masked(task_vectors: Sequence[Tensor], removed: Sequence[Removed], *, restore_norm: bool) -> list[Tensor]:
    """Each task vector without the entries that were removed on behalf of every other task."""
    return [_masked(before, removed, i, restore_norm) for i, before in enumerate(task_vectors)]


def effect(before: Tensor, after: Tensor) -> Effect:
    """What masking did, as far as one can tell without features."""
    entries = before.flatten().double()
    gone = entries - after.flatten().double()
    whole = energy(entries)
    return Effect(energy=whole, energy_removed=share(energy(gone), whole), large_share=large_share(entries, gone))


def _masked(before: Tensor, removed: Sequence[Removed], i: int, restore_norm: bool) -> Tensor:
    after = before.flatten().clone()
    for k, each in enumerate(removed):
        if k != i:
            after[each.entries] = 0
    return (after * norm_factor(before, after, restore=restore_norm)).view(before.shape)
