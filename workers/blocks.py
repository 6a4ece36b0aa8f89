"""Trims matrices that are stacked in one tensor, each with inputs of its own: experts, groups of a convolution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from service.contract.treatments import Projection, Role
from workers.factoring import eigenpairs
from workers.statistics import Statistic
from workers.treatments import Effect, Removed, Trimmed, trim
from workers.treatments.outcome import energy, known, large_share, norm_factor, share


def trim_blocks(
    task_vectors: Sequence[Tensor], statistics: Sequence[Statistic | None], params: Projection, role: Role
) -> Trimmed:
    """Project task vectors ``[blocks, out, in]`` block by block; bases come as ``[blocks, out, c]``, padded with zeros.

    Experts are linear layers of their own: each loses up to ``params.rank`` directions. A convolution in groups is one
    layer, whose removed directions may not mix groups, or it would be no such convolution any more: the
    ``params.rank`` largest eigenvalues of all groups' G_k count together. (With one channel a group, this masks the
    channels that disturb most.) An expert that some task's exemplars never reached is left as it is.

    Raises:
        BadInput: a statistic is missing or does not fit.
        BadTensor: a task vector or a statistic holds NaN or infinity.
    """
    usable = known(statistics, tasks=len(task_vectors), width=task_vectors[0].shape[-1])
    if role is Role.EXPERTS:
        removed, trimmed = _trim_experts(task_vectors, usable, params)
    else:
        removed = [_disturbed(task_vectors, usable, k, params) for k in range(len(task_vectors))]
        trimmed = [_strip(before, removed, i, params) for i, before in enumerate(task_vectors)]
    effects = [_effect(task_vectors[i], trimmed[i], usable, i) for i in range(len(task_vectors))]
    return Trimmed(trimmed, removed, effects)


def _trim_experts(
    task_vectors: Sequence[Tensor], statistics: Sequence[Statistic], params: Projection
) -> tuple[list[Removed], list[Tensor]]:
    trimmed = [vector.clone() for vector in task_vectors]
    found: list[list[Removed | None]] = [[] for _ in task_vectors]
    for expert in range(len(task_vectors[0])):
        seen = [statistic.block(expert) for statistic in statistics]
        if not all(statistic.rows for statistic in seen):
            for parts in found:
                parts.append(None)
            continue
        outcome = trim([vector[expert] for vector in task_vectors], seen, params)
        for k, parts in enumerate(found):
            parts.append(outcome.removed[k])
            trimmed[k][expert] = outcome.task_vectors[k]
    return [_stacked(parts, task_vectors[0]) for parts in found], trimmed


def _stacked(parts: Sequence[Removed | None], like: Tensor) -> Removed:
    widest = max((part.count for part in parts if part is not None), default=0)
    basis = like.new_zeros(*like.shape[:2], widest)
    for place, part in zip(basis, parts, strict=True):
        if part is not None:
            place[:, : part.count] = part.directions
    scores = [part.scores for part in parts if part is not None]
    return Removed(scores=torch.cat(scores).sort(descending=True).values if scores else like.new_zeros(0), basis=basis)


@dataclass(frozen=True, eq=False)
class _Pick:
    """Directions chosen among all groups': the group each lies in, and where it stands there."""

    scores: Tensor
    groups: Tensor
    places: Tensor


def _disturbed(task_vectors: Sequence[Tensor], statistics: Sequence[Statistic], k: int, params: Projection) -> Removed:
    """The directions in which the other tasks disturb task k most, over all groups: eigenvectors of G_k's blocks."""
    out = task_vectors[0].shape[1]
    conflict = task_vectors[0].new_zeros(len(task_vectors[0]), out, out, dtype=torch.float64)
    size = torch.zeros_like(conflict[..., 0, 0])
    for i, vector in enumerate(task_vectors):
        if i == k:
            continue
        gain, cost = (_response(vector, statistics[j], params.moments).double() for j in (k, i))
        conflict += gain @ gain.mT - params.balance * (cost @ cost.mT)
        size += gain.square().sum((1, 2)) + params.balance * cost.square().sum((1, 2))
    values, vectors = eigenpairs(conflict)
    # As for a single matrix: what rounding left of added and subtracted squares is no direction.
    noise = float(size.max()) * torch.finfo(task_vectors[0].dtype).eps
    pick = _largest(values, params.rank if len(task_vectors) > 1 else 0, noise if params.positive_only else -math.inf)
    basis = conflict.new_zeros(len(conflict), out, int(_most_in_one(pick.groups)))
    taken = [0] * len(conflict)
    for group, place in zip(pick.groups.tolist(), pick.places.tolist(), strict=True):
        basis[group, :, taken[group]] = _with_fixed_sign(vectors[group, :, place])
        taken[group] += 1
    return Removed(scores=pick.scores, basis=basis.to(task_vectors[0].dtype))


def _largest(values: Tensor, rank: int, above: float) -> _Pick:
    scores, order = values.flatten().sort(descending=True, stable=True)
    count = min(rank, int((scores > above).sum()))
    order = order[:count]
    return _Pick(scores[:count], order // values.shape[1], order % values.shape[1])


def _most_in_one(groups: Tensor) -> int:
    return int(torch.bincount(groups).max()) if len(groups) else 0


def _with_fixed_sign(vector: Tensor) -> Tensor:
    return vector * vector[vector.abs().argmax()].sign()


def _strip(before: Tensor, removed: Sequence[Removed], i: int, params: Projection) -> Tensor:
    after = before.clone()
    for k, part in enumerate(removed):
        if k != i and part.count:
            after -= part.directions @ (part.directions.mT @ after)
    factor = norm_factor(before, after, restore=params.restore_norm)
    return after if factor == 1.0 else after * factor


def _response(vector: Tensor, statistic: Statistic, moments: str) -> Tensor:
    """T R_k^T of every block, ``[blocks, out, r]``."""
    rows = torch.tensor(statistic.block_rows, dtype=vector.dtype, device=vector.device).clamp_min(1)
    divisor = rows if moments == "mean" else torch.ones_like(rows)
    return (vector @ statistic.held.to(vector).mT) / divisor.sqrt()[:, None, None]


def _effect(before: Tensor, after: Tensor, statistics: Sequence[Statistic], i: int) -> Effect:
    gone = before - after
    whole = energy(before)
    responses = tuple(energy(_response(before, statistic, "mean")) for statistic in statistics)
    left = tuple(energy(_response(after, statistic, "mean")) for statistic in statistics)
    return Effect(
        energy=whole,
        energy_removed=share(energy(gone), whole),
        conflict_before=sum(response for k, response in enumerate(responses) if k != i),
        conflict_after=sum(response for k, response in enumerate(left) if k != i),
        own_response_lost=share(energy(_response(gone, statistics[i], "mean")), responses[i]),
        large_share=large_share(before, gone),
        responses=responses,
        responses_left=left,
    )
