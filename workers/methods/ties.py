"""Keeps each task vector's largest entries, elects a sign per entry, and averages the entries that agree with it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from service.contract.methods import Ties
from workers.combining import agreed_mean
from workers.context import Context
from workers.magnitudes import largest, largest_surveyed, share_of
from workers.pieces import Pieces
from workers.thresholds import Threshold, magnitudes, surveyed, thresholds


def look(pieces: Pieces, weights: Sequence[float], params: Ties) -> list[list[Threshold]]:  # noqa: ARG001
    """Where the largest entries of each task vector end in this parameter, one threshold a task.

    What is kept are the largest entries of the whole task vector (the context knows where they end), or of this
    tensor: a share of ``density``, at least one.
    """
    if params.surveys:
        return surveyed(pieces, pieces.context.cuts)
    return thresholds(pieces, magnitudes, [[share_of(params.density, pieces.entries, least=1)]] * pieces.tasks)


def merge(task_vectors: Sequence[Tensor], weights: Sequence[float], params: Ties, context: Context) -> Tensor:
    """Trim, elect, average: TIES-Merging (arXiv:2306.01708), with weights. Any shape.

    The sign of an entry is that of the weighted sum of the trimmed task vectors; where they cancel exactly, no sign is
    elected and the entry is 0. The result is ``params.scaling`` times the weighted mean over the tasks whose entry
    survived trimming and has that sign.
    """
    keep = largest_surveyed if params.surveys else largest
    trimmed = [
        keep(task_vector, threshold.within(context.first), out=task_vector)
        for task_vector, (threshold,) in zip(task_vectors, context.facts, strict=True)
    ]
    return agreed_mean(trimmed, weights, scaling=params.scaling)
