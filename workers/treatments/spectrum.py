"""The leading eigenvectors of a difference of two squares, by the cheapest of several routes that agree."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from service.contract.errors import BadTensor

# Where one route becomes quicker than the next, measured with one thread of a current processor.
LOW_RANK_COLUMNS = 512  # up to here a QR of the columns beats an iteration
KRYLOV_SIZE = 320  # below this a complete factorization does
FORMED_SIZE = 1024  # up to here products with G itself beat products with its many columns
KRYLOV_LIMIT = 512  # dimensions to search in before giving up, if few vectors are wanted


class Eigenpairs(NamedTuple):
    """``values [c]``, descending, and ``vectors [out, c]``, orthonormal."""

    values: Tensor
    vectors: Tensor


class Difference(NamedTuple):
    """The symmetric, indefinite G = sum of g g^T over ``gains`` - ``balance`` * sum of c c^T over ``costs``.

    G is ``[out, out]`` and given by blocks of columns, each ``[out, r]`` with an r of its own. ``squares`` are c c^T
    ``[out, out]`` for each of the costs, where they are known already.
    """

    gains: Sequence[Tensor]
    costs: Sequence[Tensor]
    balance: float = 1.0
    squares: Sequence[Tensor] = ()

    @property
    def size(self) -> int:
        return self.like.shape[0]

    @property
    def like(self) -> Tensor:
        """A column block, of the type and on the device of all."""
        return (*self.gains, *self.costs)[0]

    @property
    def rank_bound(self) -> int:
        return sum(block.shape[1] for block in (*self.gains, *self.costs))

    @property
    def added(self) -> float:
        """The squares of all columns together: what is added and subtracted to make G."""
        gain, cost = (sum(_square(block) for block in blocks) for blocks in (self.gains, self.costs))
        return gain + self.balance * cost

    def times(self, rows: Tensor) -> Tensor:
        """G times each of ``rows [b, out]``, without forming G; rows, because they are quicker to multiply by."""
        total = torch.zeros_like(rows)
        for block in self.gains:
            total.addmm_(rows @ block, block.T)
        for block in self.costs:
            total.addmm_(rows @ block, block.T, alpha=-self.balance)
        return total

    def formed(self) -> Tensor:
        """G itself."""
        total = self.like.new_zeros(self.size, self.size)
        for block in self.gains:
            total.addmm_(block, block.T)
        for square in self.squares or (block @ block.T for block in self.costs):
            total.sub_(square, alpha=self.balance)
        return total

    def double(self) -> Difference:
        """The same in float64, whose products round less."""
        return Difference([g.double() for g in self.gains], [c.double() for c in self.costs], self.balance)


def is_formed(size: int, columns: int) -> bool:
    """Whether ``leading`` will form a difference ``[size, size]`` of so many columns, and squares of costs help."""
    return size <= FORMED_SIZE and columns > min(LOW_RANK_COLUMNS, size - 1)


def leading(matrix: Difference, rank: int, *, positive_only: bool, precision: float) -> Eigenpairs:
    """The eigenvectors of the ``rank`` largest signed eigenvalues of G, or of the positive ones among them.

    ``precision`` is the rounding unit that the columns were computed in: an eigenvalue counts as positive only where
    it stands out from the rounding noise of what was added and subtracted to make it.
    Both come in float64. Each vector's entry of largest magnitude is positive. Which route is taken depends on shapes
    and numbers, never on time.

    Raises:
        BadTensor: a column holds NaN or infinity.
    """
    wanted = min(rank, matrix.size)
    noise = _noise(matrix, precision)
    if wanted == 0 or (positive_only and noise == 0):
        return Eigenpairs(*(matrix.like.new_zeros(shape, dtype=torch.float64) for shape in ((0,), (matrix.size, 0))))
    pairs = _iterated(matrix, wanted, noise if positive_only else -math.inf, precision) or _complete(matrix)
    positive = int((pairs.values[:wanted] > noise).sum())
    if positive_only:
        wanted = positive
    elif positive < wanted and matrix.rank_bound < matrix.size:
        pairs = dense(matrix.double())  # directions of eigenvalue zero are wanted too: the low-rank form has none
    # Orthonormal in the type they came in, and once more in float64: a projection is only as exact as its basis.
    basis = torch.linalg.qr(pairs.vectors[:, :wanted].double()).Q
    return Eigenpairs(pairs.values[:wanted].double(), _with_fixed_signs(basis))


def dense(matrix: Difference) -> Eigenpairs:
    """All eigenpairs of G, from G itself."""
    return _descending(matrix.formed())


def low_rank(matrix: Difference) -> Eigenpairs:
    """The eigenpairs of G within the span of its columns: their QR, and a symmetric problem of their number."""
    basis, triangle = torch.linalg.qr(torch.cat([*matrix.gains, *matrix.costs], dim=1))
    gains = sum(block.shape[1] for block in matrix.gains)
    gain, cost = triangle[:, :gains], triangle[:, gains:]
    values, vectors = _descending(gain @ gain.T - matrix.balance * (cost @ cost.T))
    return Eigenpairs(values, basis @ vectors)


def krylov(
    times: Callable[[Tensor], Tensor], start: Tensor, wanted: int, *, tolerance: float, limit: int, floor: float
) -> Eigenpairs | None:
    """The ``wanted`` leading eigenpairs from products ``times`` with rows alone, or None where they don't converge.

    Block Lanczos with full reorthogonalization, from the orthonormal rows ``start [b, out]`` (Golub and Underwood,
    1977). It ends when ||G v - value * v|| is at most ``tolerance`` times the magnitude of G's largest eigenvalue for
    every pair, or at most ``floor`` for values no larger than that, and gives up when its space would exceed ``limit``
    dimensions.
    """
    width, size = start.shape
    space = start.new_empty(limit, size)
    inside = torch.zeros(limit, limit, dtype=torch.float64, device=start.device)
    block, check = start, 3 * width
    for held in range(width, limit + 1, width):
        space[held - width : held] = block
        image = times(block)
        inside[held - width : held, :held] = (image @ space[:held].T).double()
        block, coupling = _orthonormal(image, space[:held])
        if held >= check or held + width > limit:
            values, mix = _descending(inside[:held, :held].to(space.dtype))
            if _has_converged(values, coupling @ mix[-width:, :wanted], tolerance, floor):
                values, mix = _descending(inside[:held, :held])
                found = mix[:, :wanted].T.to(space.dtype) @ space[:held]
                return Eigenpairs(values[:wanted], found.T)
            check = held + max(width, held // 4)
    return None


def _iterated(matrix: Difference, wanted: int, floor: float, precision: float) -> Eigenpairs | None:
    if matrix.rank_bound <= min(LOW_RANK_COLUMNS, matrix.size - 1) or matrix.size < max(KRYLOV_SIZE, 16 * wanted):
        return None
    limit = min(max(KRYLOV_LIMIT, 16 * wanted), matrix.size // (2 if matrix.size > FORMED_SIZE else 3))
    start, tolerance = first_rows(matrix, wanted + 4), 4 * precision
    if matrix.size > FORMED_SIZE:
        return krylov(matrix.times, start, wanted, tolerance=tolerance, limit=limit, floor=floor)
    formed = matrix.formed()
    found = krylov(lambda rows: rows @ formed, start, wanted, tolerance=tolerance, limit=limit, floor=floor)
    return found or _descending(formed)


def _complete(matrix: Difference) -> Eigenpairs:
    return low_rank(matrix) if matrix.rank_bound < matrix.size else dense(matrix)


def first_rows(matrix: Difference, width: int) -> Tensor:
    """Orthonormal rows ``[width, out]`` to begin an iteration with."""
    # Chirps of different rates overlap with everything and need no random numbers.
    places = torch.arange(1, matrix.size + 1, dtype=torch.float64, device=matrix.like.device)
    rates = torch.arange(1, width + 1, dtype=torch.float64, device=places.device).sqrt()
    rows = torch.cos(rates[:, None] * places.square()).to(matrix.like.dtype)
    orthonormal: Tensor = torch.linalg.qr(rows.T).Q
    return orthonormal.T.contiguous()


def _orthonormal(rows: Tensor, space: Tensor) -> tuple[Tensor, Tensor]:
    """Rows Q, orthonormal and orthogonal to ``space``'s, and C so that ``rows`` is C^T Q but for what ``space`` spans.

    Twice, since rounding spoils the first time, and what vanished the first time is noise that needs the second.
    """
    coupling = torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
    for _ in range(2):
        rows = torch.addmm(rows, rows @ space.T, space, alpha=-1)
        turned, triangle = torch.linalg.qr(rows.T)
        rows, coupling = turned.T, triangle @ coupling
    return rows, coupling


def _has_converged(values: Tensor, residuals: Tensor, tolerance: float, floor: float) -> bool:
    scale = float(values.abs().max())
    allowed = torch.full_like(values[: residuals.shape[1]], tolerance * scale)
    allowed[values[: len(allowed)] <= floor] = max(tolerance * scale, floor)
    return bool((residuals.norm(dim=0) <= allowed).all())


def _descending(symmetric: Tensor) -> Eigenpairs:
    values, vectors = torch.linalg.eigh(symmetric)
    return Eigenpairs(values.flip(0), vectors.flip(1))


def _square(columns: Tensor) -> float:
    # Row by row: one pass, nothing allocated, and float32 sums stay short enough to be accurate.
    return float(torch.linalg.vector_norm(columns, dim=-1).double().square().sum())


def _noise(matrix: Difference, precision: float) -> float:
    added = matrix.added
    if not math.isfinite(added):
        raise BadTensor("a task vector or a statistic holds NaN or infinity")
    return max(precision, matrix.size * torch.finfo(torch.float64).eps) * added


def _with_fixed_signs(vectors: Tensor) -> Tensor:
    # An eigenvector's sign is arbitrary: fixing it makes the same inputs leave the same bytes.
    if vectors.numel() == 0:
        return vectors.clone()
    largest = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True))
    return torch.where(largest < 0, -vectors, vectors)
