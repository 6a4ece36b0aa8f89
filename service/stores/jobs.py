"""The jobs as their callers see them: submit, look, list, cancel, retry, delete."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, Select, delete, func, select

from service.contract.asked import AnyRecipe
from service.contract.errors import (
    Blame,
    IdempotencyKeyReused,
    InvalidCursor,
    JobNotRetryable,
    JobNotTerminal,
    NotFound,
    OutputExists,
    TooManyActiveJobs,
)
from service.contract.job import Event, Job, Mark, Status
from service.contract.resources import MERGES, Resource, resource_named
from service.contract.stages import STAGES, NewPart, PartMessage, Stage
from service.stores.database import Database, now
from service.stores.records import ACTIVE, event_of, is_committing, lock_job, overlaps, record, views
from service.stores.schema import events, idempotency_keys, jobs, labels, parts
from service.stores.transitions import ask_for, ready_messages, reopen, withdraw

MARKS_AT_ONCE = 1000  # SQLite takes no more than 32,766 parameters
FULL_RETRY_SECONDS = 10
FIRST_PART = NewPart(Stage.PLAN, 0, "plan", weight=1.0)


@dataclass(frozen=True)
class IdempotencyKey:
    """A caller's promise that requests with this key and the same body are one request."""

    scope: str
    key: str
    fingerprint: str


@dataclass(frozen=True)
class KeptAnswer:
    """The answer that an earlier request with the same key got."""

    status: int
    body: Any


@dataclass(frozen=True)
class Submission:
    """A job to store. ``prefix`` makes the output's place from the job's id."""

    caller: str
    recipe: AnyRecipe
    prefix: Callable[[str], str]
    warnings: tuple[str, ...] = ()
    expires_after_seconds: float | None = None


@dataclass(frozen=True)
class Listing:
    """What of the caller's jobs to list: newest first, unless ``ascending``."""

    caller: str
    resource: Resource = MERGES
    limit: int = 20
    after: str | None = None
    ascending: bool = False
    status: Status | None = None
    created_after: float | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)


