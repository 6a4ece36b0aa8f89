"""Sums up the second moment of a matrix's inputs while they stream by: rows while they are few, then one square."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from service.contract.errors import BadInput
from workers.factoring import eigenpairs
from workers.statistics import Statistic
from workers.threads import one_thread

_COLUMNS = 384  # of the square that are updated at once


@dataclass(frozen=True, eq=False)
class RowSum:
    """The sum of x x^T over ``rows`` rows x ``[in]`` in single precision; for several matrices at once, if wanted.

    Up to ``in`` rows are ``kept`` as they are. From then on their sum is kept in ``square`` ``[in, in]``, in float64
    and above the diagonal only: that costs each row in^2 multiplications, whatever the size of a batch, where
    factoring again after every batch costs 2 (in + batch) in^2. Sums of float32 products in float64 lose about 1e-16
    of the largest eigenvalue, less than the factor loses when it is rounded to float32.
    """

    rows: int = 0
    kept: tuple[Tensor, ...] = ()
    square: Tensor | None = None

    def add(self, x: Tensor) -> RowSum:
        """The sum with the rows ``x [n, in]`` added; this one stays as it is. ``[blocks, n, in]`` adds n rows to each.

        Raises:
            BadInput: ``x`` is no matrix, or of another width than before.
        """
        rows = x.detach().float()
        held = self.kept[0] if self.kept else self.square
        is_other = held is not None and (rows.shape[-1:] != held.shape[-1:] or rows.dim() != held.dim())
        if rows.dim() not in (2, 3) or is_other:
            raise BadInput(f"inputs of shape {list(x.shape)} don't continue a sum of rows")
        total = self.rows + rows.shape[-2]
        if self.square is None and total <= rows.shape[-1]:
            return RowSum(total, (*self.kept, rows.clone()))
        square = self.square
        for part in (*self.kept, rows):
            square = _added(part, square)
        return RowSum(total, (), square)

    def statistic(self) -> Statistic:
        """The sum as a factor R ``[r, in]`` with R^T R = the sum."""
        factor = torch.cat(self.kept, dim=-2) if self.square is None else _root(self.square)
        if factor.dim() == 2:
            return Statistic(rows=self.rows, factor=factor)
        return Statistic(rows=self.rows * len(factor), factor=factor, block_rows=(self.rows,) * len(factor))


def _added(rows: Tensor, square: Tensor | None) -> Tensor:
    wide, width = rows.double(), rows.shape[-1]
    after = wide.new_zeros(*wide.shape[:-2], width, width) if square is None else square.clone()
    for start in range(0, width, _COLUMNS):
        end = start + _COLUMNS
        after[..., start:end, start:] += wide[..., start:end].mT @ wide[..., start:]
    return after


def _root(square: Tensor) -> Tensor:
    """R, upper triangular, from the upper part of R^T R; directions without inputs are lifted by rounding noise."""
    width = square.shape[-1]
    largest = square.diagonal(dim1=-2, dim2=-1).amax(-1)[..., None, None]
    noise = torch.finfo(square.dtype).eps * width * largest
    lifted = square + noise * torch.eye(width, dtype=square.dtype, device=square.device)
    with one_thread():  # several round differently
        factor, failed = torch.linalg.cholesky_ex(lifted, upper=True)
    if not bool(failed.any()):
        found: Tensor = factor.triu().float()
        return found
    values, vectors = eigenpairs(square.triu() + square.triu(1).mT)
    root: Tensor = values.clamp_min(0).sqrt()[..., None] * vectors.mT
    return root.float()
