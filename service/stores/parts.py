"""The parts of jobs as workers and the sweeper see them: claimed under a lease, fenced by a token, done once."""

from __future__ import annotations

import random
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from types import MappingProxyType
from typing import Any

from sqlalchemy import Connection, Row, delete, func, select, update
from sqlalchemy import case as sql_case

from service.contract.asked import stored_recipe
from service.contract.errors import DeadlineExceeded, Failure, Stopped
from service.contract.job import Status
from service.contract.parts import Claim, Counters, Done, SoFar
from service.contract.stages import STAGES, PartMessage, Queue, Stage
from service.stores.claiming import next_job, next_part, note_turn
from service.stores.database import Database, now
from service.stores.losing import LETHAL, lost, was_silent
from service.stores.placing import note_placed
from service.stores.records import ACTIVE, is_committing, lock_job, record, touch
from service.stores.schema import idempotency_keys, jobs, parts
from service.stores.transitions import ask_for, end_job, fail_job, is_part, mark_sent, move_on, unclaimed
from service.stores.workers import at_work, serving

BACKOFF_SECONDS = 2.0
BACKOFF_LIMIT_SECONDS = 60.0
MAX_BYTES = (1 << 63) - 1
NOTHING: Mapping[str, int] = MappingProxyType({})
OPEN = {"ready": "queued", "claimed": "running"}  # states of parts that there is work for, and their names in metrics
SO_FAR = "so_far"  # in the output of a part that is not done yet
RESEND_WINDOW = 64  # parts of each queue that are sent again where their messages may be lost


