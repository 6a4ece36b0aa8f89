"""Gives each task an equal share of the rank for its leading singular vectors, and decorrelates them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from service.contract.methods import MATRICES, TsvM
from workers.combining import weighted_mean
from workers.context import Context
from workers.factoring import leading_singular, orthogonal_factor
from workers.products import product


def merge(task_vectors: Sequence[Tensor], weights: Sequence[float], params: TsvM, context: Context) -> Tensor:
    """scaling * U S V^T: Task Singular Vectors (arXiv:2412.00081).

    For linear weights and convolutions; other tensors are averaged. Of each T_k = U_k S_k V_k^T the first
    min(out, in) / K triplets are kept, at least one, with S_k times the task's weight. They stand side by side in U and
    V, which are then replaced by their orthogonal factors.
    """
    matrices = context.matrices(task_vectors, MATRICES)
    if matrices is None:
        return weighted_mean(task_vectors, weights, params.scaling)
    share = max(1, min(matrices[0].shape) // len(matrices))
    parts = [leading_singular(matrix, share) for matrix in matrices]
    left = orthogonal_factor(torch.cat([part.left for part in parts], dim=1))
    right = orthogonal_factor(torch.cat([part.right for part in parts], dim=1))
    values = torch.cat([part.values * weight for part, weight in zip(parts, weights, strict=True)])
    return context.restored(product(left * (params.scaling * values), right.T))
