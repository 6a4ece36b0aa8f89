"""What the tasks' statistics say about a weight together, in the forms that closed solutions take them in."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from service.contract.errors import BadInput
from service.contract.treatments import Moments
from workers.statistics import Statistic


def usable(statistics: Sequence[Statistic | None], width: int, parameter: str) -> list[Statistic] | None:
    """The statistics, if every task has seen inputs of this parameter; None where one has not.

    Raises:
        BadInput: a statistic is not ``width`` wide.
    """
    known = [statistic for statistic in statistics if statistic is not None and statistic.rows]
    for statistic in known:
        if statistic.width != width:
            raise BadInput(
                f"the statistics of {parameter!r} are {statistic.width} wide, but its inputs are {width} wide",
                tensor=parameter,
            )
    return known if len(known) == len(statistics) else None


def diagonals(statistics: Sequence[Statistic], weights: Sequence[float], moments: Moments) -> Tensor | None:
    """The diagonals ``[K, in]`` of weight_k * S_k, float64, if every statistic is a diagonal."""
    held = [statistic.diagonal for statistic in statistics]
    if any(diagonal is None for diagonal in held):
        return None
    shares = [_share(statistic, weight, moments) for statistic, weight in zip(statistics, weights, strict=True)]
    rows = [d.double() * share for d, share in zip(held, shares, strict=True) if d is not None]
    return torch.stack(rows)


def roots(
    statistics: Sequence[Statistic], weights: Sequence[float], moments: Moments, device: torch.device
) -> list[Tensor]:
    """R_k ``[r_k, in]`` with R_k^T R_k = weight_k * S_k, float64."""
    return [
        _factor(statistic).to(device, torch.float64) * math.sqrt(_share(statistic, weight, moments))
        for statistic, weight in zip(statistics, weights, strict=True)
    ]


def weighted_by_entry(task_vectors: Sequence[Tensor], importance: Tensor, weights: Sequence[float]) -> Tensor:
    """Per entry of the last dimension, the mean of the task vectors weighted with ``importance [K, in]``, in float64.

    Entries that are of no importance to any task get the mean with the tasks' weights: no value is better there.
    """
    importance = importance.to(task_vectors[0].device)
    plain = torch.tensor(weights, dtype=torch.float64, device=importance.device)[:, None].expand_as(importance)
    shares = torch.where(importance.sum(0) > 0, importance, plain)
    shares = shares / shares.sum(0)
    merged = torch.zeros_like(task_vectors[0], dtype=torch.float64)
    for task_vector, share in zip(task_vectors, shares, strict=True):
        merged.addcmul_(task_vector.double(), share)
    return merged


def _share(statistic: Statistic, weight: float, moments: Moments) -> float:
    return weight / statistic.rows if moments == "mean" else weight


def _factor(statistic: Statistic) -> Tensor:
    return statistic.held if statistic.diagonal is None else torch.diag(statistic.held.double().sqrt())
