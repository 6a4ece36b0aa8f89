"""Draws the mean of the checkpoints towards the base, as far as their task vectors disagree."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from service.contract.methods import ModelStock
from workers.angles import vector_products
from workers.combining import weighted_mean
from workers.context import Context
from workers.pieces import Pieces


def look(pieces: Pieces, weights: Sequence[float], params: ModelStock) -> float:  # noqa: ARG001
    """t, from the angles between the task vectors of this parameter."""
    return 1.0 if pieces.tasks == 1 else _ratio(vector_products(pieces), weights)


def merge(task_vectors: Sequence[Tensor], weights: Sequence[float], params: ModelStock, context: Context) -> Tensor:
    """t * mean T_k with t = N cos / (1 + (N - 1) cos): Model Stock (arXiv:2403.19522), tensor by tensor. Any shape.

    cos is the mean cosine between the task vectors of two tasks, not below 0. With weights a_k that sum to 1, N is
    1 / sum a_k^2 and a pair counts as a_i a_j; a task vector that is zero is at right angles to all others.
    """
    ratio: float = context.facts
    return weighted_mean(task_vectors, weights, params.scaling * ratio)


def _ratio(products: Tensor, weights: Sequence[float]) -> float:
    lengths = products.diagonal().sqrt()
    cosines = torch.where(products != 0, products / torch.outer(lengths, lengths), 0.0)
    shares = torch.tensor(weights, dtype=torch.float64)
    shares = shares / shares.sum()
    pairs = torch.outer(shares, shares).fill_diagonal_(0)
    cosine = max(0.0, float((cosines * pairs).sum() / pairs.sum()))
    count = 1 / float(shares.square().sum())
    return count * cosine / (1 + (count - 1) * cosine)
