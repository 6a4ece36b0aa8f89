"""Walks through one parameter's task vectors in pieces that fit into the cache, on as many threads as torch may use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

from workers.context import Context
from workers.crew import Crew, Room
from workers.threads import one_thread
from workers.unread import Unread

ENTRIES = 1 << 19  # about a megabyte of each operand: calls cost little beside the work, and all stays cached
LOOKED_AT = 1 << 18  # where each entry is looked at before it is merged, which takes more memory and more passes
SUM_ENTRIES = 1 << 16  # of a sum, whose operands then stay where a core is fastest
SAMPLE = 1 << 17  # entries at most that are looked at to guess where to look
SAMPLED = 32  # one entry of so many
RUN = 64  # of them lie side by side, so that few lines of memory are read
STRIDED_ROWS = 16  # rows that don't lie in a row are read together, since memory gives them together

R = TypeVar("R")
Work = Callable[[list[Tensor], Context], R]
Check = Callable[[Tensor, Sequence[Tensor]], None]


class Pieces:
    """The pieces of one parameter, in order: entries in a row, ``[n]``, or whole rows of its matrices, ``[m, n]``.

    ``work`` gets the task vectors of a piece in float32 (float64 where the base is), and the parameter's ``context``
    with the base's piece as its ``base`` and the number of entries before it as its ``first``. Both lie in memory that
    the next piece will use; the task vectors are the work's own, to be changed as it likes. Pieces are the same
    whatever the number of threads; on a GPU, which small pieces slow down, there is one.
    """

    def __init__(
        self,
        context: Context,
        sources: Sequence[Tensor | Unread],
        *,
        are_experts: bool,
        base: Unread | None = None,
        by_rows: bool = False,
        entries: int = ENTRIES,
        device: str | torch.device = "cpu",
        check: Check | None = None,
        crew: Crew | None = None,
    ) -> None:
        """``context.base`` and ``sources`` hold the whole parameter; the base is taken off where ``are_experts``.

        Where all of them are unread, so is the ``base``, and of ``context.base`` nothing but shape and type is used.
        Such are read when it is their turn, and can't be sampled or cut into rows; what their files raise comes out.
        ``check`` sees every piece once, the first time that it is read. ``crew`` does the work; without one there is
        a crew for this parameter.
        """
        self.context, self.entries = context, context.base.numel()
        self._device, self._are_experts, self._check = torch.device(device), are_experts, check
        self._compute = torch.promote_types(context.base.dtype, torch.float32)
        self._size = entries if self._device.type == "cpu" else max(1, self.entries)
        self._by_rows = by_rows
        self._whole = [context.base if base is None else base, *sources]
        self._views = list(zip(*(self._cut_up(whole) for whole in self._whole), strict=True))
        self.firsts = [context.first]
        for piece, *_ in self._views[:-1]:
            self.firsts.append(self.firsts[-1] + piece.numel())
        self._crew, self._is_own_crew = crew or Crew(torch.get_num_threads()), crew is None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_own_crew:
            self._crew.__exit__(kind, error, trace)

    def __len__(self) -> int:
        return len(self._views)

    @property
    def tasks(self) -> int:
        """How many task vectors there are."""
        return len(self._whole) - 1

    @property
    def dtype(self) -> torch.dtype:
        """The type that is computed in."""
        return self._compute

    def cut_up(self, tensor: Tensor) -> list[Tensor]:
        """The pieces of a tensor of the parameter's shape; views, if it is contiguous."""
        if self._by_rows:
            return _rows(tensor, self.context, self._size)
        flat = tensor.reshape(-1)
        return [flat] if self.entries <= self._size else list(torch.split(flat, self._size))

    def _cut_up(self, whole: Tensor | Unread) -> Sequence[Tensor | Unread]:
        return whole.split(self._size) if isinstance(whole, Unread) else self.cut_up(whole)

    def map(self, work: Work[R], facts: Any = None) -> list[R]:
        """What ``work`` returns for each of the pieces, in their order, whoever did it and when.

        ``facts`` go into every piece's context.
        """
        known = replace(self.context, facts=facts)
        found: list[R | None] = [None] * len(self)

        def one(index: int, room: Room) -> None:
            start, vectors = self._load(self._views[index], room)
            if self._check is not None:
                self._check(start, vectors)
            found[index] = work(vectors, replace(known, base=start, first=self.firsts[index]))

        self._share_out(one, threads=len(self))
        self._check = None
        return found  # type: ignore[return-value] # every place has been filled, or an error been raised

    def add_up(self, factors: Sequence[float], take: Callable[[Tensor, Context], object]) -> None:
        """Give ``take`` the sum of factor_k * T_k of each piece, in the order of the tasks, and the piece's context.

        A task vector is added as soon as it is there, so that all that is worked on stays cached however many there
        are. ``take`` may change the sum. The caller does it alone: torch adds so fast that a second thread would wait
        for the interpreter most of the time, and the first one for it.
        """

        def one(index: int, room: Room) -> None:
            base, *others = self._views[index]
            kept, row, total = room.rows(3, base.numel(), self._compute, self._device)
            start = self._start(base, room, kept)
            total.zero_()
            for other, factor in zip(others, factors, strict=True):
                total.add_(self._vector(room.read(other), start, row), alpha=factor)
            take(total, replace(self.context, base=start, first=self.firsts[index]))

        self._share_out(one, threads=1)

    def sample(self, work: Work[R]) -> R:
        """What ``work`` returns for a piece ``[n]`` that is made of short runs from everywhere."""
        runs = max(1, min(SAMPLE, self.entries // SAMPLED) // RUN)
        step = max(RUN, self.entries // runs) | 1  # odd, so that it does not keep to the same columns
        run = min(RUN, self.entries)
        flat = [tensor.reshape(-1) for tensor in self._whole if isinstance(tensor, Tensor)]
        views = [
            each.as_strided((max(1, self.entries // step), run), (step, 1), each.storage_offset()) for each in flat
        ]
        with one_thread():
            start, vectors = self._load([view.flatten() for view in views], self._crew.room)
            return work(vectors, replace(self.context, base=start))

    def _share_out(self, one: Callable[[int, Room], None], threads: int) -> None:
        queue = iter(range(len(self)))

        def work_off(room: Room) -> None:
            for index in queue:
                one(index, room)

        self._crew.share_out(work_off, threads)

    def _load(self, views: Sequence[Tensor | Unread], room: Room) -> tuple[Tensor, list[Tensor]]:
        (base, *others), shape = views, views[0].shape
        kept, *rows = (row.view(shape) for row in room.rows(len(views), base.numel(), self._compute, self._device))
        start = self._start(base, room, kept)
        # One after the other: what has been read is still in the cache, and its memory is there for the next.
        return start, [self._vector(room.read(other), start, row) for other, row in zip(others, rows, strict=True)]

    def _start(self, base: Tensor | Unread, room: Room, row: Tensor) -> Tensor:
        return self._computed(base, row) if isinstance(base, Tensor) else row.copy_(room.read(base))

    def _vector(self, view: Tensor, start: Tensor, row: Tensor) -> Tensor:
        """A piece of a task vector in the memory of ``row``, where methods may change it."""
        if not self._are_experts:
            return row.copy_(view)
        if view.dtype is self._compute and view.device == self._device:
            return torch.sub(view, start, out=row)
        return row.copy_(view).sub_(start)  # faster than a subtraction of two types

    def _computed(self, view: Tensor, row: Tensor) -> Tensor:
        is_so = view.dtype is self._compute and view.device == self._device and view.is_contiguous()
        return view if is_so else row.copy_(view)


def _rows(tensor: Tensor, context: Context, size: int) -> list[Tensor]:
    """The rows of a parameter's matrices, or all of what is no matrix as one row, a few at a time."""
    shaped = context.stacks([tensor]) or [_as_rows(tensor, context)[None]]
    (stack,) = shaped
    if not context.transposed:
        stack = stack.reshape(1, -1, stack.shape[-1])
    count = max(STRIDED_ROWS if context.transposed else 1, size // max(1, stack.shape[-1]))
    return [piece for matrix in stack for piece in torch.split(matrix, count)]


def _as_rows(tensor: Tensor, context: Context) -> Tensor:
    matrices = context.matrices([tensor])
    return tensor.reshape(1, -1) if matrices is None else matrices[0]
