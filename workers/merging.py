"""Merges one tensor: task vectors, trim, combine, add to the base, round once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from service.contract.errors import BadTensor
from service.contract.plan import TensorPlan
from service.contract.recipe import Recipe, Task
from workers.angles import gram
from workers.conflict import Conflict, Matrix
from workers.finite import is_finite
from workers.low_rank import LowRankVector, summed
from workers.magnitudes import Cut
from workers.methods import Context, heard_of, merge, merge_pieces, pieces_of
from workers.pieces import ENTRIES
from workers.statistics import Statistic
from workers.tensors import DTYPES
from workers.treatments import Effect
from workers.treatments.concentration import Concentration
from workers.trimming import concentrate, log_rows, removed_by_name, trim_parameter
from workers.unread import Unread


@dataclass(frozen=True, eq=False)
class Merged:
    """A merged tensor, the rows it adds to the trim log, and what was removed, by the name it is stored under.

    ``conflict`` is there where task vectors were trimmed.
    """

    tensor: Tensor
    rows: list[dict[str, Any]]
    removed: dict[str, Tensor]
    conflict: Conflict | None = None


@dataclass(frozen=True, eq=False)
class Analyzed:
    """What trimming would do to a tensor's task vectors, as rows of the trim log, and what those do to each other."""

    rows: list[dict[str, Any]]
    conflict: Conflict


def merge_tensor(
    plan: TensorPlan,
    recipe: Recipe,
    base: Tensor,
    experts: Sequence[Tensor | LowRankVector],
    statistics: Sequence[Statistic | None],
    device: str,
    cuts: Sequence[Sequence[Cut]] = (),
    first: int = 0,
) -> Merged:
    """W0 + the method's update of the trimmed task vectors, in float32 (float64 where the base is), rounded once.

    ``experts``, ``statistics`` and ``cuts`` come in the recipe's order of tasks; ``cuts`` are what a survey found for
    this tensor, where the method asks for one. The task vector that an adapter holds may stand for an expert. Where the
    method ``is_entrywise``, ``base`` and ``experts`` may hold some of the entries only, ``[n]``, with ``first`` entries
    before them.

    Raises:
        BadTensor: a checkpoint holds NaN or infinity here, or the result overflows its type.
    """
    method = plan.method or recipe.method
    context = _context(plan, recipe, base, statistics, cuts, first)
    whole = [expert for expert in experts if isinstance(expert, Tensor)]
    if len(whole) < len(experts):
        return _merge_adapters(plan, recipe, context, experts, device)
    if recipe.method.trims or method.pieces == "none":
        return _merge_whole(plan, recipe, context, _differences(context.base, whole, device), device)
    return Merged(merge_by_pieces(plan, recipe, context, whole, device), [], {})


def merge_unread(
    plan: TensorPlan, recipe: Recipe, unread: Sequence[Unread], cuts: Sequence[Sequence[Cut]] = (), first: int = 0
) -> Merged:
    """As ``merge_tensor`` on the CPU where the method ``is_entrywise``: the base's entries and every expert's, unread.

    Raises:
        BadTensor: as there; and what their files raise.
    """
    base, *experts = unread
    nothing = torch.zeros((), dtype=base.dtype).expand(base.shape)
    context = _context(plan, recipe, nothing, [None] * len(experts), cuts, first)
    return Merged(merge_by_pieces(plan, recipe, context, experts, "cpu", base=base), [], {})


def is_entrywise(plan: TensorPlan, recipe: Recipe) -> bool:
    """Whether an entry of the result depends on nothing but the same entry of what is merged."""
    return (plan.method or recipe.method).entrywise and not recipe.method.trims


def _context(
    plan: TensorPlan,
    recipe: Recipe,
    base: Tensor,
    statistics: Sequence[Statistic | None],
    cuts: Sequence[Sequence[Cut]],
    first: int,
) -> Context:
    return Context(
        parameter=plan.name,
        role=plan.role,
        transposed=plan.transposed,
        base=base,
        tasks=[task.name for task in recipe.tasks],
        statistics=statistics,
        seed=recipe.seed,
        cuts=cuts,
        blocks=plan.blocks,
        first=first,
    )


