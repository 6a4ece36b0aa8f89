from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import update

from service.contract.errors import (
    IdempotencyKeyReused,
    InputChanged,
    InvalidCursor,
    JobNotRetryable,
    JobNotTerminal,
    NotFound,
    OutputExists,
    PreconditionFailed,
    StorageFailure,
    TooManyActiveJobs,
)
from service.contract.job import Event, Job, Mark, Status
from service.contract.parts import Counters, Done
from service.contract.stages import NewPart, PartMessage, Queue, Stage
from service.stores.database import Database
from service.stores.jobs import IdempotencyKey, JobStore, KeptAnswer, Listing
from service.stores.parts import PartStore
from service.stores.schema import jobs as table
from tests.service.jobs_by_hand import at_once, claim, finish, merges, plan, recipe_of, submit, submit_with_key

ME = "anonymous"


@pytest.fixture
def jobs(database: Database) -> JobStore:
    return JobStore(database)


@pytest.fixture
def parts(database: Database) -> PartStore:
    return PartStore(database, lease_seconds=60, part_attempts=3)


def all_events(jobs: JobStore, job_id: str) -> list[Event]:
    return jobs.events(ME, job_id, 0, 1000)[0]


def test_a_submitted_job_is_queued_with_its_first_event(jobs: JobStore) -> None:
    job = submit(jobs, metadata={"team": "search"})
    assert (job.status, job.stage, job.attempt, job.queue_position) == (Status.QUEUED, None, 1, 1)
    assert (job.metadata, job.prefix) == ({"team": "search"}, f"s3://merged/{job.id}/")
    assert job.recipe_sha256 == job.recipe.sha256
    assert [(event.seq, event.type) for event in all_events(jobs, job.id)] == [(1, "job.queued")]
    assert jobs.get(ME, job.id) == job


def test_an_id_is_a_uuid_of_version_7(jobs: JobStore) -> None:
    digits = submit(jobs).id.removeprefix("mrg_")
    assert len(digits) == 32
    assert digits[12] == "7"
    assert digits[16] in "89ab"


def test_ids_rise_in_the_order_of_commits_under_concurrency(jobs: JobStore) -> None:
    lock = threading.Lock()
    seen: list[str] = []

    def one(_: int) -> None:
        for _ in range(5):
            with lock:
                newest = max(seen, default="")
            job_id = submit(jobs).id
            assert job_id > newest, "a job stored after another one was seen has a higher id"
            with lock:
                seen.append(job_id)

    at_once(6, one)
    assert len(set(seen)) == 30


def test_pages_neither_skip_nor_repeat_while_jobs_are_created(jobs: JobStore) -> None:
    before = [submit(jobs).id for _ in range(15)]
    stop = threading.Event()

    def create() -> None:
        while not stop.is_set():
            submit(jobs)

    thread = threading.Thread(target=create)
    thread.start()
    try:
        down = list(walk(jobs, ascending=False))
        up = list(walk(jobs, ascending=True, until=before[-1]))
    finally:
        stop.set()
        thread.join()
    everything = list(walk(jobs, ascending=True))
    assert down == [job_id for job_id in reversed(everything) if job_id <= down[0]]
    assert up == everything[: len(up)]
    assert set(before) <= set(down)


def walk(jobs: JobStore, *, ascending: bool, until: str | None = None) -> Iterator[str]:
    after, more = None, True
    while more:
        page, more = jobs.page(Listing(ME, limit=4, after=after, ascending=ascending))
        yield from (job.id for job in page)
        after = page[-1].id
        more = more and (until is None or after < until)


@pytest.mark.parametrize(
    "picked",
    [
        {"status": Status.SUCCEEDED},
        {"metadata": {"team": "search", 'odd "key" [x].y': "it's"}},
        {"metadata": {"team": "search"}, "status": Status.SUCCEEDED},
    ],
)
def test_a_list_is_filtered(jobs: JobStore, parts: PartStore, picked: dict[str, Any]) -> None:
    wanted = submit(jobs, metadata={"team": "search", 'odd "key" [x].y': "it's"})
    submit(jobs, metadata={"team": "Search"})
    submit(jobs, metadata={"color": "search"})
    finish(parts, wanted.id)
    page, more = jobs.page(Listing(ME, **picked))
    assert ([job.id for job in page], more) == ([wanted.id], False)


