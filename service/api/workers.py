"""Who does the work: the worker processes that live, what they have, and what they are at."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel, Field

from service.api.deps import Caller, Doors
from service.api.views import Timestamp, timestamp
from service.contract.stages import Stage
from service.contract.workers import InputCache, LivingWorker

router = APIRouter(prefix="/v1", tags=["workers"])


class PartView(BaseModel):
    """The part that a worker is doing."""

    job: str | None = Field(description="The merge it belongs to; null where that is someone else's")
    stage: Stage
    part: int
    name: str | None = Field(description="What is worked on; null where it is someone else's")


class CheckpointView(BaseModel):
    """A checkpoint of which something is kept."""

    address: str
    bytes: int = Field(description="What is kept of it; parts of its files may be missing")


class InputCacheView(BaseModel):
    """What a worker's machine keeps of the inputs that it read; the processes that share it say the same."""

    limit_bytes: int
    used_bytes: int
    found_bytes: int = Field(description="Of what this process was asked for since it started, what was there")
    missed_bytes: int = Field(description="And what came from the object store")
    checkpoints: list[CheckpointView] = Field(description="Those with the most bytes there, largest first")


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
    input_cache: InputCacheView | None = Field(description="null where it keeps no inputs")


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
        input_cache=_input_cache(living.input_cache),
    )


def _input_cache(keeps: InputCache | None) -> InputCacheView | None:
    if keeps is None:
        return None
    return InputCacheView(
        limit_bytes=keeps.limit_bytes,
        used_bytes=keeps.used_bytes,
        found_bytes=keeps.found_bytes,
        missed_bytes=keeps.missed_bytes,
        checkpoints=[CheckpointView(address=address, bytes=nbytes) for address, nbytes in keeps.checkpoints],
    )


def _current(living: LivingWorker, caller: str) -> PartView | None:
    doing = living.at_work
    if doing is None:
        return None
    is_own = doing.caller == caller
    return PartView(
        job=doing.job_id if is_own else None, stage=doing.stage, part=doing.part, name=doing.name if is_own else None
    )
