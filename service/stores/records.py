"""Rows as the contract's values, and the few writes that every transition of a job shares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, and_, func, or_, select, update
from sqlalchemy import case as sql_case

from service.contract.asked import stored_recipe
from service.contract.job import Event, FailureRecord, Job, Progress, Status
from service.contract.stages import Stage
from service.stores.claiming import queue_positions
from service.stores.database import now
from service.stores.schema import events, jobs, parts

ACTIVE = (Status.QUEUED.value, Status.RUNNING.value)
LAST_CHARACTER = "\U0010ffff"


def lock_job(connection: Connection, job_id: str) -> Row[Any] | None:
    """The job's row, locked until the transaction ends: all writes of one job happen one after another."""
    return connection.execute(select(jobs).where(jobs.c.id == job_id).with_for_update()).one_or_none()


def is_committing(connection: Connection, job_id: str) -> bool:
    """Whether the job's last part is just then making its result visible."""
    alive = (parts.c.job_id == job_id, parts.c.committing, parts.c.lease_until > now())
    return connection.execute(select(parts.c.part).where(*alive)).first() is not None


def record(connection: Connection, job_id: str, kind: str, data: Mapping[str, Any], **changes: Any) -> None:
    """Write a transition: the job's changed columns, its version, and its event with the next number, together."""
    seq = connection.execute(
        update(jobs)
        .where(jobs.c.id == job_id)
        .values(last_seq=jobs.c.last_seq + 1, version=jobs.c.version + 1, **changes)
        .returning(jobs.c.last_seq)
    ).scalar_one()
    connection.execute(events.insert().values(job_id=job_id, seq=seq, type=kind, created_at=now(), data=dict(data)))


def touch(connection: Connection, job_id: str) -> None:
    """Say that the job's progress changed, so that its ETag does."""
    connection.execute(update(jobs).where(jobs.c.id == job_id).values(version=jobs.c.version + 1))


def overlaps(prefix: str) -> ColumnElement[bool]:
    """Whether a job's folder is this one, above it or below it, found by index.

    Not by LIKE: to SQLite's, letter case makes no difference, and to both the underscore of a folder is a wildcard.
    """
    above = [prefix[: end + 1] for end, character in enumerate(prefix) if character == "/"]
    return or_(jobs.c.prefix.in_(above), and_(jobs.c.prefix >= prefix, jobs.c.prefix < prefix + LAST_CHARACTER))


def job_of(row: Row[Any], progress: Progress, queue_position: int | None) -> Job:
    """The job that a row of ``jobs`` stands for."""
    return Job(
        id=row.id,
        caller=row.caller,
        status=Status(row.status),
        stage=Stage(row.stage) if row.stage else None,
        recipe=stored_recipe(row.recipe),
        recipe_sha256=row.recipe_sha256,
        progress=progress,
        attempt=row.attempt,
        queue_position=queue_position,
        error=FailureRecord.model_validate(row.error) if row.error else None,
        warnings=tuple(row.warnings),
        result=row.result,
        metadata=row.metadata,
        prefix=row.prefix,
        version=row.version,
        created_at=row.created_at,
        queued_at=row.queued_at,
        started_at=row.started_at,
        finished_at=row.finished_at,
        expires_at=row.expires_at,
    )


def event_of(row: Row[Any]) -> Event:
    return Event(seq=row.seq, type=row.type, created_at=row.created_at, data=row.data)


def views(connection: Connection, rows: Sequence[Row[Any]]) -> list[Job]:
    """Rows of ``jobs`` with what is counted from their parts and from the queue."""
    progress = _progress(connection, rows)
    positions = queue_positions(connection, rows)
    return [job_of(row, progress[row.id], positions.get(row.id)) for row in rows]


def _progress(connection: Connection, rows: Sequence[Row[Any]]) -> dict[str, Progress]:
    share = sql_case(
        (parts.c.state == "done", 1.0),
        (parts.c.tensors_total > 0, parts.c.tensors_done * 1.0 / parts.c.tensors_total),
        else_=0.0,
    )
    counted = connection.execute(
        select(
            parts.c.job_id,
            func.sum(parts.c.weight).label("weight"),
            func.sum(parts.c.weight * share).label("worked"),
            func.count().label("total"),
            func.sum(sql_case((parts.c.state == "done", 1), else_=0)).label("done"),
            # Parts without a total, trials of a search for one, count tensors that they do over and over.
            func.sum(sql_case((parts.c.tensors_total > 0, parts.c.tensors_done), else_=0)).label("tensors_done"),
            func.sum(parts.c.tensors_total).label("tensors_total"),
            func.sum(parts.c.bytes_read).label("bytes_read"),
            func.sum(parts.c.bytes_written).label("bytes_written"),
            func.min(sql_case((parts.c.state == "claimed", parts.c.name), else_=None)).label("current"),
        )
        .where(parts.c.job_id.in_([row.id for row in rows]))
        .group_by(parts.c.job_id)
    )
    by_job = {row.job_id: row for row in counted}
    clock = connection.execute(select(now())).scalar_one()
    return {row.id: _progress_of(row, by_job.get(row.id), clock) for row in rows}


def _progress_of(job: Row[Any], counted: Row[Any] | None, clock: float) -> Progress:
    if counted is None:
        return Progress()
    finished = Status(job.status).has_result
    fraction = 1.0 if finished else min(float(counted.worked) / (float(counted.weight) or 1.0), 0.999)
    elapsed = clock - job.started_at if job.status == Status.RUNNING and job.started_at else None
    return Progress(
        fraction=fraction,
        parts_done=counted.done,
        parts_total=counted.total,
        tensors_done=counted.tensors_done,
        tensors_total=counted.tensors_total,
        bytes_read=counted.bytes_read,
        bytes_written=counted.bytes_written,
        eta_seconds=round(elapsed * (1 - fraction) / fraction, 1) if elapsed and fraction > 0.02 else None,
        current=counted.current if job.status == Status.RUNNING else None,
    )
