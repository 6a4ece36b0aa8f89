"""Draws the random numbers of one parameter and task: the same for any order, device and number of workers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np

BLOCK = 1 << 20
DRAWS_AT_ONCE = 16  # are cut from what the generator gives for one counter: four numbers of 64 bits
ALL_BITS = (1 << 64) - 1
STEPS = 1 << 16  # a draw is one of so many equally likely numbers


def draws(count: int, seed: int, parameter: str, task: str, first: int = 0) -> Iterator[tuple[slice, np.ndarray]]:
    """``count`` whole numbers below STEPS, block by block with the place of each, for one parameter of one task.

    ``first`` is how many to pass over: the numbers are those that a longer run has from there on.

    They come from Philox4x64-10, a counter-based generator: its key is a digest of seed, parameter and task, and every
    block starts at a counter of its own, so that any block can be drawn alone. Four draws are cut from each number.
    """
    key = hashlib.sha256(f"{seed}\0{parameter}\0{task}".encode()).digest()[:16]
    done = 0
    while done < count:
        block, offset = divmod(first + done, BLOCK)
        counter, unused = divmod(offset, DRAWS_AT_ONCE)
        size = min(BLOCK - offset, count - done)
        philox = np.random.Philox(key=int.from_bytes(key, "little"), counter=[counter, 0, 0, block])
        # The generator's own numbers of 64 bits; asked for like this, other threads run on meanwhile.
        wanted = -(-(unused + size) // 4)
        words = np.random.Generator(philox).integers(ALL_BITS, size=wanted, dtype=np.uint64, endpoint=True)
        yield slice(done, done + size), words.astype("<u8", copy=False).view("<u2")[unused : unused + size]
        done += size


def steps_of(chance: float) -> int:
    """How many of the STEPS numbers stand for a ``chance`` above 0: one at least."""
    return min(STEPS, max(1, round(chance * STEPS)))


def drawn_mask(count: int, chance: float, seed: int, parameter: str, task: str, first: int = 0) -> np.ndarray:
    """Booleans ``[count]``, each true with ``chance``, rounded to a multiple of 1 / STEPS.

    ``first`` is as in ``draws``.
    """
    mask = np.empty(count, dtype=np.bool_)
    limit = steps_of(chance)
    for place, drawn in draws(count, seed, parameter, task, first):
        np.less(drawn, limit, out=mask[place])
    return mask
