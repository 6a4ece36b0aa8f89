"""Leading eigenvectors of symmetric matrices from products with them alone; of several matrices at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

FIRST_LOOK = 48  # dimensions, or three blocks, before it pays to look whether anything has converged
FASTER = 0.75  # of the blocks that convergence at the pace so far would take: the pace grows

Times = Callable[[Tensor, Sequence[int]], Tensor]


class Eigenpairs(NamedTuple):
    """``values [c]``, descending, and ``vectors [out, c]``, orthonormal."""

    values: Tensor
    vectors: Tensor


def krylov(
    times: Times, start: Tensor, wanted: int, *, tolerance: float, floors: Sequence[float], limit: int
) -> list[Eigenpairs | None]:
    """The ``wanted`` leading eigenpairs of as many matrices as there are ``floors``, or None where they don't converge.

    Block Lanczos with full reorthogonalization, from the orthonormal rows ``start [b, out]`` (Golub and Underwood,
    1977). ``times`` multiplies ``rows [m, b, out]`` with the m matrices whose numbers it is given. A matrix is done
    when ||G v - value * v|| is at most ``tolerance`` times the magnitude of G's largest eigenvalue for every pair, or
    at most its floor for values no larger than that, and given up when its space would exceed ``limit`` dimensions.
    All go on side by side, since small products cost less together.
    """
    width, size = start.shape
    found: list[Eigenpairs | None] = [None for _ in floors]
    left = list(range(len(floors)))
    space = start.new_empty(len(left), limit, size)
    inside = start.new_zeros(len(left), limit, limit)
    block, check = start.expand(len(left), -1, -1), max(FIRST_LOOK, 3 * width)
    for held in range(width, limit + 1, width):
        space[:, held - width : held] = block
        image = times(block, left)
        block, within, triangles = _orthonormal(image, space[:, :held])
        inside[:, held - width : held, :held] = within
        if held < check and held + width <= limit:
            continue
        values, mix = torch.linalg.eigh(inside[:, :held, :held])
        values, mix = values.flip(1), mix.flip(2)[:, :, :wanted]
        residuals = (triangles[1] @ (triangles[0] @ mix[:, -width:])).norm(dim=1)
        excess = (residuals / _allowed(values, tolerance, [floors[k] for k in left], wanted)).amax(1).tolist()
        for place, k in enumerate(left):
            if excess[place] <= 1:
                found[k] = Eigenpairs(values[place, :wanted], (mix[place].T @ space[place, :held]).T)
        places = [place for place in range(len(left)) if not excess[place] <= 1]
        if not places:
            break
        if len(places) < len(left):
            left, block = [left[place] for place in places], block[places]
            space, inside = _moved_up(space, places, held), _moved_up(inside, places, held)
        check = held + _blocks_to_go(held // width, max(excess[place] for place in places), tolerance) * width
    return found


def first_rows(like: Tensor, width: int) -> Tensor:
    """Orthonormal rows ``[width, out]`` to begin an iteration with, for columns ``like [out, r]``."""
    # Chirps of different rates overlap with everything and need no random numbers.
    places = torch.arange(1, len(like) + 1, dtype=torch.float64, device=like.device)
    rates = torch.arange(1, width + 1, dtype=torch.float64, device=places.device).sqrt()
    rows = torch.cos(rates[:, None] * places.square()).to(like.dtype)
    orthonormal: Tensor = torch.linalg.qr(rows.T).Q
    return orthonormal.T.contiguous()


def _orthonormal(image: Tensor, space: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Rows Q, orthonormal and orthogonal to ``space``'s; ``image`` in terms of the space's rows, and of Q: R1^T R2^T Q.

    Twice, since rounding spoils the first time, and what vanished the first time is noise that needs the second.
    """
    within = image @ space.mT
    once, first = torch.linalg.qr(torch.baddbmm(image, within, space, alpha=-1).mT)
    again = torch.baddbmm(once.mT, once.mT @ space.mT, space, alpha=-1)
    turned, second = torch.linalg.qr(again.mT)
    return turned.mT, within, (first, second)


def _moved_up(stack: Tensor, places: Sequence[int], held: int) -> Tensor:
    """Those at some places of a stack, of each so many rows, where they lie in the memory of those that are done."""
    for new, old in enumerate(places):
        if new != old:
            stack[new, :held] = stack[old, :held]
    return stack[: len(places)]


def _allowed(values: Tensor, tolerance: float, floors: Sequence[float], wanted: int) -> Tensor:
    """How large residuals ``[m, wanted]`` may be."""
    scales = tolerance * values.abs().amax(1, keepdim=True)
    least = torch.tensor(floors, dtype=values.dtype, device=values.device)[:, None]
    return torch.where(values[:, :wanted] <= least, torch.maximum(scales, least), scales)


def _blocks_to_go(done: int, excess: float, tolerance: float) -> int:
    """After how many blocks to look again, where residuals exceed what is allowed so many times."""
    if not math.isfinite(excess):
        return 1
    begun = math.log(1 / tolerance)
    pace = max(begun - math.log(excess), 1e-3) / done
    return max(1, min(math.ceil(FASTER * math.log(excess) / pace), done))
