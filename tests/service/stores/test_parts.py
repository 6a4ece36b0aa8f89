from __future__ import annotations

import pytest
from sqlalchemy import update

from service.contract.errors import BadTensor, StorageFailure
from service.contract.job import Status
from service.contract.parts import Counters, Done
from service.contract.stages import NewPart, PartMessage, Stage
from service.stores.database import Database
from service.stores.duties import DutyStore
from service.stores.ended import EndedJobs
from service.stores.jobs import JobStore
from service.stores.parts import RESEND_WINDOW, PartStore
from service.stores.schema import jobs as job_table
from service.stores.schema import parts as table
from tests.service.jobs_by_hand import at_once, claim, merges, plan, submit

ME = "anonymous"
ATTEMPTS = 3


@pytest.fixture
def jobs(database: Database) -> JobStore:
    return JobStore(database)


@pytest.fixture
def parts(database: Database) -> PartStore:
    return PartStore(database, lease_seconds=60, part_attempts=ATTEMPTS)


def later(database: Database, seconds: float = 3600) -> None:
    """Let time pass for all parts: leases end, pauses are over, messages grow old."""
    with database.write() as connection:
        for column in ("lease_until", "not_before", "sent_at"):
            connection.execute(update(table).values({column: table.c[column] - seconds}))


def test_of_many_claims_one_wins(jobs: JobStore, parts: PartStore) -> None:
    for _ in range(5):
        message = PartMessage(Stage.PLAN, submit(jobs).id, 0)
        claims = at_once(6, lambda i, message=message: parts.claim(message, f"worker {i}"))  # type: ignore[misc]
        assert sum(found is not None for found in claims) == 1


def test_the_first_claim_starts_the_job_and_its_stage(jobs: JobStore, parts: PartStore) -> None:
    job = submit(jobs)
    held = claim(parts, job.id)
    assert (held.recipe, held.prefix, held.attempt) == (job.recipe, job.prefix, 1)
    running = jobs.get(ME, job.id)
    assert (running.status, running.stage, running.progress.current) == (Status.RUNNING, Stage.PLAN, "plan")
    assert running.started_at is not None


@pytest.mark.parametrize("message", [(Stage.MERGE, 0), (Stage.PLAN, 7)])
def test_a_message_for_a_part_that_does_not_exist_is_dropped(
    jobs: JobStore, parts: PartStore, message: tuple[Stage, int]
) -> None:
    stage, part = message
    assert parts.claim(PartMessage(stage, submit(jobs).id, part), "worker") is None
    assert parts.claim(PartMessage(Stage.PLAN, "mrg_unknown", 0), "worker") is None


def test_a_stale_token_counts_for_nothing(jobs: JobStore, parts: PartStore, database: Database) -> None:
    job = submit(jobs)
    stale = claim(parts, job.id, owner="slow")
    later(database)
    assert parts.take_back_expired() == 1
    later(database)
    fresh = claim(parts, job.id, owner="quick")
    assert fresh.attempt == 2
    assert not parts.heartbeat(stale, Counters(tensors_done=5))
    assert not parts.commit_point(stale)
    assert parts.complete(stale, Done(status=Status.SUCCEEDED), Counters()) is None
    assert not parts.fail(stale, BadTensor("NaN"))
    assert parts.release(stale) is None
    assert parts.heartbeat(fresh, Counters())
    assert jobs.get(ME, job.id).status is Status.RUNNING


def test_a_heartbeat_keeps_the_lease_and_counts(jobs: JobStore, parts: PartStore, database: Database) -> None:
    job = submit(jobs)
    plan(parts, job.id, *merges(1))
    held = claim(parts, job.id, Stage.MERGE)
    later(database, 59)
    version = jobs.get(ME, job.id).version
    assert parts.heartbeat(held, Counters(tensors_done=5, bytes_read=100, bytes_written=50))
    later(database, 59)
    assert parts.take_back_expired() == 0
    seen = jobs.get(ME, job.id)
    assert seen.version > version
    assert (seen.progress.tensors_done, seen.progress.bytes_read, seen.progress.bytes_written) == (5, 100, 50)


def test_progress_never_falls(jobs: JobStore, parts: PartStore, database: Database) -> None:
    job = submit(jobs)
    plan(parts, job.id, *merges(2))
    held = claim(parts, job.id, Stage.MERGE)
    parts.heartbeat(held, Counters(tensors_done=8, bytes_read=100))
    before = jobs.get(ME, job.id).progress
    parts.fail(held, StorageFailure("a blip"))
    later(database)
    again = claim(parts, job.id, Stage.MERGE)
    parts.heartbeat(again, Counters(tensors_done=1, bytes_read=10))
    after = jobs.get(ME, job.id).progress
    assert (after.fraction, after.tensors_done, after.bytes_read) == (before.fraction, 8, 100)


