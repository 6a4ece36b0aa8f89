"""What a method may know about the parameter it merges, beside the task vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from service.contract.treatments import Role
from workers.layout import as_matrix, from_matrix
from workers.magnitudes import Cut
from workers.statistics import Statistic

MATRIX_ROLES = (Role.LINEAR, Role.CONVOLUTION, Role.EMBEDDING)


@dataclass(frozen=True, eq=False)
class Context:
    """One parameter: its name, role and layout, its value in the base (of the task vectors' shape and type).

    ``tasks`` are the names of the tasks in order; ``statistics`` and ``cuts`` come in that order too. ``cuts`` are the
    places where each task's largest entries end, one for each share that ``Method.surveys`` asks for, counted over
    the whole task vector.
    """

    parameter: str
    role: Role
    transposed: bool
    base: Tensor
    tasks: Sequence[str]
    statistics: Sequence[Statistic | None]
    seed: int = 0
    cuts: Sequence[Sequence[Cut]] = ()

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
