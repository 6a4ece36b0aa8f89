"""Finds the task vector that changes the tasks' outputs least, on what was seen and on what task vectors suggest."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from service.contract.methods import MATRICES, Shrinkage
from workers.combining import weighted_mean
from workers.context import Context
from workers.factoring import over_positive
from workers.features import roots, usable
from workers.products import product


def merge(task_vectors: Sequence[Tensor], weights: Sequence[float], params: Shrinkage, context: Context) -> Tensor:
    """scaling * argmin_T sum_k weight_k tr((T - T_k) M_k (T - T_k)^T) + damping * mean eigenvalue * ||T||^2.

    M_k = (1 - proxy) S_k / tr(S_k) + proxy T_k^T T_k / ||T_k||^2 for linear weights and convolutions: the second moment
    S_k of the inputs that exemplars show, shrunk towards the inputs that made the task vector, whose rows are sums of
    them. ``proxy`` is 1 where a task's inputs are not known. Between its ends lie LOT (arXiv:2505.23859, proxy 0) and
    WUDI (arXiv:2503.08099, proxy 1), both damped as in ridge regression. Other tensors are averaged.
    """
    matrices = context.matrices(task_vectors, MATRICES)
    if matrices is None:
        return weighted_mean(task_vectors, weights, params.scaling)
    ridge = params.damping * sum(weights) / matrices[0].shape[1]
    return context.restored(_least_change(_evidence(matrices, weights, params, context), ridge) * params.scaling)


def _evidence(
    matrices: Sequence[Tensor], weights: Sequence[float], params: Shrinkage, context: Context
) -> Iterator[tuple[Tensor, Tensor]]:
    """Per task T_k and the inputs to answer as it does, ``[r_k, in]``: R_k with R_k^T R_k = weight_k M_k."""
    known = usable(context.statistics, matrices[0].shape[1], context.parameter)
    proxy = 1.0 if known is None else params.proxy
    for k, matrix in enumerate(matrices):
        own = matrix.double()
        rows = [_of_trace(own, weights[k] * proxy)] if proxy else []
        if known is not None and proxy < 1:
            rows += [_of_trace(root, weights[k] * (1 - proxy)) for root in roots([known[k]], [1.0], "mean", own.device)]
        yield own, torch.cat(rows)


def _of_trace(rows: Tensor, trace: float) -> Tensor:
    """The rows, scaled so that their second moment has this trace; rows of zeros stay."""
    norm = float(rows.norm())
    return rows * (math.sqrt(trace) / norm) if norm else rows


def _least_change(evidence: Iterable[tuple[Tensor, Tensor]], ridge: float) -> Tensor:
    """``T [out, in]`` with least sum_k ||(T - T_k) R_k^T||^2 + ridge * ||T||^2; ridge above 0.

    That is (sum_k T_k M_k) (sum_k M_k + ridge)^-1 with M_k = R_k^T R_k.
    """
    answers, total = torch.zeros(()), torch.zeros(())
    for own, rows in evidence:
        moment = product(rows.T, rows)
        answers, total = answers + product(own, moment), total + moment
    total.diagonal().add_(ridge)
    return over_positive(answers, total)
