"""The jobs that have ended, as whoever clears up behind them sees them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import ColumnElement, and_, delete, func, select, update

from service.contract.job import Job, Status
from service.contract.stages import Stage
from service.stores.base import Unfinished
from service.stores.begun import begun_by
from service.stores.database import Database, now
from service.stores.records import ACTIVE, overlaps, views
from service.stores.schema import jobs, parts


@dataclass(frozen=True)
class Ended:
    """A job that has ended, and how long ago it was submitted, in seconds by the database's clock."""

    id: str
    status: Status
    prefix: str
    submitted_seconds_ago: float


class EndedJobs:
    """What there is to know before anything is cleared away; each method is one transaction."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def untidied(self, quiet_seconds: float, limit: int) -> list[Ended]:
        """Jobs that ended that long ago and were not cleared up behind, longest ago first."""
        over = (jobs.c.tidied_at.is_(None), jobs.c.finished_at < now() - quiet_seconds, jobs.c.status.not_in(ACTIVE))
        age = (now() - jobs.c.created_at).label("age")
        query = select(jobs.c.id, jobs.c.status, jobs.c.prefix, age).where(*over).order_by(jobs.c.finished_at)
        with self._database.read() as connection:
            found = connection.execute(query.limit(limit)).all()
        return [Ended(row.id, Status(row.status), row.prefix, row.age) for row in found]

    def is_at_work(self, prefix: str) -> bool:
        """Whether a job that has not ended writes to a folder, above it or below it."""
        with self._database.read() as connection:
            active = select(jobs.c.id).where(jobs.c.status.in_(ACTIVE), overlaps(prefix))
            return connection.execute(active.limit(1)).first() is not None

    def begun(self, job_id: str) -> list[Unfinished]:
        """What the workers of a job had begun to write and noted."""
        with self._database.read() as connection:
            return begun_by(connection, job_id)

    def mark_tidied(self, job_id: str) -> None:
        """Note that there is nothing left of a job; one that was retried meanwhile is looked at again."""
        with self._database.write() as connection:
            ended = (jobs.c.id == job_id, jobs.c.status.not_in(ACTIVE))
            connection.execute(update(jobs).where(*ended).values(tidied_at=now()))

    def expired(self, limit: int) -> list[Job]:
        """Jobs that have ended and are past their ``expires_at``."""
        with self._database.read() as connection:
            query = select(jobs).where(_is_expired()).order_by(jobs.c.expires_at).limit(limit)
            return views(connection, connection.execute(query).all())

    def forget(self, job_ids: Sequence[str]) -> int:
        """Forget jobs that are still past their ``expires_at``."""
        with self._database.write() as connection:
            return connection.execute(delete(jobs).where(jobs.c.id.in_(job_ids), _is_expired())).rowcount

    def statistics_used(self) -> dict[str, float]:
        """How many seconds ago statistics were last of use to a job, by address; 0 where one is at work with them."""
        address = parts.c.output["statistics"].as_string()
        done = (parts.c.stage == Stage.CALIBRATE.value, parts.c.state == "done", address.is_not(None))
        last = func.min(now() - func.coalesce(jobs.c.finished_at, now()))
        query = select(address, last).join(jobs, jobs.c.id == parts.c.job_id).where(*done).group_by(address)
        with self._database.read() as connection:
            return {row[0]: max(float(row[1]), 0.0) for row in connection.execute(query)}

    def clock(self) -> float:
        return self._database.clock()

    def is_calibrating(self) -> bool:
        """Whether a worker may be looking for statistics at this moment."""
        with self._database.read() as connection:
            claimed = (parts.c.stage == Stage.CALIBRATE.value, parts.c.state == "claimed")
            return connection.execute(select(parts.c.part).where(*claimed).limit(1)).first() is not None


def _is_expired() -> ColumnElement[bool]:
    return and_(jobs.c.expires_at < now(), jobs.c.status.not_in(ACTIVE))
