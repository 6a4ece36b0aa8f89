"""What the parts of a job go through together: asked for, opened stage by stage, withdrawn when the job ends.

Everything here is called inside a transaction that has locked the job.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, func, select, update

from service.contract.errors import Failure
from service.contract.job import FailureRecord, Status
from service.contract.parts import Claim, Done
from service.contract.stages import ORDER, STAGES, NewPart, PartMessage, Stage
from service.stores.database import now
from service.stores.records import record
from service.stores.schema import jobs, parts


def ask_for(connection: Connection, job_id: str, new: Sequence[NewPart], *, ready: Stage | None) -> None:
    """Add parts to a job: those of the stage ``ready`` may be claimed at once, the others wait for their stage."""
    rows = [
        {
            "job_id": job_id,
            "stage": part.stage.value,
            "part": part.part,
            "name": part.name,
            "state": "ready" if part.stage is ready else "waiting",
            "weight": part.weight,
            "tries": 0,
            "attempt": 0,
            "committing": False,
            "not_before": 0.0,
            "tensors_done": 0,
            "tensors_total": part.tensors_total,
            "peak_bytes": part.peak_bytes,
            "inputs": list(part.inputs) or None,
            "deaths": 0,
            "bytes_read": 0,
            "bytes_written": 0,
        }
        for part in new
    ]
    if rows:
        connection.execute(parts.insert(), rows)


def ready_messages(connection: Connection, job_id: str) -> list[PartMessage]:
    """What to send for the parts of a job that may be claimed."""
    rows = connection.execute(
        select(parts.c.stage, parts.c.part).where(parts.c.job_id == job_id, parts.c.state == "ready")
    )
    return [PartMessage(Stage(row.stage), job_id, row.part) for row in rows]


def mark_sent(connection: Connection, messages: Sequence[PartMessage]) -> None:
    for message in messages:
        connection.execute(update(parts).where(*is_part(message)).values(sent_at=now()))


def move_on(connection: Connection, claim: Claim) -> list[PartMessage]:
    left = select(func.count()).where(
        parts.c.job_id == claim.job_id, parts.c.stage == claim.stage.value, parts.c.state != "done"
    )
    if connection.execute(left).scalar_one():
        return []
    _open_next_stage(connection, claim.job_id)
    messages = ready_messages(connection, claim.job_id)
    mark_sent(connection, messages)
    return messages


def reopen(connection: Connection, job_id: str) -> Stage | None:
    """Open a job's undone parts again, with fresh tries; returns the stage that goes on."""
    connection.execute(
        update(parts)
        .where(parts.c.job_id == job_id, parts.c.state != "done")
        .values(**unclaimed(), tries=0, deaths=0, not_before=0.0)
        .values(state="waiting")
    )
    return _open_next_stage(connection, job_id)


def _open_next_stage(connection: Connection, job_id: str) -> Stage | None:
    found = connection.execute(
        select(parts.c.stage).where(parts.c.job_id == job_id, parts.c.state != "done").distinct()
    ).scalars()
    waiting = {Stage(stage) for stage in found}
    upcoming = next((stage for stage in ORDER if stage in waiting), None)
    if upcoming is not None:
        connection.execute(
            update(parts)
            .where(parts.c.job_id == job_id, parts.c.stage == upcoming.value, parts.c.state == "waiting")
            .values(state="ready", sent_at=None)
        )
        connection.execute(update(jobs).where(jobs.c.id == job_id).values(queue=STAGES[upcoming].queue.value))
    return upcoming


def end_job(connection: Connection, job_id: str, done: Done) -> None:
    status = done.status or Status.SUCCEEDED
    withdraw(connection, job_id)
    record(
        connection,
        job_id,
        f"job.{status.value}",
        {"status": status.value},
        status=status.value,
        finished_at=now(),
        queue=None,
        result=dict(done.result or {}),
    )


def fail_job(connection: Connection, job_id: str, failure: Failure) -> None:
    """End a job over ``failure``; its open parts are withdrawn."""
    error = FailureRecord.of(failure).model_dump(mode="json")
    withdraw(connection, job_id)
    ended = {"status": Status.FAILED.value, "finished_at": now(), "queue": None}
    record(connection, job_id, "job.failed", error, **ended, error=error)


def withdraw(connection: Connection, job_id: str) -> None:
    """Take back a job's open parts, so that no worker's later write counts."""
    connection.execute(
        update(parts)
        .where(parts.c.job_id == job_id, parts.c.state != "done")
        .values(state="cancelled", claim=None, owner=None, lease_until=None, committing=False)
    )


def is_part(message: PartMessage) -> tuple[Any, ...]:
    return (
        parts.c.job_id == message.job_id,
        parts.c.stage == message.stage.value,
        parts.c.part == message.part,
    )


def unclaimed() -> dict[str, Any]:
    return {
        "state": "ready",
        "claim": None,
        "owner": None,
        "lease_until": None,
        "committing": False,
        "sent_at": None,
    }
