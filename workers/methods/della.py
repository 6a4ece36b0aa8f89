"""Drops entries at random, small ones of a row rather than large ones; rescales, elects signs, averages."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from service.contract.methods import Della
from workers.combining import combine, l1_ratios
from workers.context import Context
from workers.draws import STEPS, draws
from workers.pieces import Pieces

DIGIT_BITS = 16  # numpy sorts whole numbers of so many bits by counting, in the same time whatever the row's length


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
    last = (limits - 1).astype(np.uint16)
    chances = limits / STEPS if params.rescale == "density" else np.ones_like(limits)
    factors = (1 / chances).astype(np.float32 if task_vectors[0].dtype == torch.float32 else np.float64)
    return [
        _by_place(np.multiply(_drawn(rows, context, task) <= last, factors), rows).mul_(rows)
        for rows, task in zip(task_vectors, context.tasks, strict=True)
    ]


def _drawn(rows: Tensor, context: Context, task: str) -> np.ndarray:
    """A number below STEPS for every place ``[m, n]``."""
    blocks = [block for _, block in draws(rows.numel(), context.seed, context.parameter, task, context.first)]
    return (blocks[0] if len(blocks) == 1 else np.concatenate(blocks)).reshape(rows.shape)


def _limits(count: int, params: Della) -> np.ndarray:
    """Chances to be kept by rank ``[n]``, the largest entry's first, as numbers of STEPS."""
    chances = params.density + params.epsilon / 2 - params.epsilon * (np.arange(count) + 0.5) / count
    return np.clip(np.rint(chances * STEPS), 1, STEPS)


def _by_place(by_rank: np.ndarray, rows: Tensor) -> Tensor:
    """What is given for each rank ``[m, n]``, where the entry of that rank in its row of ``rows`` lies.

    The largest magnitude in float32 comes first, among equals the lower column.
    """
    given = torch.from_numpy(by_rank).to(rows.device)
    if rows.device.type != "cpu":
        order = rows.abs().float().sort(dim=1, descending=True, stable=True).indices
        return torch.empty_like(given).scatter_(1, order, given)
    # The bits of a positive float are ordered as it is. Turned around, so that the largest comes first, they are sorted
    # digit by digit, the lower one first, and equals stay as they were.
    bits = ~rows.abs().float().contiguous().numpy().view(np.uint32)
    lower = _order(bits.astype(np.uint16))
    upper = torch.from_numpy((bits >> DIGIT_BITS).astype(np.uint16).view(np.int16)).gather(1, lower)
    by_lower = torch.empty_like(given).scatter_(1, _order(upper.numpy().view(np.uint16)), given)
    return given.scatter_(1, lower, by_lower)


def _order(digits: np.ndarray) -> Tensor:
    return torch.from_numpy(np.argsort(digits, axis=1, kind="stable"))
