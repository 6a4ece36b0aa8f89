"""Drops each task vector's largest and smallest entries, and combines what lies between."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from service.contract.methods import Breadcrumbs
from workers.combining import combine
from workers.context import Context
from workers.magnitudes import Cut, above, cut_at, share_of


def merge(task_vectors: Sequence[Tensor], weights: Sequence[float], params: Breadcrumbs, context: Context) -> Tensor:
    """scaling times the combination of masked task vectors: Model Breadcrumbs (arXiv:2312.06795). Any shape.

    The mask leaves out the share ``gamma`` of the largest entries and keeps the share ``density`` of those that follow:
    of this tensor, at least one, or of the whole task vector where the context knows its cuts.
    """
    crumbs = [
        task_vector * _between(task_vector, params, context.cuts[k] if params.surveys else None)
        for k, task_vector in enumerate(task_vectors)
    ]
    return combine(crumbs, weights, params.combine).mul_(params.scaling)


def _between(task_vector: Tensor, params: Breadcrumbs, cuts: Sequence[Cut] | None) -> Tensor:
    sizes = task_vector.abs().flatten()
    if cuts is None:
        dropped = share_of(params.gamma, sizes.numel() - 1)
        outer, inner = cut_at(sizes, dropped + share_of(params.density, sizes.numel(), least=1)), cut_at(sizes, dropped)
    else:
        sizes, (outer, inner) = sizes.float(), cuts  # float32 is what a survey compares
    return (above(sizes, outer) & ~above(sizes, inner)).view_as(task_vector)