def test_a_list_begins_after_a_time(jobs: JobStore) -> None:
    first, second = submit(jobs), submit(jobs)
    page, _ = jobs.page(Listing(ME, created_after=first.created_at))
    assert [job.id for job in page] == [second.id]


def test_a_cursor_is_one_of_the_callers_own_jobs(jobs: JobStore) -> None:
    theirs = submit(jobs, caller="somebody")
    for cursor in (theirs.id, "mrg_no"):
        with pytest.raises(InvalidCursor):
            jobs.page(Listing(ME, after=cursor))


def test_a_job_of_somebody_else_does_not_exist(jobs: JobStore) -> None:
    theirs = submit(jobs, caller="somebody")
    assert jobs.page(Listing(ME)) == ([], False)
    for act in (jobs.get, jobs.cancel, jobs.retry, jobs.delete):
        with pytest.raises(NotFound):
            act(ME, theirs.id)
    with pytest.raises(NotFound):
        jobs.events(ME, theirs.id, 0, 10)
    assert jobs.get("somebody", theirs.id).status is Status.QUEUED


def test_the_same_key_and_body_are_one_job(jobs: JobStore) -> None:
    key = IdempotencyKey("me POST /v1/merges", "k1", "f1")
    first = submit_with_key(jobs, key)
    assert isinstance(first, Job)
    assert submit_with_key(jobs, key) == KeptAnswer(202, {"id": first.id})
    assert jobs.replay(key) == KeptAnswer(202, {"id": first.id})
    assert len(jobs.page(Listing(ME))[0]) == 1


def test_the_same_key_with_another_body_is_refused(jobs: JobStore) -> None:
    submit_with_key(jobs, IdempotencyKey("scope", "k1", "f1"))
    with pytest.raises(IdempotencyKeyReused):
        submit_with_key(jobs, IdempotencyKey("scope", "k1", "f2"))
    with pytest.raises(IdempotencyKeyReused):
        jobs.replay(IdempotencyKey("scope", "k1", "f2"))
    assert jobs.replay(IdempotencyKey("another scope", "k1", "f2")) is None


def test_a_key_used_at_the_same_moment_makes_one_job(jobs: JobStore) -> None:
    key = IdempotencyKey("scope", "k1", "f1")
    answers = at_once(8, lambda _: submit_with_key(jobs, key))
    (made,) = [answer for answer in answers if isinstance(answer, Job)]
    assert [a for a in answers if a != made] == [KeptAnswer(202, {"id": made.id})] * 7


def test_a_kept_refusal_is_not_overwritten(jobs: JobStore) -> None:
    key = IdempotencyKey("scope", "k1", "f1")
    jobs.keep(key, KeptAnswer(422, {"n": 1}))
    jobs.keep(key, KeptAnswer(422, {"n": 2}))
    assert jobs.replay(key) == KeptAnswer(422, {"n": 1})


def test_a_refusal_can_be_kept_from_two_threads_at_once(jobs: JobStore) -> None:
    key = IdempotencyKey("scope", "k1", "f1")
    at_once(8, lambda i: jobs.keep(key, KeptAnswer(422, {"n": i})))
    assert jobs.replay(key) is not None


def test_keys_are_forgotten_when_they_are_old(jobs: JobStore, parts: PartStore) -> None:
    key = IdempotencyKey("scope", "k1", "f1")
    submit_with_key(jobs, key)
    assert parts.forget_keys(3600) == 0
    assert parts.forget_keys(-1) == 1
    assert jobs.replay(key) is None


