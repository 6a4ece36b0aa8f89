"""The workers there are: each process has a row that it keeps fresh; one that is silent for a lease is gone."""

from __future__ import annotations

from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, delete, select, update

from service.contract.stages import Queue, Stage
from service.contract.workers import AtWork, LivingWorker, Worker
from service.stores.database import Database, now
from service.stores.schema import jobs, parts, workers

PLAIN = ("id", "host", "pid", "device", "memory_bytes", "usable_bytes", "processes", "version", "engine")


class WorkerStore:
    """What workers say of themselves; each method is one transaction."""

    def __init__(self, database: Database, *, lease_seconds: float) -> None:
        self._database = database
        self._lease_seconds = lease_seconds

    def enter(self, worker: Worker) -> None:
        """A worker is ready for parts."""
        with self._database.write() as connection:
            connection.execute(delete(workers).where(workers.c.id == worker.id))
            connection.execute(workers.insert().values(**_values(worker), started_at=now(), seen_at=now()))

    def seen(self, worker: Worker) -> None:
        """A worker still lives. One that was thought gone comes back."""
        with self._database.write() as connection:
            known = connection.execute(update(workers).where(workers.c.id == worker.id).values(seen_at=now())).rowcount
            if not known:
                connection.execute(workers.insert().values(**_values(worker), started_at=now(), seen_at=now()))

    def leave(self, worker_id: str) -> None:
        with self._database.write() as connection:
            connection.execute(delete(workers).where(workers.c.id == worker_id))

    def present(self) -> list[LivingWorker]:
        """The workers that live, with what they do, by host."""
        with self._database.read() as connection:
            rows = connection.execute(
                select(workers).where(is_alive(self._lease_seconds)).order_by(workers.c.host, workers.c.id)
            ).all()
            doing = at_work(connection)
        return [LivingWorker(_worker(row), row.started_at, row.seen_at, doing.get(row.id)) for row in rows]

    def forget_gone(self) -> int:
        with self._database.write() as connection:
            return connection.execute(delete(workers).where(~is_alive(self._lease_seconds))).rowcount


def is_alive(lease_seconds: float) -> ColumnElement[bool]:
    return workers.c.seen_at > now() - lease_seconds


def serving(connection: Connection, queue: Queue, lease_seconds: float) -> list[Worker]:
    """The workers that live and take parts of a queue."""
    rows = connection.execute(select(workers).where(is_alive(lease_seconds)))
    return [worker for worker in map(_worker, rows) if queue in worker.queues]


def at_work(connection: Connection) -> dict[str, AtWork]:
    """What is being done, by the id of the worker."""
    rows = connection.execute(
        select(parts.c.owner, parts.c.job_id, jobs.c.caller, parts.c.stage, parts.c.part, parts.c.name)
        .join(jobs, jobs.c.id == parts.c.job_id)
        .where(parts.c.state == "claimed")
    )
    return {row.owner: AtWork(row.job_id, row.caller, Stage(row.stage), row.part, row.name) for row in rows}


def _values(worker: Worker) -> dict[str, Any]:
    return {**{name: getattr(worker, name) for name in PLAIN}, "queues": [queue.value for queue in worker.queues]}


def _worker(row: Row[Any]) -> Worker:
    return Worker(**{name: getattr(row, name) for name in PLAIN}, queues=tuple(map(Queue, row.queues)))
