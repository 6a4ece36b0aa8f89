"""Inner products of checkpoints and of task vectors, piece by piece."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from workers.context import Context
from workers.pieces import Pieces
from workers.threads import one_thread, shared_out

RUN = 1 << 11  # entries of which a product is summed in the vectors' own type: few, so that rounding stays below it
SHARE = 1 << 17  # entries that one thread sums at once: their copies stay in the cache
CPU_BLOCK = 1 << 14  # entries that are summed at once: in float64 they stay in the cache for a few tasks
GPU_BLOCK = 1 << 20


def vector_products(pieces: Pieces, *, with_base: bool = False) -> Tensor:
    """The Gram matrix ``[K, K]`` of K task vectors, the base being the first of them ``with_base``.

    In float64 and in host memory, from sums of RUN products in the vectors' own type, which leaves relative errors of
    about that type's rounding unit. Sums of pieces are added in their order, whoever made them.
    """

    def products(task_vectors: Sequence[Tensor], context: Context) -> Tensor:
        return _in_runs([context.base, *task_vectors] if with_base else task_vectors)

    first, *others = pieces.map(products)
    for part in others:
        first += part
    return first


def gram(task_vectors: Sequence[Tensor]) -> Tensor:
    """The inner products ``[K, K]`` of K task vectors of one shape, as ``vector_products`` takes them."""
    flat = [vector.reshape(-1) for vector in task_vectors]

    def products(first: int) -> Tensor:
        return _in_runs([vector[first : first + SHARE] for vector in flat])

    total = torch.zeros(len(flat), len(flat), dtype=torch.float64)
    with one_thread() as threads:
        for part in shared_out(products, range(0, len(flat[0]), SHARE), threads):
            total += part
    return total


def inner_products(pieces: Pieces) -> Tensor:
    """The Gram matrix ``[K, K]`` of K checkpoints, the base plus each task vector, all of it in float64.

    For what depends on small differences of nearly parallel checkpoints. In host memory; sums of pieces are added in
    their order, whoever made them.
    """
    first, *others = pieces.map(lambda task_vectors, context: _products(task_vectors, context.base))
    for part in others:
        first += part
    return first


def _in_runs(vectors: Sequence[Tensor]) -> Tensor:
    rows = torch.stack([vector.reshape(-1) for vector in vectors])
    whole = rows.shape[1] // RUN * RUN
    runs = rows[:, :whole].reshape(len(vectors), -1, RUN).transpose(0, 1)
    total = torch.bmm(runs, runs.mT).sum(0, dtype=torch.float64)
    rest = rows[:, whole:]
    return (total + (rest @ rest.T).double()).cpu()


def _products(vectors: Sequence[Tensor], base: Tensor) -> Tensor:
    vectors, base = [vector.reshape(-1) for vector in vectors], base.reshape(-1)
    count = len(base)
    block = CPU_BLOCK if base.device.type == "cpu" else GPU_BLOCK
    total = torch.zeros(len(vectors), len(vectors), dtype=torch.float64, device=base.device)
    room = torch.empty(len(vectors), min(block, count), dtype=torch.float64, device=base.device)
    for first in range(0, count, block):
        part = slice(first, first + block)
        rows = room[:, : len(base[part])]
        for row, vector in zip(rows, vectors, strict=True):
            row.copy_(vector[part]).add_(base[part])
        total.addmm_(rows, rows.T)
    return total.cpu()