@pytest.mark.parametrize("other", ["s3://m/a_b/", "s3://m/a_b/c/", "s3://m/"])
def test_two_active_jobs_never_share_a_folder(jobs: JobStore, parts: PartStore, other: str) -> None:
    first = submit(jobs, prefix="s3://m/a_b/")
    with pytest.raises(OutputExists, match=first.id):
        submit(jobs, prefix=other)
    finish(parts, first.id)
    assert submit(jobs, prefix=other).prefix == other


@pytest.mark.parametrize("other", ["s3://m/axb/", "s3://m/A_B/", "s3://m/a_b2/"])
def test_a_folder_that_only_looks_alike_is_free(jobs: JobStore, other: str) -> None:
    submit(jobs, prefix="s3://m/a_b/")
    assert submit(jobs, prefix=other).prefix == other


def test_only_a_later_job_in_the_folder_is_a_successor(jobs: JobStore, parts: PartStore) -> None:
    first = submit(jobs, prefix="s3://m/a/")
    finish(parts, first.id)
    assert jobs.successor(first) is None
    second = submit(jobs, prefix="s3://m/a/")
    submit(jobs, prefix="s3://m/b/")
    assert jobs.successor(first) == second.id
    assert jobs.successor(second) is None


def test_cancelling_withdraws_the_parts(jobs: JobStore, parts: PartStore) -> None:
    job = submit(jobs)
    held = claim(parts, job.id)
    ended, was_active = jobs.cancel(ME, job.id)
    assert (ended.status, was_active, ended.finished_at is not None) == (Status.CANCELLED, True, True)
    assert not parts.heartbeat(held, Counters())
    assert not parts.commit_point(held)
    assert parts.complete(held, Done(), Counters()) is None
    assert parts.claim(PartMessage(Stage.PLAN, job.id, 0), "late") is None
    again, was_active = jobs.cancel(ME, job.id)
    assert (again, was_active) == (ended, False)
    assert [event.type for event in all_events(jobs, job.id)] == [
        "job.queued",
        "job.started",
        "stage.started",
        "job.cancelled",
    ]


def test_a_job_at_its_commit_point_is_let_finish(jobs: JobStore, parts: PartStore) -> None:
    job = submit(jobs)
    held = claim(parts, job.id)
    assert parts.commit_point(held)
    assert jobs.cancel(ME, job.id)[0].status is Status.RUNNING
    assert parts.complete(held, Done(status=Status.SUCCEEDED, result={}), Counters()) == []
    assert jobs.get(ME, job.id).status is Status.SUCCEEDED


def test_a_cancel_and_a_commit_point_never_both_win(jobs: JobStore, parts: PartStore) -> None:
    for _ in range(10):
        job = submit(jobs)
        held = claim(parts, job.id)

        def act(i: int, job_id: str = job.id, held: Any = held) -> bool:
            if i:
                return jobs.cancel(ME, job_id)[0].status is Status.CANCELLED
            return parts.commit_point(held)

        committed, cancelled = at_once(2, act)
        assert committed != cancelled


def test_what_is_expected_is_seen_before_anything_happens(jobs: JobStore, parts: PartStore) -> None:
    def refuse(_: Job) -> None:
        raise PreconditionFailed("no")

    job = submit(jobs)
    with pytest.raises(PreconditionFailed):
        jobs.cancel(ME, job.id, refuse)
    assert jobs.get(ME, job.id) == job
    finish(parts, job.id)
    with pytest.raises(PreconditionFailed):
        jobs.delete(ME, job.id, refuse)
    assert jobs.get(ME, job.id).status is Status.SUCCEEDED


def test_only_a_failed_or_cancelled_job_is_retried(jobs: JobStore, parts: PartStore) -> None:
    job = submit(jobs)
    with pytest.raises(JobNotRetryable):
        jobs.retry(ME, job.id)
    finish(parts, job.id)
    with pytest.raises(JobNotRetryable):
        jobs.retry(ME, job.id)


