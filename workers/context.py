"""What a method may know about the parameter it merges, beside the task vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from service.contract.errors import BadInput
from service.contract.treatments import Role
from workers.layout import as_blocks, as_matrix, from_blocks, from_matrix
from workers.magnitudes import Cut
from workers.statistics import Statistic

MATRIX_ROLES = (Role.LINEAR, Role.CONVOLUTION, Role.EMBEDDING)
STACKS = (Role.EXPERTS, Role.GROUPED_CONVOLUTION)


@dataclass(frozen=True, eq=False)
class Context:
    """One parameter: its name, role and layout, its value in the base (of the task vectors' shape and type).

    ``tasks`` are the names of the tasks in order; ``statistics`` and ``cuts`` come in that order too. ``cuts`` are the
    places where each task's largest entries end, one for each share that ``Method.surveys`` asks for, counted over
    the whole task vector. ``blocks`` counts the matrices that are stacked in the parameter.
    ``first`` counts the entries before those of a piece, if the task vectors are but that: ``[n]`` of the parameter's
    entries in a row, or whole rows ``[m, n]`` of its matrices. ``facts`` are what the method's own ``look`` found.
    """

    parameter: str
    role: Role
    transposed: bool
    base: Tensor
    tasks: Sequence[str]
    statistics: Sequence[Statistic | None]
    seed: int = 0
    cuts: Sequence[Sequence[Cut]] = ()
    blocks: int = 1
    first: int = 0
    facts: Any = None

    def of(self, chosen: Sequence[int]) -> Context:
        """The same parameter with some of the tasks only."""
        return replace(
            self,
            tasks=[self.tasks[k] for k in chosen],
            statistics=[self.statistics[k] for k in chosen],
            cuts=[self.cuts[k] for k in chosen] if self.cuts else (),
        )

    def matrices(self, task_vectors: Sequence[Tensor], roles: Sequence[Role] = MATRIX_ROLES) -> list[Tensor] | None:
        """The task vectors as ``[out, in]``; None where the parameter's role is none of ``roles``."""
        if self.role not in roles:
            return None
        return [as_matrix(task_vector, self.role, self.transposed) for task_vector in task_vectors]

    def restored(self, matrix: Tensor) -> Tensor:
        """A matrix ``[out, in]`` in the parameter's own shape and type."""
        return from_matrix(matrix, tuple(self.base.shape), self.role, self.transposed).to(self.base.dtype)

    def stacks(self, task_vectors: Sequence[Tensor]) -> list[Tensor] | None:
        """The task vectors as ``[blocks, out, in]``; None where the parameter is no stack of matrices."""
        if self.role not in STACKS:
            return None
        return [as_blocks(task_vector, self.role, self.blocks, self.transposed) for task_vector in task_vectors]

    def block(self, index: int) -> Context:
        """One of the stacked matrices ``[out, in]`` as a linear weight of its own.

        Raises:
            BadInput: statistics are about another number of matrices.
        """
        return replace(
            self,
            role=Role.LINEAR,
            transposed=False,
            base=as_blocks(self.base, self.role, self.blocks, self.transposed)[index],
            statistics=[self._of_block(statistic, index) for statistic in self.statistics],
            blocks=1,
        )

    def unstacked(self, stack: Tensor) -> Tensor:
        """A stack ``[blocks, out, in]`` in the parameter's own shape."""
        return from_blocks(stack, tuple(self.base.shape), self.transposed)

    def _of_block(self, statistic: Statistic | None, index: int) -> Statistic | None:
        if statistic is None:
            return None
        if len(statistic.block_rows) != self.blocks:
            raise BadInput(
                f"the statistics of {self.parameter!r} are about {len(statistic.block_rows) or 1} matrices, but "
                f"{self.blocks} are stacked there",
                tensor=self.parameter,
            )
        return statistic.block(index)
