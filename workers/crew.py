"""Threads that share out one piece of work after the other, each with memory of its own that stays with it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from workers.buffers import Buffers
from workers.threads import alone, one_thread
from workers.unread import Landing, Unread

KEEP_BYTES = 64 << 20  # of results that have been written
LENT_BYTES = 1 << 20  # smaller results find memory that has been used soon enough


class Crew:
    """As many ``threads``, the caller's among them, a room for each, and memory for what they leave."""

    def __init__(self, threads: int) -> None:
        self._results = Buffers(KEEP_BYTES)
        self._rooms = [Room() for _ in range(max(1, threads))]
        self._others = ThreadPoolExecutor(max(1, threads - 1), thread_name_prefix="merge")  # no thread until used

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._others.shutdown(cancel_futures=True)

    @property
    def room(self) -> Room:
        """The caller's own."""
        return self._rooms[0]

    def result(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Memory with any content; another result will have it once nobody refers to this one any more."""
        size = math.prod(shape) * dtype.itemsize
        if size < LENT_BYTES:
            return torch.empty(shape, dtype=dtype)
        return self._results.lend(size).view(dtype).view(shape)

    def share_out(self, work: Callable[[Room], None], threads: int) -> None:
        """Have so many of the threads do the same ``work`` at once, each in its own room.

        Raises what the caller's share raised, or else another's.
        """
        with one_thread():
            started = [self._others.submit(alone(work), room) for room in self._rooms[1:threads]]
            try:
                work(self.room)
            finally:
                errors = [error for each in started if (error := each.exception()) is not None]
            if errors:
                raise errors[0]


class Room:
    """A thread's memory, which what it works on next will use again."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._rows: Sequence[Tensor] = ()
        self._asked: tuple[int, int, torch.dtype, torch.device] | None = None
        self._landing = Landing()

    def rows(self, count: int, entries: int, dtype: torch.dtype, device: torch.device) -> Sequence[Tensor]:
        """So many rows ``[entries]`` with any content."""
        asked = (count, entries, dtype, device)
        if asked != self._asked:  # most pieces are like the one before
            self._asked, self._rows = asked, self._laid_out(*asked)
        return self._rows

    def read(self, view: Tensor | Unread) -> Tensor:
        """What a view holds; what had to be read stays until the next is."""
        return self._landing.read(view) if isinstance(view, Unread) else view

    def _laid_out(self, count: int, entries: int, dtype: torch.dtype, device: torch.device) -> Sequence[Tensor]:
        size = count * entries * dtype.itemsize
        if self._memory.numel() < size or self._memory.device.type != device.type:
            self._memory = torch.empty(size, dtype=torch.uint8, device=device)
        return self._memory[:size].view(dtype).view(count, entries).unbind()