def test_expired_leases_are_taken_back_until_attempts_run_out(
    jobs: JobStore, parts: PartStore, database: Database
) -> None:
    job = submit(jobs)
    for attempt in range(1, ATTEMPTS + 1):
        later(database)
        assert claim(parts, job.id).attempt == attempt
        assert parts.take_back_expired() == 0
        later(database)
        assert parts.take_back_expired() == 1
    failed = jobs.get(ME, job.id)
    assert failed.error is not None
    assert (failed.status, failed.error.code, failed.error.retryable) == (Status.FAILED, "worker_lost", True)
    assert parts.claim(PartMessage(Stage.PLAN, job.id, 0), "worker") is None
    types = [event.type for event in jobs.events(ME, job.id, 0, 100)[0]]
    assert types.count("part.retried") == ATTEMPTS - 1
    assert types[-1] == "job.failed"


def test_two_sweepers_take_a_part_back_once(jobs: JobStore, parts: PartStore, database: Database) -> None:
    claim(parts, submit(jobs).id)
    later(database)
    assert sum(at_once(4, lambda _: parts.take_back_expired())) == 1


def test_a_retryable_failure_waits_longer_each_time(jobs: JobStore, parts: PartStore, database: Database) -> None:
    job = submit(jobs)
    assert not parts.fail(claim(parts, job.id), StorageFailure("a blip"))
    assert parts.due(30, 10) == [], "not before the pause is over"
    later(database, 4)
    assert parts.due(30, 10) == [PartMessage(Stage.PLAN, job.id, 0)]
    assert not parts.fail(claim(parts, job.id), StorageFailure("a blip"))
    later(database, 1.9)
    assert parts.due(30, 10) == []
    later(database, 5)
    assert parts.due(30, 10) == [PartMessage(Stage.PLAN, job.id, 0)]
    assert parts.fail(claim(parts, job.id), StorageFailure("a blip"))
    assert jobs.get(ME, job.id).status is Status.FAILED


def test_a_failure_that_a_retry_can_not_help_ends_the_job(jobs: JobStore, parts: PartStore) -> None:
    job = submit(jobs)
    plan(parts, job.id, *merges(2))
    other = claim(parts, job.id, Stage.MERGE, 1)
    assert parts.fail(claim(parts, job.id, Stage.MERGE, 0), BadTensor("NaN in w", tensor="w"))
    failed = jobs.get(ME, job.id)
    assert failed.error is not None
    assert (failed.error.code, failed.error.tensor, failed.error.blame) == ("non_finite_tensor", "w", "user")
    assert not parts.heartbeat(other, Counters()), "its other parts are withdrawn"


def test_a_released_part_costs_no_attempt(jobs: JobStore, parts: PartStore) -> None:
    job = submit(jobs)
    for _ in range(ATTEMPTS + 2):
        held = claim(parts, job.id)
        assert parts.release(held) == PartMessage(Stage.PLAN, job.id, 0)
    assert claim(parts, job.id).attempt == ATTEMPTS + 3
    assert jobs.get(ME, job.id).status is Status.RUNNING


def test_stages_follow_each_other_in_order(jobs: JobStore, parts: PartStore) -> None:
    job = submit(jobs)
    asked = [NewPart(Stage.FINALIZE, 0, "finalize", 1.0), *merges(2), NewPart(Stage.CALIBRATE, 0, "cars", 1.0)]
    assert plan(parts, job.id, *asked) == [PartMessage(Stage.CALIBRATE, job.id, 0)]
    assert parts.claim(PartMessage(Stage.MERGE, job.id, 0), "early") is None
    sent = parts.complete(claim(parts, job.id, Stage.CALIBRATE), Done(), Counters())
    assert sent == [PartMessage(Stage.MERGE, job.id, 0), PartMessage(Stage.MERGE, job.id, 1)]
    assert parts.complete(claim(parts, job.id, Stage.MERGE, 1), Done(output={"n": 1}), Counters()) == []
    sent = parts.complete(claim(parts, job.id, Stage.MERGE, 0), Done(output={"n": 0}), Counters())
    assert sent == [PartMessage(Stage.FINALIZE, job.id, 0)]
    assert parts.outputs(job.id, Stage.MERGE) == [{"n": 0}, {"n": 1}]
    last = claim(parts, job.id, Stage.FINALIZE)
    assert parts.complete(last, Done(status=Status.REJECTED, result={"ok": False}), Counters()) == []
    ended = jobs.get(ME, job.id)
    assert (ended.status, ended.result, ended.progress.fraction) == (Status.REJECTED, {"ok": False}, 1.0)


