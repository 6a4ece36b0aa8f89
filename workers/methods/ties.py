"""Keeps each task vector's largest entries, elects a sign per entry, and averages the entries that agree with it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from service.contract.methods import Ties
from workers.combining import agreed_mean
from workers.context import Context
from workers.magnitudes import Cut, above, cut_at, share_of


def merge(task_vectors: Sequence[Tensor], weights: Sequence[float], params: Ties, context: Context) -> Tensor:
    """Trim, elect, average: TIES-Merging (arXiv:2306.01708), with weights. Any shape.

    What is kept are the largest entries of the whole task vector (the context knows where they end), or of this
    tensor. The sign of an entry is that of the weighted sum of the trimmed task vectors; where they cancel exactly,
    no sign is elected and the entry is 0. The result is ``params.scaling`` times the weighted mean over the tasks whose
    entry survived trimming and has that sign.
    """
    trimmed = [
        _largest(task_vector, params.density, context.cuts[k][0] if params.surveys else None)
        for k, task_vector in enumerate(task_vectors)
    ]
    return agreed_mean(trimmed, weights).mul_(params.scaling)


def _largest(task_vector: Tensor, density: float, cut: Cut | None) -> Tensor:
    """``task_vector`` without what lies below the ``cut``, or else outside the largest ``density``, at least one."""
    sizes = task_vector.abs().flatten()
    if cut is None:
        count = share_of(density, sizes.numel(), least=1)
        if count >= sizes.numel():
            return task_vector
        cut = cut_at(sizes, count)
    else:
        sizes = sizes.float()  # as a survey compares them
    return task_vector * above(sizes, cut).view_as(task_vector)
