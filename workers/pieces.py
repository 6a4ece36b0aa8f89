"""Walks through one parameter's task vectors in pieces that fit into the cache, on as many threads as torch may use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

from workers.context import Context
from workers.threads import alone, one_thread
from workers.unread import Landing, Unread

ENTRIES = 1 << 19  # about a megabyte of each operand: calls cost little beside the work, and all stays cached
LOOKED_AT = 1 << 18  # where each entry is looked at before it is merged, which takes more memory and more passes
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
    ) -> None:
        """``context.base`` and ``sources`` hold the whole parameter; the base is taken off where ``are_experts``.

        Where all of them are unread, so is the ``base``, and of ``context.base`` nothing but shape and type is used.
        Such are read when it is their turn, and can't be sampled or cut into rows; what their files raise comes out.
        ``check`` sees every piece once, the first time that it is read.
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
        self._room = max((piece.numel() for piece, *_ in self._views), default=0)
        self._threads = min(torch.get_num_threads(), len(self._views))
        self._rooms: list[_Room] = []
        self._pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> Self:
        if self._threads > 1:
            self._pool = ThreadPoolExecutor(self._threads - 1, thread_name_prefix="merge")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

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
        queue = iter(range(len(self)))

        def work_off(thread: int) -> None:
            room = self._rooms[thread]
            for index in queue:
                start, vectors = self._load(self._views[index], room)
                if self._check is not None:
                    self._check(start, vectors)
                found[index] = work(vectors, replace(known, base=start, first=self.firsts[index]))

        self._share_out(work_off)
        self._check = None
        return found  # type: ignore[return-value] # every place has been filled, or an error been raised

    def sample(self, work: Work[R]) -> R:
        """What ``work`` returns for a piece ``[n]`` that is made of short runs from everywhere."""
        runs = max(1, min(SAMPLE, self.entries // SAMPLED) // RUN)
        step = max(RUN, self.entries // runs) | 1  # odd, so that it does not keep to the same columns
        run = min(RUN, self.entries)
        flat = [tensor.reshape(-1) for tensor in self._whole if isinstance(tensor, Tensor)]
        views = [
            each.as_strided((max(1, self.entries // step), run), (step, 1), each.storage_offset()) for each in flat
        ]
        room = self._make_room(views[0].numel())
        with one_thread():
            start, vectors = self._load([view.flatten() for view in views], room)
            return work(vectors, replace(self.context, base=start))

    def _share_out(self, work_off: Callable[[int], None]) -> None:
        while len(self._rooms) < self._threads:
            self._rooms.append(self._make_room(self._room))
        with one_thread():
            pool = self._pool
            started = (
                [] if pool is None else [pool.submit(alone(work_off), thread) for thread in range(1, self._threads)]
            )
            try:
                work_off(0)
            finally:
                errors = [error for each in started if (error := each.exception()) is not None]
            if errors:
                raise errors[0]

    def _make_room(self, entries: int) -> _Room:
        computed = torch.empty(len(self._whole), entries, dtype=self._compute, device=self._device)
        wide = max((whole.dtype.itemsize for whole in self._whole if isinstance(whole, Unread)), default=0)
        return _Room(computed, Landing(torch.empty(wide * entries, dtype=torch.uint8)))

    def _load(self, views: Sequence[Tensor | Unread], room: _Room) -> tuple[Tensor, list[Tensor]]:
        base, *others = views
        start = self._loaded(room.read(base), room.computed[0], is_lasting=isinstance(base, Tensor))
        load = partial(self._difference, start) if self._are_experts else partial(self._loaded, is_lasting=False)
        # One after the other: what has been read is still in the cache, and its memory is there for the next.
        return start, [load(room.read(other), row) for other, row in zip(others, room.computed[1:], strict=True)]

    def _loaded(self, view: Tensor, row: Tensor, *, is_lasting: bool = True) -> Tensor:
        if is_lasting and view.dtype is self._compute and view.device == self._device and view.is_contiguous():
            return view
        return row[: view.numel()].view(view.shape).copy_(view)

    def _difference(self, start: Tensor, view: Tensor, row: Tensor) -> Tensor:
        place = row[: view.numel()].view(view.shape)
        if view.dtype is self._compute and view.device == self._device:
            return torch.sub(view, start, out=place)
        return place.copy_(view).sub_(start)  # faster than a subtraction of two types


@dataclass(frozen=True, eq=False)
class _Room:
    """A thread's memory for one piece: of every operand as it is computed with, and of one as it lies in its file."""

    computed: Tensor
    landing: Landing

    def read(self, view: Tensor | Unread) -> Tensor:
        return self.landing.read(view) if isinstance(view, Unread) else view


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
