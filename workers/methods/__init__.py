"""How task vectors become one update: one file per method, one row per file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from service.contract.methods import Method
from workers.context import Context
from workers.methods import (
    average,
    breadcrumbs,
    consensus,
    dare,
    della,
    iso_c,
    iso_cts,
    karcher,
    lot,
    model_stock,
    pcb,
    regmean,
    sce,
    shrinkage,
    slerp,
    task_arithmetic,
    ties,
    tsv_m,
    wudi,
)
from workers.pieces import Pieces
from workers.unread import Unread

__all__ = ["LOOKS", "METHODS", "Context", "heard_of", "merge", "merge_pieces", "pieces_of"]

# By the name that a method's row in the contract says it ``combines`` with.
METHODS: dict[str, Callable[[Sequence[Tensor], Sequence[float], Any, Context], Tensor]] = {
    "task_arithmetic": task_arithmetic.merge,
    "average": average.merge,
    "ties": ties.merge,
    "dare": dare.merge,
    "della": della.merge,
    "breadcrumbs": breadcrumbs.merge,
    "slerp": slerp.merge,
    "karcher": karcher.merge,
    "model_stock": model_stock.merge,
    "sce": sce.merge,
    "consensus": consensus.merge,
    "pcb": pcb.merge,
    "tsv_m": tsv_m.merge,
    "iso_c": iso_c.merge,
    "iso_cts": iso_cts.merge,
    "lot": lot.merge,
    "regmean": regmean.merge,
    "wudi": wudi.merge,
    "shrinkage": shrinkage.merge,
}

# What a method must know of the whole parameter before it merges pieces of it, by the same name: ``context.facts``.
LOOKS: dict[str, Callable[[Pieces, Sequence[float], Any], Any]] = {
    "ties": ties.look,
    "dare": dare.look,
    "della": della.look,
    "breadcrumbs": breadcrumbs.look,
    "slerp": slerp.look,
    "karcher": karcher.look,
    "model_stock": model_stock.look,
    "sce": sce.look,
    "pcb": pcb.look,
}


def merge(task_vectors: Sequence[Tensor], weights: Sequence[float], params: Method, context: Context) -> Tensor:
    """One parameter's update, to add to the base, scaling included; task vectors of any one shape, a weight each.

    A task of weight zero has no say: it is left out before the method looks at how many there are.
    """
    heard, method = heard_of(weights), params.combining
    if task_vectors[0].numel() == 0 or not heard:
        return torch.zeros_like(task_vectors[0])
    chosen = [task_vectors[k] for k in heard]
    said, known = [weights[k] for k in heard], context.of(heard)
    if method.pieces == "none":
        return _merge(chosen, said, method, known)
    update = torch.empty_like(chosen[0], memory_format=torch.contiguous_format)
    with pieces_of(method, known, chosen, are_experts=False, device=update.device) as pieces:
        places = dict(zip(pieces.firsts, pieces.cut_up(update), strict=True))
        merge_pieces(pieces, said, method, lambda piece, within: places[within.first].copy_(piece))
    return update


def heard_of(weights: Sequence[float]) -> list[int]:
    """The tasks that have a say."""
    return [k for k, weight in enumerate(weights) if weight]


def pieces_of(method: Method, context: Context, sources: Sequence[Tensor | Unread], **options: Any) -> Pieces:
    """A parameter in the pieces that ``method`` merges, one by one. ``options`` are those of ``Pieces``."""
    return Pieces(context, sources, by_rows=method.pieces == "rows", **options)


def merge_pieces(
    pieces: Pieces, weights: Sequence[float], method: Method, take: Callable[[Tensor, Context], object]
) -> None:
    """Merge piece by piece; ``take`` gets each piece's update, which it may change, and its context."""
    factors = method.sum_weights(weights)
    if factors is not None:
        pieces.add_up(factors, take)
        return
    function = METHODS[method.combines]
    facts = LOOKS[method.combines](pieces, weights, method) if method.looks and not method.entrywise else None

    def work(task_vectors: list[Tensor], context: Context) -> None:
        take(function(task_vectors, weights, method, context), context)

    pieces.map(work, facts)


def _merge(task_vectors: Sequence[Tensor], weights: Sequence[float], params: Method, context: Context) -> Tensor:
    function = METHODS[params.combines]
    stacks = context.stacks(task_vectors) if params.by_matrix else None
    if stacks is None:
        return function(task_vectors, weights, params, context)
    blocks = [
        function([stack[index] for stack in stacks], weights, params, context.block(index))
        for index in range(context.blocks)
    ]
    return context.unstacked(torch.stack(blocks))
