"""Lets parameters compete within and between tasks, drops the losers, and averages the others by their scores."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from service.contract.methods import Pcb
from workers.combining import weighted_sum
from workers.context import Context
from workers.magnitudes import kth_largest, share_of


def merge(
    task_vectors: Sequence[Tensor],
    weights: Sequence[float],
    params: Pcb,
    context: Context,  # noqa: ARG001 (every method is called alike)
) -> Tensor:
    """scaling * sum_k s_k T_k / sum_k s_k: Parameter Competition Balancing (arXiv:2410.02396). Any shape.

    An entry's standing within its task is exp(N u^2), u being its magnitude scaled to [0, 1]; between the tasks it is
    tanh(T_k * sum_i T_i), as in the paper's published results, which use tanh where the text has a softmax. Scores
    s_k are their product with the losers' best taken off, scaled to [0, 1]. Weights multiply the task vectors in the
    sum (divided by their mean) and the scores.
    """
    count = len(task_vectors)
    together = weighted_sum(task_vectors, weights, count / sum(weights))
    total, scores = torch.zeros_like(together), torch.zeros_like(together)
    for task_vector, weight in zip(task_vectors, weights, strict=True):
        clipped = _clipped(task_vector, params.clip)
        standing = _unit(clipped.abs()).square_().mul_(count).exp_()
        score = _winners(standing.mul_(torch.tanh(task_vector * together)), params.density)
        total.addcmul_(clipped, score, value=weight)
        scores.add_(score, alpha=weight)
    return torch.where(scores > 0, total / scores, 0.0) * params.scaling


def _clipped(task_vector: Tensor, share: float) -> Tensor:
    """The task vector with a ``share`` of its entries, the largest, cut down to the next in size."""
    sizes = task_vector.abs().flatten()
    count = share_of(share, sizes.numel() - 1)
    if count == 0:
        return task_vector
    limit = float(kth_largest(sizes, count + 1))
    return task_vector.clamp(-limit, limit)


def _unit(sizes: Tensor) -> Tensor:
    """Scaled to [0, 1]; zeros where all are equal."""
    least, most = sizes.min(), sizes.max()
    return (sizes - least) / (most - least) if most > least else torch.zeros_like(sizes)


def _winners(score: Tensor, density: float) -> Tensor:
    """Scores above the best loser's, scaled to [0, 1]; ones where all are equal and nobody can lose."""
    raised = score - score.min()
    most = raised.max()
    if most == 0:
        return torch.ones_like(score)
    count = share_of(density, score.numel(), least=1)
    best_loser = kth_largest(raised.flatten(), min(count + 1, score.numel()))
    if best_loser == most:
        best_loser = raised.min()
    return ((raised - best_loser) / (most - best_loser)).clamp_min_(0)
