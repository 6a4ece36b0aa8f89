"""Lets parameters compete within and between tasks, drops the losers, and averages the others by their scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from service.contract.methods import Pcb
from workers.combining import weighted_sum
from workers.context import Context
from workers.magnitudes import share_of
from workers.pieces import Pieces
from workers.thresholds import Sizes, magnitudes, thresholds


@dataclass(frozen=True)
class Contest:
    """What one task's entries compete with, found over the whole parameter.

    Magnitudes lie between ``least`` and ``most``, where they are clipped. Scores begin at ``worst``; counted from there
    they end at ``best``, and win above ``losing``.
    """

    least: float
    most: float
    worst: float = 0.0
    best: float = 0.0
    losing: float = 0.0


def look(pieces: Pieces, weights: Sequence[float], params: Pcb) -> list[Contest]:
    """Each task's contest in this parameter, where a share ``density`` of its entries wins, one at least."""
    contests = _clips(pieces, params)

    def scores(task_vectors: list[Tensor], context: Context) -> list[Tensor]:  # noqa: ARG001
        return _scores(task_vectors, weights, contests)

    ends = _ends(pieces, scores)
    contests = [replace(each, worst=low, best=high - low) for each, (low, high) in zip(contests, ends, strict=True)]
    count = share_of(params.density, pieces.entries, least=1) + 1
    if count > pieces.entries:
        return contests

    def raised(task_vectors: list[Tensor], context: Context) -> list[Tensor]:
        found = scores(task_vectors, context)
        return [score.sub_(each.worst) for score, each in zip(found, contests, strict=True)]

    losing = [row[0].value for row in thresholds(pieces, raised, [[count]] * pieces.tasks)]
    losing = [max(0.0, value) if value < each.best else 0.0 for value, each in zip(losing, contests, strict=True)]
    return [replace(each, losing=value) for each, value in zip(contests, losing, strict=True)]


def merge(task_vectors: Sequence[Tensor], weights: Sequence[float], params: Pcb, context: Context) -> Tensor:
    """scaling * sum_k s_k T_k / sum_k s_k: Parameter Competition Balancing (arXiv:2410.02396). Any shape.

    An entry's standing within its task is exp(N u^2), u being its magnitude scaled to [0, 1]; between the tasks it is
    tanh(T_k * sum_i T_i), as in the paper's published results, which use tanh where the text has a softmax. Scores
    s_k are their product with the losers' best taken off, scaled to [0, 1]. Weights multiply the task vectors in the
    sum (divided by their mean) and the scores.
    """
    contests: list[Contest] = context.facts
    total, sums = torch.zeros_like(task_vectors[0]), torch.zeros_like(task_vectors[0])
    scores = _scores(task_vectors, weights, contests)
    for task_vector, weight, score, contest in zip(task_vectors, weights, scores, contests, strict=True):
        won = _won(score, contest)
        total.addcmul_(task_vector.clamp(-contest.most, contest.most), won, value=weight)
        sums.add_(won, alpha=weight)
    return torch.where(sums > 0, total / sums, 0.0) * params.scaling


def _clips(pieces: Pieces, params: Pcb) -> list[Contest]:
    """Where a share ``clip`` of each task's entries, the largest, is cut down to the next in size."""
    ends = _ends(pieces, magnitudes)
    count = share_of(params.clip, pieces.entries - 1)
    if count == 0:
        return [Contest(least, most) for least, most in ends]
    limits = thresholds(pieces, magnitudes, [[count + 1]] * pieces.tasks)
    return [
        Contest(least, most if limit.value < 0 else limit.value)
        for (least, most), (limit,) in zip(ends, limits, strict=True)
    ]


def _ends(pieces: Pieces, sizes: Sizes) -> list[tuple[float, float]]:
    """The least and the most of each row of ``sizes``."""

    def ends(task_vectors: list[Tensor], context: Context) -> list[tuple[float, float]]:
        return [(float(row.min()), float(row.max())) for row in sizes(task_vectors, context)]

    return [
        (min(low for low, _ in parts), max(high for _, high in parts)) for parts in zip(*pieces.map(ends), strict=True)
    ]


def _scores(task_vectors: Sequence[Tensor], weights: Sequence[float], contests: Sequence[Contest]) -> list[Tensor]:
    count = len(task_vectors)
    together = weighted_sum(task_vectors, weights, count / sum(weights))
    return [
        _unit(task_vector, contest).square_().mul_(count).exp_().mul_(torch.tanh(task_vector * together))
        for task_vector, contest in zip(task_vectors, contests, strict=True)
    ]


def _unit(task_vector: Tensor, contest: Contest) -> Tensor:
    """Clipped magnitudes, scaled to [0, 1]; zeros where all are equal."""
    if contest.most <= contest.least:
        return torch.zeros_like(task_vector)
    sizes = task_vector.abs().clamp_max_(contest.most)
    return sizes.sub_(contest.least).div_(contest.most - contest.least)


def _won(score: Tensor, contest: Contest) -> Tensor:
    """Scores above the best loser's, scaled to [0, 1]; ones where all are equal and nobody can lose."""
    if contest.best <= 0:
        return torch.ones_like(score)
    return (score - contest.worst).sub_(contest.losing).div_(contest.best - contest.losing).clamp_min_(0)
