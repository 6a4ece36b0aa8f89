"""Finds which entries of a tensor are its largest, without sorting it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Cut:
    """Where the largest entries of a tensor end: those above ``value``, and the first ``tied`` that equal it."""

    value: float
    tied: int


NOTHING = Cut(math.inf, 0)
EVERYTHING = Cut(-1.0, 0)
FEW = 1 << 17  # entries among which numpy selects at once


def share_of(share: float, count: int, *, least: int = 0) -> int:
    """A ``share`` of ``count`` entries, rounded half up, ``least`` of them at least."""
    return min(count, max(least, math.floor(share * count + 0.5)))


def cut_at(sizes: Tensor, count: int) -> Cut:
    """The cut that leaves the ``count`` largest of ``sizes [n]``, which are not negative; ties to the lower index."""
    if count <= 0:
        return NOTHING
    if count >= sizes.numel():
        return EVERYTHING
    value = kth_largest(sizes, count)
    return Cut(float(value), count - int((sizes > value).count_nonzero()))  # a sum of booleans takes five times as long


def above(sizes: Tensor, cut: Cut) -> Tensor:
    """Which of ``sizes [n]`` a cut leaves: booleans ``[n]``."""
    # Numpy compares five times as fast.
    on_cpu = sizes.device.type == "cpu"
    kept = torch.from_numpy(np.greater(sizes.numpy(), cut.value)) if on_cpu else sizes > cut.value
    if cut.tied:
        kept[_places(sizes == cut.value)[: cut.tied]] = True
    return kept


def largest(vector: Tensor, cut: Cut, out: Tensor | None = None) -> Tensor:
    """``vector [n]`` with zeros where a cut of its magnitudes leaves nothing; in ``out``, which may be itself."""
    places = _places(vector.abs() == cut.value)[: cut.tied] if cut.tied else None
    tied = None if places is None else vector[places]
    kept = torch.hardshrink(vector, cut.value, out=out)  # one pass, where a mask takes three
    if places is not None and tied is not None:
        kept[places] = tied
    return kept


def largest_surveyed(vector: Tensor, cut: Cut, out: Tensor | None = None) -> Tensor:
    """As ``largest``, for a cut that a survey found, which compares magnitudes in float32."""
    if vector.dtype == torch.float32:
        return largest(vector, cut, out)
    return torch.mul(vector, above(vector.abs().float(), cut), out=out)


def kth_largest(sizes: Tensor, count: int) -> Tensor:
    """The ``count``-th largest of ``sizes [n]``, contiguous and not negative, in float32 or float64; a scalar.

    Floats that are not negative are ordered as their bit patterns are. Counting them by their upper bits leaves a few
    candidates to select among, in a third of the time that a selection among all of them takes.
    """
    if sizes.device.type == "cpu" and sizes.numel() <= FEW:
        place = sizes.numel() - count
        return torch.from_numpy(np.partition(sizes.numpy(), place)[place : place + 1])[0]
    bits = sizes.view(torch.int32 if sizes.dtype == torch.float32 else torch.int64)
    coarse = bits >> (torch.iinfo(bits.dtype).bits - 16)
    at_least = torch.bincount(coarse, minlength=1 << 15).flip(0).cumsum(0)
    place = int((at_least < count).sum())
    candidates = sizes[_places(coarse == len(at_least) - 1 - place)]
    above = int(at_least[place - 1]) if place else 0
    return candidates.kthvalue(len(candidates) - (count - above) + 1).values


def _places(mask: Tensor) -> Tensor:
    """Where ``mask [n]`` is true, in order; few places are found by numpy in a quarter of torch's time."""
    if mask.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.nonzero().flatten()
