"""Drops entries at random and makes the others larger, then adds them up or lets signs be elected."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from service.contract.methods import Dare
from workers.combining import combine, l1_ratios
from workers.context import Context
from workers.draws import STEPS, drawn_mask, key_of, steps_of
from workers.pieces import Pieces


def look(pieces: Pieces, weights: Sequence[float], params: Dare) -> list[float]:  # noqa: ARG001
    """The factors that restore the L1 norms over this parameter, where that is asked for."""
    return l1_ratios(pieces, lambda task_vectors, context: _thinned(task_vectors, params, context))


def merge(task_vectors: Sequence[Tensor], weights: Sequence[float], params: Dare, context: Context) -> Tensor:
    """scaling times the combination of T_k * m_k / density, with random masks m_k: DARE (arXiv:2311.03099). Any shape.

    Masks are drawn for the entries in the order of the tensor, from the seed and the names of parameter and task. The
    density is the chance that is really drawn with, a multiple of 1 / 65536, so that the expectation is exact.
    """
    by_chance = [STEPS / steps_of(params.density)] * len(task_vectors)
    factors = by_chance if params.rescale == "density" else context.facts
    thinned = _thinned(task_vectors, params, context)
    return combine(thinned, weights, params.combine, scaling=params.scaling, factors=factors)


def _thinned(task_vectors: Sequence[Tensor], params: Dare, context: Context) -> list[Tensor]:
    return [
        _masked(
            task_vector,
            drawn_mask(
                task_vector.shape,
                steps_of(params.density),
                key_of(context.seed, context.parameter, task),
                context.first,
            ),
        )
        for task_vector, task in zip(task_vectors, context.tasks, strict=True)
    ]


def _masked(task_vector: Tensor, mask: np.ndarray) -> Tensor:
    if task_vector.device.type == "cpu":  # numpy multiplies with a mask in a third of torch's time
        entries = task_vector.numpy()
        np.multiply(entries, mask, out=entries)
        return task_vector
    return task_vector.mul_(torch.from_numpy(mask).to(task_vector.device))
