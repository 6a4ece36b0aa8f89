"""Singular directions, orthogonal factors and least-squares solutions of weight matrices, by their Gram matrices.

Everything is computed in float64, on the smaller side of a matrix: there, a symmetric eigenproblem costs a fraction of
a singular value decomposition, and squares lose nothing that a checkpoint's type could hold. Factorizations take one
thread, since several round them differently, and hardly make them faster.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from workers.products import ROWS, product
from workers.threads import one_thread, shared_out

FLOOR = 1e-7  # about the square root of float64's rounding unit: what a Gram matrix can still tell from zero


class Singular(NamedTuple):
    """Leading singular triplets, float64: ``left [m, c]``, ``values [c]``, descending, and ``right [n, c]``."""

    left: Tensor
    values: Tensor
    right: Tensor


def eigenpairs(symmetric: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues of ``symmetric [..., n, n]``, ascending, and eigenvectors as columns: the same for any threads."""
    with one_thread():
        values, vectors = torch.linalg.eigh(symmetric)
    return values, vectors


def over_positive(answers: Tensor, positive: Tensor) -> Tensor:
    """``answers [m, n]`` times the inverse of ``positive [n, n]``, a band of rows by each thread."""
    with one_thread() as threads:
        factor = torch.linalg.cholesky(positive)
        bands = torch.split(answers, ROWS)
        return torch.cat(shared_out(lambda band: torch.cholesky_solve(band.T, factor).T, bands, threads))


def triangle(rows: Tensor) -> Tensor:
    """R ``[min(r, n), n]`` of ``rows [r, n]`` = Q R: the same for any number of threads."""
    with one_thread():
        found: Tensor = torch.linalg.qr(rows, mode="r").R
    return found


def leading_singular(matrix: Tensor, count: int) -> Singular:
    """The ``count`` largest singular values of ``matrix [m, n]``, or all that are not zero, with their vectors.

    Zero is what can't be told from the rounding noise of the matrix's type.
    """
    wide = matrix.double()
    is_tall = wide.shape[0] > wide.shape[1]
    squares, vectors = eigenpairs(product(wide.T, wide) if is_tall else product(wide, wide.T))
    values, vectors = squares.clamp_min(0).sqrt().flip(0), vectors.flip(1)
    kept = min(count, int((values > _noise(matrix) * values[:1]).sum()))
    values, vectors = values[:kept], _with_fixed_signs(vectors[:, :kept])
    other = product(wide if is_tall else wide.T, vectors) / values
    return Singular(other, values, vectors) if is_tall else Singular(vectors, values, other)


def orthogonal_factor(matrix: Tensor) -> Tensor:
    """The nearest matrix to ``matrix [m, n]`` with orthonormal columns, or rows if there are fewer: U V^T, in float64.

    Directions in which the matrix is zero stay zero: nothing there says which way to turn.
    """
    found = leading_singular(matrix, min(matrix.shape))
    return product(found.left, found.right.T)


def least_squares(answers: Tensor, rows: Tensor, cutoff: float) -> Tensor:
    """The smallest ``X [out, in]`` with X R^T nearest to ``answers [out, r]``, for ``rows`` R ``[r, in]``; in float64.

    That is answers R (R^T R)^+, where eigenvalues of R^T R below ``cutoff`` times the largest count as zero.
    """
    wide, targets = rows.double(), answers.double()
    if wide.shape[0] < wide.shape[1]:  # R (R^T R)^+ = (R R^T)^+ R
        return product(product(targets, pseudo_inverse(product(wide, wide.T), cutoff)), wide)
    return product(product(targets, wide), pseudo_inverse(product(wide.T, wide), cutoff))


def pseudo_inverse(symmetric: Tensor, cutoff: float) -> Tensor:
    """The inverse of a positive semidefinite matrix where its eigenvalues exceed ``cutoff`` times the largest."""
    values, vectors = eigenpairs(symmetric)
    least = max(cutoff, len(values) * torch.finfo(values.dtype).eps) * values[-1:].clamp_min(0)
    seen = values > least
    return product(vectors[:, seen] / values[seen], vectors[:, seen].T)


def _noise(matrix: Tensor) -> float:
    return max(FLOOR, torch.finfo(matrix.dtype).eps * math.sqrt(max(matrix.shape)))


def _with_fixed_signs(vectors: Tensor) -> Tensor:
    # An eigenvector's sign is arbitrary: fixing it makes sums over tasks the same on every machine.
    if vectors.numel() == 0:
        return vectors
    largest = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True))
    return torch.where(largest < 0, -vectors, vectors)
