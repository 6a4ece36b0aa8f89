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
    slerp,
    task_arithmetic,
    ties,
    tsv_m,
    wudi,
)

__all__ = ["METHODS", "Context", "merge"]

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
}


def merge(task_vectors: Sequence[Tensor], weights: Sequence[float], params: Method, context: Context) -> Tensor:
    """One parameter's update, to add to the base, scaling included; task vectors of any one shape, a weight each.

    A task of weight zero has no say: it is left out before the method looks at how many there are.
    """
    heard = [k for k, weight in enumerate(weights) if weight]
    if task_vectors[0].numel() == 0 or not heard:
        return torch.zeros_like(task_vectors[0])
    chosen = [task_vectors[k] for k in heard]
    return _merge(chosen, [weights[k] for k in heard], params.combining, context.of(heard))


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
