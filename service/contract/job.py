"""The job: what the world sees of a merge while it is underway and when it is done."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from pydantic import Field

from service.contract.asked import AnyRecipe
from service.contract.base import Frozen
from service.contract.errors import Blame, Failure
from service.contract.stages import Stage


class Status(StrEnum):
    """Where a job stands. No edge leaves the last four, except by a retry."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    REJECTED = "rejected"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_terminal(self) -> bool:
        return self not in (Status.QUEUED, Status.RUNNING)

    @property
    def has_result(self) -> bool:
        """Whether artifacts and a report exist: a rejected job was merged, but a gate said no."""
        return self in (Status.SUCCEEDED, Status.REJECTED)

    @property
    def is_retryable(self) -> bool:
        return self in (Status.FAILED, Status.CANCELLED)


class Progress(Frozen):
    """How far a job is. No figure ever falls."""

    fraction: float = Field(0.0, ge=0, le=1)
    parts_done: int = 0
    parts_total: int = 0
    tensors_done: int = 0
    tensors_total: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    eta_seconds: float | None = None
    current: str | None = Field(None, description="What is being worked on, in words")


class FailureRecord(Frozen):
    """Why a job failed."""

    code: str
    blame: Blame
    retryable: bool
    detail: str
    tensor: str | None = None

    @classmethod
    def of(cls, failure: Failure) -> FailureRecord:
        return cls(
            code=failure.code,
            blame=failure.blame,
            retryable=failure.retryable,
            detail=failure.detail,
            tensor=failure.tensor,
        )


class Job(Frozen):
    """One merge, from its recipe to its result. Times are seconds since the epoch, by the database's clock."""

    id: str
    caller: str
    status: Status
    stage: Stage | None
    recipe: AnyRecipe
    recipe_sha256: str
    progress: Progress
    attempt: int
    queue_position: int | None
    error: FailureRecord | None
    warnings: tuple[str, ...]
    result: dict[str, Any] | None
    metadata: dict[str, str]
    prefix: str
    version: int
    created_at: float
    queued_at: float
    started_at: float | None
    finished_at: float | None
    expires_at: float | None


class Mark(Frozen):
    """How far a job is, in short: the number of its last event, and whether it has ended."""

    last_seq: int
    has_ended: bool


class Event(Frozen):
    """One line of a job's history; ``seq`` counts from 1 without gaps."""

    seq: int
    type: str
    created_at: float
    data: dict[str, Any]


class Artifact(Frozen):
    """One file of a result."""

    name: str
    role: str
    media_type: str
    size: int
    sha256: str
