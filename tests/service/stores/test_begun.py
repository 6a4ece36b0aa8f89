"""What parts have begun to write: found by who does the part again, taken away once when the job has ended."""

from __future__ import annotations

import pytest
from sqlalchemy import update

from service.contract.errors import BadTensor, Stopped, StorageFailure
from service.contract.parts import Claim, Counters, Done
from service.contract.stages import Stage
from service.stores.base import Unfinished
from service.stores.begun import BegunObjects
from service.stores.database import Database
from service.stores.ended import EndedJobs
from service.stores.jobs import JobStore
from service.stores.parts import PartStore
from service.stores.schema import parts as table
from tests.service.jobs_by_hand import claim, merges, plan, submit

ME = "anonymous"
ADDRESS = "s3://merged/run/model.safetensors"
BEGUN = [Unfinished(ADDRESS, "upload", 0.0)]


@pytest.fixture
def jobs(database: Database) -> JobStore:
    return JobStore(database)


@pytest.fixture
def parts(database: Database) -> PartStore:
    return PartStore(database, lease_seconds=60, part_attempts=3)


@pytest.fixture
def begun(database: Database) -> BegunObjects:
    return BegunObjects(database)


@pytest.fixture
def held(jobs: JobStore, parts: PartStore, begun: BegunObjects) -> Claim:
    """A shard's part, which has begun to write."""
    job = submit(jobs)
    plan(parts, job.id, *merges(2))
    found = claim(parts, job.id, Stage.MERGE)
    begun.note(found, ADDRESS, "upload")
    return found


def again(database: Database, parts: PartStore, held: Claim) -> Claim:
    with database.write() as connection:
        connection.execute(update(table).values(not_before=0.0))
    return claim(parts, held.job_id, Stage.MERGE)


def test_nothing_was_begun_at_first(held: Claim, parts: PartStore, begun: BegunObjects) -> None:
    assert begun.find(held, ADDRESS + ".other") is None
    assert begun.find(claim(parts, held.job_id, Stage.MERGE, 1), ADDRESS) is None


def test_who_does_the_part_again_finds_it(
    held: Claim, database: Database, parts: PartStore, begun: BegunObjects
) -> None:
    assert not parts.fail(held, StorageFailure("away"))
    second = again(database, parts, held)
    assert begun.find(second, ADDRESS) == "upload"
    parts.release(second)
    third = again(database, parts, held)
    assert begun.find(third, ADDRESS) == "upload"
    assert parts.report_lost("worker", "died") == 1
    assert begun.find(again(database, parts, held), ADDRESS) == "upload"


def test_what_a_job_has_cost_is_kept_beside_it(held: Claim, parts: PartStore, begun: BegunObjects) -> None:
    so_far = parts.so_far(held)
    begun.note(held, ADDRESS, "another")
    assert begun.find(held, ADDRESS) == "another"
    assert parts.so_far(held) == so_far
    begun.note(held, ADDRESS, None)
    assert begun.find(held, ADDRESS) is None
    assert parts.so_far(held) == so_far


def test_who_has_lost_the_part_neither_finds_nor_notes_nor_takes(
    held: Claim, database: Database, parts: PartStore, begun: BegunObjects
) -> None:
    parts.report_lost("worker", "died")
    second = again(database, parts, held)
    with pytest.raises(Stopped):
        begun.find(held, ADDRESS)
    with pytest.raises(Stopped):
        begun.note(held, ADDRESS, "late")
    assert begun.take_ended(held) == []
    assert begun.find(second, ADDRESS) == "upload"


@pytest.mark.parametrize("end", ["cancel", "fail"])
def test_when_the_job_has_ended_it_is_taken_once(
    held: Claim, jobs: JobStore, parts: PartStore, begun: BegunObjects, database: Database, end: str
) -> None:
    if end == "cancel":
        jobs.cancel(ME, held.job_id)
    else:
        assert parts.fail(held, BadTensor("NaN"))
    assert EndedJobs(database).begun(held.job_id) == BEGUN
    assert begun.take_ended(held) == BEGUN
    assert begun.take_ended(held) == []
    assert EndedJobs(database).begun(held.job_id) == []


def test_a_job_that_is_retried_finds_it_and_nobody_may_drop_it(
    held: Claim, jobs: JobStore, parts: PartStore, begun: BegunObjects, database: Database
) -> None:
    jobs.cancel(ME, held.job_id)
    jobs.retry(ME, held.job_id)
    assert begun.take_ended(held) == [], "the worker that was cancelled is late"
    assert begun.find(again(database, parts, held), ADDRESS) == "upload"


def test_a_part_that_is_done_has_begun_nothing(
    held: Claim, parts: PartStore, begun: BegunObjects, database: Database
) -> None:
    parts.complete(held, Done(output={"files": []}), Counters())
    assert EndedJobs(database).begun(held.job_id) == []
    assert parts.outputs(held.job_id, Stage.MERGE) == [{"files": []}, {}]
