"""Walks on the great circle from one checkpoint to another."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from service.contract.methods import Slerp
from workers.angles import inner_products
from workers.context import Context

LEAST_SINE = 1e-6  # below it the arc is straight, or leads through the opposite point and has no direction


def merge(task_vectors: Sequence[Tensor], weights: Sequence[float], params: Slerp, context: Context) -> Tensor:
    """(sin((1 - t) a) W_1 + sin(t a) W_2) / sin a - W0, a being the angle between the checkpoints. Any shape.

    Shoemake 1985, with each tensor as one vector. With one task W_1 is the base. Where the sine is nearly zero the way
    is straight.
    """
    if len(task_vectors) == 1:
        ends, shares = [torch.zeros_like(task_vectors[0]), task_vectors[0]], [0.5, 0.5]
    else:
        ends, shares = list(task_vectors), list(weights)
    t = shares[1] / sum(shares) if params.t is None else params.t
    first, second, drift = _coefficients(inner_products(ends, context.base), t)
    # W_1 and W_2 are never formed: of two nearly equal checkpoints only the difference matters.
    return ends[0].mul(first).add_(ends[1], alpha=second).add_(context.base, alpha=drift)


def _coefficients(products: Tensor, t: float) -> tuple[float, float, float]:
    """Factors of W_1 and of W_2, and by how much their sum exceeds 1."""
    length = math.sqrt(float(products[0, 0]) * float(products[1, 1]))
    angle = math.acos(max(-1.0, min(1.0, float(products[0, 1]) / length))) if length else 0.0
    if math.sin(angle) < LEAST_SINE:
        return 1 - t, t, 0.0
    first, second = math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
    return first, second, first + second - 1
