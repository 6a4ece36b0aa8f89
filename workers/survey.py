"""Finds where the largest entries of a whole task vector end, tensor by tensor, without ever holding all of it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from workers.magnitudes import NOTHING, Cut, share_of
from workers.pieces import LOOKED_AT
from workers.threads import one_thread, shared_out
from workers.thresholds import MARGIN

COARSE_BITS = 16  # what is not looked at first: the lower bits of a float32
BUCKETS = 1 << (31 - COARSE_BITS)
FEW = 1 << 16  # entries of a tensor that are all looked at
RUN = 64  # of more, so many in a row
STEP = 32 * RUN + 1  # of so many; odd, so that they do not keep to the same columns

Stream = Callable[[], Iterable[tuple[str, Tensor, Tensor]]]
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class WholeCut:
    """Where the largest entries of a task vector end: above ``value``, and as many that equal it as ``tied`` says.

    ``tied`` counts them by tensor; a tensor that it does not name keeps none of them. None as the ``value`` leaves
    nothing.
    """

    value: float | None
    tied: Mapping[str, int]

    def of(self, tensor: str) -> Cut:
        """The cut of one tensor."""
        return NOTHING if self.value is None else Cut(self.value, self.tied.get(tensor, 0))


def survey(stream: Stream, shares: Sequence[float]) -> list[WholeCut]:
    """The cuts that leave each of ``shares`` of all entries, ties going to the lower index of the earlier tensor.

    ``stream`` gives each tensor's name, the base's and the task's, in host memory, always in the same order. Magnitudes
    of the differences are compared in float32. It is asked for twice: first some of them are counted by their upper
    bits, which says about where the cuts fall, then all, and what lies there is looked at closely. Where some were not
    like all, it is asked for twice more.
    """
    counts, total, seen = _coarse(stream(), _some)
    wanted = [share_of(share, total) for share in shares]
    within = _fine(stream(), [_guessed(counts, count / total, seen) if count else None for count in wanted])
    if not all(found.has(count) for found, count in zip(within, wanted, strict=True)):
        counts, _, _ = _coarse(stream(), _all)
        within = _fine(stream(), [_bucket(counts, count) if count else None for count in wanted])
    return [
        _cut(found.tensors, count - found.above) if count else WholeCut(None, {})
        for found, count in zip(within, wanted, strict=True)
    ]


def as_json(cuts: Sequence[WholeCut]) -> str:
    """Cuts as text; a float's shortest spelling is exact."""
    return json.dumps([{"value": cut.value, "tied": dict(cut.tied)} for cut in cuts])


def from_json(text: str | bytes) -> list[WholeCut]:
    """Cuts from the text that ``as_json`` made."""
    return [WholeCut(cut["value"], cut["tied"]) for cut in json.loads(text)]


def _magnitudes(pair: Pair) -> np.ndarray:
    """What one tensor ``[n]`` differs from another by, as whole numbers of the same order, uint32."""
    before, after = pair
    compute = torch.promote_types(before.dtype, torch.float32)
    sizes: np.ndarray = after.to(compute, copy=True).sub_(before.to(compute)).float().abs_().numpy()
    return sizes.view(np.uint32)


def _all(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1)