class JobStore:
    """What callers may do with jobs; each method is one transaction."""

    def __init__(self, database: Database, *, max_active_jobs: int | None = None) -> None:
        self._database = database
        self._max_active_jobs = max_active_jobs

    def submit(
        self, submission: Submission, key: IdempotencyKey | None, answer: Callable[[Job], KeptAnswer]
    ) -> Job | KeptAnswer:
        """Store a job, its first event, its first part and its idempotency key, or find the answer already given.

        Raises:
            OutputExists: another job that is not finished writes to the same place, above it or below it.
            IdempotencyKeyReused: the key was used with another body.
            TooManyActiveJobs: the caller has as many as it may have.
        """
        with self._database.write() as connection:
            # Ids are given out and committed in one order, so that no list ever skips a job that commits late.
            self._database.serialize(connection, "submit")
            kept = _kept(connection, key)
            if kept is not None:
                return kept
            self._refuse_full(connection, submission.caller)
            job_id = _next_id(connection, submission.recipe.resource)
            prefix = submission.prefix(job_id)
            _refuse_taken(connection, prefix, except_job=job_id)
            connection.execute(jobs.insert().values(**_new_row(job_id, prefix, submission)))
            ask_for(connection, job_id, [FIRST_PART], ready=Stage.PLAN)
            record(connection, job_id, "job.queued", {"recipe_sha256": submission.recipe.sha256})
            job = _one_view(connection, job_id)
            if key is not None:
                _keep(connection, key, answer(job))
            return job

    def expect_room(self, caller: str) -> None:
        """Raises TooManyActiveJobs where one more job would be refused now."""
        with self._database.read() as connection:
            self._refuse_full(connection, caller)

    def _refuse_full(self, connection: Connection, caller: str) -> None:
        if self._max_active_jobs is None:
            return
        active = select(func.count()).where(jobs.c.caller == caller, jobs.c.status.in_(ACTIVE))
        count = connection.execute(active).scalar_one()
        if count >= self._max_active_jobs:
            raise TooManyActiveJobs(
                f"{count} of your jobs wait or run, and {self._max_active_jobs} may: wait for one, or cancel it.",
                retry_after_seconds=FULL_RETRY_SECONDS,
            )

    def replay(self, key: IdempotencyKey) -> KeptAnswer | None:
        """The answer kept for ``key``, if there is one. Raises IdempotencyKeyReused."""
        with self._database.read() as connection:
            return _kept(connection, key)

    def keep(self, key: IdempotencyKey, answer: KeptAnswer) -> None:
        """Keep a deterministic refusal, so that the key can't be used with another body."""
        with self._database.write() as connection:
            self._database.serialize(connection, "submit")
            if _kept(connection, key) is None:
                _keep(connection, key, answer)

    def get(self, caller: str, job_id: str) -> Job:
        """Raises NotFound, also for a job of someone else."""
        with self._database.read() as connection:
            _own(connection.execute(select(jobs).where(jobs.c.id == job_id)).one_or_none(), caller, job_id)
            return _one_view(connection, job_id)

    def page(self, listing: Listing) -> tuple[list[Job], bool]:
        """A page of jobs, and whether there are more. Raises InvalidCursor."""
        with self._database.read() as connection:
            if listing.after is not None and not _exists(connection, listing.caller, listing.after):
                raise InvalidCursor(f"after={listing.after!r} is not one of your jobs; use an id from the last page.")
            rows = connection.execute(_listed(listing, self._database.is_sqlite)).all()
            return views(connection, rows[: listing.limit]), len(rows) > listing.limit

    def cancel(self, caller: str, job_id: str, expect: Callable[[Job], None] = lambda _: None) -> tuple[Job, bool]:
        """End a job that has not ended; returns it and whether it was still active.

        A job whose last part is just then making its result visible is let finish. ``expect`` sees the job before
        anything happens to it, and may raise.
        """
        with self._database.write() as connection:
            row = _own(lock_job(connection, job_id), caller, job_id)
            expect(_one_view(connection, job_id))
            changes = row.status in ACTIVE and not is_committing(connection, job_id)
            if changes:
                withdraw(connection, job_id)
                ended = {"status": Status.CANCELLED.value, "finished_at": now(), "queue": None}
                record(connection, job_id, "job.cancelled", {"by": caller}, **ended)
            return _one_view(connection, job_id), row.status in ACTIVE

    def retry(self, caller: str, job_id: str) -> tuple[Job, list[PartMessage]]:
        """Let a failed or cancelled job go on from the parts that are done; returns it and what to send.

        A job that failed over its inputs is planned again from the start, since they have to change for it to pass. So
        is one in whose folder another job was at work meanwhile: the parts that were done may be gone.
        """
        with self._database.write() as connection:
            self._database.serialize(connection, "submit")
            row = _own(lock_job(connection, job_id), caller, job_id)
            if not Status(row.status).is_retryable:
                raise JobNotRetryable(f"Job {job_id} is {row.status}; only a failed or cancelled job can be retried.")
            self._refuse_full(connection, caller)
            _refuse_taken(connection, row.prefix, except_job=job_id)
            over_inputs = row.error is not None and row.error["blame"] == Blame.USER
            if over_inputs or _overtaken(connection, row.id, row.prefix, row.queued_at) is not None:
                connection.execute(delete(parts).where(parts.c.job_id == job_id))
                ask_for(connection, job_id, [FIRST_PART], ready=Stage.PLAN)
                stage = None
            else:
                stage = reopen(connection, job_id)
            record(connection, job_id, "job.retried", {"attempt": row.attempt + 1}, **_reopened(row, stage))
            return _one_view(connection, job_id), ready_messages(connection, job_id)

    def delete(self, caller: str, job_id: str, expect: Callable[[Job], None] = lambda _: None) -> Job:
        """Forget a finished job. ``expect`` sees it first, and may raise. Raises JobNotTerminal, NotFound."""
        with self._database.write() as connection:
            row = _own(lock_job(connection, job_id), caller, job_id)
            job = _one_view(connection, job_id)
            expect(job)
            if row.status in ACTIVE:
                raise JobNotTerminal(f"Job {job_id} is {row.status}; cancel it first, or wait.")
            connection.execute(delete(jobs).where(jobs.c.id == job_id))
            return job

    def successor(self, job: Job) -> str | None:
        """The id of a job that was put in the same folder, above it or below it, after ``job``; None: there is none."""
        with self._database.read() as connection:
            return _overtaken(connection, job.id, job.prefix, job.queued_at)

    def events(self, caller: str, job_id: str, after: int, limit: int) -> tuple[list[Event], bool, bool]:
        """Events with numbers above ``after``; whether there are more; and whether no further event will come."""
        looked_at: Select[Any] = select(jobs.c.caller, jobs.c.status).where(jobs.c.id == job_id)
        with self._database.read() as connection:
            row = _own(connection.execute(looked_at).one_or_none(), caller, job_id)
            found = connection.execute(
                select(events)
                .where(events.c.job_id == job_id, events.c.seq > after)
                .order_by(events.c.seq)
                .limit(limit + 1)
            ).all()
            more = len(found) > limit
            return [event_of(event) for event in found[:limit]], more, row.status not in ACTIVE and not more

    def marks(self, job_ids: Collection[str]) -> dict[str, Mark]:
        """How far the jobs of these ids are, whosever they are; those that are gone are left out."""
        found: dict[str, Mark] = {}
        ids = list(job_ids)
        with self._database.read() as connection:
            for start in range(0, len(ids), MARKS_AT_ONCE):
                rows = connection.execute(
                    select(jobs.c.id, jobs.c.last_seq, jobs.c.status).where(
                        jobs.c.id.in_(ids[start : start + MARKS_AT_ONCE])
                    )
                )
                found |= {row.id: Mark(last_seq=row.last_seq, has_ended=row.status not in ACTIVE) for row in rows}
        return found

    def counts(self) -> dict[str, int]:
        """How many jobs there are by status."""
        with self._database.read() as connection:
            counted = connection.execute(select(jobs.c.status, func.count()).group_by(jobs.c.status))
            return dict(counted.all())


