"""Drops each task vector's largest and smallest entries, and combines what lies between."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from service.contract.methods import Breadcrumbs
from workers.combining import combine
from workers.context import Context
from workers.magnitudes import largest, largest_surveyed, share_of
from workers.pieces import Pieces
from workers.thresholds import Threshold, magnitudes, surveyed, thresholds


def look(pieces: Pieces, weights: Sequence[float], params: Breadcrumbs) -> list[list[Threshold]]:  # noqa: ARG001
    """Where each task vector's mask ends in this parameter, and where the outliers that it leaves out end.

    The mask leaves out the share ``gamma`` of the largest entries and keeps the share ``density`` of those that follow:
    of this tensor, at least one, or of the whole task vector where the context knows its cuts.
    """
    if params.surveys:
        return surveyed(pieces, pieces.context.cuts)
    dropped = share_of(params.gamma, pieces.entries - 1)
    kept = share_of(params.density, pieces.entries, least=1)
    return thresholds(pieces, magnitudes, [[dropped + kept, dropped]] * pieces.tasks)


def merge(task_vectors: Sequence[Tensor], weights: Sequence[float], params: Breadcrumbs, context: Context) -> Tensor:
    """scaling times the combination of masked task vectors: Model Breadcrumbs (arXiv:2312.06795). Any shape."""
    keep = largest_surveyed if params.surveys else largest
    for task_vector, (outer, inner) in zip(task_vectors, context.facts, strict=True):
        outliers = keep(task_vector, inner.within(context.first))
        keep(task_vector, outer.within(context.first), out=task_vector).sub_(outliers)  # an entry less itself is 0
    return combine(task_vectors, weights, params.combine, scaling=params.scaling)
