"""The leading eigenvectors of a difference of two squares, by the cheapest of several routes that agree."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from service.contract.errors import BadTensor
from workers.treatments.krylov import Eigenpairs, Times, first_rows, krylov
from workers.treatments.outcome import energy

# Where one route becomes quicker than the next, measured with one thread of a current processor.
LOW_RANK_COLUMNS = 512  # up to here a QR of the columns beats an iteration
KRYLOV_SIZE = 320  # below this a complete factorization does
FORMED_SIZE = 1024  # up to here products with G itself beat products with its many columns
KRYLOV_LIMIT = 512  # dimensions to search in before giving up, if few vectors are wanted

Iterate = Callable[[Times, Tensor], list[Eigenpairs | None]]


@dataclass(frozen=True, eq=False)
class Difference:
    """The symmetric, indefinite G = sum of g g^T over ``gains`` - ``balance`` * sum of c c^T over ``costs``.

    G is ``[out, out]`` and given by blocks of columns, each ``[out, r]`` with an r of its own. Where they are known
    already, ``squares`` are c c^T ``[out, out]`` for each of the costs, and ``energies`` the squares of all gains'
    entries and of all costs'.
    """

    gains: Sequence[Tensor]
    costs: Sequence[Tensor]
    balance: float = 1.0
    squares: Sequence[Tensor] = ()
    energies: tuple[float, float] | None = None

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
        gain, cost = self.energies or (sum(map(energy, blocks)) for blocks in (self.gains, self.costs))
        return gain + self.balance * cost

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


def leading(matrices: Sequence[Difference], rank: int, *, positive_only: bool, precision: float) -> list[Eigenpairs]:
    """The eigenvectors of the ``rank`` largest signed eigenvalues of each G, or of the positive ones among them.

    All have one size, and an iteration works on all of them together. ``precision`` is the rounding unit that the
    columns were computed in: an eigenvalue counts as positive only where it stands out from the rounding noise of what
    was added and subtracted to make it. Both come in float64. Each vector's entry of largest magnitude is positive.
    Which route is taken depends on shapes and numbers, never on time.

    Raises:
        BadTensor: a column holds NaN or infinity.
    """
    wanted = min(rank, matrices[0].size)
    noises = [_noise(matrix, precision) for matrix in matrices]
    told = [k for k, noise in enumerate(noises) if wanted and not (positive_only and noise == 0)]
    floors = [noises[k] if positive_only else -math.inf for k in told]
    found = [_none(matrix) for matrix in matrices]
    for k, pairs in zip(told, _iterated([matrices[k] for k in told], wanted, floors, precision), strict=True):
        found[k] = _chosen(matrices[k], pairs or _complete(matrices[k]), wanted, noises[k], positive_only)
    return found


def _chosen(matrix: Difference, pairs: Eigenpairs, wanted: int, noise: float, positive_only: bool) -> Eigenpairs:
    positive = int((pairs.values[:wanted] > noise).sum())
    if positive_only:
        wanted = positive
    elif positive < wanted and matrix.rank_bound < matrix.size:
        pairs = dense(matrix.double())  # directions of eigenvalue zero are wanted too: the low-rank form has none
    # Orthonormal in the type they came in, and once more in float64: a projection is only as exact as its basis.
    basis = torch.linalg.qr(pairs.vectors[:, :wanted].double()).Q
    return Eigenpairs(pairs.values[:wanted].double(), _with_fixed_signs(basis))


def _none(matrix: Difference) -> Eigenpairs:
    return Eigenpairs(*(matrix.like.new_zeros(shape, dtype=torch.float64) for shape in ((0,), (matrix.size, 0))))


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


def _iterated(
    matrices: Sequence[Difference], wanted: int, floors: Sequence[float], precision: float
) -> list[Eigenpairs | None]:
    """Those that an iteration pays for and that it converges on; None for the others."""
    found: list[Eigenpairs | None] = [None for _ in matrices]
    paying = [k for k, matrix in enumerate(matrices) if _pays(matrix, wanted)]
    if not paying:
        return found
    chosen, size = [matrices[k] for k in paying], matrices[0].size
    iterate = partial(
        krylov,
        wanted=wanted,
        tolerance=4 * precision,
        floors=[floors[k] for k in paying],
        limit=min(max(KRYLOV_LIMIT, 16 * wanted), size // 2),
    )
    iterated = _by_columns(chosen, wanted, iterate) if size > FORMED_SIZE else _by_squares(chosen, wanted, iterate)
    for k, pairs in zip(paying, iterated, strict=True):
        found[k] = pairs
    return found


def _by_columns(matrices: Sequence[Difference], wanted: int, iterate: Iterate) -> list[Eigenpairs | None]:
    # Columns are read from memory, which costs the same for some rows more, that lead there sooner.
    start = first_rows(matrices[0].like, wanted + 4)
    return iterate(lambda rows, which: times([matrices[k] for k in which], rows), start)


def _by_squares(matrices: Sequence[Difference], wanted: int, iterate: Iterate) -> list[Eigenpairs | None]:
    formed = torch.stack([matrix.formed() for matrix in matrices])
    iterated = iterate(lambda rows, which: _multiplied(formed, which, rows), first_rows(formed[0], wanted))
    return [pairs or _descending(matrix) for pairs, matrix in zip(iterated, formed, strict=True)]


def times(matrices: Sequence[Difference], rows: Tensor) -> Tensor:
    """G times ``rows [m, b, out]`` for each of m matrices, without forming any.

    Costs that several have in common are multiplied with the rows of all of them at once.
    """
    total = torch.zeros_like(rows)
    for matrix, own, place in zip(matrices, rows, total, strict=True):
        for block in matrix.gains:
            place.add_(_squared(block, own))
    sharing: dict[int, tuple[float, Tensor, list[int]]] = {}
    for place, matrix in enumerate(matrices):
        for block in matrix.costs:
            sharing.setdefault(id(block), (matrix.balance, block, []))[2].append(place)
    for balance, block, places in sharing.values():
        theirs = rows[places]
        total[places] -= balance * _squared(block, theirs.flatten(0, 1)).reshape(theirs.shape)
    return total


def _multiplied(formed: Tensor, which: Sequence[int], rows: Tensor) -> Tensor:
    """``rows [m, b, out]`` times some of the symmetric matrices ``formed [n, out, out]``."""
    if len(which) == len(formed):
        return torch.bmm(rows, formed)
    return torch.stack([own @ formed[k] for own, k in zip(rows, which, strict=True)])


def _squared(block: Tensor, rows: Tensor) -> Tensor:
    """Rows times C C^T, for columns C; the second product is quicker the other way around."""
    return (block @ (rows @ block).T).T


def _pays(matrix: Difference, wanted: int) -> bool:
    has_many_columns = matrix.rank_bound > min(LOW_RANK_COLUMNS, matrix.size - 1)
    return has_many_columns and matrix.size >= max(KRYLOV_SIZE, 16 * wanted)


def _complete(matrix: Difference) -> Eigenpairs:
    return low_rank(matrix) if matrix.rank_bound < matrix.size else dense(matrix)


def _descending(symmetric: Tensor) -> Eigenpairs:
    values, vectors = torch.linalg.eigh(symmetric)
    return Eigenpairs(values.flip(0), vectors.flip(1))


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