def _own(row: Row[Any] | None, caller: str, job_id: str) -> Row[Any]:
    if row is None or row.caller != caller:
        raise NotFound(f"There is no {resource_named(job_id).name} {job_id!r}.")
    return row


def _exists(connection: Connection, caller: str, job_id: str) -> bool:
    found = connection.execute(select(jobs.c.id).where(jobs.c.id == job_id, jobs.c.caller == caller))
    return found.first() is not None


def _one_view(connection: Connection, job_id: str) -> Job:
    return views(connection, connection.execute(select(jobs).where(jobs.c.id == job_id)).all())[0]


def _kept(connection: Connection, key: IdempotencyKey | None) -> KeptAnswer | None:
    if key is None:
        return None
    mine = (idempotency_keys.c.scope == key.scope, idempotency_keys.c.key == key.key)
    row = connection.execute(select(idempotency_keys).where(*mine)).one_or_none()
    if row is None:
        return None
    if row.fingerprint != key.fingerprint:
        raise IdempotencyKeyReused(f"The idempotency key {key.key!r} was used with another body; use a new key.")
    return KeptAnswer(row.status, row.body)


def _keep(connection: Connection, key: IdempotencyKey, answer: KeptAnswer) -> None:
    connection.execute(
        idempotency_keys.insert().values(
            scope=key.scope,
            key=key.key,
            fingerprint=key.fingerprint,
            status=answer.status,
            body=answer.body,
            created_at=now(),
        )
    )


def _next_id(connection: Connection, resource: Resource) -> str:
    """A UUIDv7 (RFC 9562) above every id of its kind given out before, whatever this machine's clock says."""
    milliseconds = int(connection.execute(select(now())).scalar_one() * 1000)
    fresh = (milliseconds << 80) | (7 << 76) | (secrets.randbits(12) << 64) | (2 << 62) | secrets.randbits(62)
    last = connection.execute(select(func.max(jobs.c.id)).where(_is_of(resource))).scalar_one()
    if last is not None:
        fresh = max(fresh, int(last.removeprefix(resource.id_prefix), 16) + 1 + secrets.randbits(32))
    return f"{resource.id_prefix}{fresh:032x}"


