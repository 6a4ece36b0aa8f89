"""Workers: who lives, what fits them, and what becomes of parts whose workers are lost."""

from __future__ import annotations

from dataclasses import replace

import pytest
from sqlalchemy import update

from service.contract.job import Status
from service.contract.parts import Counters, Done
from service.contract.stages import NewPart, PartMessage, Queue, Stage
from service.contract.workers import InputCache, Worker
from service.stores.database import Database
from service.stores.jobs import JobStore
from service.stores.losing import LETHAL, has_exited
from service.stores.parts import PartStore
from service.stores.placing import Placement
from service.stores.schema import jobs as job_table
from service.stores.schema import parts as part_table
from service.stores.schema import workers as worker_table
from service.stores.workers import WorkerStore
from tests.service.jobs_by_hand import claim, plan, submit

ME = "anonymous"
GB = 10**9
SMALL = Worker("host:a:1", "host", 1, "cpu", 4 * GB, 2 * GB, 1, (Queue.LIGHT, Queue.HEAVY), "0.1.0", "1")
LARGE = replace(SMALL, id="host:b:2", pid=2, device="cuda", usable_bytes=8 * GB, queues=(Queue.HEAVY,))
KILLED = has_exited(-9)


@pytest.fixture
def jobs(database: Database) -> JobStore:
    return JobStore(database)


@pytest.fixture
def parts(database: Database) -> PartStore:
    return PartStore(database, lease_seconds=60, part_attempts=100)


@pytest.fixture
def workers(database: Database) -> WorkerStore:
    return WorkerStore(database, lease_seconds=60)


def placement(database: Database, patience_seconds: float = 600) -> Placement:
    return Placement(database, lease_seconds=60, patience_seconds=patience_seconds)


def planned(jobs: JobStore, parts: PartStore, *peaks: int) -> str:
    """A job to be merged in parts that need so much memory."""
    job_id = submit(jobs).id
    shards = [NewPart(Stage.MERGE, index, f"shard {index}", 1.0, peak_bytes=peak) for index, peak in enumerate(peaks)]
    plan(parts, job_id, *shards, NewPart(Stage.FINALIZE, 0, "finalize", 1.0))
    return job_id


def silent(database: Database, seconds: float = 61) -> None:
    with database.write() as connection:
        connection.execute(update(worker_table).values(seen_at=worker_table.c.seen_at - seconds))


def ready_now(database: Database) -> None:
    with database.write() as connection:
        connection.execute(update(part_table).values(not_before=0.0))


def test_a_worker_is_there_until_it_leaves_or_is_silent(workers: WorkerStore, database: Database) -> None:
    workers.enter(SMALL)
    workers.enter(LARGE)
    assert [presence.worker for presence in workers.present()] == [SMALL, LARGE]
    workers.leave(SMALL.id)
    assert [presence.worker for presence in workers.present()] == [LARGE]
    silent(database)
    assert workers.present() == []
    workers.seen(LARGE)
    assert [presence.worker for presence in workers.present()] == [LARGE], "it was only slow"
    silent(database)
    assert (workers.forget_gone(), workers.forget_gone()) == (1, 0)
    workers.seen(LARGE)
    assert [presence.worker for presence in workers.present()] == [LARGE]


def test_a_worker_that_starts_again_under_its_name_is_new(workers: WorkerStore) -> None:
    workers.enter(SMALL)
    workers.enter(replace(SMALL, usable_bytes=1))
    assert [presence.worker.usable_bytes for presence in workers.present()] == [1]


def test_workers_say_what_their_machines_keep(workers: WorkerStore, database: Database) -> None:
    keeps = InputCache(100, 60, 7, 8, (("s3://models/base/", 40), ("s3://models/a.safetensors", 20)))
    workers.enter(SMALL)
    workers.enter(LARGE, keeps)
    assert [living.input_cache for living in workers.present()] == [None, keeps]
    workers.seen(SMALL, keeps)
    workers.seen(LARGE, replace(keeps, used_bytes=0, checkpoints=()))
    assert [living.input_cache for living in workers.present()] == [keeps, replace(keeps, used_bytes=0, checkpoints=())]
    silent(database)
    workers.forget_gone()
    workers.seen(SMALL, keeps)
    assert [living.input_cache for living in workers.present()] == [keeps]


