"""Task vectors that are known as products of two thin matrices, as LoRA adapters have them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class LowRankVector:
    """scale * B A, for a parameter of ``shape``: ``down`` is A ``[r, in]``, ``up`` B ``[out, r]`` (arXiv:2106.09685).

    A convolution's A is ``[r, in, ...]`` and its B ``[out, r, 1, ...]``. ``transposed`` says that the parameter is
    ``[in, out]``.
    """

    down: Tensor
    up: Tensor
    scale: float
    transposed: bool
    shape: tuple[int, ...]

    def dense(self, dtype: torch.dtype, device: str | torch.device = "cpu") -> Tensor:
        """The task vector itself, multiplied out in ``dtype``."""
        return summed([self], [1.0], dtype, device)


def summed(
    vectors: Sequence[LowRankVector], factors: Sequence[float], dtype: torch.dtype, device: str | torch.device = "cpu"
) -> Tensor:
    """sum_k factor_k * T_k of vectors of one parameter: one product of all B in a row and all A in a column."""
    ups = [vector.up.to(device, dtype).flatten(1) for vector in vectors]
    up = torch.cat([u * (f * vector.scale) for u, f, vector in zip(ups, factors, vectors, strict=True)], dim=1)
    down = torch.cat([vector.down.to(device, dtype).flatten(1) for vector in vectors])
    product = down.T @ up.T if vectors[0].transposed else up @ down
    return product.reshape(vectors[0].shape)
