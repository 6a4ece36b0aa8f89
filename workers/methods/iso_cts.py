"""Sums task vectors, replaces the least of the sum's directions by directions of single tasks, and makes all equal."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from service.contract.methods import MATRICES, IsoCts
from workers.combining import weighted_mean, weighted_sum
from workers.context import Context
from workers.factoring import leading_singular, orthogonal_factor
from workers.products import product


def merge(task_vectors: Sequence[Tensor], weights: Sequence[float], params: IsoCts, context: Context) -> Tensor:
    """scaling * mean(S) * U V^T: Iso-CTS (arXiv:2502.04959).

    For linear weights and convolutions; other tensors are averaged. The leading triplets of sum_k weight_k T_k, a share
    ``common`` of all, are joined by the leading triplets of each weight_k T_k with those left singular vectors
    projected out, an equal number per task. U and V are the orthogonal factors of the vectors side by side, S all
    their singular values.
    """
    matrices = context.matrices(task_vectors, MATRICES)
    if matrices is None:
        return weighted_mean(task_vectors, weights, params.scaling)
    rank = min(matrices[0].shape)
    own = round((rank - int(rank * params.common)) / len(matrices))
    common = leading_singular(weighted_sum(matrices, weights), rank - own * len(matrices))
    parts = [common]
    for matrix, weight in zip(matrices, weights, strict=True):
        wide = matrix.double() * weight
        rest = wide - product(common.left, product(common.left.T, wide))
        parts.append(leading_singular(rest.to(matrix.dtype), own))
    left = orthogonal_factor(torch.cat([part.left for part in parts], dim=1))
    right = orthogonal_factor(torch.cat([part.right for part in parts], dim=1))
    mean = torch.cat([part.values for part in parts]).sum() / rank
    return context.restored(product(left * (params.scaling * mean), right.T))
