"""Draws the random masks of one parameter and task: the same for any order, device and number of workers."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np

BLOCK = 1 << 20
DRAWS_AT_ONCE = 32  # are cut from what the generator gives for one counter: four numbers of 64 bits
DRAWS_A_WORD = 8
ALL_BITS = (1 << 64) - 1
STEPS = 1 << 16  # a draw is one of so many equally likely numbers
GOLDEN, MIX_1, MIX_2 = (np.uint64(number) for number in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def key_of(seed: int, parameter: str, task: str) -> bytes:
    """What the draws for one parameter of one task depend on, beside the place of each: 32 bytes."""
    return hashlib.sha256(f"{seed}\0{parameter}\0{task}".encode()).digest()


def steps_of(chance: float) -> int:
    """How many of the STEPS numbers stand for a ``chance`` above 0: one at least."""
    return min(STEPS, max(1, round(chance * STEPS)))


def drawn_mask(shape: Sequence[int], limits: int | np.ndarray, key: bytes, first: int = 0) -> np.ndarray:
    """Booleans of a ``shape``, each true where the number below STEPS that is drawn for its place is below its limit.

    ``limits`` are whole numbers from 1 to STEPS, one for all places or one for each column. ``first`` is how many
    places to pass over: the mask is what a longer one has from there on. The upper eight bits of a draw decide, but for
    one place in 256, which needs the lower ones too; so these are made for no other.
    """
    last = np.asarray(limits) - 1
    upper, lower = (last >> 8).astype(np.uint8), (last & 255).astype(np.uint8)
    drawn = upper_bytes(math.prod(shape), key, first).reshape(shape)
    mask: np.ndarray = np.less(drawn, upper)
    open_places = np.flatnonzero(np.equal(drawn, upper))
    most = lower[open_places % len(lower)] if lower.ndim else lower
    mask.reshape(-1)[open_places] = lower_bytes(open_places + first, key) <= most
    return mask


def upper_bytes(count: int, key: bytes, first: int = 0) -> np.ndarray:
    """The upper bytes of ``count`` draws, from the place ``first`` on: ``[count]`` uint8.

    They come from Philox4x64-10, a counter-based generator; every block of them starts at a counter of its own, so that
    any can be drawn alone.
    """
    drawn, done = np.empty(count, dtype=np.uint8), 0
    while done < count:
        block, offset = divmod(first + done, BLOCK)
        size = min(BLOCK - offset, count - done)
        drawn[done : done + size] = _of_block(key, block, offset, size)
        done += size
    return drawn


def _of_block(key: bytes, block: int, offset: int, size: int) -> np.ndarray:
    counter, unused = divmod(offset, DRAWS_AT_ONCE)
    philox = np.random.Philox(key=int.from_bytes(key[:16], "little"), counter=[counter, 0, 0, block])
    # The generator's own numbers of 64 bits; asked for like this, other threads run on meanwhile.
    wanted = -(-(unused + size) // DRAWS_A_WORD)
    words = np.random.Generator(philox).integers(ALL_BITS, size=wanted, dtype=np.uint64, endpoint=True)
    return words.astype("<u8", copy=False).view(np.uint8)[unused : unused + size]


def lower_bytes(places: np.ndarray, key: bytes) -> np.ndarray:
    """The lower bytes of the draws at ``places [n]``: ``[n]`` uint8, by SplitMix64, whose state is key and place."""
    start = np.uint64(int.from_bytes(key[16:24], "little"))
    mixed = places.astype(np.uint64) * GOLDEN + start
    mixed = (mixed ^ (mixed >> np.uint64(30))) * MIX_1
    mixed = (mixed ^ (mixed >> np.uint64(27))) * MIX_2
    return (mixed >> np.uint64(56)).astype(np.uint8)