def test_one_sees_what_a_worker_does(jobs: JobStore, parts: PartStore, workers: WorkerStore) -> None:
    workers.enter(SMALL)
    job_id = planned(jobs, parts, 0)
    held = parts.claim_next([Queue.HEAVY], SMALL.id)
    (presence,) = workers.present()
    assert presence.at_work is not None
    assert (presence.at_work.job_id, presence.at_work.stage, presence.at_work.caller) == (job_id, Stage.MERGE, ME)
    assert held is not None
    parts.complete(held, Done(), Counters())
    assert workers.present()[0].at_work is None


def test_a_part_goes_only_where_its_peak_fits(jobs: JobStore, parts: PartStore) -> None:
    first, second = planned(jobs, parts, 3 * GB, 2 * GB), planned(jobs, parts, 9 * GB, 1)
    small = [parts.claim_next([Queue.HEAVY], SMALL.id, SMALL.usable_bytes) for _ in range(3)]
    assert [(held.job_id, held.part) for held in small if held] == [(first, 1), (second, 1)]
    large = [parts.claim_next([Queue.HEAVY], LARGE.id, LARGE.usable_bytes) for _ in range(2)]
    assert [(held.job_id, held.part) for held in large if held] == [(first, 0)]


def test_a_job_that_fits_no_worker_waits_with_a_warning_and_then_fails(
    jobs: JobStore, parts: PartStore, workers: WorkerStore, database: Database
) -> None:
    workers.enter(SMALL)
    job_id, other = planned(jobs, parts, 9 * GB), planned(jobs, parts, 1)
    for _ in range(3):
        placement(database).sweep()
    waiting = jobs.get(ME, job_id)
    assert (waiting.status, len(waiting.warnings)) == (Status.RUNNING, 1)
    for words in ("'shard 0' (merge)", "9.00 GB", "host:a:1: 2.00 GB", "CATMERGE_WORKER_MEMORY_BYTES"):
        assert words in waiting.warnings[0]
    placement(database, patience_seconds=0).sweep()
    failed = jobs.get(ME, job_id)
    assert failed.error is not None
    assert (failed.status, failed.error.code, failed.error.retryable) == (Status.FAILED, "no_worker_fits", True)
    assert failed.error.detail == waiting.warnings[0]
    assert jobs.get(ME, other).status is Status.RUNNING
    jobs.retry(ME, job_id)
    placement(database).sweep()
    assert jobs.get(ME, job_id).status is Status.QUEUED, "its patience begins anew"


def test_a_larger_worker_sets_a_job_free(
    jobs: JobStore, parts: PartStore, workers: WorkerStore, database: Database
) -> None:
    workers.enter(SMALL)
    job_id = planned(jobs, parts, 3 * GB)
    placement(database).sweep()
    workers.enter(LARGE)
    placement(database, patience_seconds=0).sweep()
    assert jobs.get(ME, job_id).warnings == ()
    workers.leave(LARGE.id)
    placement(database, patience_seconds=600).sweep()
    waiting = jobs.get(ME, job_id)
    assert (waiting.status, len(waiting.warnings)) == (Status.RUNNING, 1)
    told = [event.type for event in jobs.events(ME, job_id, 0, 100)[0]]
    assert (told.count("job.stuck"), told.count("job.unstuck")) == (2, 1)


def test_a_job_that_is_placed_no_longer_warns_that_it_waits(
    jobs: JobStore, parts: PartStore, workers: WorkerStore, database: Database
) -> None:
    """Between two sweeps too: its last part may be done before the next."""
    workers.enter(SMALL)
    job_id = planned(jobs, parts, 3 * GB, GB, 5 * GB)
    placement(database).sweep()
    assert parts.claim_next([Queue.HEAVY], SMALL.id, SMALL.usable_bytes) is not None
    claim(parts, job_id, Stage.MERGE, 0, owner=LARGE.id)
    assert len(jobs.get(ME, job_id).warnings) == 1, "the largest part still waits"
    held = claim(parts, job_id, Stage.MERGE, 2, owner=LARGE.id)
    assert jobs.get(ME, job_id).warnings == ()
    parts.complete(held, Done(warnings=("another",)), Counters())
    assert jobs.get(ME, job_id).warnings == ("another",)
    placement(database).sweep()
    assert [event.type for event in jobs.events(ME, job_id, 0, 100)[0]].count("job.unstuck") == 1


def test_while_no_worker_lives_nobody_is_told_that_none_fits(
    jobs: JobStore, parts: PartStore, workers: WorkerStore, database: Database
) -> None:
    job_id = planned(jobs, parts, 9 * GB)
    workers.enter(replace(SMALL, queues=(Queue.LIGHT,)))
    placement(database, patience_seconds=0).sweep()
    workers.enter(LARGE)
    silent(database)
    placement(database, patience_seconds=0).sweep()
    assert jobs.get(ME, job_id).warnings == ()


