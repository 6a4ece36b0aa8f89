"""Jobs, workers and sweepers in any order, on both databases, beside a model of what must come of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from hypothesis.stateful import run_state_machine_as_test as run_machine
from sqlalchemy import select, update

from service.contract.errors import BadTensor, JobNotRetryable, OutputExists, StorageFailure
from service.contract.job import Status
from service.contract.parts import Claim, Counters, Done
from service.contract.stages import NewPart, PartMessage, Stage
from service.dispatch import Dispatcher
from service.stores.database import Database
from service.stores.jobs import FIRST_PART, IdempotencyKey, JobStore, KeptAnswer
from service.stores.parts import PartStore
from service.stores.placing import Placement
from service.stores.records import ACTIVE
from service.stores.schema import events, jobs, metadata, parts
from service.sweeper import Sweeper
from tests.service.jobs_by_hand import submit_with_key

ME = "anonymous"
ATTEMPTS = 3
LEASE_SECONDS = 6000  # no time that passes here comes so near to it that a slow machine makes a difference
PASSES = (700.0, 4000.0, 360_000.0)
PLANNED = (
    NewPart(Stage.CALIBRATE, 0, "cars", 1.0),
    NewPart(Stage.MERGE, 0, "shard 1", 1.0),
    NewPart(Stage.MERGE, 1, "shard 2", 1.0),
    NewPart(Stage.FINALIZE, 0, "finalize", 1.0),
)
KEYS = ("red", "green", None)
WHICH = st.integers(0, 5)


class Bell(Dispatcher):
    """A broker in memory that loses what it is told to lose; the sweeper sends through it."""

    def __init__(self) -> None:
        self.is_down = False
        self.rung: list[PartMessage] = []

    def ring(self, messages: Any) -> list[PartMessage]:
        if self.is_down:
            return list(messages)
        self.rung += messages
        return []


@dataclass
class Lease:
    """Who holds a part, by the token of the claim, and for how long from now."""

    token: str
    seconds: float = LEASE_SECONDS


@dataclass
class Model:
    """What is known of a job without asking the database."""

    attempt: int = 1
    done: set[tuple[Stage, int]] = field(default_factory=set)
    held: dict[tuple[Stage, int], Lease] = field(default_factory=dict)
    ended: Status | None = None

    def end(self, status: Status) -> None:
        self.ended, self.held = status, {}


class Machine(RuleBasedStateMachine):
    """Callers, workers, time and sweepers. What is late must change nothing, and nothing may be lost."""

    database: Database  # set by the test, fresh for each run

    @initialize()
    def open(self) -> None:
        with self.database.write() as connection:
            for table in reversed(metadata.sorted_tables):
                connection.execute(table.delete())
        self.jobs = JobStore(self.database)
        self.parts = PartStore(self.database, lease_seconds=LEASE_SECONDS, part_attempts=ATTEMPTS)
        self.bell = Bell()
        placement = Placement(self.database, lease_seconds=LEASE_SECONDS, patience_seconds=1e9)
        self.sweeper = Sweeper(self.parts, placement, self.bell, resend_after_seconds=30)
        self.models: dict[str, Model] = {}
        self.keys: dict[str, str] = {}
        self.claims: list[Claim] = []  # of workers that live, whether or not they still hold their parts

    # --- callers

    @precondition(lambda self: len(self.models) < 3)
    @rule(key=st.sampled_from(KEYS))
    def submit(self, key: str | None) -> None:
        kept = None if key is None else IdempotencyKey("me", key, "same body")
        stored = submit_with_key(self.jobs, kept)
        if isinstance(stored, KeptAnswer):
            assert key is not None
            assert stored.body["id"] == self.keys[key], "a key is one job, however often it is used"
            return
        assert key not in self.keys
        if key is not None:
            self.keys[key] = stored.id
        self.models[stored.id] = Model()

    @precondition(lambda self: self.models)
    @rule(which=WHICH)
    def cancel(self, which: int) -> None:
        job_id, model = self._job(which)
        job, was_active = self.jobs.cancel(ME, job_id)
        assert was_active == (model.ended is None)
        if was_active and job.status is Status.CANCELLED:
            model.end(Status.CANCELLED)

    @precondition(lambda self: self.models)
    @rule(which=WHICH)
    def retry(self, which: int) -> None:
        job_id, model = self._job(which)
        can_be = model.ended in (Status.FAILED, Status.CANCELLED)
        try:
            job, _ = self.jobs.retry(ME, job_id)
        except (JobNotRetryable, OutputExists):
            assert not can_be
            return
        assert can_be
        model.attempt, model.ended = job.attempt, None
        model.done &= self._done(job_id)  # one that failed over its inputs is planned again

    # --- workers

    @precondition(lambda self: self.models)
    @rule(which=WHICH, part=st.sampled_from([*PLANNED, FIRST_PART, NewPart(Stage.SEARCH, 0, "no such part", 1.0)]))
    def any_message(self, which: int, part: NewPart) -> None:
        """Whatever a broker may deliver: early, late, twice, or about nothing."""
        self._take(PartMessage(part.stage, self._job(which)[0], part.part))

    @precondition(lambda self: self.bell.rung)
    @rule(which=WHICH, again=st.booleans())
    def delivery(self, which: int, again: bool) -> None:
        """A message that was sent is delivered, and may be delivered again."""
        position = which % len(self.bell.rung)
        self._take(self.bell.rung[position] if again else self.bell.rung.pop(position))

    def _take(self, message: PartMessage) -> None:
        claim = self._claim(message, f"worker {len(self.claims)}")
        if claim is not None:
            self.claims.append(claim)

    def _claim(self, message: PartMessage, worker: str) -> Claim | None:
        model, part = self.models[message.job_id], (message.stage, message.part)
        claim = self.parts.claim(message, worker)
        if claim is not None:
            assert model.ended is None
            assert part not in model.done
            assert part not in model.held, "nobody is robbed of a part, but by a sweep"
            model.held[part] = Lease(claim.token)
        return claim

    @precondition(lambda self: self.claims)
    @rule(which=WHICH)
    def beat(self, which: int) -> None:
        claim = self.claims[which % len(self.claims)]
        lease = self._lease(claim)
        assert self.parts.is_held(claim) == (lease is not None)
        assert self.parts.heartbeat(claim, Counters(tensors_done=1)) == (lease is not None)
        if lease is not None:
            lease.seconds = LEASE_SECONDS

    @precondition(lambda self: any(claim.stage is Stage.FINALIZE for claim in self.claims))
    @rule(which=WHICH)
    def commit_point(self, which: int) -> None:
        """Only of the last part, which makes the result visible."""
        last = [claim for claim in self.claims if claim.stage is Stage.FINALIZE]
        claim = last[which % len(last)]
        assert self.parts.commit_point(claim) == (self._lease(claim) is not None)

    @precondition(lambda self: self.claims)
    @rule(which=WHICH, twice=st.booleans())
    def complete(self, which: int, twice: bool) -> None:
        self._complete(self.claims[which % len(self.claims)], twice)

    def _complete(self, claim: Claim, twice: bool) -> None:
        """A worker is done, and may say so again where it got no answer."""
        model, holds = self.models[claim.job_id], self._lease(claim) is not None
        done = Done()
        if claim.stage is Stage.PLAN:
            done = Done(parts=PLANNED)
        if claim.stage is Stage.FINALIZE:
            done = Done(status=Status.SUCCEEDED, result={})
        told = self.parts.complete(claim, done, Counters())
        assert (told is not None) == holds
        if told is not None:
            self.bell.ring(told)
            del model.held[claim.stage, claim.part]
            model.done.add((claim.stage, claim.part))
            if done.status is not None:
                model.end(done.status)
        if twice:
            assert self.parts.complete(claim, done, Counters()) is None

    @precondition(lambda self: self.claims)
    @rule(which=WHICH, final=st.booleans())
    def fail(self, which: int, final: bool) -> None:
        claim = self.claims[which % len(self.claims)]
        model, holds = self.models[claim.job_id], self._lease(claim) is not None
        has_failed = self.parts.fail(claim, BadTensor("NaN") if final else StorageFailure("a blip"))
        assert has_failed <= holds
        assert has_failed >= (final and holds)
        if has_failed:
            model.end(Status.FAILED)
        elif holds:
            del model.held[claim.stage, claim.part]

    @precondition(lambda self: self.claims)
    @rule(which=WHICH)
    def release(self, which: int) -> None:
        claim = self.claims.pop(which % len(self.claims))
        holds = self._lease(claim) is not None
        assert (self.parts.release(claim) is not None) == holds
        if holds:
            del self.models[claim.job_id].held[claim.stage, claim.part]

    @precondition(lambda self: self.claims)
    @rule(which=WHICH)
    def crash(self, which: int) -> None:
        """The worker is gone: nobody will ever speak for this claim again."""
        self.claims.pop(which % len(self.claims))

    @precondition(lambda self: self.claims)
    @rule(which=WHICH)
    def overrun(self, which: int) -> None:
        """A worker stands still until another one has its part, and goes on as if nothing had happened."""
        claim = self.claims[which % len(self.claims)]
        self.time_passes(PASSES[-1])
        self.sweep(1)
        self.time_passes(PASSES[-1])  # the pause before the next try
        self._take(PartMessage(claim.stage, claim.job_id, claim.part))

    # --- time, sweepers and the broker

    @rule(seconds=st.sampled_from(PASSES))
    def time_passes(self, seconds: float) -> None:
        with self.database.write() as connection:
            for column in ("lease_until", "not_before", "sent_at"):
                connection.execute(update(parts).values({column: parts.c[column] - seconds}))
        for model in self.models.values():
            for lease in model.held.values():
                lease.seconds -= seconds

    @rule(times=st.integers(1, 2))
    def sweep(self, times: int) -> None:
        for _ in range(times):  # as by two sweepers that both think that it is their turn
            self.sweeper.sweep()
        for model in self.models.values():
            model.held = {part: lease for part, lease in model.held.items() if lease.seconds > 0}
        self._learn_of_failures()

    @rule()
    def broker_forgets(self) -> None:
        self.bell.rung.clear()

    @rule(down=st.booleans())
    def broker_is(self, down: bool) -> None:
        self.bell.is_down = down

    # --- what must hold

    @invariant()
    def history_is_whole(self) -> None:
        for job_id, model in self.models.items():
            row, told = self._row(job_id)
            assert [event.seq for event in told] == list(range(1, row.last_seq + 1))
            ends = [event for event in told if event.type in ("job.succeeded", "job.failed", "job.cancelled")]
            restarts = sum(event.type == "job.retried" for event in told)
            assert len(ends) - restarts == (model.ended is not None)
            assert row.attempt == restarts + 1 == model.attempt
            assert (Status(row.status) if row.status not in ACTIVE else None) == model.ended
            attempts = [(e.data["stage"], e.data["part"], e.data["attempt"]) for e in told if e.type == "part.done"]
            planned = sum(stage == "plan" for stage, _, _ in attempts)
            assert len(set(attempts)) == len(attempts) or planned > 1, "at most one commit per part and attempt"

    @invariant()
    def parts_are_where_they_should_be(self) -> None:
        for job_id, model in self.models.items():
            with self.database.read() as connection:
                rows = connection.execute(select(parts).where(parts.c.job_id == job_id)).all()
            assert {(Stage(row.stage), row.part) for row in rows if row.state == "done"} == model.done
            claimed = {(Stage(row.stage), row.part): row.claim for row in rows if row.state == "claimed"}
            assert claimed == {part: lease.token for part, lease in model.held.items()}
            for row in rows:
                assert (row.state == "claimed") == (row.lease_until is not None)
                assert (row.state in ("claimed", "done")) == (row.claim is not None)
                assert row.tries <= ATTEMPTS
            if model.ended is None:
                assert any(row.state in ("ready", "claimed") for row in rows), "a job that has not ended can go on"
            else:
                assert not any(row.state in ("ready", "claimed", "waiting") for row in rows)

    def teardown(self) -> None:
        """Whatever happened before: once all is well again, every job comes to its end."""
        if not hasattr(self, "bell"):
            return
        self.bell.is_down = False
        for _ in range(60):
            if all(model.ended for model in self.models.values()):
                break
            self.time_passes(PASSES[-1])
            self.sweep(1)
            for message in list(self.bell.rung):
                claim = self._claim(message, "last")
                if claim is not None:
                    self._complete(claim, False)
        assert all(model.ended for model in self.models.values())
        self.history_is_whole()
        self.parts_are_where_they_should_be()

    def _job(self, which: int) -> tuple[str, Model]:
        return list(self.models.items())[which % len(self.models)]

    def _lease(self, claim: Claim) -> Lease | None:
        """The claim's lease, if the part is still its."""
        lease = self.models[claim.job_id].held.get((claim.stage, claim.part))
        return lease if lease is not None and lease.token == claim.token else None

    def _done(self, job_id: str) -> set[tuple[Stage, int]]:
        with self.database.read() as connection:
            done = connection.execute(
                select(parts.c.stage, parts.c.part).where(parts.c.job_id == job_id, parts.c.state == "done")
            )
            return {(Stage(row.stage), row.part) for row in done}

    def _row(self, job_id: str) -> tuple[Any, list[Any]]:
        with self.database.read() as connection:
            row = connection.execute(select(jobs).where(jobs.c.id == job_id)).one()
            told = connection.execute(select(events).where(events.c.job_id == job_id).order_by(events.c.seq)).all()
        return row, list(told)

    def _learn_of_failures(self) -> None:
        """The sweeper fails parts that were lost too often: that is for it to say, and only then."""
        for job_id, model in self.models.items():
            row, told = self._row(job_id)
            if row.status == Status.FAILED and model.ended is None:
                assert told[-1].type == "job.failed"
                assert told[-1].data["code"] == "worker_lost"
                model.end(Status.FAILED)


def test_whatever_happens_in_whatever_order(database: Database) -> None:
    """The same on SQLite and PostgreSQL."""

    class Run(Machine):
        pass

    Run.database = database
    run_machine(
        Run,
        settings=settings(
            max_examples=30,
            stateful_step_count=50,
            deadline=None,
            database=None,
            phases=[Phase.generate],  # to shrink a run of databases takes minutes
            suppress_health_check=list(HealthCheck),
        ),
    )