def _is_of(resource: Resource) -> ColumnElement[bool]:
    """Whether a job is of this kind, told by a range of ids, which an index serves."""
    return jobs.c.id.between(resource.id_prefix + 32 * "0", resource.id_prefix + 32 * "f")


def _refuse_taken(connection: Connection, prefix: str, *, except_job: str) -> None:
    """Two jobs at work in one folder would make one result of both."""
    taken = connection.execute(
        select(jobs.c.id).where(jobs.c.status.in_(ACTIVE), jobs.c.id != except_job, overlaps(prefix))
    ).first()
    if taken is not None:
        raise OutputExists(
            f"Job {taken.id} is writing to {prefix}, above it or below it; wait for it, cancel it, or choose another."
        )


def _overtaken(connection: Connection, job_id: str, prefix: str, queued_at: float) -> str | None:
    """A job that was put in the same folder, above it or below it, after this one."""
    later = (jobs.c.queued_at > queued_at, jobs.c.id != job_id, overlaps(prefix))
    return connection.execute(select(jobs.c.id).where(*later).limit(1)).scalar_one_or_none()


def _new_row(job_id: str, prefix: str, submission: Submission) -> dict[str, Any]:
    recipe, expires = submission.recipe, submission.expires_after_seconds
    return {
        "id": job_id,
        "caller": submission.caller,
        "status": Status.QUEUED.value,
        "recipe": recipe.model_dump(mode="json"),
        "recipe_sha256": recipe.sha256,
        "metadata": recipe.metadata,
        "prefix": prefix,
        "attempt": 1,
        "version": 0,
        "last_seq": 0,
        "warnings": list(submission.warnings),
        "created_at": now(),
        "queued_at": now(),
        "priority": recipe.priority,
        **_turn(FIRST_PART.stage),
        "deadline_at": None if recipe.deadline_seconds is None else now() + recipe.deadline_seconds,
        "expires_at": None if expires is None else now() + expires,
    }


def _reopened(row: Row[Any], stage: Stage | None) -> dict[str, Any]:
    seconds = row.recipe["deadline_seconds"]
    return {
        "status": Status.QUEUED.value,
        "stage": stage.value if stage else None,
        "attempt": row.attempt + 1,
        "error": None,
        "finished_at": None,
        "tidied_at": None,
        "queued_at": now(),
        "deadline_at": None if seconds is None else now() + seconds,
        **_turn(stage or FIRST_PART.stage),
    }


def _turn(stage: Stage) -> dict[str, Any]:
    """A job that has just been queued, for this stage."""
    return {"queue": STAGES[stage].queue.value, "given": 0, "turn_at": now(), "stuck_since": None}


def _listed(listing: Listing, is_sqlite: bool) -> Select[Any]:
    query = select(jobs).where(jobs.c.caller == listing.caller, _is_of(listing.resource))
    if listing.after is not None:
        query = query.where(jobs.c.id > listing.after if listing.ascending else jobs.c.id < listing.after)
    if listing.status is not None:
        query = query.where(jobs.c.status == listing.status.value)
    if listing.created_after is not None:
        since = listing.created_after
        query = query.where(jobs.c.created_at > since, jobs.c.id > _older_than(since, listing.resource))
    for name, value in listing.metadata.items():
        query = query.where(_labeled(name, value, is_sqlite))
    return query.order_by(jobs.c.id if listing.ascending else jobs.c.id.desc()).limit(listing.limit + 1)


def _older_than(moment: float, resource: Resource) -> str:
    """An id below those of all jobs created since: ids are in the order of creation, and this one is an hour early."""
    milliseconds = int(max(moment - 3600.0, 0.0) * 1000)
    return f"{resource.id_prefix}{milliseconds << 80:032x}"


def _labeled(name: str, value: str, is_sqlite: bool) -> Any:
    if is_sqlite:  # json_each takes any key as it is, where a JSON path would have to quote it
        entry = func.json_each(jobs.c.metadata).table_valued("key", "value")
        return select(entry.c.key).where(entry.c.key == name, entry.c.value == value).exists()
    return labels.contains({name: value})