def test_only_as_many_are_rung_for_again_as_have_nothing_to_do(
    jobs: JobStore, parts: PartStore, workers: WorkerStore, database: Database
) -> None:
    planned(jobs, parts, *[0] * 10)
    with database.write() as connection:
        connection.execute(update(part_table).values(sent_at=1.0))
    workers.enter(SMALL)
    workers.enter(LARGE)
    assert len(parts.due(5, 100)) == 2
    held = parts.claim_next([Queue.HEAVY], LARGE.id)
    assert held is not None
    with database.write() as connection:
        connection.execute(update(part_table).values(sent_at=1.0))
    assert len(parts.due(5, 100)) == 1
    assert parts.claim_next([Queue.HEAVY], SMALL.id) is not None
    assert parts.due(5, 100) == [], "those at work look for more by themselves"


def test_the_part_of_a_dead_worker_is_ready_before_its_lease_is_over(
    jobs: JobStore, parts: PartStore, database: Database
) -> None:
    job_id = planned(jobs, parts, GB)
    held = parts.claim_next([Queue.HEAVY], "dead")
    assert held is not None
    assert parts.report_lost("somebody else", KILLED) == 0
    assert parts.report_lost("dead", KILLED) == 1
    assert parts.report_lost("dead", KILLED) == 0, "told once"
    ready_now(database)
    again = parts.claim_next([Queue.HEAVY], "alive")
    assert again is not None
    assert (again.job_id, again.attempt) == (job_id, 2)
    assert parts.complete(held, Done(), Counters()) is None, "whoever was thought dead is fenced"
    assert not parts.heartbeat(held, Counters())
    told = [event.data for event in jobs.events(ME, job_id, 0, 100)[0] if event.type == "part.retried"]
    assert told[0]["code"] == "worker_lost"
    assert "signal 9 (SIGKILL)" in told[0]["detail"]


def test_a_part_that_costs_three_workers_fails_its_job_and_no_other(
    jobs: JobStore, parts: PartStore, database: Database
) -> None:
    """However many attempts a part may have."""
    poison, other = planned(jobs, parts, 3 * GB), submit(jobs).id
    for death in range(LETHAL):
        ready_now(database)
        held = parts.claim_next([Queue.HEAVY], f"worker {death}")
        assert held is not None
        if death == 1:
            expire(database)
            assert parts.take_back_expired() == 1
        else:
            assert parts.report_lost(f"worker {death}", KILLED) == 1
    failed = jobs.get(ME, poison)
    assert failed.error is not None
    assert (failed.status, failed.error.code) == (Status.FAILED, "worker_lost")
    for words in ("worker 2 was ended by signal 9 (SIGKILL)", "3. worker", "a peak of 3.00 GB", "Give workers more"):
        assert words in failed.error.detail
    assert parts.claim(PartMessage(Stage.PLAN, other, 0), "worker") is not None
    jobs.retry(ME, poison)
    assert parts.report_lost(claim_owner(parts, poison), KILLED) == 1
    assert jobs.get(ME, poison).status is Status.RUNNING, "a retry counts anew"


def expire(database: Database) -> None:
    with database.write() as connection:
        connection.execute(update(part_table).where(part_table.c.state == "claimed").values(lease_until=0.0))


def claim_owner(parts: PartStore, job_id: str) -> str:
    claim(parts, job_id, Stage.MERGE, owner="again")
    return "again"


@pytest.mark.parametrize(
    ("status", "words"), [(-11, "was ended by signal 11 (SIGSEGV)"), (1, "ended with exit status 1")]
)
def test_an_exit_status_is_told_in_words(status: int, words: str) -> None:
    assert has_exited(status) == words


def test_a_stuck_job_is_found_among_many_that_are_not(
    jobs: JobStore, parts: PartStore, workers: WorkerStore, database: Database
) -> None:
    workers.enter(SMALL)
    many = [planned(jobs, parts, GB) for _ in range(5)]
    stuck = planned(jobs, parts, GB, 5 * GB)
    placement(database).sweep()
    with database.read() as connection:
        found = connection.execute(job_table.select().where(job_table.c.stuck_since.is_not(None))).all()
    assert [row.id for row in found] == [stuck]
    assert all(jobs.get(ME, job_id).warnings == () for job_id in many)