class PartStore:
    """What workers and the sweeper may do with parts; each method is one transaction."""

    def __init__(self, database: Database, *, lease_seconds: float, part_attempts: int) -> None:
        self._database = database
        self._lease_seconds = lease_seconds
        self._part_attempts = part_attempts

    def claim(self, message: PartMessage, owner: str) -> Claim | None:
        """Take a part that is ready. None where it is claimed, done, withdrawn or unknown."""
        with self._database.write() as connection:
            job = lock_job(connection, message.job_id)
            return None if job is None else self._take(connection, job, message, owner)

    def claim_next(
        self,
        queues: Sequence[Queue],
        owner: str,
        usable_bytes: int = MAX_BYTES,
        kept: Mapping[str, int] = NOTHING,
    ) -> Claim | None:
        """Take the part whose turn it is in the first of these queues that has one; None where there is none.

        Parts that are predicted to need more than ``usable_bytes`` of memory are left to others. Of a job's parts the
        first is the one of whose files the worker's machine keeps most: ``kept`` has their bytes by address.

        Jobs that others have locked are passed over first, and waited for where there is nothing else: a worker that
        finds nothing goes to sleep, and must have looked at everything.
        """
        for queue in queues:
            claim = self._claim_of(queue, owner, usable_bytes, kept)
            if claim is not None:
                return claim
        return None

    def _claim_of(self, queue: Queue, owner: str, usable_bytes: int, kept: Mapping[str, int]) -> Claim | None:
        patient = self._database.is_sqlite  # which lets in one writer at a time
        while True:
            with self._database.write() as connection:
                job = next_job(connection, queue, usable_bytes, patient=patient)
                if job is None and patient:
                    return None
                part = None if job is None else next_part(connection, job.id, usable_bytes, kept)
                if job is not None and part is not None:
                    return self._take(connection, job, PartMessage(Stage(part.stage), job.id, part.part), owner)
            patient = True

    def _take(self, connection: Connection, job: Row[Any], message: PartMessage, owner: str) -> Claim | None:
        """Claim a part of a locked job."""
        if job.status not in ACTIVE:
            return None
        token = secrets.token_hex(16)
        row = connection.execute(
            update(parts)
            .where(*is_part(message), parts.c.state == "ready")
            .values(
                state="claimed",
                claim=token,
                owner=owner,
                lease_until=now() + self._lease_seconds,
                attempt=parts.c.attempt + 1,
                tries=parts.c.tries + 1,
            )
            .returning(parts)
        ).one_or_none()
        if row is None:
            return None
        note_turn(connection, job.id)
        note_placed(connection, job, row.peak_bytes)
        self._note_start(connection, job, message.stage)
        recipe = stored_recipe(job.recipe)
        return Claim(job.id, message.stage, row.part, row.name, token, row.attempt, recipe, job.prefix)

    def _note_start(self, connection: Connection, job: Row[Any], stage: Stage) -> None:
        if job.status == Status.QUEUED:
            changes = {"status": Status.RUNNING.value, "started_at": func.coalesce(jobs.c.started_at, now())}
            record(connection, job.id, "job.started", {"attempt": job.attempt}, **changes)
        if job.stage != stage:
            count = connection.execute(
                select(func.count()).where(parts.c.job_id == job.id, parts.c.stage == stage.value)
            ).scalar_one()
            record(connection, job.id, "stage.started", {"stage": stage.value, "parts": count}, stage=stage.value)

    def heartbeat(self, claim: Claim, counters: Counters) -> bool:
        """Extend the lease and write how far the part is. False: it is no longer this worker's."""
        with self._database.write() as connection:
            lock_job(connection, claim.job_id)
            held = connection.execute(
                update(parts)
                .where(*held_by(claim))
                .values(lease_until=now() + self._lease_seconds, **_counted(counters))
            ).rowcount
            if held:
                touch(connection, claim.job_id)
            return bool(held)

    def is_held(self, claim: Claim) -> bool:
        """Whether a part is still this worker's; nothing is written."""
        with self._database.read() as connection:
            return connection.execute(select(parts.c.part).where(*held_by(claim))).first() is not None

    def commit_point(self, claim: Claim) -> bool:
        """Announce that the result is about to become visible: from here the job can't be cancelled."""
        with self._database.write() as connection:
            lock_job(connection, claim.job_id)
            return bool(connection.execute(update(parts).where(*held_by(claim)).values(committing=True)).rowcount)

    def complete(self, claim: Claim, done: Done, counters: Counters) -> list[PartMessage] | None:
        """Record that a part is done and move its job on; returns what to send, or None where the claim was lost."""
        with self._database.write() as connection:
            job = lock_job(connection, claim.job_id)
            held = connection.execute(
                update(parts)
                .where(*held_by(claim))
                .values(
                    state="done",
                    committing=False,
                    lease_until=None,
                    output=dict(done.output),
                    **_counted(counters),
                )
            ).rowcount
            if not held or job is None:
                return None
            warnings = list(dict.fromkeys([*job.warnings, *done.warnings]))
            record(connection, claim.job_id, "part.done", _named(claim), warnings=warnings)
            ask_for(connection, claim.job_id, done.parts, ready=None)
            if done.status is not None:
                end_job(connection, claim.job_id, done)
                return []
            return move_on(connection, claim)

    def fail(self, claim: Claim, failure: Failure) -> bool:
        """Try the part again later where that may help, else fail the job. True where the job has failed."""
        with self._database.write() as connection:
            lock_job(connection, claim.job_id)
            row = connection.execute(select(parts).where(*held_by(claim))).one_or_none()
            return row is not None and self._retry_or_fail(connection, row, failure)

    def release(self, claim: Claim) -> PartMessage | None:
        """Give a part back undone, to be done elsewhere at once: the worker is leaving."""
        with self._database.write() as connection:
            lock_job(connection, claim.job_id)
            held = connection.execute(
                update(parts).where(*held_by(claim)).values(**unclaimed(), tries=parts.c.tries - 1, not_before=now())
            ).rowcount
            return PartMessage(claim.stage, claim.job_id, claim.part) if held else None

    def outputs(self, job_id: str, stage: Stage) -> list[dict[str, Any]]:
        """What the parts of a stage left, in their order."""
        with self._database.read() as connection:
            found = connection.execute(
                select(parts.c.output)
                .where(parts.c.job_id == job_id, parts.c.stage == stage.value)
                .order_by(parts.c.part)
            ).scalars()
            return [dict(output or {}) for output in found]

    def so_far(self, claim: Claim) -> SoFar:
        """What a job has cost until this was first asked for a part.

        Whoever does the part again gets the same figures, and writes the same bytes: two workers that finish one job,
        because one of them was thought dead, must not leave a report of the one and the manifest of the other.
        Raises Stopped where the claim was lost.
        """
        with self._database.write() as connection:
            job = lock_job(connection, claim.job_id)
            row = connection.execute(select(parts.c.output).where(*held_by(claim))).one_or_none()
            if job is None or row is None:
                raise Stopped("the job was cancelled, or the part taken over")
            kept = (row.output or {}).get(SO_FAR)
            if kept is not None:
                return SoFar(**kept)
            found = _so_far(connection, job)
            kept_too = {**(row.output or {}), SO_FAR: asdict(found)}
            connection.execute(update(parts).where(*held_by(claim)).values(output=kept_too))
            return found

    def counts(self) -> dict[tuple[Queue, str], int]:
        """How many parts of each queue may be claimed (``queued``), and how many are claimed (``running``)."""
        counted = dict.fromkeys(((queue, word) for queue in Queue for word in OPEN.values()), 0)
        with self._database.read() as connection:
            rows = connection.execute(
                select(parts.c.stage, parts.c.state, func.count())
                .where(parts.c.state.in_(OPEN))
                .group_by(parts.c.stage, parts.c.state)
            )
            for stage, state, count in rows:
                counted[STAGES[Stage(stage)].queue, OPEN[state]] += count
        return counted

    def due(self, resend_after_seconds: float, limit: int) -> list[PartMessage]:
        """Parts that are ready and were never sent, or so long ago that their message may be lost. Marks them sent.

        Of those that wait in a long queue only the first few of each queue are sent again, as many as there are workers
        with nothing to do: those at work look for more by themselves, and ringing for all over and over would fill the
        broker.
        """
        with self._database.write() as connection:
            messages = _ready(connection, parts.c.sent_at.is_(None), limit=limit)
            late = now() - resend_after_seconds
            for queue in Queue:
                stages = [stage.value for stage, row in STAGES.items() if row.queue is queue]
                limit = min(self._idle(connection, queue), RESEND_WINDOW)
                first = _ready(connection, parts.c.stage.in_(stages), limit=limit)
                messages += [message for message in first if _is_late(connection, message, late)]
            mark_sent(connection, messages)
            return messages

    def _idle(self, connection: Connection, queue: Queue) -> int:
        """Workers of a queue with nothing to do; where none is known, there may be some of an earlier version."""
        known = serving(connection, queue, self._lease_seconds)
        doing = at_work(connection)
        return sum(worker.id not in doing for worker in known) if known else RESEND_WINDOW

    def mark_sent(self, messages: Sequence[PartMessage]) -> None:
        """Note that these parts were rung for, so that the sweeper leaves them be for a while."""
        with self._database.write() as connection:
            mark_sent(connection, messages)

    def mark_unsent(self, messages: Sequence[PartMessage]) -> None:
        """Note that the broker did not take these, so that the sweeper sends them when it can."""
        with self._database.write() as connection:
            for message in messages:
                connection.execute(update(parts).where(*is_part(message)).values(sent_at=None))

    def take_back_expired(self) -> int:
        """Make ready again, or fail, the parts whose workers have not been heard from; returns how many."""
        with self._database.read() as connection:
            late = connection.execute(
                select(parts).where(parts.c.state == "claimed", parts.c.lease_until < now())
            ).all()
        return sum(self._take_back(row) for row in late)

    def _take_back(self, late: Row[Any]) -> bool:
        with self._database.write() as connection:
            lock_job(connection, late.job_id)
            still = (parts.c.claim == late.claim, parts.c.state == "claimed", parts.c.lease_until < now())
            row = connection.execute(select(parts).where(*still)).one_or_none()
            if row is None:
                return False
            self._lose(connection, row, was_silent(self._lease_seconds))
            return True

    def report_lost(self, owner: str, how: str) -> int:
        """A worker is known to be dead: its part is made ready again, or fails, without waiting for the lease."""
        with self._database.read() as connection:
            held = connection.execute(select(parts).where(parts.c.state == "claimed", parts.c.owner == owner)).all()
        return sum(self._report(row, how) for row in held)

    def _report(self, held: Row[Any], how: str) -> bool:
        with self._database.write() as connection:
            lock_job(connection, held.job_id)
            still = (parts.c.claim == held.claim, parts.c.state == "claimed")
            row = connection.execute(select(parts).where(*still)).one_or_none()
            if row is not None:
                self._lose(connection, row, how)
            return row is not None

    def _lose(self, connection: Connection, row: Row[Any], how: str) -> None:
        if row.deaths + 1 >= LETHAL:
            fail_job(connection, row.job_id, lost(row, how))
            return
        of_this_part = (parts.c.job_id == row.job_id, parts.c.stage == row.stage, parts.c.part == row.part)
        connection.execute(update(parts).where(*of_this_part).values(deaths=row.deaths + 1))
        self._retry_or_fail(connection, row, lost(row, how))

    def end_overdue(self) -> list[str]:
        """Fail the jobs whose deadline has passed; returns their ids."""
        with self._database.read() as connection:
            overdue = connection.execute(
                select(jobs.c.id).where(jobs.c.status.in_(ACTIVE), jobs.c.deadline_at < now())
            ).scalars()
            ids = list(overdue)
        return [job_id for job_id in ids if self._end_overdue(job_id)]

    def _end_overdue(self, job_id: str) -> bool:
        with self._database.write() as connection:
            job = lock_job(connection, job_id)
            if job is None or job.status not in ACTIVE or is_committing(connection, job_id):
                return False
            seconds = job.recipe["deadline_seconds"]
            fail_job(connection, job_id, DeadlineExceeded(f"The job did not finish within {seconds} s."))
            return True

    def forget_keys(self, older_than_seconds: float) -> int:
        """Forget idempotency keys of that age."""
        with self._database.write() as connection:
            old = idempotency_keys.c.created_at < now() - older_than_seconds
            return connection.execute(delete(idempotency_keys).where(old)).rowcount

    def _retry_or_fail(self, connection: Connection, row: Row[Any], failure: Failure) -> bool:
        if not failure.retryable or row.tries >= self._part_attempts:
            fail_job(connection, row.job_id, failure)
            return True
        wait = min(BACKOFF_SECONDS * 2 ** (row.tries - 1), BACKOFF_LIMIT_SECONDS) * random.uniform(0.5, 1.5)  # noqa: S311
        connection.execute(
            update(parts)
            .where(parts.c.job_id == row.job_id, parts.c.stage == row.stage, parts.c.part == row.part)
            .values(**unclaimed(), not_before=now() + wait)
        )
        data = {"stage": row.stage, "part": row.part, "name": row.name, "attempt": row.attempt}
        record(connection, row.job_id, "part.retried", {**data, "code": failure.code, "detail": failure.detail})
        return False


