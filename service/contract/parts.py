"""What a worker is given with a part, and what it leaves behind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from service.contract.asked import AnyRecipe
from service.contract.job import Status
from service.contract.stages import NewPart, Stage


@dataclass(frozen=True)
class Counters:
    """How far a part is."""

    tensors_done: int = 0
    bytes_read: int = 0
    bytes_written: int = 0


@dataclass(frozen=True)
class SoFar:
    """What a job has cost until now; times in seconds since the epoch, by the database's clock."""

    created_at: float
    started_at: float
    now: float
    bytes_read: int
    bytes_written: int


@dataclass(frozen=True)
class Claim:
    """The right to do a part, until the lease ends. ``token`` is what every later write has to show."""

    job_id: str
    stage: Stage
    part: int
    name: str
    token: str
    attempt: int
    recipe: AnyRecipe
    prefix: str


@dataclass(frozen=True)
class Done:
    """What a part leaves in the database when it is done.

    ``parts`` are the parts that a plan asks for; ``status`` and ``result`` end the job, which only its last part may.
    """

    output: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    parts: tuple[NewPart, ...] = ()
    status: Status | None = None
    result: Mapping[str, Any] | None = None
