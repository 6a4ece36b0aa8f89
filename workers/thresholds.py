"""Finds where the largest entries of a whole parameter end, piece by piece: exactly, and without keeping it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from workers.context import Context
from workers.magnitudes import EVERYTHING, NOTHING, Cut, cut_at
from workers.pieces import Pieces, Work

# Standard deviations of a share among so many independent entries; neighbors are alike, so it must be ample. Where it
# is not, that costs one more pass.
MARGIN = 5.0
COMMON = 1 / 512  # of a sample: a value that is rarer is not worth counting
COARSE_BITS = 16

Sizes = Work[Sequence[Tensor]]


@dataclass(frozen=True)
class Threshold:
    """A cut through a whole parameter, as it goes through its pieces.

    Above ``value`` all is kept; of what equals it all before the piece that begins at entry ``first``, and the first
    ``tied`` in that piece. ``lower`` is any number below the value with none of the entries between.
    """

    value: float
    lower: float
    first: int
    tied: int

    def within(self, first: int) -> Cut:
        """The cut of the piece that begins at entry ``first``."""
        if first < self.first:
            return Cut(self.lower, 0)
        return Cut(self.value, self.tied if first == self.first else 0)


def magnitudes(task_vectors: list[Tensor], context: Context) -> list[Tensor]:  # noqa: ARG001 (all sizes are asked alike)
    """The sizes of entries in most methods: |T_k|."""
    return [task_vector.abs_() for task_vector in task_vectors]


def thresholds(pieces: Pieces, sizes: Sizes, counts: Sequence[Sequence[int]]) -> list[list[Threshold]]:
    """Where the largest entries of each row of ``sizes`` end, for each of its ``counts``; ties to the lower index.

    ``sizes`` gives rows ``[n]`` of numbers that are not negative, entry by entry. The answer is exact: a sample says
    only between which two values the last entry to keep is looked for.
    """
    if len(pieces) == 1:

        def cuts(task_vectors: list[Tensor], context: Context) -> list[list[Threshold]]:
            rows = zip(sizes(task_vectors, context), counts, strict=True)
            return [[_alone(cut_at(row, count)) for count in wanted] for row, wanted in rows]

        return pieces.map(cuts)[0]
    found = _trivial(counts, pieces.entries)
    brackets = _guessed(pieces, sizes, counts, found)
    while brackets:
        seen = pieces.map(partial(_scanned, sizes, brackets))
        outcomes = {
            (row, index): _selected([part[row, index] for part in seen], counts[row][index], bracket, pieces.dtype)
            for (row, index), bracket in brackets.items()
        }
        found |= {place: outcome for place, outcome in outcomes.items() if isinstance(outcome, Threshold)}
        brackets = {place: outcome for place, outcome in outcomes.items() if isinstance(outcome, _Bracket)}
    return [[found[row, index] for index in range(len(wanted))] for row, wanted in enumerate(counts)]


def surveyed(pieces: Pieces, cuts: Sequence[Sequence[Cut]]) -> list[list[Threshold]]:
    """Each task's cuts of the whole parameter, as a survey found them for magnitudes in float32, as thresholds."""
    if len(pieces) == 1:
        return [[_alone(cut) for cut in row] for row in cuts]
    if not any(cut.tied for row in cuts for cut in row):
        return [[Threshold(cut.value, cut.value, 0, 0) for cut in row] for row in cuts]

    def equals(task_vectors: list[Tensor], context: Context) -> tuple[int, list[list[int]]]:
        rows = [vector.abs_().float().numpy() for vector in task_vectors]
        counts = [
            [_count(row == cut.value) if cut.tied else 0 for cut in wanted]
            for row, wanted in zip(rows, cuts, strict=True)
        ]
        return context.first, counts

    parts = pieces.map(equals)
    firsts = [first for first, _ in parts]
    return [
        [
            _resolved(cut.value, cut.tied, firsts, [part[k][i] for _, part in parts], torch.float32)
            for i, cut in enumerate(row)
        ]
        for k, row in enumerate(cuts)
    ]


@dataclass(frozen=True)
class _Bracket:
    """Two values, at or between which a threshold is looked for.

    Where many entries may equal one of them, these are counted, else they are gathered with those between.
    """

    least: float
    most: float
    are_common: bool = True


@dataclass(frozen=True, eq=False)
class _Seen:
    """How many entries of a piece lie above a bracket and at its ends, and those ``inside`` that are not counted."""

    first: int
    above: int
    at_most: int
    inside: np.ndarray
    at_least: int


_Place = tuple[int, int]  # a row of sizes, and one of its counts


def _alone(cut: Cut) -> Threshold:
    return Threshold(cut.value, cut.value, 0, cut.tied)


def _trivial(counts: Sequence[Sequence[int]], entries: int) -> dict[_Place, Threshold]:
    known = {}
    for row, wanted in enumerate(counts):
        for index, count in enumerate(wanted):
            if count <= 0 or count >= entries:
                known[row, index] = _alone(NOTHING if count <= 0 else EVERYTHING)
    return known


