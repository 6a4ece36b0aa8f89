"""Jobs that no worker has the memory for: told at once, taken back when one comes, and failed where none does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, Row, select

from service.contract.errors import NoWorkerFits
from service.contract.stages import Queue
from service.contract.workers import Worker, gigabytes
from service.stores.database import Database, now
from service.stores.records import ACTIVE, lock_job, record
from service.stores.schema import jobs, parts
from service.stores.transitions import fail_job
from service.stores.workers import serving

SHOWN = 3
NO_ROOM = "No worker has the memory for "  # how the warning begins


class Placement:
    """Looks after jobs whose parts are too large for every worker that lives.

    A larger worker may be on its way, so such a job waits, with a warning, for ``patience_seconds``, and fails then.
    Where no worker lives at all nothing is known, and jobs wait as they do in any queue.
    """

    def __init__(self, database: Database, *, lease_seconds: float, patience_seconds: float) -> None:
        self._database = database
        self._lease_seconds = lease_seconds
        self._patience_seconds = patience_seconds

    def sweep(self) -> None:
        """Warn of jobs that are stuck, fail those that stay so, and let go of those that no longer are."""
        for queue in Queue:
            with self._database.read() as connection:
                known = serving(connection, queue, self._lease_seconds)
                stuck = _stuck(connection, queue, max((worker.usable_bytes for worker in known), default=None))
                freed = _freed(connection, queue, stuck)
            for job_id in stuck:
                self._look_at(job_id, known)
            for job_id in freed:
                self._let_go(job_id)

    def _look_at(self, job_id: str, known: Sequence[Worker]) -> None:
        with self._database.write() as connection:
            job = lock_job(connection, job_id)
            part = _largest(connection, job_id, max(worker.usable_bytes for worker in known))
            if job is None or part is None or job.status not in ACTIVE:
                return
            failure = NoWorkerFits(_sentence(part, known))
            if job.stuck_since is None:
                warned = {"stuck_since": now(), "warnings": [*job.warnings, failure.detail]}
                record(connection, job_id, "job.stuck", {"code": failure.code, "detail": failure.detail}, **warned)
            elif connection.execute(select(now())).scalar_one() > job.stuck_since + self._patience_seconds:
                fail_job(connection, job_id, failure)

    def _let_go(self, job_id: str) -> None:
        with self._database.write() as connection:
            job = lock_job(connection, job_id)
            if job is not None and job.stuck_since is not None and job.status in ACTIVE:
                _take_back(connection, job)


def note_placed(connection: Connection, job: Row[Any], peak_bytes: int) -> None:
    """A part of a locked job was claimed: where none that waits is larger, there is a worker for all of them."""
    if job.stuck_since is None:
        return
    larger = (parts.c.job_id == job.id, parts.c.state == "ready", parts.c.peak_bytes > peak_bytes)
    if connection.execute(select(parts.c.part).where(*larger).limit(1)).first() is None:
        _take_back(connection, job)


def _take_back(connection: Connection, job: Row[Any]) -> None:
    """A warning that no longer holds would stay beside the job's result."""
    warnings = [warning for warning in job.warnings if not warning.startswith(NO_ROOM)]
    record(connection, job.id, "job.unstuck", {}, stuck_since=None, warnings=warnings)


def _stuck(connection: Connection, queue: Queue, largest: int | None) -> list[str]:
    """Jobs of a queue with parts that are ready and need more than any worker has."""
    if largest is None:
        return []
    too_large = (parts.c.state == "ready", parts.c.peak_bytes > largest)
    query = select(jobs.c.id).join(parts, parts.c.job_id == jobs.c.id).where(jobs.c.queue == queue.value, *too_large)
    return list(connection.execute(query.distinct()).scalars())


def _freed(connection: Connection, queue: Queue, stuck: Sequence[str]) -> list[str]:
    was = select(jobs.c.id).where(jobs.c.queue == queue.value, jobs.c.stuck_since.is_not(None))
    return [job_id for job_id in connection.execute(was).scalars() if job_id not in stuck]


def _largest(connection: Connection, job_id: str, usable: int) -> Row[Any, Any, Any] | None:
    row: Row[Any, Any, Any] | None = connection.execute(
        select(parts.c.name, parts.c.stage, parts.c.peak_bytes)
        .where(parts.c.job_id == job_id, parts.c.state == "ready", parts.c.peak_bytes > usable)
        .order_by(parts.c.peak_bytes.desc(), parts.c.part)
        .limit(1)
    ).one_or_none()
    return row


def _sentence(part: Row[Any, Any, Any], known: Sequence[Worker]) -> str:
    by_size = sorted(known, key=lambda worker: (-worker.usable_bytes, worker.id))
    shown = ", ".join(f"{worker.id}: {gigabytes(worker.usable_bytes)}" for worker in by_size[:SHOWN])
    more = f" and {len(known) - SHOWN} smaller" if len(known) > SHOWN else ""
    return (
        f"{NO_ROOM}{part.name!r} ({part.stage}): it is predicted to need "
        f"{gigabytes(part.peak_bytes)}, and they may use {shown}{more}. Start a worker with more memory or with fewer "
        "processes, or raise its CATMERGE_WORKER_MEMORY_BYTES; or merge fewer tasks, or by a method that needs less."
    )
