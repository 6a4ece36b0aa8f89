"""Memory that is used again: the first touch of a fresh page costs several times what copying into a known one does."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from typing import Any

import numpy as np
import torch
from torch import Tensor

SMALLEST_BYTES = 64 << 10


class Buffers:
    """Lends tensors of bytes, and takes each one's memory back once no tensor, view or array refers to it any more.

    Nobody says when a buffer is free: whoever still reads it, holds it. So a view that outlives its reader's intention
    costs memory, and never a wrong byte. May be used from several threads.

    Args:
        keep_bytes: how much memory is kept at most while nobody uses it.
    """

    def __init__(self, keep_bytes: int) -> None:
        self._keep_bytes = keep_bytes
        self._lock = threading.Lock()
        self._idle: list[np.ndarray] = []  # the most recently returned, whose bytes may still be in the cache, last
        # Returning only appends: it happens wherever the last reference goes, also while this thread holds the lock.
        self._returned: deque[np.ndarray] = deque()

    def lend(self, size: int) -> Tensor:
        """``size`` bytes ``[size]`` uint8 with any content."""
        wanted = _capacity(size)
        with self._lock:
            self._take_back()
            memory = next((idle for idle in reversed(self._idle) if len(idle) == wanted), None)
            if memory is None:
                memory = np.empty(wanted, dtype=np.uint8)
            else:
                self._idle = [idle for idle in self._idle if idle is not memory]
        lent = memory[:size]
        # torch and every array or memoryview made from the tensor hold ``lent`` itself, so it goes after all of them.
        weakref.finalize(lent, self._returned.append, memory).atexit = False
        return torch.from_numpy(lent)

    def idle_bytes(self) -> int:
        """How much memory lies ready."""
        with self._lock:
            self._take_back()
            return sum(len(idle) for idle in self._idle)

    def _take_back(self) -> None:
        while self._returned:
            self._idle.append(self._returned.popleft())
        kept = sum(len(idle) for idle in self._idle)
        while kept > self._keep_bytes:
            kept -= len(self._idle.pop(0))


def _capacity(size: int) -> int:
    """The power of two that holds ``size`` bytes: one of few, which the next may want; untouched pages cost nothing."""
    return 1 << (max(size, SMALLEST_BYTES) - 1).bit_length()


def bytes_of(buffer: Tensor) -> memoryview:
    """The memory of a tensor of bytes."""
    array: Any = buffer.numpy()
    return memoryview(array)
