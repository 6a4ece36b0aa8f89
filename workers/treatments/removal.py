"""Takes directions out of a task vector in two passes over it, and measures on the way what that did."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from workers.treatments.outcome import LARGE_SHARE, Removed, energy, norm_factor

CHUNK = 1 << 18  # entries that are worked on at once, so that they stay in the cache between the operations


@dataclass(frozen=True, eq=False)
class Removal:
    """The product (I - B_m B_m^T) ... (I - B_1 B_1^T) as I - V U, with V = [B_1 ... B_m] ``[out, m]``.

    The coefficients of the projections obey a_k = B_k^T (T - sum_{j < k} B_j a_j), which is a unit lower triangular
    system in the ``overlaps`` V^T V ``[m, m]``: U = L^-1 V^T ``[m, out]`` gives them all at once, a = U T. What is left
    of T has the square ||T||^2 - ||a||^2, since each projection takes away what is orthogonal to the rest.
    """

    directions: Tensor
    solver: Tensor
    overlaps: Tensor

    @classmethod
    def on_behalf(cls, removed: Sequence[Removed], i: int) -> Removal:
        """What task ``i`` loses: the bases of every other task."""
        bases = [part.directions[:, :0] if k == i else part.directions for k, part in enumerate(removed)]
        directions = torch.cat(bases, dim=1)
        wide = directions.double()
        overlaps = wide.T @ wide
        solver = torch.linalg.solve_triangular(overlaps, wide.T, upper=False, unitriangular=True)
        return cls(directions, solver.to(directions.dtype), overlaps)

    @property
    def count(self) -> int:
        return self.directions.shape[1]

    def square_of(self, coefficients: Tensor) -> float:
        """||V a||^2 for ``coefficients`` a ``[m, n]``."""
        return float((coefficients * (self.overlaps.to(coefficients.dtype) @ coefficients)).sum(dtype=torch.float64))

    def along(self, coefficients: Tensor) -> float:
        """The inner product of T and V a, where a = U T are the ``coefficients`` ``[m, n]``."""
        return 0.5 * (self.square_of(coefficients) + energy(coefficients))


@dataclass(eq=False)
class Largest:
    """Gathers what was removed from the largest entries of a task vector, while it is looked at chunk by chunk.

    Floats that are not negative are ordered as their bit patterns are: counting the entries by their upper bits first
    leaves few to gather and to select among.
    """

    count: int
    counts: Tensor | None = None
    least: float | None = None
    sizes: list[Tensor] = field(default_factory=list)
    squares: list[Tensor] = field(default_factory=list)

    def look(self, entries: Tensor) -> None:
        """Count some of the entries ``[n]``."""
        sizes = entries.abs()
        bits = sizes.view(torch.int32 if sizes.dtype == torch.float32 else torch.int64)
        counts = torch.bincount(bits >> (torch.iinfo(bits.dtype).bits - 16), minlength=1 << 15)
        self.counts = counts if self.counts is None else self.counts.add_(counts)

    def gather(self, entries: Tensor, gone: Tensor) -> None:
        """Keep what is ``gone [n]`` from the largest of some of the entries, once all of them have been counted."""
        sizes = entries.abs()
        self.least = self._least(sizes.dtype) if self.least is None else self.least
        places = _places(sizes >= self.least)
        self.sizes.append(sizes[places])
        self.squares.append(gone[places].double().square())

    def total(self) -> float:
        """The squares of what was removed from the ``count`` largest entries and those equal to the least of them."""
        sizes = torch.cat(self.sizes)
        least = sizes.kthvalue(len(sizes) - self.count + 1).values
        return float(torch.cat(self.squares)[sizes >= least].sum())

    def _least(self, dtype: torch.dtype) -> float:
        """The ``count`` largest entries are among those of at least this size."""
        if self.counts is None:
            return 0.0
        at_least = self.counts.flip(0).cumsum(0)
        place = len(at_least) - 1 - int((at_least < self.count).sum())
        bits, shift = (torch.int32, 16) if dtype == torch.float32 else (torch.int64, 48)
        return float(torch.tensor([place << shift], dtype=bits).view(dtype))


@dataclass(eq=False)
class Stripped:
    """What is found while one task vector is stripped: the ``coefficients`` ``[m, in]`` to take away, and squares.

    ``whole`` is that of the task vector, ``gone`` of what is taken from it, ``large`` of what of that its largest
    entries lose; ``factor`` restores the norm, where that is asked for. Squares are 0 unless they are measured.
    """

    coefficients: Tensor
    factor: float = 1.0
    whole: float = 0.0
    gone: float = 0.0
    large: float = 0.0
    largest: Largest | None = None


def look(before: Tensor, removal: Removal, *, restore_norm: bool, measure: bool) -> Stripped:
    """Find what ``take`` will take from ``before [out, in]``: the same whether it is measured or not."""
    found = Stripped(before.new_zeros(removal.count, before.shape[1]))
    if measure and removal.count:
        found.largest = Largest(max(1, math.floor(LARGE_SHARE * before.numel() + 0.5)))
    for rows, columns in _chunks(before):
        chunk = before[rows, columns]
        if removal.count:
            found.coefficients[:, columns].addmm_(removal.solver[:, rows], chunk)
        if measure:
            found.whole += energy(_stored(chunk))
        if found.largest is not None:
            found.largest.look(_stored(chunk).reshape(-1))
    if restore_norm and removal.count:
        after = torch.addmm(before, removal.directions, found.coefficients, alpha=-1)
        found.factor = norm_factor(before, after, restore=True)
    return found


def take(before: Tensor, removal: Removal, found: Stripped, out: Tensor) -> None:
    """Write what is left of ``before [out, in]`` to ``out``, which may be ``before`` itself, and measure what went."""
    if not removal.count:
        if out is not before:
            out.copy_(before)
        return
    for rows, columns in _chunks(before):
        chunk = before[rows, columns]
        gone = torch.mm(removal.directions[rows], found.coefficients[:, columns], out=torch.empty_like(chunk))
        if found.factor != 1.0:
            gone = chunk - (chunk - gone) * found.factor
        if found.largest is not None:
            found.gone += energy(_stored(gone))
            found.largest.gather(_stored(chunk).reshape(-1), _stored(gone).reshape(-1))
        torch.sub(chunk, gone, out=out[rows, columns])
    if found.largest is not None and found.gone > 0:
        found.large = found.largest.total()


def _chunks(matrix: Tensor) -> Iterator[tuple[slice, slice]]:
    """Parts of a matrix that lie together: some of its rows, or of its columns where those are what lies in a row."""
    everything = slice(None)
    out, width = matrix.shape
    if matrix.device.type != "cpu":  # a GPU is slowed down by small pieces
        yield everything, everything
    elif _is_turned(matrix):
        yield from ((everything, part) for part in _parts(width, out))
    else:
        yield from ((part, everything) for part in _parts(out, width))


def _parts(count: int, each: int) -> Iterator[slice]:
    """``count`` rows of ``each`` entries in parts of much the same size."""
    most = max(1, CHUNK // max(1, each))
    step = max(1, -(-count // max(1, -(-count // most))))
    yield from (slice(start, start + step) for start in range(0, count, step))


def _is_turned(matrix: Tensor) -> bool:
    return matrix.stride(0) == 1 and matrix.stride(1) != 1


def _stored(matrix: Tensor) -> Tensor:
    """The matrix as it lies in memory: turned around, where its columns lie in a row."""
    return matrix.T if _is_turned(matrix) else matrix


def _places(mask: Tensor) -> Tensor:
    """Where ``mask [n]`` is true, in order; few places are found by numpy in a quarter of torch's time."""
    if mask.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.nonzero().flatten()
