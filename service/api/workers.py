"""Who does the work: the worker processes that live, what they have, and what they are at."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel, Field

from service.api.deps import Caller, Doors
from service.api.views import Timestamp, timestamp
from service.contract.stages import Stage
from service.contract.workers import LivingWorker

router = APIRouter(prefix="/v1", tags=["workers"])


class PartView(BaseModel):
    """The part that a worker is doing."""

    job: str | None = Field(description="The merge it belongs to; null where that is someone else's")
    stage: Stage
    part: int
    name: str | None = Field(description="What is worked on; null where it is someone else's")


class WorkerView(BaseModel):
    """A process that does parts, one at a time."""

    object: Literal["worker"] = "worker"
    id: str
    host: str
    pid: int
    device: str
    memory_bytes: int = Field(description="Of the device; of the machine, or what a container may use, for the CPU")
    usable_bytes: int = Field(description="A part that is predicted to need more is left to other workers")
    processes: int = Field(description="How many processes share the machine and the device with this one, and itself")
    queues: list[Literal["light", "heavy"]]
    version: str
    engine: str
    started_at: Timestamp
    seen_at: Timestamp
    current: PartView | None = Field(description="null where it waits")


class WorkerList(BaseModel):
    """Every worker that was heard from within a lease."""

    object: Literal["list"] = "list"
    data: list[WorkerView]
    has_more: Literal[False] = False


@router.get("/workers")
def list_workers(doors: Doors, caller: Caller) -> WorkerList:
    """List the workers that live. One that ends drops off at once, one that is lost after a lease."""
    return WorkerList(data=[_view(presence, caller) for presence in doors.workers.present()])


def _view(living: LivingWorker, caller: str) -> WorkerView:
    worker = living.worker
    return WorkerView(
        id=worker.id,
        host=worker.host,
        pid=worker.pid,
        device=worker.device,
        memory_bytes=worker.memory_bytes,
        usable_bytes=worker.usable_bytes,
        processes=worker.processes,
        queues=[queue.word for queue in worker.queues],
        version=worker.version,
        engine=worker.engine,
        started_at=timestamp(living.started_at),
        seen_at=timestamp(living.seen_at),
        current=_current(living, caller),
    )


def _current(living: LivingWorker, caller: str) -> PartView | None:
    doing = living.at_work
    if doing is None:
        return None
    is_own = doing.caller == caller
    return PartView(
        job=doing.job_id if is_own else None, stage=doing.stage, part=doing.part, name=doing.name if is_own else None
    )
