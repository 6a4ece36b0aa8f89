"""Entries in a file on this machine that are read piece by piece, by whoever needs them, straight into the cache."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


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
    """Memory ``[size]`` uint8 that entries are read into, over and over."""

    def __init__(self, memory: Tensor) -> None:
        array: Any = memory.numpy()
        self._memory, self._bytes = memory, memoryview(array)

    def read(self, entries: Unread) -> Tensor:
        """The entries ``[n]``, until the next are read. Raises what the file raises."""
        file, start, dtype, _ = entries
        size = entries.numel() * dtype.itemsize
        file.read(start, self._bytes[:size])
        return self._memory[:size].view(dtype)