def test_of_parts_that_end_together_exactly_one_opens_the_next_stage(jobs: JobStore, parts: PartStore) -> None:
    job = submit(jobs)
    plan(parts, job.id, *merges(8), NewPart(Stage.FINALIZE, 0, "finalize", 1.0))
    held = [claim(parts, job.id, Stage.MERGE, i) for i in range(8)]
    sent = at_once(8, lambda i: parts.complete(held[i], Done(), Counters()))
    assert sorted(map(len, filter(None, sent))) == [1]
    assert parts.claim(PartMessage(Stage.FINALIZE, job.id, 0), "worker") is not None


def test_completing_twice_counts_once(jobs: JobStore, parts: PartStore) -> None:
    job = submit(jobs)
    held = claim(parts, job.id)
    done = Done(parts=tuple(merges(1)))
    answers = at_once(4, lambda _: parts.complete(held, done, Counters()))
    assert sum(answer is not None for answer in answers) == 1


def test_warnings_are_collected_once(jobs: JobStore, parts: PartStore) -> None:
    job = submit(jobs)
    parts.complete(claim(parts, job.id), Done(warnings=("w1", "w1"), parts=tuple(merges(1))), Counters())
    parts.complete(claim(parts, job.id, Stage.MERGE), Done(warnings=("w1", "w2")), Counters())
    assert jobs.get(ME, job.id).warnings == ("w1", "w2")


def test_what_is_due_is_sent_once_and_again_when_it_may_be_lost(
    jobs: JobStore, parts: PartStore, database: Database
) -> None:
    message = PartMessage(Stage.PLAN, submit(jobs).id, 0)
    assert parts.due(30, 10) == [message]
    assert parts.due(30, 10) == []
    parts.mark_unsent([message])
    assert parts.due(30, 10) == [message]
    later(database, 31)
    assert parts.due(30, 10) == [message]
    parts.mark_unsent([message])
    parts.mark_sent([message])
    assert parts.due(30, 10) == []


def test_a_claimed_part_is_not_due(jobs: JobStore, parts: PartStore, database: Database) -> None:
    claim(parts, submit(jobs).id)
    later(database, 31)
    assert parts.due(30, 10) == []


def test_a_limit_bounds_what_is_due(jobs: JobStore, parts: PartStore) -> None:
    messages = [PartMessage(Stage.PLAN, submit(jobs).id, 0) for _ in range(3)]
    assert parts.due(30, 2) == messages[:2]
    assert parts.due(30, 2) == messages[2:]


def test_of_a_long_queue_only_the_next_are_sent_again(jobs: JobStore, parts: PartStore, database: Database) -> None:
    job = submit(jobs)
    shards = [NewPart(Stage.MERGE, index, f"shard {index}", 1.0) for index in range(RESEND_WINDOW + 10)]
    first = claim(parts, job.id)
    parts.complete(first, Done(parts=(*shards, NewPart(Stage.FINALIZE, 0, "finalize", 1.0))), Counters())
    assert parts.due(30, 1000) == []
    later(database, 31)
    again = parts.due(30, 1000)
    assert [message.part for message in again] == list(range(RESEND_WINDOW))
    claim(parts, job.id, Stage.MERGE, 0)
    assert [message.part for message in parts.due(30, 1000)] == [RESEND_WINDOW], "the next moves up"


def test_one_owner_at_a_time_has_a_duty(database: Database) -> None:
    duties = DutyStore(database)
    assert sum(at_once(5, lambda i: duties.elect("sweep", f"owner {i}", 3600))) == 1
    winner = next(f"owner {i}" for i in range(5) if duties.elect("sweep", f"owner {i}", 3600))
    assert not duties.elect("sweep", "somebody", 3600)
    duties.resign("sweep", "somebody")
    assert not duties.elect("sweep", "somebody", 3600)
    duties.resign("sweep", winner)
    assert duties.elect("sweep", "somebody", -1)
    assert duties.elect("sweep", "another", 3600), "a duty that ran out is free"


def test_the_times_of_a_job_are_the_databases(jobs: JobStore, parts: PartStore, database: Database) -> None:
    job = submit(jobs)
    cost = parts.so_far(claim(parts, job.id))
    seen = jobs.get(ME, job.id)
    assert (cost.created_at, cost.started_at) == (seen.created_at, seen.started_at)
    assert cost.started_at <= cost.now <= database.clock()


def test_expired_jobs_are_forgotten_once_they_have_ended(jobs: JobStore, database: Database) -> None:
    running, ended = submit(jobs), submit(jobs)
    jobs.cancel(ME, ended.id)
    with database.write() as connection:
        connection.execute(update(job_table).values(expires_at=0.0))
    expired = EndedJobs(database).expired(10)
    assert [job.id for job in expired] == [ended.id]
    assert EndedJobs(database).forget([running.id, ended.id]) == 1
    assert jobs.get(ME, running.id).status is Status.QUEUED
