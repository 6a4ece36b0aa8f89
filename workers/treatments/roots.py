"""Square roots of what tasks' inputs look like on average, through which task vectors answer them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from service.contract.treatments import Moments
from workers.statistics import Statistic


@dataclass(frozen=True, eq=False)
class Root:
    """A square root of S_k: ``scale`` times R_k ``[r, in]``, or for one-hot inputs ``weights [r]`` per index seen."""

    weights: Tensor
    scale: float = 1.0
    indices: Tensor | None = None

    @property
    def rows(self) -> int:
        return self.weights.shape[0]

    def answer(self, columns: Tensor) -> Tensor:
        """T R_k^T ``[out, r]`` for T ``[out, in]``."""
        if self.indices is None:
            return (columns @ self.weights.T).mul_(self.scale)
        # An embedding lies turned around, so that what was seen lies in rows.
        return (columns.T.index_select(0, self.indices) * self.weights[:, None]).T


def root_of(statistic: Statistic, moments: Moments, *, like: Tensor) -> Root:
    """The root of a statistic on the device and in the type of ``like``; its mean per row, or its sum."""
    divisor = statistic.rows if moments == "mean" else 1
    if statistic.diagonal is None:
        return Root(statistic.held.to(like), statistic.scale / math.sqrt(divisor))
    diagonal = statistic.diagonal.to(like.device, torch.float64) / divisor
    seen = diagonal.nonzero().flatten()
    return Root(diagonal[seen].sqrt().to(like.dtype), indices=seen)
