"""Leaves task vectors as they are: for parameters that nothing is known about."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from service.contract.treatments import Keep
from workers.statistics import Statistic
from workers.treatments.outcome import Effect, Removed, Trimmed


def trim(
    task_vectors: Sequence[Tensor],
    statistics: Sequence[Statistic | None],  # noqa: ARG001 (every treatment is called alike)
    params: Keep,  # noqa: ARG001 (every treatment is called alike)
) -> Trimmed:
    """The task vectors themselves, nothing removed and nothing measured. Any shape."""
    nothing = [Removed(scores=_none(t, torch.float64), mask=_none(t, torch.int64)) for t in task_vectors]
    return Trimmed(list(task_vectors), nothing, [Effect() for _ in task_vectors])


def apply_removed(
    task_vectors: Sequence[Tensor],
    removed: Sequence[Removed],  # noqa: ARG001 (every treatment is called alike)
    params: Keep,  # noqa: ARG001 (every treatment is called alike)
) -> list[Tensor]:
    """The task vectors themselves."""
    return list(task_vectors)


def _none(like: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(0, dtype=dtype, device=like.device)
