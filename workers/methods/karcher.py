"""Takes the mean of checkpoints on the sphere: slerp for any number of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from service.contract.methods import Karcher
from workers.angles import inner_products
from workers.combining import weighted_sum
from workers.context import Context
from workers.pieces import Pieces

ROUNDING = 1e-12  # a sum of coefficients this near to 1 is 1


@dataclass(frozen=True)
class Factors:
    """What each task vector and the base are multiplied with."""

    tasks: list[float]
    base: float


def look(pieces: Pieces, weights: Sequence[float], params: Karcher) -> Factors:
    """The factors of the mean, from inner products alone.

    The mean lies in the span of the checkpoints, so that the iteration runs on coefficients and cosines, and tensors
    are read twice whatever the number of steps.
    """
    products = inner_products(pieces)
    lengths = products.diagonal().sqrt()
    shares = torch.tensor(weights, dtype=torch.float64)
    shares = shares / shares.sum()
    found = _center(products / torch.outer(lengths, lengths), shares, params) if bool((lengths > 0).all()) else None
    if found is None:
        return Factors(shares.tolist(), 0.0)
    factors = found * (shares @ lengths) / lengths
    drift = float(factors.sum() - 1)
    return Factors(factors.tolist(), drift if abs(drift) > ROUNDING else 0.0)


def merge(
    task_vectors: Sequence[Tensor],
    weights: Sequence[float],  # noqa: ARG001 (every method is called alike)
    params: Karcher,  # noqa: ARG001
    context: Context,
) -> Tensor:
    """The Riemannian center of mass of the checkpoints' directions times their mean length, minus W0. Any shape.

    Karcher 1977, each tensor as one vector. Where a checkpoint is zero, or they cancel, there is no direction, and the
    result is the weighted mean.
    """
    factors: Factors = context.facts
    merged = weighted_sum(task_vectors, factors.tasks)
    return merged.add_(context.base, alpha=factors.base) if factors.base else merged


def _center(cosines: Tensor, shares: Tensor, params: Karcher) -> Tensor | None:
    """Coefficients ``[K]`` of the mean direction in the checkpoints' directions; None where they cancel."""
    center = shares
    for _ in range(params.steps):
        length = float((center @ cosines @ center).clamp_min(0).sqrt())
        if length < ROUNDING:
            return None
        center = center / length
        across = (cosines @ center).clamp(-1, 1)
        angles = across.acos()
        pull = shares * torch.where(angles > 0, angles / angles.sin(), 1.0)
        step = pull - (pull @ across) * center
        size = float((step @ cosines @ step).clamp_min(0).sqrt())
        if size < params.tolerance:
            break
        center = torch.cos(torch.tensor(size)) * center + torch.sin(torch.tensor(size)) / size * step
    return center
