"""Stand-ins for a task's inputs where nobody brought exemplars: a task vector knows which inputs made it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from service.contract.errors import BadInput
from service.contract.methods import Proxy
from workers.statistics import Statistic
from workers.threads import one_thread


def proxy_statistic(task_vector: Tensor, kind: Proxy, rank: int = 8) -> Statistic:
    """The statistic that ``task_vector [out, in]`` suggests for its own inputs: one row, second moment of trace 1.

    ``task_vector`` is T^T T (WUDI-Merging, arXiv:2503.08099), ``covariance`` the covariance of T's rows (ACE-Merging,
    arXiv:2603.02945), ``subspace`` the projector on T's ``rank`` leading right singular vectors. A task vector that is
    zero has the zero statistic. Deterministic: nothing is drawn. The factor may be ``task_vector`` itself.

    Raises:
        BadInput: ``task_vector`` is no matrix.
    """
    if task_vector.dim() != 2:
        raise BadInput(f"a proxy needs a matrix, not a tensor of shape {list(task_vector.shape)}")
    with one_thread():
        rows = _ROWS[kind](task_vector, rank)
        if len(rows) > rows.shape[1]:
            rows = torch.linalg.qr(rows, mode="r").R
    norm = float(torch.linalg.vector_norm(rows, dim=-1).double().norm())
    return Statistic(rows=1, factor=rows, scale=1 / norm if norm else 1.0)


def proxy_squares(task_vector: Tensor) -> Statistic:
    """The statistic that a normalization scale's task vector suggests for its inputs: q = T^2, as one row, ``[d]``."""
    return Statistic(rows=1, diagonal=task_vector.detach().double().flatten().square())


def _task_vector_rows(task_vector: Tensor, rank: int) -> Tensor:  # noqa: ARG001 (one shape for all kinds)
    return task_vector


def _covariance_rows(task_vector: Tensor, rank: int) -> Tensor:  # noqa: ARG001 (one shape for all kinds)
    return task_vector - task_vector.mean(dim=0, keepdim=True)


def _subspace_rows(task_vector: Tensor, rank: int) -> Tensor:
    # The eigenvectors of the smaller Gram matrix cost a fraction of a full singular value decomposition.
    matrix = task_vector.double()
    tall = matrix.shape[0] > matrix.shape[1]
    squares, vectors = torch.linalg.eigh(matrix.T @ matrix if tall else matrix @ matrix.T)
    squares, vectors = squares.flip(0)[:rank], vectors.flip(1)[:, :rank]
    seen = squares > squares[:1].clamp_min(0) * max(matrix.shape) * torch.finfo(matrix.dtype).eps
    squares, vectors = squares[seen], vectors[:, seen]
    rows: Tensor = vectors.T if tall else (vectors / squares.sqrt()).T @ matrix
    return rows.to(task_vector.dtype)


_ROWS: dict[Proxy, Callable[[Tensor, int], Tensor]] = {
    "task_vector": _task_vector_rows,
    "covariance": _covariance_rows,
    "subspace": _subspace_rows,
}
