"""Drops entries at random, small ones of a row rather than large ones; rescales, elects signs, averages."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from service.contract.methods import Della
from workers.combining import combine
from workers.context import Context
from workers.draws import STEPS, draws

ROW_BLOCK_ENTRIES = 1 << 20  # so many entries are ranked at a time, in whole rows


def merge(task_vectors: Sequence[Tensor], weights: Sequence[float], params: Della, context: Context) -> Tensor:
    """Drop by magnitude, elect, fuse: DELLA-Merging (arXiv:2406.11617), with weights. Any shape.

    Rows are output units: those of the matrix or matrices for weights, the whole tensor for everything else. In a
    row of n entries the one of rank r, counted from 0 for the largest, is dropped with the chance
    1 - density - epsilon / 2 + epsilon * (r + 1/2) / n; among equals the lower index is the larger. What is kept is
    divided by the chance it had, a multiple of 1 / 65536. Masks are drawn by rank, row after row, from the seed and the
    names of parameter and task.
    """
    matrices, stacks = context.matrices(task_vectors), context.stacks(task_vectors)
    shaped = matrices or stacks or [task_vector.reshape(1, -1) for task_vector in task_vectors]
    thinned = [
        _thinned(each.reshape(-1, each.shape[-1]), params, context, task)
        for each, task in zip(shaped, context.tasks, strict=True)
    ]
    merged = combine(thinned, weights, params.combine).mul_(params.scaling).view(shaped[0].shape)
    if matrices:
        return context.restored(merged)
    return context.unstacked(merged) if stacks else merged.reshape(context.base.shape)


def _thinned(rows: Tensor, params: Della, context: Context, task: str) -> Tensor:
    """``rows [m, n]`` with what is dropped set to zero, and rescaled."""
    limits = _limits(rows.shape[1], params)
    drawn = np.empty(rows.numel(), dtype=np.uint16)
    for place, numbers in draws(rows.numel(), context.seed, context.parameter, task):
        drawn[place] = numbers
    is_kept = torch.from_numpy(drawn.reshape(rows.shape) <= (limits - 1).astype(np.uint16))
    factors = torch.from_numpy(STEPS / limits if params.rescale == "density" else np.ones_like(limits)).to(rows)
    thinned = torch.empty_like(rows, memory_format=torch.contiguous_format)
    block = max(1, ROW_BLOCK_ENTRIES // rows.shape[1])
    for first in range(0, rows.shape[0], block):
        part = slice(first, first + block)
        by_rank = is_kept[part].to(rows).mul_(factors)
        torch.mul(rows[part], torch.empty_like(by_rank).scatter_(1, _ranked(rows[part]), by_rank), out=thinned[part])
    return thinned if params.rescale == "density" else thinned.mul_(_l1_ratio(rows, thinned))


def _limits(count: int, params: Della) -> np.ndarray:
    """Chances to be kept by rank ``[n]``, the largest entry's first, as numbers of STEPS."""
    chances = params.density + params.epsilon / 2 - params.epsilon * (np.arange(count) + 0.5) / count
    return np.clip(np.rint(chances * STEPS), 1, STEPS)


def _ranked(rows: Tensor) -> Tensor:
    """For each row of ``rows [m, n]`` the columns of its entries, the largest magnitude first, ``[m, n]`` int64."""
    columns = torch.arange(rows.shape[1], device=rows.device)
    # The bits of a positive float are ordered as it is; below them the column breaks ties. One sort of whole numbers.
    keys = rows.abs().float().contiguous().view(torch.int32).long().mul_(1 << 32).add_(columns.flip(0))
    if keys.device.type == "cpu":
        keys.numpy().sort(axis=1)
    else:
        keys = keys.sort(dim=1).values
    return keys.flip(1).bitwise_and_(0xFFFFFFFF).neg_().add_(rows.shape[1] - 1)


def _l1_ratio(before: Tensor, after: Tensor) -> float:
    left = float(after.double().abs().sum())
    return float(before.double().abs().sum()) / left if left else 0.0
