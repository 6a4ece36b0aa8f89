"""Draws the random numbers of one parameter and task: the same for any order, device and number of workers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

BLOCK = 1 << 20
STEPS = 1 << 16  # a draw is one of so many equally likely numbers


def draws(count: int, seed: int, parameter: str, task: str) -> Iterator[tuple[slice, np.ndarray]]:
    """``count`` whole numbers below STEPS, block by block with the place of each, for one parameter of one task.

    They come from Philox4x64-10, a counter-based generator: its key is a digest of seed, parameter and task, and every
    block starts at a counter of its own, so that any block can be drawn alone. Four draws are cut from each number.
    """
    key = hashlib.sha256(f"{seed}\0{parameter}\0{task}".encode()).digest()[:16]
    for block, start in enumerate(range(0, count, BLOCK)):
        size = min(BLOCK, count - start)
        generator = np.random.Philox(key=int.from_bytes(key, "little"), counter=[0, 0, 0, block])
        words = generator.random_raw(-(-size // 4)).astype("<u8", copy=False)
        yield slice(start, start + size), words.view("<u2")[:size]


def steps_of(chance: float) -> int:
    """How many of the STEPS numbers stand for a ``chance`` above 0: one at least."""
    return min(STEPS, max(1, round(chance * STEPS)))


def drawn_mask(count: int, chance: float, seed: int, parameter: str, task: str) -> Tensor:
    """Booleans ``[count]``, in host memory, each true with ``chance``, rounded to a multiple of 1 / STEPS."""
    mask = np.empty(count, dtype=np.bool_)
    limit = steps_of(chance)
    for place, drawn in draws(count, seed, parameter, task):
        np.less(drawn, limit, out=mask[place])
    return torch.from_numpy(mask)