def _some(tensor: Tensor) -> Tensor:
    flat = tensor.reshape(-1)
    if len(flat) <= FEW:
        return flat
    return flat.as_strided((len(flat) // STEP, RUN), (STEP, 1), flat.storage_offset()).reshape(-1)


def _coarse(
    tensors: Iterable[tuple[str, Tensor, Tensor]], chosen: Callable[[Tensor], Tensor]
) -> tuple[np.ndarray, int, int]:
    """About how many entries lie in each bucket, how many there are in all, and how many have been ``chosen``."""
    counts, total, seen = np.zeros(BUCKETS), 0, 0
    with one_thread() as threads:
        for _, before, after in tensors:
            pair = (chosen(before), chosen(after))
            looked_at, entries = pair[0].numel(), before.numel()
            total, seen = total + entries, seen + looked_at
            for part in shared_out(_counted, _shares(pair, threads), threads):
                counts += part * (entries / max(1, looked_at))
    return counts, total, seen


def _shares(pair: Pair, threads: int) -> list[Sequence[Pair]]:
    """Entries in pieces that fit into the cache, dealt out to threads."""
    pieces = list(zip(*(torch.split(tensor.reshape(-1), LOOKED_AT) for tensor in pair), strict=True))
    return [pieces[thread::threads] for thread in range(min(threads, len(pieces)))]


def _counted(pieces: Sequence[Pair]) -> np.ndarray:
    counts = np.zeros(BUCKETS)
    for piece in pieces:
        counts += np.bincount(_magnitudes(piece) >> COARSE_BITS, minlength=BUCKETS)
    return counts


@dataclass(frozen=True)
class _Range:
    """Neighboring buckets, from the bits of the ``least`` magnitude to those of the first ``beyond``."""

    least: int
    beyond: int


def _guessed(counts: np.ndarray, share: float, seen: int) -> _Range:
    """Where the largest ``share`` of all surely ends, judged by so many of them."""
    off = (MARGIN * math.sqrt(seen * share * (1 - share)) + MARGIN) / seen
    total = float(counts.sum())
    most, least = (_bucket(counts, (share + sign * off) * total) for sign in (-1, 1))
    return _Range(least.least, most.beyond)


def _bucket(counts: np.ndarray, count: float) -> _Range:
    """The bucket where the ``count``-th largest lies."""
    bucket = max(0, BUCKETS - 1 - int((counts[::-1].cumsum() < count).sum()))
    return _Range(bucket << COARSE_BITS, bucket + 1 << COARSE_BITS)


@dataclass(frozen=True, eq=False)
class _Within:
    """The magnitudes of one tensor that lie in a range: each one's bits, ascending, and how often it is there."""

    tensor: str
    bits: Tensor
    counts: Tensor


@dataclass(eq=False)
class _Found:
    """How many entries lie above a range, and those in it, by tensor."""

    above: int
    tensors: list[_Within]

    def has(self, count: int) -> bool:
        """Whether the ``count``-th largest of all is among them; the largest of none is always."""
        return not count or 0 < count - self.above <= sum(int(part.counts.sum()) for part in self.tensors)


def _fine(tensors: Iterable[tuple[str, Tensor, Tensor]], ranges: Sequence[_Range | None]) -> list[_Found]:
    found = [_Found(0, []) for _ in ranges]
    with one_thread() as threads:
        for name, before, after in tensors:
            parts = shared_out(partial(_looked_at, ranges), _shares((before, after), threads), threads)
            for index, each in enumerate(found):
                each.above += sum(part[index][0] for part in parts)
                inside = [bits for part in parts for bits in part[index][1]]
                if inside:
                    values, counts = np.unique(np.concatenate(inside), return_counts=True)
                    each.tensors.append(_Within(name, torch.from_numpy(values), torch.from_numpy(counts)))
    return found


def _looked_at(ranges: Sequence[_Range | None], pieces: Sequence[Pair]) -> list[tuple[int, list[np.ndarray]]]:
    """For each range, how many entries lie above it, and the bits of those inside, int32, in parts."""
    above, inside = [0] * len(ranges), [list[np.ndarray]() for _ in ranges]
    for piece in pieces:
        bits = _magnitudes(piece)
        for index, wanted in enumerate(ranges):
            if wanted is None:
                continue
            beyond = bits >= wanted.beyond
            above[index] += int(np.count_nonzero(beyond))
            places = np.flatnonzero((bits >= wanted.least) ^ beyond)
            if len(places):
                inside[index].append(bits[places].view(np.int32))
    return list(zip(above, inside, strict=True))


def _cut(within: Sequence[_Within], count: int) -> WholeCut:
    """The cut that leaves ``count`` of the entries of a range."""
    values, places = torch.unique(torch.cat([part.bits for part in within]), return_inverse=True)
    together = torch.zeros_like(values, dtype=torch.int64)
    together.index_add_(0, places, torch.cat([part.counts for part in within]))
    at_least = together.flip(0).cumsum(0)
    place = int((at_least < count).sum())
    value = values[len(values) - 1 - place]
    left = count - (int(at_least[place - 1]) if place else 0)
    tied = {}
    for part in within:
        there = int(part.counts[part.bits == value].sum())
        if left and there:
            tied[part.tensor] = min(left, there)
            left -= tied[part.tensor]
    return WholeCut(float(value.view(torch.float32)), tied)
