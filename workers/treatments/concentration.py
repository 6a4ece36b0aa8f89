"""Asks how much of what task vectors answer is told by their few largest entries alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from service.contract.treatments import Projection, ScaleMask
from workers.magnitudes import cut_at, largest
from workers.statistics import Statistic
from workers.threads import one_thread, shared_out
from workers.treatments.outcome import LARGE_SHARE, energy, known
from workers.treatments.roots import Root, root_of


@dataclass(frozen=True)
class Concentration:
    """One task vector with zeros in place of all but its largest 1 % of entries (one at least, ties to the first).

    ``energy`` is the sum of its squares, and ``responses`` are the second moments of its response to every task's
    inputs, in the tasks' order.
    """

    energy: float
    responses: tuple[float, ...]


def concentrations(
    task_vectors: Sequence[Tensor], statistics: Sequence[Statistic | None], params: Projection | ScaleMask
) -> list[Concentration]:
    """The concentration of matrices ``[out, in]``, stacked ones ``[blocks, out, in]``, or a scale's entries ``[d]``.

    The largest 1 % are those of the whole parameter, stacked or not.

    Raises:
        BadInput: a statistic is missing, empty or of another width.
    """
    usable = known(statistics, tasks=len(task_vectors), width=task_vectors[0].shape[-1])
    with one_thread() as threads:
        return shared_out(lambda vector: _concentration(vector, usable, params), task_vectors, threads)


def largest_entries(vector: Tensor) -> Tensor:
    """``vector`` with zeros in place of all but its largest 1 % of entries; any shape."""
    flat = vector.reshape(-1)
    count = max(1, math.floor(LARGE_SHARE * flat.numel() + 0.5))
    return largest(flat, cut_at(flat.abs(), count)).view(vector.shape)


def _concentration(vector: Tensor, statistics: Sequence[Statistic], params: Projection | ScaleMask) -> Concentration:
    few = largest_entries(vector)
    if isinstance(params, ScaleMask):
        moments = [_mean(statistic, params).to(few.device) for statistic in statistics]
        responses = [float((few.double().square() * moment).sum()) for moment in moments]
    elif few.dim() == 2:
        responses = _responses(few, [root_of(statistic, params.moments, like=few) for statistic in statistics])
    else:
        responses = [_stacked_response(few, statistic) for statistic in statistics]
    return Concentration(energy(few), tuple(responses))


def _mean(statistic: Statistic, params: ScaleMask) -> Tensor:
    divisor = statistic.rows if params.moments == "mean" else 1
    return statistic.held.double() / divisor


def _responses(few: Tensor, roots: Sequence[Root]) -> list[float]:
    """Where nearly all entries are zeros, a product of the others takes a fraction of the time."""
    sparse = few.to_sparse()
    return [
        energy(torch.sparse.mm(sparse, root.weights.T)) * root.scale**2
        if root.indices is None
        else energy(root.answer(few))
        for root in roots
    ]


def _stacked_response(few: Tensor, statistic: Statistic) -> float:
    """Over all blocks, each with the mean of its own inputs; one that saw none answers nothing."""
    blocks = [statistic.block(index) for index in range(len(statistic.block_rows))]
    return sum(
        _responses(matrix, [root_of(block, "mean", like=matrix)])[0]
        for matrix, block in zip(few, blocks, strict=True)
        if block.rows
    )
