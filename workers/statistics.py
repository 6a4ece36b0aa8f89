"""What one task's exemplars say about one parameter's inputs, small enough to store, streamed batch by batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from service.contract.errors import BadInput
from workers.factoring import triangle


@dataclass(frozen=True, eq=False)
class Statistic:
    """The second moment of a parameter's inputs over ``rows`` rows, unnormalized, in one of two forms.

    ``factor`` is ``[r, in]`` with ``factor.T @ factor`` the sum over rows of x x^T, r <= in. ``diagonal`` is ``[d]``,
    the sum over rows of x^2 per dimension, where the inputs are one-hot (token counts) or only their squares matter.
    Matrices that are stacked have one factor each, ``[blocks, r, in]`` with rows of zeros where one has fewer than r,
    and ``block_rows`` says how many rows each of them saw. Where ``scale`` is not 1, a factor is meant that many times:
    a tensor that is large and known otherwise need not be copied to be one.

    Raises:
        BadInput: neither form or both are given, a shape is wrong, or ``rows`` is negative.
    """

    rows: int
    factor: Tensor | None = None
    diagonal: Tensor | None = None
    block_rows: tuple[int, ...] = ()
    scale: float = 1.0

    def __post_init__(self) -> None:
        if (self.factor is None) == (self.diagonal is None):
            raise BadInput("a statistic has either a factor or a diagonal, and not both")
        if self.factor is not None and self.factor.dim() != (3 if self.block_rows else 2):
            raise BadInput(f"a statistic's factor has two dimensions, not the shape {list(self.factor.shape)}")
        if self.block_rows and self.held.shape[0] != len(self.block_rows):
            raise BadInput(f"a statistic has {len(self.held)} blocks, but the row counts of {len(self.block_rows)}")
        if self.diagonal is not None and self.diagonal.dim() != 1:
            raise BadInput(f"a statistic's diagonal has one dimension, not the shape {list(self.diagonal.shape)}")
        if self.rows < 0:
            raise BadInput(f"a statistic can't have seen {self.rows} rows")

    @property
    def width(self) -> int:
        """The number of input dimensions."""
        return self.held.shape[-1]

    def block(self, index: int) -> Statistic:
        """The statistic of one of the stacked matrices."""
        return Statistic(rows=self.block_rows[index], factor=self.held[index], scale=self.scale)

    @property
    def held(self) -> Tensor:
        """The factor or the diagonal, whichever it is."""
        held = self.diagonal if self.factor is None else self.factor
        if held is None:
            raise BadInput("a statistic has either a factor or a diagonal, and not both")
        return held


def stack_statistics(blocks: Sequence[Statistic | None]) -> Statistic | None:
    """One statistic of stacked matrices from one factor for each; None where no matrix has any."""
    widths = [block.width for block in blocks if block is not None]
    if not widths:
        return None
    longest = max(len(block.held) for block in blocks if block is not None)
    like = next(block.held for block in blocks if block is not None)
    factor = like.new_zeros(len(blocks), longest, widths[0])
    for place, block in zip(factor, blocks, strict=True):
        if block is not None:
            place[: len(block.held)] = block.held * block.scale
    rows = tuple(block.rows if block is not None else 0 for block in blocks)
    return Statistic(rows=sum(rows), factor=factor, block_rows=rows)


def observe_rows(x: Tensor, so_far: Statistic | None = None) -> Statistic:
    """Add the rows ``x [n, in]`` to a factor: the rows themselves while they are few, then a triangular factor.

    Once there are more rows than columns, the stack of the old factor and the new rows is replaced by the R of its QR
    factorization, which has the same second moment. Rows in half precision are kept in float32.

    Raises:
        BadInput: ``x`` is no matrix, or does not fit ``so_far``.
    """
    if x.dim() != 2:
        raise BadInput(f"inputs are rows of a matrix, not a tensor of shape {list(x.shape)}")
    rows = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    if so_far is None:
        return Statistic(rows=len(rows), factor=_compact(rows.clone()))
    _check_continues(so_far.factor, x.shape[1])
    return Statistic(rows=so_far.rows + len(rows), factor=_compact(torch.cat([so_far.held, rows.to(so_far.held)])))


def observe_squares(x: Tensor, so_far: Statistic | None = None) -> Statistic:
    """Add the squares of the rows ``x [n, d]`` to a diagonal, in float64.

    Raises:
        BadInput: ``x`` is no matrix, or does not fit ``so_far``.
    """
    if x.dim() != 2:
        raise BadInput(f"inputs are rows of a matrix, not a tensor of shape {list(x.shape)}")
    return _add_diagonal(x.detach().double().square().sum(0), len(x), so_far)


def observe_indices(counts: Tensor, rows: int, so_far: Statistic | None = None) -> Statistic:
    """Add ``rows`` one-hot rows to a diagonal, given how often each index occurred: ``counts [d]``.

    Raises:
        BadInput: ``counts`` is no vector, or does not fit ``so_far``.
    """
    return _add_diagonal(counts.detach().double(), rows, so_far)


def _add_diagonal(squares: Tensor, rows: int, so_far: Statistic | None) -> Statistic:
    if so_far is None:
        return Statistic(rows=rows, diagonal=squares)
    _check_continues(so_far.diagonal, len(squares))
    return Statistic(rows=so_far.rows + rows, diagonal=so_far.held + squares.to(so_far.held.device))


def _compact(rows: Tensor) -> Tensor:
    if rows.shape[0] <= rows.shape[1]:
        return rows
    return triangle(rows.double()).to(rows.dtype)


def _check_continues(held: Tensor | None, width: int) -> None:
    if held is None:
        raise BadInput("rows continue a factor and squares a diagonal; the statistic so far is of the other form")
    if held.shape[-1] != width:
        raise BadInput(f"inputs of width {width} don't continue a statistic of width {held.shape[-1]}")
