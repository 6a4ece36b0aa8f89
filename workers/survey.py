"""Finds where the largest entries of a whole task vector end, tensor by tensor, without ever holding all of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from workers.magnitudes import NOTHING, Cut, share_of
from workers.pieces import ENTRIES
from workers.threads import one_thread, shared_out

COARSE_BITS = 16  # what the first pass does not look at: the lower bits of a float32
BUCKETS = 1 << (31 - COARSE_BITS)

Stream = Callable[[], Iterable[tuple[str, Tensor]]]


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

    ``stream`` gives the tensors by name, always in the same order; it is asked for twice. Magnitudes are compared in
    float32: the first pass counts them by their upper bits, the second looks closer at the buckets where cuts fall.
    """
    counts = _coarse(stream())
    total = int(counts.sum())
    wanted = [share_of(share, total) for share in shares]
    at_least = counts.flip(0).cumsum(0)
    buckets = [BUCKETS - 1 - int((at_least < count).sum()) for count in wanted]
    found = _fine(stream(), frozenset(bucket for bucket, count in zip(buckets, wanted, strict=True) if count))
    return [
        _cut(found[bucket], count - int(counts[bucket + 1 :].sum())) if count else WholeCut(None, {})
        for bucket, count in zip(buckets, wanted, strict=True)
    ]


def as_json(cuts: Sequence[WholeCut]) -> str:
    """Cuts as text; a float's shortest spelling is exact."""
    return json.dumps([{"value": cut.value, "tied": dict(cut.tied)} for cut in cuts])


def from_json(text: str | bytes) -> list[WholeCut]:
    """Cuts from the text that ``as_json`` made."""
    return [WholeCut(cut["value"], cut["tied"]) for cut in json.loads(text)]


def _bits(tensor: Tensor) -> Tensor:
    """Magnitudes as whole numbers of the same order, ``[n]`` int32."""
    return tensor.float().abs().flatten().view(torch.int32)


def _coarse(tensors: Iterable[tuple[str, Tensor]]) -> Tensor:
    counts = torch.zeros(BUCKETS, dtype=torch.int64)
    with one_thread() as threads:
        for _, tensor in tensors:
            for part in shared_out(_counted, _shares(tensor, threads), threads):
                counts += part
    return counts


def _shares(tensor: Tensor, threads: int) -> list[Sequence[Tensor]]:
    """A tensor's entries in pieces that fit into the cache, dealt out to threads; on a GPU in one piece."""
    if tensor.device.type != "cpu":
        return [[tensor.flatten()]]
    pieces = torch.split(tensor.reshape(-1), ENTRIES)
    return [pieces[thread::threads] for thread in range(min(threads, len(pieces)))]


def _counted(pieces: Sequence[Tensor]) -> Tensor:
    counts = torch.zeros(BUCKETS, dtype=torch.int64)
    for piece in pieces:
        counts += torch.bincount(_bits(piece) >> COARSE_BITS, minlength=BUCKETS).cpu()
    return counts


@dataclass(frozen=True, eq=False)
class _Within:
    """The magnitudes of one tensor that lie in a bucket: each one's bits, ascending, and how often it is there."""

    tensor: str
    bits: Tensor
    counts: Tensor


def _fine(tensors: Iterable[tuple[str, Tensor]], buckets: frozenset[int]) -> dict[int, list[_Within]]:
    found: dict[int, list[_Within]] = {bucket: [] for bucket in buckets}
    with one_thread() as threads:
        for name, tensor in tensors:
            parts = shared_out(partial(_inside, frozenset(found)), _shares(tensor, threads), threads)
            for bucket, within in found.items():
                inside = torch.cat([part[bucket] for part in parts])
                if inside.numel():
                    values, counts = torch.unique(inside, return_counts=True)
                    within.append(_Within(name, values, counts))
    return found


def _inside(buckets: frozenset[int], pieces: Sequence[Tensor]) -> dict[int, Tensor]:
    """The bits of the entries that lie in each bucket, in host memory."""
    found: dict[int, list[Tensor]] = {bucket: [] for bucket in buckets}
    for piece in pieces:
        bits = _bits(piece)
        coarse = bits >> COARSE_BITS
        for bucket, inside in found.items():
            inside.append(bits[coarse == bucket].cpu())
    return {bucket: torch.cat(inside) for bucket, inside in found.items()}


def _cut(within: Sequence[_Within], count: int) -> WholeCut:
    """The cut that leaves ``count`` of the entries of a bucket."""
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
