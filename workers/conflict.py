"""Adds up what task vectors do to each other, over parameters: answers to each other's inputs, and likeness."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Conflict:
    """Sums over parameters for K tasks; ``[i, k]`` is about task i's vector and task k's inputs.

    ``inner`` holds the inner products of task vectors, over all ``parameters``. The others are second moments of
    responses ||X_k T_i^T||^2, over the ``measured`` parameters, whose inputs are known: ``before`` of the task vectors,
    ``after`` of what trimming left of them, and ``large`` of their largest 1 % of entries, where that was asked for;
    ``large_energy [K]`` and ``seen_energy [K]`` are the energies of those entries and of the whole vectors there.
    """

    inner: Matrix
    before: Matrix
    after: Matrix
    large: Matrix
    large_energy: Matrix
    seen_energy: Matrix
    parameters: int = 0
    measured: int = 0

    @classmethod
    def none(cls, tasks: int) -> Self:
        """Nothing yet."""
        square, row = np.zeros((tasks, tasks)), np.zeros(tasks)
        return cls(square, square, square, square, row, row)

    @classmethod
    def of(
        cls,
        inner: Matrix,
        before: Sequence[Sequence[float]] = (),
        after: Sequence[Sequence[float]] = (),
        large: Sequence[Sequence[float]] = (),
        large_energy: Sequence[float] = (),
    ) -> Self:
        """That of one parameter; what was not measured is left out."""
        nothing = cls.none(len(inner))
        return cls(
            inner=inner,
            before=_or(before, nothing.before),
            after=_or(after, nothing.after),
            large=_or(large, nothing.large),
            large_energy=_or(large_energy, nothing.large_energy),
            seen_energy=np.diag(inner).copy() if len(large_energy) else nothing.seen_energy,
            parameters=1,
            measured=int(bool(len(before))),
        )

    def __add__(self, other: Self) -> Self:
        names = [field.name for field in fields(self)]
        sums: dict[str, Any] = {name: getattr(self, name) + getattr(other, name) for name in names}
        return replace(self, **sums)

    def as_dict(self) -> dict[str, Any]:
        """The sums by name, as JSON can hold them."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """From what ``as_dict`` gave."""
        sums: dict[str, Any] = {
            name: np.asarray(value) if isinstance(value, list) else value for name, value in values.items()
        }
        return cls(**sums)

    def disturbance(self, when: Matrix) -> list[list[float | None]]:
        """``[i][k]``: task i's response to task k's inputs, relative to task k's own before trimming; None without."""
        return _divided(when, np.diag(self.before)[None, :])

    def cosine(self) -> list[list[float | None]]:
        """``[i][k]``: the cosine of two task vectors; None where one is zero."""
        lengths = np.sqrt(np.diag(self.inner))
        return _divided(self.inner, np.outer(lengths, lengths))

    def summary(self, tasks: Sequence[str]) -> dict[str, Any]:
        """What a report shows of it."""
        return {"tasks": list(tasks), "disturbance": self.disturbance(self.before), "cosine": self.cosine()}


def total(parts: Iterable[Conflict], tasks: int) -> Conflict:
    """The sum of all."""
    return sum(parts, start=Conflict.none(tasks))


def off_diagonal(matrix: Matrix) -> Matrix:
    """The matrix with zeros in its diagonal."""
    return matrix * (1 - np.eye(len(matrix)))


def _or(values: Sequence[Any], nothing: Matrix) -> Matrix:
    return np.asarray(values, dtype=np.float64) if len(values) else nothing


def _divided(part: Matrix, whole: Matrix) -> list[list[float | None]]:
    rows = zip(part, np.broadcast_to(whole, part.shape), strict=True)
    return [[_ratio(a, b) for a, b in zip(*pair, strict=True)] for pair in rows]


def _ratio(part: float, whole: float) -> float | None:
    """Six digits: more than any page shows."""
    return float(f"{part / whole:.6g}") if whole > 0 else None
