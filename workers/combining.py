"""The two ways to combine task vectors that have been thinned out: add them, or let signs be elected first."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from service.contract.methods import Combine

CHUNK = 1 << 16  # entries


def combine(task_vectors: Sequence[Tensor], weights: Sequence[float], how: Combine) -> Tensor:
    """The weighted sum (``linear``), or the weighted mean of entries that agree with an elected sign (``ties``)."""
    return agreed_mean(task_vectors, weights) if how == "ties" else weighted_sum(task_vectors, weights)


def weighted_sum(task_vectors: Sequence[Tensor], weights: Sequence[float], scaling: float = 1.0) -> Tensor:
    """scaling * sum_k weight_k * T_k, added in the order of the tasks. Any shape."""
    total = task_vectors[0] * (scaling * weights[0])
    for task_vector, weight in zip(task_vectors[1:], weights[1:], strict=True):
        total.add_(task_vector, alpha=scaling * weight)
    return total


def weighted_mean(task_vectors: Sequence[Tensor], weights: Sequence[float], scaling: float = 1.0) -> Tensor:
    """scaling * sum_k weight_k * T_k / sum_k weight_k, added in the order of the tasks. Any shape."""
    return weighted_sum(task_vectors, weights, scaling / sum(weights))


def agreed_mean(
    task_vectors: Sequence[Tensor], weights: Sequence[float], votes: Sequence[float] | None = None
) -> Tensor:
    """Per entry, the weighted mean over the tasks that are not zero there and have the elected sign. Any shape.

    The sign of an entry is that of the sum weighted with ``votes``, or else with ``weights``; where the tasks cancel
    exactly, none is elected and the entry is 0: the election and disjoint mean of TIES-Merging (arXiv:2306.01708).
    """
    flat = [task_vector.reshape(-1) for task_vector in task_vectors]
    merged = torch.empty_like(flat[0])
    # What fits into the cache is read from memory once; a GPU is slowed down by small pieces.
    size = CHUNK if merged.device.type == "cpu" else max(1, merged.numel())
    for first in range(0, merged.numel(), size):
        part = slice(first, first + size)
        merged[part] = _agreed([vector[part] for vector in flat], weights, weights if votes is None else votes)
    return merged.view(task_vectors[0].shape)


def _agreed(parts: Sequence[Tensor], weights: Sequence[float], votes: Sequence[float]) -> Tensor:
    elected = weighted_sum(parts, votes).sign_()
    total, weight_there = torch.zeros_like(elected), torch.zeros_like(elected)
    for part, weight in zip(parts, weights, strict=True):
        agreeing = (part * elected).clamp_min_(0)  # the magnitude, or 0 where the sign is another
        total.add_(agreeing, alpha=weight)
        weight_there.add_(agreeing.sign_(), alpha=weight)
    # Where no task agrees the total is 0, and any divisor will do; this takes a fraction of what masking takes.
    return total.div_(weight_there.clamp_min_(torch.finfo(total.dtype).tiny)).mul_(elected)