def _guessed(
    pieces: Pieces, sizes: Sizes, counts: Sequence[Sequence[int]], known: Mapping[_Place, Threshold]
) -> dict[_Place, _Bracket]:
    def ordered(task_vectors: list[Tensor], context: Context) -> list[np.ndarray]:
        return [np.sort(row.numpy()) for row in sizes(task_vectors, context)]

    rows = pieces.sample(ordered)
    return {
        (row, index): _bracket(rows[row], count / pieces.entries)
        for row, wanted in enumerate(counts)
        for index, count in enumerate(wanted)
        if (row, index) not in known
    }


def _bracket(ordered: np.ndarray, share: float) -> _Bracket:
    """Where the largest ``share`` of all surely ends, judged by a sample in ascending order."""
    count = len(ordered)
    place, off = (1 - share) * count, MARGIN * math.sqrt(count * share * (1 - share)) + MARGIN
    low, high = math.floor(place - off), math.ceil(place + off)
    least, most = ordered[low] if low >= 0 else 0.0, ordered[high] if high < count else math.inf
    firsts, lasts = (np.searchsorted(ordered, (least, most), side=side) for side in ("left", "right"))
    return _Bracket(float(least), float(most), bool((lasts - firsts > count * COMMON).any()))


def _scanned(
    sizes: Sizes, brackets: Mapping[_Place, _Bracket], task_vectors: list[Tensor], context: Context
) -> dict[_Place, _Seen]:
    rows = [row.numpy() for row in sizes(task_vectors, context)]
    return {place: _seen(rows[place[0]], context.first, bracket) for place, bracket in brackets.items()}


def _seen(sizes: np.ndarray, first: int, bracket: _Bracket) -> _Seen:
    least, most = bracket.least, bracket.most
    above, reached = sizes > most, sizes >= least
    if least == most:
        return _Seen(first, _count(above), _count(reached) - _count(above), sizes[:0], 0)
    if not bracket.are_common:
        return _Seen(first, _count(above), 0, _where(sizes, above ^ reached), 0)
    from_most, beyond_least = sizes >= most, sizes > least
    inside = _where(sizes, from_most ^ beyond_least)
    return _Seen(
        first, _count(above), _count(from_most) - _count(above), inside, _count(reached) - _count(beyond_least)
    )


def _selected(parts: Sequence[_Seen], count: int, bracket: _Bracket, dtype: torch.dtype) -> Threshold | _Bracket:
    """The threshold that leaves ``count`` entries, or else the bracket where it must be."""
    firsts, left = [part.first for part in parts], count - sum(part.above for part in parts)
    if left <= 0:
        return _Bracket(bracket.most, math.inf)
    equal = [part.at_most for part in parts]
    if left <= sum(equal):
        return _resolved(bracket.most, left, firsts, equal, dtype)
    left -= sum(equal)
    inside = np.concatenate([part.inside for part in parts])
    if left <= len(inside):
        value = _kth_largest(inside, left)
        owners = np.repeat(np.arange(len(parts)), [len(part.inside) for part in parts])
        equal = np.bincount(owners[inside == value], minlength=len(parts)).tolist()
        return _resolved(float(value), left - _count(inside > value), firsts, equal, dtype)
    left -= len(inside)
    equal = [part.at_least for part in parts]
    if left <= sum(equal):
        return _resolved(bracket.least, left, firsts, equal, dtype)
    return _Bracket(0.0, bracket.least)


def _kth_largest(sizes: np.ndarray, count: int) -> np.floating[Any]:
    """The ``count``-th largest of numbers near each other: by counting them first, since many may be equal."""
    bits = sizes.view(np.uint32 if sizes.dtype == np.float32 else np.uint64)
    offsets = bits - bits.min()
    coarse = (offsets >> max(0, int(offsets.max()).bit_length() - COARSE_BITS)).astype(np.int64)
    at_least = np.bincount(coarse)[::-1].cumsum()
    place = int(np.searchsorted(at_least, count))
    near = sizes[coarse == len(at_least) - 1 - place]
    place = len(near) - count + (int(at_least[place - 1]) if place else 0)
    found: np.floating[Any] = np.partition(near, place)[place]
    return found


def _resolved(value: float, tied: int, firsts: Sequence[int], equal: Sequence[int], dtype: torch.dtype) -> Threshold:
    """The threshold that keeps the first ``tied`` of what equals its value, of which each piece has so many."""
    lower = float(torch.tensor(value, dtype=dtype).nextafter(torch.tensor(-1.0, dtype=dtype)))
    for first, there in zip(firsts, equal, strict=True):
        if tied <= there:
            return Threshold(value, lower, first, tied)
        tied -= there
    return Threshold(value, lower, firsts[-1] + 1, 0)


def _where(sizes: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """``sizes[mask]``, which takes several times as long where many are chosen."""
    return sizes[np.flatnonzero(mask)]


def _count(mask: np.ndarray) -> int:
    return int(np.count_nonzero(mask))