def _merge_adapters(
    plan: TensorPlan, recipe: Recipe, context: Context, experts: Sequence[Tensor | LowRankVector], device: str
) -> Merged:
    """Where adapters add to the base: a weighted sum takes one product for all, and any other method their products."""
    method = plan.method or recipe.method
    weights = method.sum_weights([task.weight for task in recipe.tasks])
    if weights is not None and not recipe.method.trims:
        return Merged(_sum_adapters(plan, recipe, context.base, experts, weights, device), [], {})
    vectors = _differences(context.base, experts, device)
    if recipe.method.trims or method.pieces == "none":
        return _merge_whole(plan, recipe, context, vectors, device)
    return Merged(merge_by_pieces(plan, recipe, context, vectors, device, are_experts=False), [], {})


def _sum_adapters(
    plan: TensorPlan,
    recipe: Recipe,
    base: Tensor,
    experts: Sequence[Tensor | LowRankVector],
    weights: Sequence[float],
    device: str,
) -> Tensor:
    """W0 + sum_k weight_k * T_k, with one product of all adapters' factors. Raises BadTensor."""
    start = base.to(device, torch.promote_types(base.dtype, torch.float32))
    told = [(expert, weight) for expert, weight in zip(experts, weights, strict=True) if weight]
    thin = [(expert, weight) for expert, weight in told if isinstance(expert, LowRankVector)]
    total = start.clone()
    if thin:
        total += summed([vector for vector, _ in thin], [weight for _, weight in thin], start.dtype, device)
    for expert, weight in told:
        if isinstance(expert, Tensor):
            total.add_(expert.to(device, start.dtype) - start, alpha=weight)
    tensor = total.to(DTYPES[plan.dtype])
    if not is_finite(tensor):
        _refuse_non_finite(plan, recipe, recipe.tasks, start, _differences(base, experts, device))
        _refuse_overflow(plan, tensor)
    return tensor.cpu()


def _differences(base: Tensor, experts: Sequence[Tensor | LowRankVector], device: str) -> list[Tensor]:
    """The task vectors, each in memory of its own, in float32 (float64 where the base is)."""
    start = base.to(device, torch.promote_types(base.dtype, torch.float32))
    return [
        expert.dense(start.dtype, device)
        if isinstance(expert, LowRankVector)
        else expert.to(device, start.dtype, copy=True).sub_(start)
        for expert in experts
    ]


def _merge_whole(plan: TensorPlan, recipe: Recipe, context: Context, vectors: list[Tensor], device: str) -> Merged:
    """With whole task vectors, for methods that look at matrices and for trimming, which overwrites them."""
    method = plan.method or recipe.method
    start = context.base.to(device, torch.promote_types(context.base.dtype, torch.float32))
    _refuse_non_finite(plan, recipe, recipe.tasks, start, vectors)
    inner = gram(vectors).numpy() if recipe.method.trims else None
    trimmed, treatment, reason = trim_parameter(plan, recipe, vectors, context.statistics)
    rows = log_rows(plan, recipe, vectors, trimmed, treatment, reason) if recipe.method.trims else []
    removed = removed_by_name(plan, recipe, trimmed.removed)
    conflict = None if inner is None else _conflict(inner, trimmed.effects)
    context = replace(context, base=start)
    if method.combining.pieces != "none":
        tensor = merge_by_pieces(plan, recipe, context, trimmed.task_vectors, device, are_experts=False)
        return Merged(tensor, rows, removed, conflict)
    update = merge(trimmed.task_vectors, [task.weight for task in recipe.tasks], method, context)
    tensor = (start + update).to(DTYPES[plan.dtype])
    _refuse_overflow(plan, tensor)
    return Merged(tensor.cpu(), rows, removed, conflict)


