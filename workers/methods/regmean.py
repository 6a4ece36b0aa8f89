"""Finds the weights that answer the tasks' own inputs as the experts do, in closed form."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from service.contract.methods import MATRICES, Regmean
from workers.combining import weighted_mean
from workers.context import Context
from workers.factoring import pseudo_inverse
from workers.features import roots, usable
from workers.products import product


def merge(task_vectors: Sequence[Tensor], weights: Sequence[float], params: Regmean, context: Context) -> Tensor:
    """(sum_k weight_k T_k G_k) (sum_k weight_k G_k)^+: RegMean (arXiv:2212.09849), for linear weights and convolutions.

    G_k is the second moment of task k's inputs with ``off_diagonal`` as a factor on what is off its diagonal. Solved
    for the task vector; that is the paper's solution for the weights where every direction was seen. Every other
    parameter is averaged, and so is one whose inputs are not known in all tasks.
    """
    matrices = context.matrices(task_vectors, MATRICES)
    known = None if matrices is None else usable(context.statistics, matrices[0].shape[1], context.parameter)
    if matrices is None or known is None:
        return weighted_mean(task_vectors, weights)
    answers = torch.zeros_like(matrices[0], dtype=torch.float64)
    total = torch.zeros(matrices[0].shape[1], matrices[0].shape[1], dtype=torch.float64, device=answers.device)
    for matrix, root in zip(matrices, roots(known, weights, params.moments, answers.device), strict=True):
        moment = product(root.T, root)
        damped = moment * params.off_diagonal
        damped.diagonal().copy_(moment.diagonal())
        total += damped
        answers += product(matrix.double(), damped)
    return context.restored(product(answers, pseudo_inverse(total, params.cutoff)))
