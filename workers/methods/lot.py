"""Finds the task vector that changes the tasks' own features least, in closed form."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from service.contract.methods import Lot
from service.contract.treatments import Role
from workers.combining import weighted_mean
from workers.context import Context
from workers.factoring import least_squares
from workers.features import diagonals, roots, usable, weighted_by_entry
from workers.products import product


def merge(task_vectors: Sequence[Tensor], weights: Sequence[float], params: Lot, context: Context) -> Tensor:
    """scaling * (sum_k weight_k T_k S_k) (sum_k weight_k S_k)^+: LOT Merging (arXiv:2505.23859, eq. 9).

    For weights, with S_k the second moment of task k's inputs. Where S_k is a diagonal (embeddings; scales, eq. 12),
    that is a mean entry by entry, and inputs that no task has seen are averaged plainly. So is every other parameter,
    and one whose inputs are not known in all tasks.
    """
    shaped = _shaped(task_vectors, context)
    known = None if shaped is None else usable(context.statistics, shaped[0].shape[-1], context.parameter)
    if shaped is None or known is None:
        return weighted_mean(task_vectors, weights, params.scaling)
    importance = diagonals(known, weights, params.moments)
    if importance is not None:
        found = weighted_by_entry(shaped, importance, weights)
    else:
        rows = roots(known, weights, params.moments, shaped[0].device)
        answers = [product(matrix.double(), r.double().T) for matrix, r in zip(shaped, rows, strict=True)]
        found = least_squares(torch.cat(answers, dim=1), torch.cat(rows), params.cutoff)
    return _restored(found * params.scaling, context)


def _shaped(task_vectors: Sequence[Tensor], context: Context) -> list[Tensor] | None:
    """Matrices ``[out, in]``, or scales ``[d]``; None for everything else."""
    if context.role is Role.SCALE:
        return [task_vector.flatten() for task_vector in task_vectors]
    return context.matrices(task_vectors)


def _restored(found: Tensor, context: Context) -> Tensor:
    if context.role is Role.SCALE:
        return found.reshape(context.base.shape).to(context.base.dtype)
    return context.restored(found)
