"""Entries in a file on this machine that are read piece by piece, by whoever needs them, straight into the cache."""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from workers.buffers import bytes_of


class File(Protocol):
    """An open file that several threads may read."""

    def expect(self, start: int, size: int) -> None: ...

    def read(self, start: int, into: memoryview) -> None: ...


class Unread(NamedTuple):
    """A tensor of ``shape``, or some of its entries ``[n]``, whose bytes begin at ``start`` of an open file."""

    file: File
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def numel(self) -> int:
        return math.prod(self.shape)

    def expect(self) -> None:
        """Say that all of it will be read soon."""
        self.file.expect(self.start, self.numel() * self.dtype.itemsize)

    def split(self, entries: int) -> list[Unread]:
        """Its entries in row order, so many at a time."""
        file, start, dtype, _ = self
        total, size = self.numel(), dtype.itemsize
        return [
            Unread(file, start + first * size, dtype, (min(entries, total - first),))
            for first in range(0, total, entries)
        ]


class Landing:
    """Memory that entries are read into, over and over."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._entries, self._bytes = self._memory, bytes_of(self._memory)
        self._asked = (0, torch.uint8)

    def read(self, entries: Unread) -> Tensor:
        """The entries ``[n]``, until the next are read. Raises what the file raises."""
        asked = (entries.numel(), entries.dtype)
        if asked != self._asked:  # most are like those before
            self._make_room(*asked)
        entries.file.read(entries.start, self._bytes)
        return self._entries

    def _make_room(self, count: int, dtype: torch.dtype) -> None:
        self._asked, size = (count, dtype), count * dtype.itemsize
        if len(self._memory) < size:
            self._memory = torch.empty(size, dtype=torch.uint8)
        self._entries, self._bytes = self._memory[:size].view(dtype), bytes_of(self._memory[:size])