def test_a_retry_goes_on_from_the_parts_that_are_done(jobs: JobStore, parts: PartStore) -> None:
    job = submit(jobs)
    plan(parts, job.id, *merges(2))
    parts.complete(claim(parts, job.id, Stage.MERGE, 0), Done(), Counters(tensors_done=10))
    before = jobs.cancel(ME, job.id)[0].progress.fraction
    again, messages = jobs.retry(ME, job.id)
    assert messages == [PartMessage(Stage.MERGE, job.id, 1)]
    assert (again.status, again.stage, again.attempt, again.error) == (Status.QUEUED, Stage.MERGE, 2, None)
    assert again.finished_at is None
    assert again.progress.fraction == pytest.approx(before)
    assert claim(parts, job.id, Stage.MERGE, 1).attempt == 1


def test_a_job_that_failed_over_its_inputs_is_planned_again(jobs: JobStore, parts: PartStore) -> None:
    job = submit(jobs)
    plan(parts, job.id, *merges(1))
    assert parts.fail(claim(parts, job.id, Stage.MERGE, 0), InputChanged("another etag"))
    failed = jobs.get(ME, job.id)
    assert failed.error is not None
    assert (failed.status, failed.error.code, failed.error.retryable) == (Status.FAILED, "input_changed", False)
    _, messages = jobs.retry(ME, job.id)
    assert messages == [PartMessage(Stage.PLAN, job.id, 0)]


def test_a_retry_does_not_enter_a_folder_in_use(jobs: JobStore) -> None:
    first = submit(jobs, prefix="s3://m/a/")
    jobs.cancel(ME, first.id)
    submit(jobs, prefix="s3://m/a/")
    with pytest.raises(OutputExists):
        jobs.retry(ME, first.id)


def test_a_finished_job_is_deleted_with_its_rows(jobs: JobStore, parts: PartStore) -> None:
    job = submit(jobs)
    with pytest.raises(JobNotTerminal):
        jobs.delete(ME, job.id)
    finish(parts, job.id)
    assert jobs.delete(ME, job.id).id == job.id
    with pytest.raises(NotFound):
        jobs.get(ME, job.id)
    assert parts.outputs(job.id, Stage.PLAN) == []


def test_events_come_in_pages_and_say_when_they_end(jobs: JobStore, parts: PartStore) -> None:
    job = submit(jobs)
    finish(parts, job.id)
    first, more, ended = jobs.events(ME, job.id, 0, 2)
    rest, no_more, has_ended = jobs.events(ME, job.id, first[-1].seq, 100)
    assert [event.seq for event in first + rest] == list(range(1, len(first + rest) + 1))
    assert (more, ended, no_more, has_ended) == (True, False, False, True)
    assert rest[-1].type == "job.succeeded"


def test_event_numbers_have_no_gaps_under_concurrency(jobs: JobStore, parts: PartStore) -> None:
    job = submit(jobs)
    plan(parts, job.id, *merges(12))

    def one(i: int) -> None:
        held = claim(parts, job.id, Stage.MERGE, i)
        if i % 3 == 0:
            parts.fail(held, StorageFailure("a blip"))
        else:
            parts.complete(held, Done(), Counters())

    at_once(12, one)
    seqs = [event.seq for event in all_events(jobs, job.id)]
    assert seqs == list(range(1, len(seqs) + 1))
    assert len(seqs) == 5 + 12  # queued, started, two stages, the plan; and one per part


def test_the_queue_is_counted(jobs: JobStore, parts: PartStore) -> None:
    first, second = submit(jobs), submit(jobs)
    assert (jobs.get(ME, first.id).queue_position, jobs.get(ME, second.id).queue_position) == (1, 2)
    claim(parts, first.id)
    assert (jobs.get(ME, first.id).queue_position, jobs.get(ME, second.id).queue_position) == (None, 1)
    assert jobs.counts() == {"queued": 1, "running": 1}


def test_a_deadline_is_counted_from_the_submit(jobs: JobStore, parts: PartStore, database: Database) -> None:
    submit(jobs)
    late = submit(jobs, deadline_seconds=3600)
    assert parts.end_overdue() == []
    push_back(database, late.id, "deadline_at", 3600)
    assert parts.end_overdue() == [late.id]
    failed = jobs.get(ME, late.id)
    assert failed.error is not None
    assert (failed.status, failed.error.code) == (Status.FAILED, "deadline_exceeded")