def _ready(connection: Connection, condition: Any, *, limit: int) -> list[PartMessage]:
    """Parts that may be claimed now and meet a condition, longest waiting first."""
    rows = connection.execute(
        select(parts.c.stage, parts.c.job_id, parts.c.part)
        .where(parts.c.state == "ready", parts.c.not_before <= now(), condition)
        .order_by(parts.c.not_before, parts.c.job_id, parts.c.part)
        .limit(limit)
    )
    return [PartMessage(Stage(row.stage), row.job_id, row.part) for row in rows]


def _is_late(connection: Connection, message: PartMessage, late: Any) -> bool:
    return connection.execute(select(parts.c.part).where(*is_part(message), parts.c.sent_at < late)).first() is not None


def held_by(claim: Claim) -> tuple[Any, ...]:
    """A part that is done keeps its token, and is nobody's: what comes twice counts once."""
    message = PartMessage(claim.stage, claim.job_id, claim.part)
    return (*is_part(message), parts.c.claim == claim.token, parts.c.state == "claimed")


def _so_far(connection: Connection, job: Row[Any]) -> SoFar:
    moved = connection.execute(
        select(func.sum(parts.c.bytes_read), func.sum(parts.c.bytes_written), now()).where(parts.c.job_id == job.id)
    ).one()
    return SoFar(job.created_at, job.started_at or moved[2], moved[2], int(moved[0] or 0), int(moved[1] or 0))


def _named(claim: Claim) -> dict[str, Any]:
    return {"stage": claim.stage.value, "part": claim.part, "name": claim.name, "attempt": claim.attempt}


def _counted(counters: Counters) -> dict[str, Any]:
    """Counters never fall, though a part may start over on another worker."""

    def higher(name: str, value: int) -> Any:
        column = parts.c[name]
        return sql_case((column > value, column), else_=value)

    return {
        "tensors_done": higher("tensors_done", counters.tensors_done),
        "bytes_read": higher("bytes_read", counters.bytes_read),
        "bytes_written": higher("bytes_written", counters.bytes_written),
    }
