"""Adds task vectors up, without the entries that too few tasks care for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from service.contract.methods import Consensus
from workers.combining import weighted_sum
from workers.context import Context


def merge(
    task_vectors: Sequence[Tensor],
    weights: Sequence[float],
    params: Consensus,
    context: Context,  # noqa: ARG001 (every method is called alike)
) -> Tensor:
    """scaling * c * sum_k V_k, V_k = weight_k * T_k: Consensus Merging by TALL masks (arXiv:2405.07813). Any shape.

    Task k cares for an entry where |V_k| >= threshold * |sum_i V_i - V_k|; the mask c is 1 where at least ``agreeing``
    tasks do, or all, where there are fewer.
    """
    total = weighted_sum(task_vectors, weights)
    caring = torch.zeros_like(total, dtype=torch.uint8)
    for task_vector, weight in zip(task_vectors, weights, strict=True):
        own = task_vector * weight
        caring += own.abs() >= (total - own).abs_().mul_(params.threshold)
    return total.mul_(caring >= min(params.agreeing, len(task_vectors))).mul_(params.scaling)