def test_the_schema_is_current_once_migrated(database: Database) -> None:
    assert database.is_current()
    database.migrate()
    assert database.is_current()


def test_a_recipe_comes_back_as_it_was_stored(jobs: JobStore) -> None:
    changes: dict[str, Any] = {"method": {"name": "ties", "density": 0.3}, "seed": 2**62}
    job = submit(jobs, **changes)
    assert jobs.get(ME, job.id).recipe == recipe_of(**changes)


def push_back(database: Database, job_id: str, column: str, seconds: float) -> None:
    """Let time pass for one job."""
    with database.write() as connection:
        connection.execute(update(table).where(table.c.id == job_id).values({column: table.c[column] - seconds}))


def test_tensors_of_trials_are_not_counted_beside_those_of_the_result(jobs: JobStore, parts: PartStore) -> None:
    job = submit(jobs)
    plan(parts, job.id, NewPart(Stage.SEARCH, 0, "trial/1", weight=1.0), *merges(2))
    parts.complete(claim(parts, job.id, Stage.SEARCH), Done(), Counters(tensors_done=30))
    parts.complete(claim(parts, job.id, Stage.MERGE, 0), Done(), Counters(tensors_done=10))
    progress = jobs.get(ME, job.id).progress
    assert (progress.tensors_done, progress.tensors_total) == (10, 20)


def test_marks_tell_how_far_jobs_are(jobs: JobStore, parts: PartStore) -> None:
    ended, waiting = submit(jobs, caller="me"), submit(jobs, caller="you")
    finish(parts, ended.id)
    last = jobs.events("me", ended.id, 0, 100)[0][-1].seq
    marks = jobs.marks({ended.id, waiting.id, "mrg_gone"})
    assert marks == {ended.id: Mark(last_seq=last, has_ended=True), waiting.id: Mark(last_seq=1, has_ended=False)}
    assert jobs.marks([f"mrg_{n}" for n in range(2500)] + [waiting.id]).keys() == {waiting.id}
    assert jobs.marks([]) == {}


def test_counts_of_parts_go_with_their_states(jobs: JobStore, parts: PartStore) -> None:
    job = submit(jobs)
    assert parts.counts()[Queue.LIGHT, "queued"] == 1
    plan(parts, job.id, *merges(3))
    claim(parts, job.id, Stage.MERGE)
    assert parts.counts() == {
        (Queue.LIGHT, "queued"): 0,
        (Queue.LIGHT, "running"): 0,
        (Queue.HEAVY, "queued"): 2,
        (Queue.HEAVY, "running"): 1,
    }


def test_a_caller_may_have_so_many_jobs_at_once(database: Database) -> None:
    jobs = JobStore(database, max_active_jobs=2)
    parts = PartStore(database, lease_seconds=60, part_attempts=3)
    first, second = submit(jobs), submit(jobs)
    with pytest.raises(TooManyActiveJobs, match="2 of your jobs wait or run, and 2 may"):
        submit(jobs)
    submit(jobs, caller="somebody else")
    finish(parts, first.id)
    third = submit(jobs)
    jobs.cancel(ME, second.id)
    fourth = submit(jobs)
    with pytest.raises(TooManyActiveJobs):
        jobs.retry(ME, second.id)
    jobs.cancel(ME, third.id)
    assert jobs.retry(ME, second.id)[0].status is Status.QUEUED
    assert jobs.get(ME, fourth.id).status is Status.QUEUED


def test_of_jobs_submitted_at_once_no_more_than_the_limit_are_taken(database: Database) -> None:
    jobs = JobStore(database, max_active_jobs=3)

    def try_one(_: int) -> bool:
        try:
            submit(jobs)
        except TooManyActiveJobs:
            return False
        return True

    assert sum(at_once(8, try_one)) == 3
