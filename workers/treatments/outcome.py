"""What a treatment hands back: the trimmed task vectors, what was taken from them, and what that did."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from service.contract.errors import BadInput
from workers.magnitudes import kth_largest
from workers.statistics import Statistic

LARGE_SHARE = 0.01  # "large" entries are the largest 1 % by magnitude


@dataclass(frozen=True, eq=False)
class Removed:
    """What was removed on one task's behalf from every other task's vector.

    ``scores [c]`` are the eigenvalues or scores, descending. ``basis [out, c]`` holds the removed output directions, or
    ``mask [c]`` (int64) the removed entries' indices into the flattened parameter.
    """

    scores: Tensor
    basis: Tensor | None = None
    mask: Tensor | None = None

    def __post_init__(self) -> None:
        if (self.basis is None) == (self.mask is None):
            raise BadInput("what was removed is either a basis or a mask, and not both")

    @property
    def count(self) -> int:
        """How many directions or entries were removed."""
        return len(self.scores)

    @property
    def directions(self) -> Tensor:
        """The basis, ``[out, c]``.

        Raises:
            BadInput: entries were removed, not directions.
        """
        if self.basis is None:
            raise BadInput("entries were removed here, not directions")
        return self.basis

    @property
    def entries(self) -> Tensor:
        """The mask, ``[c]``.

        Raises:
            BadInput: directions were removed, not entries.
        """
        if self.mask is None:
            raise BadInput("directions were removed here, not entries")
        return self.mask


@dataclass(frozen=True)
class Effect:
    """What trimming did to one task's vector; None where there is nothing to measure.

    ``energy`` is ||before||^2, and ``energy_removed`` ||before - after||^2 as a share of it. ``conflict_before`` and
    ``conflict_after`` sum, over the other tasks k, the second moment of the vector's response to task k's inputs.
    ``own_response_lost`` is the share of its response to its own inputs that is gone, ``large_share`` the share of the
    removed energy that sat in its largest 1 % of entries. ``responses`` are the second moments of the vector's response
    to every task's inputs, its own among them, and ``responses_left`` those of what trimming left of it.
    """

    energy_removed: float = 0.0
    conflict_before: float | None = None
    conflict_after: float | None = None
    own_response_lost: float | None = None
    large_share: float | None = None
    energy: float | None = None
    responses: tuple[float, ...] = ()
    responses_left: tuple[float, ...] = ()


@dataclass(frozen=True, eq=False)
class Trimmed:
    """The outcome of one parameter's treatment: each list has one item per task, in the recipe's order."""

    task_vectors: list[Tensor]
    removed: list[Removed]
    effects: list[Effect]


def energy(x: Tensor) -> float:
    """The sum of squares."""
    # Row by row: one pass, nothing allocated, and float32 sums stay short enough to be accurate.
    return float(torch.linalg.vector_norm(x, dim=-1).double().square().sum())


def share(part: float, whole: float) -> float:
    """``part / whole``, and 0 where there is no whole to take a part of."""
    return part / whole if whole > 0 else 0.0


def large_share(before: Tensor, gone: Tensor) -> float | None:
    """The share of the energy of ``gone`` that sits in the largest 1 % of the entries of ``before``, ties included."""
    total = energy(gone)
    if total == 0:
        return None
    sizes = before.abs().flatten()
    count = max(1, math.floor(LARGE_SHARE * sizes.numel() + 0.5))
    threshold = kth_largest(sizes, count)
    return energy(gone.flatten()[sizes >= threshold]) / total


def norm_factor(before: Tensor, after: Tensor, *, restore: bool) -> float:
    """The factor that gives ``after`` the norm of ``before``; 1 where that is not asked for.

    Where nothing but rounding noise is left there is no direction to rescale, and the factor is 0.
    """
    if not restore:
        return 1.0
    old, new = math.sqrt(energy(before)), math.sqrt(energy(after))
    return old / new if new > 64 * torch.finfo(after.dtype).eps * old else 0.0


def known(statistics: Sequence[Statistic | None], *, tasks: int, width: int) -> list[Statistic]:
    """The statistics, once it is certain that there is one per task, that each saw something, and that all fit.

    Raises:
        BadInput: a statistic is missing, has no rows, or has another width than the parameter.
    """
    found = [s for s in statistics if s is not None and s.rows > 0]
    if len(found) != tasks:
        raise BadInput(f"{len(found)} of {tasks} tasks have a statistic with rows for this parameter")
    misfits = sorted({s.width for s in found} - {width})
    if misfits:
        raise BadInput(f"a statistic is {misfits[0]} wide and the parameter's inputs are {width} wide")
    return found


def check_alike(task_vectors: Sequence[Tensor], *, dimensions: int | None = None) -> None:
    """Make sure that there are task vectors, of one shape, all in float32 or all in float64.

    Raises:
        BadInput: they are not, or they don't have the given number of ``dimensions``.
    """
    kinds = {(t.shape, t.dtype) for t in task_vectors}
    if len(kinds) != 1:
        raise BadInput(f"the task vectors of one parameter have {len(kinds)} different shapes or types")
    shape, dtype = next(iter(kinds))
    if dtype not in (torch.float32, torch.float64):
        raise BadInput(f"task vectors are trimmed in float32 or float64, not {dtype}")
    if dimensions is not None and len(shape) != dimensions:
        raise BadInput(f"a task vector of shape {list(shape)} where {dimensions} dimensions are needed")
