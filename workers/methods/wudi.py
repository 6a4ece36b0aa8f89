"""Finds the task vector that interferes least with the inputs that the tasks' own vectors stand for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from service.contract.methods import MATRICES, Wudi
from workers.combining import weighted_mean, weighted_sum
from workers.context import Context
from workers.factoring import least_squares
from workers.products import product

# Adam's own constants, as its paper has them.
FIRST_DECAY, SECOND_DECAY, EPSILON = 0.9, 0.999, 1e-8


def merge(task_vectors: Sequence[Tensor], weights: Sequence[float], params: Wudi, context: Context) -> Tensor:
    """scaling * argmin_T sum_k weight_k ||(T - T_k) T_k^T||^2 / ||T_k||^2: WUDI-Merging (arXiv:2503.08099).

    For linear weights and convolutions; other tensors are averaged. ``iterative`` takes Adam's steps from the weighted
    sum, as the paper does, and stays near it; ``closed`` is the smallest T that reaches the minimum.
    """
    matrices = context.matrices(task_vectors, MATRICES)
    if matrices is None:
        return weighted_mean(task_vectors, weights, params.scaling)
    norms = [float(torch.linalg.vector_norm(matrix.double(), dim=-1).norm()) ** 2 for matrix in matrices]
    told = [(m, w / norm) for m, w, norm in zip(matrices, weights, norms, strict=True) if norm]
    if not told:
        return torch.zeros_like(task_vectors[0])
    rows = torch.cat([matrix * share**0.5 for matrix, share in told])
    answers = torch.cat([product(matrix.double(), matrix.double().T) * share**0.5 for matrix, share in told], dim=1)
    if params.solver == "closed":
        found = least_squares(answers, rows, params.cutoff)
    else:
        found = _descended(weighted_sum(matrices, weights), rows, answers, params)
    return context.restored(found * params.scaling)


def _descended(start: Tensor, rows: Tensor, answers: Tensor, params: Wudi) -> Tensor:
    """Where Adam gets to from ``start [out, in]`` on ||T R^T - Y||^2; R are ``rows [r, in]``, Y ``answers``."""
    wide = rows.double()
    target = product(answers, wide).to(start.dtype)
    moment = product(wide.T, wide).to(start.dtype)
    point = start.clone(memory_format=torch.contiguous_format)
    first, second = torch.zeros_like(point), torch.zeros_like(point)
    for step in range(1, params.steps + 1):
        gradient = product(point, moment).sub_(target).mul_(2)
        first.lerp_(gradient, 1 - FIRST_DECAY)
        second.mul_(SECOND_DECAY).addcmul_(gradient, gradient, value=1 - SECOND_DECAY)
        spread = (second / (1 - SECOND_DECAY**step)).sqrt_().add_(EPSILON)
        point.addcdiv_(first, spread, value=-params.learning_rate / (1 - FIRST_DECAY**step))
    return point
