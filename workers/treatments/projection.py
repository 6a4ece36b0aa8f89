"""Takes out of each task vector the output directions in which it disturbs other tasks: for weight matrices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from service.contract.treatments import Moments, Projection
from workers.statistics import Statistic
from workers.treatments.outcome import (
    Effect,
    Removed,
    Trimmed,
    check_alike,
    energy,
    known,
    large_share,
    norm_factor,
    share,
)
from workers.treatments.spectrum import Difference, leading


def trim(task_vectors: Sequence[Tensor], statistics: Sequence[Statistic | None], params: Projection) -> Trimmed:
    """Project the basis B_k of every other task k out of each task vector ``[out, in]``, in the order of the tasks.

    B_k holds the eigenvectors of the ``params.rank`` largest eigenvalues (positive ones only, unless ``params`` says
    otherwise) of G_k = sum_{i != k} T_i (S_k - balance * S_i) T_i^T, taken from the untrimmed task vectors:
    CAT Merging, arXiv:2505.06977, in the layout of ``torch.nn.Linear``. Beside its inputs and outputs this holds one
    response ``[out, sum over tasks of r]`` per task, r being the rows of a statistic's factor.

    Raises:
        BadInput: task vectors differ in shape or type, or a statistic is missing, empty or of another width.
        BadTensor: a task vector or a statistic holds NaN or infinity.
    """
    check_alike(task_vectors, dimensions=2)
    usable = known(statistics, tasks=len(task_vectors), width=task_vectors[0].shape[1])
    responses = _responses(task_vectors, usable, params.moments)
    removed = [_disturbed(responses, k, params) for k in range(len(task_vectors))]
    trimmed: list[Tensor] = []
    effects: list[Effect] = []
    for i, before in enumerate(task_vectors):
        removal = _removal(removed, i)
        after, factor = _strip(before, removal, params)
        response_after = _Response(removal.from_columns(responses[i].columns) * factor, responses[i].widths)
        trimmed.append(after)
        effects.append(_effect(before, after, responses[i], response_after, i))
    return Trimmed(trimmed, removed, effects)


def apply_removed(task_vectors: Sequence[Tensor], removed: Sequence[Removed], params: Projection) -> list[Tensor]:
    """The trimmed task vectors, from the untrimmed ones and the recorded bases alone: no statistics needed.

    Raises:
        BadInput: task vectors differ in shape or type.
    """
    check_alike(task_vectors, dimensions=2)
    return [_strip(before, _removal(removed, i), params)[0] for i, before in enumerate(task_vectors)]


@dataclass(frozen=True, eq=False)
class _Root:
    """A square root of S_k: ``weights`` are R_k^T ``[in, r]``, or for one-hot inputs ``[r]``, one per index seen."""

    weights: Tensor
    indices: Tensor | None = None

    def response(self, task_vector: Tensor) -> Tensor:
        """T R_k^T, ``[out, r]``."""
        if self.indices is None:
            return task_vector @ self.weights
        return task_vector.index_select(1, self.indices) * self.weights


@dataclass(frozen=True, eq=False)
class _Response:
    """How one task vector answers every task's inputs: T R_k^T ``[out, r_k]``, side by side for all tasks k."""

    columns: Tensor
    widths: list[int]

    def to_task(self, k: int) -> Tensor:
        return self.columns.narrow(1, sum(self.widths[:k]), self.widths[k])

    def energies(self) -> list[float]:
        """Per task k, the second moment of the answer to its inputs."""
        per_column = self.columns.square().sum(0, dtype=torch.float64).cpu()
        return [float(part.sum()) for part in torch.split(per_column, self.widths)]


@dataclass(frozen=True, eq=False)
class _Removal:
    """The product (I - B_m B_m^T) ... (I - B_1 B_1^T) as I - V L^-1 V^T, with V = [B_1 ... B_m].

    The coefficients of the projections obey a_k = B_k^T (T - sum_{j < k} B_j a_j), which is a unit lower triangular
    system in the overlaps V^T V. Solving it once reads a large tensor twice, whatever the number of tasks.
    """

    directions: Tensor
    overlaps: Tensor

    def from_columns(self, columns: Tensor) -> Tensor:
        """What is left of ``columns [out, n]``."""
        if self.directions.shape[1] == 0:
            return columns.clone()
        along = self.directions.T @ columns
        coefficients = torch.linalg.solve_triangular(self.overlaps, along, upper=False, unitriangular=True)
        return torch.addmm(columns, self.directions, coefficients, alpha=-1)


def _responses(task_vectors: Sequence[Tensor], statistics: Sequence[Statistic], moments: Moments) -> list[_Response]:
    roots = [_root(s, moments, like=task_vectors[0]) for s in statistics]
    widths = [root.weights.shape[-1] for root in roots]
    return [_Response(torch.cat([root.response(t) for root in roots], dim=1), widths) for t in task_vectors]


def _root(statistic: Statistic, moments: Moments, *, like: Tensor) -> _Root:
    divisor = statistic.rows if moments == "mean" else 1
    if statistic.diagonal is None:
        return _Root(statistic.held.to(like).T / math.sqrt(divisor))
    diagonal = statistic.diagonal.to(like.device, torch.float64) / divisor
    seen = diagonal.nonzero().flatten()
    return _Root(diagonal[seen].sqrt().to(like.dtype), seen)


def _disturbed(responses: Sequence[_Response], k: int, params: Projection) -> Removed:
    columns = responses[k].columns
    others = [(i, response) for i, response in enumerate(responses) if i != k]
    nothing = columns[:, :0]
    conflict = Difference(
        gain=torch.cat([nothing, *(response.to_task(k) for _, response in others)], dim=1),
        cost=torch.cat([nothing, *(response.to_task(i) for i, response in others)], dim=1) * math.sqrt(params.balance),
    )
    rank = params.rank if others else 0
    precision = torch.finfo(columns.dtype).eps
    values, vectors = leading(conflict, rank, positive_only=params.positive_only, precision=precision)
    return Removed(scores=values, basis=vectors.to(columns.dtype))


def _removal(removed: Sequence[Removed], i: int) -> _Removal:
    bases = [r.directions[:, :0] if k == i else r.directions for k, r in enumerate(removed)]
    directions = torch.cat(bases, dim=1)
    wide = directions.double()
    return _Removal(directions, (wide.T @ wide).to(directions.dtype))


def _strip(before: Tensor, removal: _Removal, params: Projection) -> tuple[Tensor, float]:
    after = removal.from_columns(before)
    factor = norm_factor(before, after, restore=params.restore_norm)
    return (after if factor == 1.0 else after * factor), factor


def _effect(before: Tensor, after: Tensor, answered: _Response, answer: _Response, i: int) -> Effect:
    gone = before - after
    energies_before, energies_after = answered.energies(), answer.energies()
    own_lost = energy(answered.to_task(i) - answer.to_task(i))
    return Effect(
        energy_removed=share(energy(gone), energy(before)),
        conflict_before=sum(energies_before) - energies_before[i],
        conflict_after=sum(energies_after) - energies_after[i],
        own_response_lost=share(own_lost, energies_before[i]),
        large_share=large_share(before, gone),
    )
