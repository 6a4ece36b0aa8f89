"""Walks on the great circle from one checkpoint to another."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from service.contract.methods import Slerp
from workers.angles import vector_products
from workers.context import Context
from workers.pieces import Pieces

LEAST_SINE = 1e-6  # below it the arc is straight, or leads through the opposite point and has no direction


def look(pieces: Pieces, weights: Sequence[float], params: Slerp) -> tuple[float, float, float]:
    """Factors of the two ends' task vectors and of the base. With one task the first end is the base."""
    is_alone = pieces.tasks == 1
    shares = [0.5, 0.5] if is_alone else weights
    t = shares[1] / sum(shares) if params.t is None else params.t
    return _coefficients(*_triangle(vector_products(pieces, with_base=True), is_alone), t)


def merge(
    task_vectors: Sequence[Tensor],
    weights: Sequence[float],  # noqa: ARG001 (every method is called alike)
    params: Slerp,  # noqa: ARG001
    context: Context,
) -> Tensor:
    """(sin((1 - t) a) W_1 + sin(t a) W_2) / sin a - W0, a being the angle between the checkpoints. Any shape.

    Shoemake 1985, with each tensor as one vector. With one task W_1 is the base. Where the sine is nearly zero the way
    is straight.
    """
    factors: tuple[float, float, float] = context.facts
    first, second, drift = factors
    # W_1 and W_2 are never formed: of two nearly equal checkpoints only the difference matters.
    merged = task_vectors[-1] * second
    if len(task_vectors) > 1:
        merged.add_(task_vectors[0], alpha=first)
    return merged.add_(context.base, alpha=drift)


def _triangle(products: Tensor, is_alone: bool) -> tuple[float, float, float]:
    """Squared length of W_1, its product with D = W_2 - W_1, and the squared length of D; of base and task vectors."""
    sides = torch.tensor([[1.0, 0.0], [0.0, 1.0]] if is_alone else [[1.0, 1.0, 0.0], [0.0, -1.0, 1.0]])
    found = sides.double() @ products @ sides.double().T
    return float(found[0, 0]), float(found[0, 1]), float(found[1, 1])


def _coefficients(start: float, along: float, way: float, t: float) -> tuple[float, float, float]:
    """Factors of W_1 and of W_2, and by how much their sum exceeds 1.

    The sine comes from the part of D that is at right angles to W_1: of two nearly parallel checkpoints, products of
    their own would leave it to rounding.
    """
    end = start + 2 * along + way
    length = math.sqrt(start * end) if end > 0 else 0.0
    sine = math.sqrt(max(0.0, start * way - along * along)) / length if length else 0.0
    if sine < LEAST_SINE:
        return 1 - t, t, 0.0
    angle = math.atan2(sine, (start + along) / length)
    first, second = math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
    return first, second, first + second - 1