def analyze_tensor(
    plan: TensorPlan,
    recipe: Recipe,
    base: Tensor,
    experts: Sequence[Tensor | LowRankVector],
    statistics: Sequence[Statistic | None],
    device: str,
) -> Analyzed:
    """What ``merge_tensor`` would find out while it trims, and how much the largest entries have to do with it.

    Raises:
        BadTensor: a checkpoint holds NaN or infinity here.
    """
    vectors = _differences(base, experts, device)
    _refuse_non_finite(plan, recipe, recipe.tasks, base.to(device), vectors)
    inner = gram(vectors).numpy()
    largest = concentrate(plan, recipe, vectors, statistics)
    trimmed, treatment, reason = trim_parameter(plan, recipe, vectors, statistics)
    rows = log_rows(plan, recipe, vectors, trimmed, treatment, reason)
    return Analyzed(rows, _conflict(inner, trimmed.effects, largest))


def _conflict(inner: Matrix, effects: Sequence[Effect], largest: Sequence[Concentration] = ()) -> Conflict:
    return Conflict.of(
        inner,
        before=[effect.responses for effect in effects if effect.responses],
        after=[effect.responses_left for effect in effects if effect.responses],
        large=[found.responses for found in largest],
        large_energy=[found.energy for found in largest],
    )


def merge_by_pieces(
    plan: TensorPlan,
    recipe: Recipe,
    context: Context,
    sources: Sequence[Tensor | Unread],
    device: str,
    *,
    base: Unread | None = None,
    are_experts: bool = True,
    entries: int = ENTRIES,
) -> Tensor:
    """As ``merge_tensor``, about ``entries`` at a time: what fits into the cache is read from memory once.

    ``sources`` are the experts, or else task vectors; ``base`` is given where it is unread. Raises BadTensor.
    """
    method = (plan.method or recipe.method).combining
    heard = heard_of([task.weight for task in recipe.tasks])
    tasks = [recipe.tasks[k] for k in heard]
    merged = torch.empty(context.base.shape, dtype=DTYPES[plan.dtype])
    if not heard or not merged.numel():
        return merged.copy_(context.base)
    refuse = partial(_refuse_non_finite, plan, recipe, tasks)
    options = {"are_experts": are_experts, "base": base, "entries": entries, "device": device}
    check = refuse if method.drops else None
    doubtful = []
    with pieces_of(method, context.of(heard), [sources[k] for k in heard], check=check, **options) as pieces:
        places = dict(zip(pieces.firsts, pieces.cut_up(merged), strict=True))

        def round_once(update: Tensor, piece: Context) -> None:
            total = update.add_(piece.base)
            places[piece.first].copy_(total)
            if not is_within(total, merged.dtype):
                doubtful.append(piece.first)

        merge_pieces(pieces, [task.weight for task in tasks], method, round_once)
        if doubtful:
            pieces.map(lambda vectors, piece: refuse(piece.base, vectors))
            _refuse_overflow(plan, merged)
    return merged


def _refuse_overflow(plan: TensorPlan, tensor: Tensor) -> None:
    if not is_finite(tensor):
        raise BadTensor(
            f"the merged {plan.name!r} does not fit into {plan.dtype}: it overflows. Lower method.scaling, or choose "
            "a wider output.dtype",
            tensor=plan.name,
        )


def _refuse_non_finite(
    plan: TensorPlan, recipe: Recipe, tasks: Sequence[Task], start: Tensor, vectors: Sequence[Tensor]
) -> None:
    together = sum(float(vector.sum()) for vector in vectors)
    if math.isfinite(together):
        return
    for task, vector in zip(tasks, vectors, strict=True):
        if is_finite(vector):
            continue
        if not is_finite(start):
            raise BadTensor(
                f"the base holds NaN or infinity in {plan.name!r} ({recipe.base}); merge finite checkpoints",
                tensor=plan.name,
            )
        raise BadTensor(
            f"task {task.name!r} holds NaN or infinity in {plan.name!r} ({task.checkpoint}); merge finite checkpoints",
            tensor=plan.name,
        )


def is_within(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether all of a tensor, not empty, is surely finite in another type; False asks for a closer look."""
    least, most = tensor.aminmax()
    return bool(torch.maximum(-least, most) < torch.finfo(dtype).max)
