"""Inner products of checkpoints or task vectors, summed in float64 and block by block."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

CPU_BLOCK = 1 << 16  # entries that are summed at once: for all tasks together they stay in the cache
GPU_BLOCK = 1 << 20


def inner_products(vectors: Sequence[Tensor], base: Tensor | None = None) -> Tensor:
    """The Gram matrix ``[K, K]`` of K tensors of one shape, flattened; of base + tensor each, where there is a base.

    In float64 and in host memory.
    """
    flat = [vector.reshape(-1) for vector in vectors]
    start = None if base is None else base.reshape(-1)
    total = torch.zeros(len(flat), len(flat), dtype=torch.float64, device=flat[0].device)
    block = CPU_BLOCK if total.device.type == "cpu" else GPU_BLOCK
    for first in range(0, flat[0].numel(), block):
        rows = torch.stack([vector[first : first + block].double() for vector in flat])
        if start is not None:
            rows += start[first : first + block].double()
        total.addmm_(rows, rows.T)
    return total.cpu()
