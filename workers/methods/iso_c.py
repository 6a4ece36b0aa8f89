"""Sums task vectors and makes all singular values of the sum equal."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from service.contract.methods import MATRICES, IsoC
from workers.combining import weighted_mean, weighted_sum
from workers.context import Context
from workers.factoring import leading_singular
from workers.products import product


def merge(task_vectors: Sequence[Tensor], weights: Sequence[float], params: IsoC, context: Context) -> Tensor:
    """scaling * mean(S) * U V^T with U S V^T = sum_k weight_k T_k: Iso-C (arXiv:2502.04959).

    For linear weights and convolutions; other tensors are averaged. Directions in which the sum is zero stay zero, and
    lower the mean.
    """
    matrices = context.matrices(task_vectors, MATRICES)
    if matrices is None:
        return weighted_mean(task_vectors, weights, params.scaling)
    total = weighted_sum(matrices, weights)
    found = leading_singular(total, min(total.shape))
    mean = found.values.sum() / min(total.shape)
    return context.restored(product(found.left * (params.scaling * mean), found.right.T))
