"""The leading eigenvectors of a difference of two squares, by the cheapest of three routes that agree."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from service.contract.errors import BadTensor

# Below these sizes a complete factorization is quicker than an iteration.
KRYLOV_SIZE = 1024
KRYLOV_RANK_BOUND = 512
KRYLOV_LIMIT = 512  # dimensions to search in before giving up


class Eigenpairs(NamedTuple):
    """``values [c]``, descending, and ``vectors [out, c]``, orthonormal; both float64."""

    values: Tensor
    vectors: Tensor


class Difference(NamedTuple):
    """The symmetric, indefinite matrix G = gain gain^T - cost cost^T, ``[out, out]``, given by its columns.

    ``gain`` is ``[out, p]`` and ``cost`` ``[out, n]``, so that G's rank is at most p + n.
    """

    gain: Tensor
    cost: Tensor

    @property
    def size(self) -> int:
        return self.gain.shape[0]

    @property
    def rank_bound(self) -> int:
        return self.gain.shape[1] + self.cost.shape[1]

    def times(self, rows: Tensor) -> Tensor:
        """G times each of ``rows [b, out]``, without forming G; rows, because they are quicker to multiply by."""
        return (rows @ self.gain) @ self.gain.T - (rows @ self.cost) @ self.cost.T


def leading(matrix: Difference, rank: int, *, positive_only: bool, precision: float) -> Eigenpairs:
    """The eigenvectors of the ``rank`` largest signed eigenvalues of G, or of the positive ones among them.

    ``precision`` is the rounding unit that the columns were computed in: an eigenvalue counts as positive only where
    it stands out from the rounding noise of what was added and subtracted to make it.
    Each vector's entry of largest magnitude is positive.

    Raises:
        BadTensor: a column holds NaN or infinity.
    """
    matrix = Difference(matrix.gain.double(), matrix.cost.double())
    noise = _noise(matrix, precision)
    wanted = min(rank, matrix.size)
    if wanted == 0:
        return Eigenpairs(matrix.gain.new_zeros(0), matrix.gain.new_zeros(matrix.size, 0))
    pairs = _iterated(matrix, wanted, precision) or (low_rank if matrix.rank_bound < matrix.size else dense)(matrix)
    positive = int((pairs.values[:wanted] > noise).sum())
    if positive_only:
        wanted = positive
    elif positive < wanted and matrix.rank_bound < matrix.size:
        pairs = dense(matrix)  # directions of eigenvalue zero are wanted too, and the low-rank form has none
    return Eigenpairs(pairs.values[:wanted].clone(), _with_fixed_signs(pairs.vectors[:, :wanted]))


def dense(matrix: Difference) -> Eigenpairs:
    """All eigenpairs of G, from G itself."""
    return _descending(matrix.gain @ matrix.gain.T - matrix.cost @ matrix.cost.T)


def low_rank(matrix: Difference) -> Eigenpairs:
    """The eigenpairs of G within the span of its columns: their QR, and a symmetric problem of their number."""
    basis, triangle = torch.linalg.qr(torch.cat([matrix.gain, matrix.cost], dim=1))
    gain, cost = torch.split(triangle, [matrix.gain.shape[1], matrix.cost.shape[1]], dim=1)
    values, vectors = _descending(gain @ gain.T - cost @ cost.T)
    return Eigenpairs(values, basis @ vectors)


def krylov(matrix: Difference, wanted: int, *, tolerance: float, limit: int) -> Eigenpairs | None:
    """The ``wanted`` leading eigenpairs from products with G alone, or None where they don't converge.

    A block Krylov method with full reorthogonalization. It ends when ||G v - value * v|| is at most ``tolerance`` times
    the largest of the values for every pair, and gives up when its space would exceed ``limit`` dimensions.
    """
    block = _start(matrix, width=max(16, wanted + 8))
    space = block.new_empty(limit, matrix.size)
    images = torch.empty_like(space)
    for held in range(len(block), limit + 1, len(block)):
        space[held - len(block) : held] = block
        images[held - len(block) : held] = matrix.times(block)
        pairs = _converged(space[:held], images[:held], wanted, tolerance)
        if pairs is not None:
            return pairs
        block = _orthonormal(images[held - len(block) : held], space[:held])
    return None


def _iterated(matrix: Difference, wanted: int, precision: float) -> Eigenpairs | None:
    if matrix.size < KRYLOV_SIZE or matrix.rank_bound < KRYLOV_RANK_BOUND or wanted > KRYLOV_LIMIT // 16:
        return None
    return krylov(matrix, wanted, tolerance=max(0.1 * precision, 1e-13), limit=min(KRYLOV_LIMIT, matrix.size // 4))


def _start(matrix: Difference, width: int) -> Tensor:
    # Chirps of different rates overlap with everything and need no random numbers.
    places = torch.arange(1, matrix.size + 1, dtype=torch.float64, device=matrix.gain.device)
    rates = torch.arange(1, width + 1, dtype=torch.float64, device=matrix.gain.device).sqrt()
    return _orthonormal(torch.cos(rates[:, None] * places.square()), matrix.gain.new_empty(0, matrix.size))


def _orthonormal(rows: Tensor, space: Tensor) -> Tensor:
    """``rows`` made orthonormal, and orthogonal to ``space``'s; twice, since rounding spoils the first time."""
    for _ in range(2):
        rows = torch.linalg.qr((rows - (rows @ space.T) @ space).T).Q.T
    return rows


def _converged(space: Tensor, images: Tensor, wanted: int, tolerance: float) -> Eigenpairs | None:
    inside = space @ images.T
    values, vectors = _descending((inside + inside.T) / 2)
    values, mix = values[:wanted], vectors[:, :wanted].T
    rows = mix @ space
    residuals = (mix @ images - values[:, None] * rows).norm(dim=1)
    off = (rows @ rows.T - torch.eye(len(rows), dtype=rows.dtype, device=rows.device)).abs().max()
    done = bool(residuals.max() <= tolerance * values.abs().max()) and bool(off < 1e-12)
    return Eigenpairs(values, rows.T) if done else None


def _descending(symmetric: Tensor) -> Eigenpairs:
    values, vectors = torch.linalg.eigh(symmetric)
    return Eigenpairs(values.flip(0), vectors.flip(1))


def _noise(matrix: Difference, precision: float) -> float:
    added = float(matrix.gain.square().sum() + matrix.cost.square().sum())
    if not math.isfinite(added):
        raise BadTensor("a task vector or a statistic holds NaN or infinity")
    return max(precision, matrix.size * torch.finfo(torch.float64).eps) * added


def _with_fixed_signs(vectors: Tensor) -> Tensor:
    # An eigenvector's sign is arbitrary: fixing it makes the same inputs leave the same bytes.
    if vectors.numel() == 0:
        return vectors.clone()
    largest = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True))
    return torch.where(largest < 0, -vectors, vectors)
