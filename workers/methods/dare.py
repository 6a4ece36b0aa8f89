"""Drops entries at random and makes the others larger, then adds them up or lets signs be elected."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from service.contract.methods import Dare
from workers.combining import combine
from workers.context import Context
from workers.draws import STEPS, drawn_mask, steps_of


def merge(task_vectors: Sequence[Tensor], weights: Sequence[float], params: Dare, context: Context) -> Tensor:
    """scaling times the combination of T_k * m_k / density, with random masks m_k: DARE (arXiv:2311.03099). Any shape.

    Masks are drawn for the entries in the order of the tensor, from the seed and the names of parameter and task. The
    density is the chance that is really drawn with, a multiple of 1 / 65536, so that the expectation is exact.
    """
    thinned = [
        _thinned(task_vector, params, context, task)
        for task_vector, task in zip(task_vectors, context.tasks, strict=True)
    ]
    return combine(thinned, weights, params.combine).mul_(params.scaling)


def _thinned(task_vector: Tensor, params: Dare, context: Context, task: str) -> Tensor:
    mask = drawn_mask(task_vector.numel(), params.density, context.seed, context.parameter, task, context.first)
    kept = mask.to(task_vector.device).view(task_vector.shape).to(task_vector.dtype).mul_(task_vector)
    if params.rescale == "density":
        return kept.mul_(STEPS / steps_of(params.density))
    return kept.mul_(_l1_ratio(task_vector, kept))


def _l1_ratio(before: Tensor, after: Tensor) -> float:
    left = float(after.double().abs().sum())
    return float(before.double().abs().sum()) / left if left else 0.0
