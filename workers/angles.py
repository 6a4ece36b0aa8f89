"""Inner products of checkpoints or task vectors, summed in float64 and piece by piece."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from workers.context import Context
from workers.pieces import Pieces
from workers.threads import one_thread, shared_out

SHARE = 1 << 20  # entries that one thread sums
CPU_BLOCK = 1 << 14  # entries that are summed at once: in float64 they stay in the cache for a few tasks
GPU_BLOCK = 1 << 20


def inner_products(pieces: Pieces, *, of_checkpoints: bool = False, and_base: bool = False) -> Tensor:
    """The Gram matrix ``[K, K]`` of K task vectors, or of the base plus each of them: the checkpoints themselves.

    With ``and_base`` the base is the first of these checkpoints, and there is one more of them.

    In float64 and in host memory. Sums of pieces are added in their order, whoever made them.
    """

    def products(task_vectors: Sequence[Tensor], context: Context) -> Tensor:
        vectors = [torch.zeros_like(context.base), *task_vectors] if and_base else task_vectors
        return _products(vectors, context.base if of_checkpoints else None)

    first, *others = pieces.map(products)
    for part in others:
        first += part
    return first


def gram(task_vectors: Sequence[Tensor]) -> Tensor:
    """The inner products ``[K, K]`` of K task vectors of one shape, in float64 and in host memory."""
    flat = [vector.reshape(-1) for vector in task_vectors]

    def products(first: int) -> Tensor:
        return _products([vector[first : first + SHARE] for vector in flat], None)

    total = torch.zeros(len(flat), len(flat), dtype=torch.float64)
    with one_thread() as threads:
        for part in shared_out(products, range(0, len(flat[0]), SHARE), threads):
            total += part
    return total


def _products(vectors: Sequence[Tensor], base: Tensor | None) -> Tensor:
    vectors, base = [vector.reshape(-1) for vector in vectors], None if base is None else base.reshape(-1)
    count = len(vectors[0])
    block = CPU_BLOCK if vectors[0].device.type == "cpu" else GPU_BLOCK
    total = torch.zeros(len(vectors), len(vectors), dtype=torch.float64, device=vectors[0].device)
    room = torch.empty(len(vectors), min(block, count), dtype=torch.float64, device=total.device)
    for first in range(0, count, block):
        part = slice(first, first + block)
        rows = room[:, : len(vectors[0][part])]
        for row, vector in zip(rows, vectors, strict=True):
            row.copy_(vector[part])
            if base is not None:
                row.add_(base[part])
        total.addmm_(rows, rows.T)
    return total.cpu()
