"""Merges one tensor: task vectors, trim, combine, add to the base, round once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from service.contract.errors import BadTensor
from service.contract.plan import TensorPlan
from service.contract.recipe import Recipe
from workers.magnitudes import Cut
from workers.methods import Context, merge
from workers.statistics import Statistic
from workers.tensors import DTYPES
from workers.trimming import log_rows, removed_by_name, trim_parameter

CHUNK = 1 << 17  # entries that are merged at once: half a megabyte of each operand, which stay in the cache


@dataclass(frozen=True, eq=False)
class Merged:
    """A merged tensor, the rows it adds to the trim log, and what was removed, by the name it is stored under."""

    tensor: Tensor
    rows: list[dict[str, Any]]
    removed: dict[str, Tensor]


def merge_tensor(
    plan: TensorPlan,
    recipe: Recipe,
    base: Tensor,
    experts: Sequence[Tensor],
    statistics: Sequence[Statistic | None],
    device: str,
    cuts: Sequence[Sequence[Cut]] = (),
) -> Merged:
    """W0 + the method's update of the trimmed task vectors, in float32 (float64 where the base is), rounded once.

    ``experts``, ``statistics`` and ``cuts`` come in the recipe's order of tasks; ``cuts`` are what a survey found for
    this tensor, where the method asks for one.

    Raises:
        BadTensor: a checkpoint holds NaN or infinity here, or the result overflows its type.
    """
    if _is_entrywise(plan, recipe):
        return Merged(merge_entrywise(plan, recipe, base, experts, device), [], {})
    compute = torch.promote_types(base.dtype, torch.float32)
    start = base.to(device, compute)
    vectors = [expert.to(device, compute, copy=True).sub_(start) for expert in experts]
    _refuse_non_finite(plan, recipe, start, vectors)
    trimmed, treatment, reason = trim_parameter(plan, recipe, vectors, statistics)
    method = plan.method or recipe.method
    context = Context(
        parameter=plan.name,
        role=plan.role,
        transposed=plan.transposed,
        base=start,
        tasks=[task.name for task in recipe.tasks],
        statistics=statistics,
        seed=recipe.seed,
        cuts=cuts,
        blocks=plan.blocks,
    )
    update = merge(trimmed.task_vectors, [task.weight for task in recipe.tasks], method, context)
    tensor = (start + update).to(DTYPES[plan.dtype])
    _refuse_overflow(plan, tensor)
    rows = log_rows(plan, recipe, vectors, trimmed, treatment, reason) if recipe.method.trims else []
    return Merged(tensor.cpu(), rows, removed_by_name(plan, recipe, trimmed.removed))


def _is_entrywise(plan: TensorPlan, recipe: Recipe) -> bool:
    """Whether an entry of the result depends on nothing but the same entry of what is merged."""
    return (plan.method or recipe.method).entrywise and not recipe.method.trims


def merge_entrywise(
    plan: TensorPlan, recipe: Recipe, base: Tensor, experts: Sequence[Tensor], device: str, chunk: int = CHUNK
) -> Tensor:
    """As ``merge_tensor``, ``chunk`` entries at a time: what fits into the cache is read from memory once.

    The same arithmetic in the same order, so the same bytes. Raises BadTensor.
    """
    compute = torch.promote_types(base.dtype, torch.float32)
    method = plan.method or recipe.method
    weights = [task.weight for task in recipe.tasks]
    names = [task.name for task in recipe.tasks]
    flat, others = base.reshape(-1), [expert.reshape(-1) for expert in experts]
    merged = torch.empty(flat.shape, dtype=DTYPES[plan.dtype])
    step = chunk if device == "cpu" else max(1, flat.numel())  # a GPU is slowed down by small pieces
    pieces = range(0, flat.numel(), step)

    def merge_pieces(starts: range) -> None:
        room = torch.empty(len(others) + 1, min(step, flat.numel()), dtype=compute, device=device)
        for first in starts:
            part = slice(first, first + step)
            start, *vectors = _task_vectors(room, flat[part], [other[part] for other in others])
            context = Context(
                plan.name, plan.role, plan.transposed, start, names, [None] * len(names), recipe.seed, first=first
            )
            total = merge(vectors, weights, method, context).add_(start)
            merged[part] = total
            if not is_within(total, merged.dtype):
                _refuse_non_finite(plan, recipe, start, vectors)
                _refuse_overflow(plan, merged[part])

    _share_out(pieces, merge_pieces)
    return merged.view(base.shape)


def _share_out(pieces: range, work: Callable[[range], None]) -> None:
    """Do all pieces in as many threads as torch may use, each of which computes alone."""
    threads = min(torch.get_num_threads(), len(pieces))
    with _one_thread():
        if threads <= 1:
            work(pieces)
            return
        with ThreadPoolExecutor(threads, thread_name_prefix="merge") as pool:
            for done in [pool.submit(work, pieces[index::threads]) for index in range(threads)]:
                done.result()


def _task_vectors(room: Tensor, base: Tensor, experts: Sequence[Tensor]) -> list[Tensor]:
    """The base and its differences to the experts ``[n]``, in ``room [1 + experts, at least n]``."""
    start, *vectors = [row[: base.numel()].copy_(source) for row, source in zip(room, (base, *experts), strict=True)]
    return [start, *(vector.sub_(start) for vector in vectors)]


@contextmanager
def _one_thread() -> Iterator[None]:
    """Small operations gain nothing from more threads, and on a busy host wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _refuse_overflow(plan: TensorPlan, tensor: Tensor) -> None:
    if not is_finite(tensor):
        raise BadTensor(
            f"the merged {plan.name!r} does not fit into {plan.dtype}: it overflows. Lower method.scaling, or choose "
            "a wider output.dtype",
            tensor=plan.name,
        )


def _refuse_non_finite(plan: TensorPlan, recipe: Recipe, start: Tensor, vectors: Sequence[Tensor]) -> None:
    for task, vector in zip(recipe.tasks, vectors, strict=True):
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


def is_finite(tensor: Tensor) -> bool:
    """Whether there is neither NaN nor infinity. Either would reach the sum, which takes one pass and no memory."""
    total = tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32))
    return bool(total.isfinite()) or bool(tensor.isfinite().all())


def is_within(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether all of a tensor, not empty, is surely finite in another type; False asks for a closer look."""
    least, most = tensor.aminmax()
    return bool(torch.maximum(-least, most) < torch.finfo(dtype).max)
