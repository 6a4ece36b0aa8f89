"""The workers there are: each process has a row that it keeps fresh; one that is silent for a lease is gone."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, delete, select, update

from service.contract.stages import Queue, Stage
from service.contract.workers import AtWork, InputCache, LivingWorker, Worker
from service.stores.database import Database, now
from service.stores.schema import jobs, parts, workers

PLAIN = ("id", "host", "pid", "device", "memory_bytes", "usable_bytes", "processes", "version", "engine")


class WorkerStore:
    """What workers say of themselves; each method is one transaction."""

    def __init__(self, database: Database, *, lease_seconds: float) -> None:
        self._database = database
        self._lease_seconds = lease_seconds

    def enter(self, worker: Worker, keeps: InputCache | None = None) -> None:
        """A worker is ready for parts."""
        with self._database.write() as connection:
            connection.execute(delete(workers).where(workers.c.id == worker.id))
            _add(connection, worker, keeps)

    def seen(self, worker: Worker, keeps: InputCache | None = None) -> None:
        """A worker still lives, and its machine keeps this of inputs. One that was thought gone comes back."""
        news = {"seen_at": now(), "input_cache": _as_json(keeps)}
        with self._database.write() as connection:
            known = connection.execute(update(workers).where(workers.c.id == worker.id).values(news)).rowcount
            if not known:
                _add(connection, worker, keeps)

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
        return [
            LivingWorker(_worker(row), row.started_at, row.seen_at, doing.get(row.id), _input_cache(row))
            for row in rows
        ]

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


def _add(connection: Connection, worker: Worker, keeps: InputCache | None) -> None:
    values = {**_values(worker), "input_cache": _as_json(keeps)}
    connection.execute(workers.insert().values(**values, started_at=now(), seen_at=now()))


def _as_json(keeps: InputCache | None) -> dict[str, Any] | None:
    return None if keeps is None else asdict(keeps)


def _input_cache(row: Row[Any]) -> InputCache | None:
    if row.input_cache is None:
        return None
    checkpoints = tuple((address, nbytes) for address, nbytes in row.input_cache["checkpoints"])
    return InputCache(**{**row.input_cache, "checkpoints": checkpoints})


def _values(worker: Worker) -> dict[str, Any]:
    return {**{name: getattr(worker, name) for name in PLAIN}, "queues": [queue.value for queue in worker.queues]}


def _worker(row: Row[Any]) -> Worker:
    return Worker(**{name: getattr(row, name) for name in PLAIN}, queues=tuple(map(Queue, row.queues)))
