"""Takes the mean of checkpoints on the sphere: slerp for any number of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from service.contract.methods import Karcher
from workers.angles import inner_products
from workers.combining import weighted_mean
from workers.context import Context

ROUNDING = 1e-12  # a sum of coefficients this near to 1 is 1


def merge(task_vectors: Sequence[Tensor], weights: Sequence[float], params: Karcher, context: Context) -> Tensor:
    """The Riemannian center of mass of the checkpoints' directions times their mean length, minus W0. Any shape.

    Karcher 1977, each tensor as one vector. The mean lies in the span of the checkpoints, so that the iteration runs
    on coefficients and cosines alone, and tensors are read twice whatever the number of steps. Where a checkpoint is
    zero, or they cancel, there is no direction, and the result is the weighted mean.
    """
    products = inner_products(task_vectors, context.base)
    lengths = products.diagonal().sqrt()
    shares = torch.tensor(weights, dtype=torch.float64)
    shares = shares / shares.sum()
    found = _center(products / torch.outer(lengths, lengths), shares, params) if bool((lengths > 0).all()) else None
    if found is None:
        return weighted_mean(task_vectors, weights)
    factors = found * (shares @ lengths) / lengths
    drift = float(factors.sum() - 1)
    merged = context.base * (drift if abs(drift) > ROUNDING else 0.0)
    for task_vector, factor in zip(task_vectors, factors.tolist(), strict=True):
        merged.add_(task_vector, alpha=factor)
    return merged


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
