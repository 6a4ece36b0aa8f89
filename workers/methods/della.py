"""Drops entries at random, small ones of a row rather than large ones; rescales, elects signs, averages."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from service.contract.methods import Della
from workers.combining import combine, l1_ratios
from workers.context import Context
from workers.draws import STEPS, drawn_mask, key_of
from workers.pieces import Pieces

COLUMN_BITS = 32  # of a number of 64 that the magnitude leaves


def look(pieces: Pieces, weights: Sequence[float], params: Della) -> list[float]:  # noqa: ARG001
    """The factor on what is left of each task vector: from L1 norms over this parameter, or 1."""
    if params.rescale == "density":
        return [1.0] * pieces.tasks
    return l1_ratios(pieces, lambda task_vectors, context: _thinned(task_vectors, params, context))


def merge(task_vectors: Sequence[Tensor], weights: Sequence[float], params: Della, context: Context) -> Tensor:
    """Drop by magnitude, elect, fuse: DELLA-Merging (arXiv:2406.11617), with weights, for rows ``[m, n]``.

    Rows are output units: those of the matrix or matrices for weights, the whole tensor for everything else. In a
    row of n entries the one of rank r, counted from 0 for the largest, is dropped with the chance
    1 - density - epsilon / 2 + epsilon * (r + 1/2) / n; among equals the lower index is the larger. What is kept is
    divided by the chance it had, a multiple of 1 / 65536. Masks are drawn by rank, row after row, from the seed and the
    names of parameter and task.
    """
    thinned = _thinned(task_vectors, params, context)
    return combine(thinned, weights, params.combine, scaling=params.scaling, factors=context.facts)


def _thinned(task_vectors: Sequence[Tensor], params: Della, context: Context) -> list[Tensor]:
    """Rows ``[m, n]`` with what is dropped set to zero, and divided by its chance where that is asked for."""
    limits = _limits(task_vectors[0].shape[1], params)
    chances = limits / STEPS if params.rescale == "density" else np.ones(len(limits))
    factors = (1 / chances).astype(np.float32 if task_vectors[0].dtype == torch.float32 else np.float64)
    return [
        rows.mul_(_by_place(np.multiply(_drawn(rows, limits, task, context), factors), rows))
        for rows, task in zip(task_vectors, context.tasks, strict=True)
    ]


def _drawn(rows: Tensor, limits: np.ndarray, task: str, context: Context) -> np.ndarray:
    return drawn_mask(rows.shape, limits, key_of(context.seed, context.parameter, task), context.first)


def _limits(count: int, params: Della) -> np.ndarray:
    """Chances to be kept by rank ``[n]``, the largest entry's first, as numbers of STEPS."""
    chances = params.density + params.epsilon / 2 - params.epsilon * (np.arange(count) + 0.5) / count
    return np.clip(np.rint(chances * STEPS), 1, STEPS).astype(np.int64)


def _by_place(by_rank: np.ndarray, rows: Tensor) -> Tensor:
    """What is given for each rank ``[m, n]``, where the entry of that rank in its row of ``rows`` lies.

    The largest magnitude in float32 comes first, among equals the lower column.
    """
    given, sizes = torch.from_numpy(by_rank).to(rows.device), rows.abs().float()
    if rows.device.type == "cpu":
        order = torch.from_numpy(_order(sizes.contiguous().numpy()))
    else:
        order = sizes.sort(dim=1, descending=True, stable=True).indices
    return torch.empty_like(given).scatter_(1, order, given)


def _order(sizes: np.ndarray) -> np.ndarray:
    """The columns ``[m, n]`` int64 of each row of ``sizes``, float32 and not negative, the largest first.

    The bits of such floats are ordered as they are. With the column below them they make one number for each entry, no
    two in a row alike, and numpy sorts plain numbers several times as fast as it finds out an order.
    """
    numbers = sizes.view(np.int32).astype(np.int64)
    numbers <<= COLUMN_BITS
    np.subtract(np.arange(sizes.shape[1]), numbers, out=numbers)
    numbers.sort(axis=1)
    numbers &= (1 << COLUMN_BITS) - 1
    return numbers
