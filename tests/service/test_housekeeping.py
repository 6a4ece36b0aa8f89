"""What is cleared away behind jobs that have ended, and what is let be: on a folder and on an S3 server."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update

from service.contract.errors import StorageFailure
from service.contract.job import Job, Status
from service.contract.parts import Counters, Done
from service.contract.settings import Connections
from service.contract.stages import NewPart, Stage
from service.housekeeping import Housekeeper, Keeping
from service.stores import s3
from service.stores.begun import BegunObjects
from service.stores.database import Database
from service.stores.ended import EndedJobs
from service.stores.jobs import JobStore, Listing
from service.stores.objects import Objects, ObjectWriter, open_objects
from service.stores.parts import PartStore
from service.stores.schema import jobs as job_table
from service.stores.workers import WorkerStore
from tests.servers import S3Server, s3_server
from tests.service.jobs_by_hand import claim, plan, submit

ME = "anonymous"
WORKSPACE = "s3://catmerge/"
PLACE = "s3://catmerge/out/"
AT_ONCE = Keeping(quiet_seconds=0.0, in_use_seconds=0.0)


class House:
    """Jobs moved on by hand over a database, a store and a housekeeper that is told when."""

    def __init__(self, database: Database, objects: Objects) -> None:
        self.database, self.objects = database, objects
        self.jobs = JobStore(database)
        self.parts = PartStore(database, lease_seconds=60, part_attempts=1)
        self._begun: list[ObjectWriter] = []

    def close(self) -> None:
        for writer in self._begun:
            writer.abort()
        for address in self.listed():
            self.objects.delete(address)
        self.database.close()

    def clear_up(self, **keeping: Any) -> None:
        ended = EndedJobs(self.database)
        kept = replace(AT_ONCE, **keeping)
        workers = WorkerStore(self.database, lease_seconds=60)
        Housekeeper(self.jobs, self.parts, workers, ended, self.objects, WORKSPACE, kept).clear_up()

    def submit(self, prefix: str = PLACE) -> Job:
        return submit(self.jobs, prefix=prefix)

    def finish(self, job: Job, status: Status = Status.SUCCEEDED, **result: Any) -> None:
        held = claim(self.parts, job.id)
        self.parts.complete(held, Done(status=status, result=result), Counters())

    def fail(self, job: Job) -> None:
        assert self.parts.fail(claim(self.parts, job.id), StorageFailure("away"))

    def put(self, address: str, data: bytes = b"x") -> str:
        self.objects.put(address, data, "application/octet-stream")
        return address

    def begin(self, address: str) -> ObjectWriter:
        """Begin to write a large object, as a worker does that is killed then."""
        writer = self.objects.write(address)
        writer.write(bytes(6 << 20))
        self._begun.append(writer)
        return writer

    def unfinished(self) -> list[str]:
        return [found.address for found in self.objects.unfinished(WORKSPACE)]

    def listed(self) -> list[str]:
        return [info.address for info in self.objects.list(WORKSPACE)]

    def expire(self, job: Job) -> None:
        with self.database.write() as connection:
            connection.execute(update(job_table).where(job_table.c.id == job.id).values(expires_at=0.0))


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server("rclone") as opened:  # moto does not know when an upload began
        yield opened


@pytest.fixture(params=["folder", "s3"])
def house(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[House]:
    monkeypatch.setattr(s3, "FIRST_PART_BYTES", 5 << 20)
    environ = {"CATMERGE_OBJECT_STORE": f"file://{tmp_path / 'objects'}"}
    if request.param == "s3":
        environ = request.getfixturevalue("server").environment()
    database = Database(f"sqlite:///{tmp_path / 'jobs.db'}")
    database.migrate()
    opened = House(database, open_objects(Connections.from_environment(environ)))
    yield opened
    opened.close()


def test_what_a_dead_worker_left_half_written_goes_when_its_job_has_ended(house: House) -> None:
    job = house.submit()
    house.begin(f"{PLACE}model-00001-of-00002.safetensors")
    house.begin(f"{WORKSPACE}scratch/{job.id}/figures-00001.safetensors")
    house.clear_up()
    assert len(house.unfinished()) == 2, "its job is at work"
    house.fail(job)
    house.clear_up()
    assert house.unfinished() == []
    assert house.listed() == []


def test_what_a_part_noted_that_it_had_begun_goes_without_a_look_for_it(house: House) -> None:
    """Some stores list no uploads; here it has a name that nobody looks for."""
    job = house.submit()
    house.begin(f"{PLACE}notes/film.bin")
    (found,) = house.objects.unfinished(PLACE)
    held = claim(house.parts, job.id)
    BegunObjects(house.database).note(held, found.address, found.handle)
    house.clear_up()
    assert len(house.unfinished()) == 1, "its job is at work"
    assert house.parts.fail(held, StorageFailure("away"))
    house.clear_up()
    assert house.unfinished() == []


def test_an_upload_of_another_job_in_the_same_folder_goes_on(house: House) -> None:
    first = house.submit()
    house.fail(first)
    second = house.submit(f"{PLACE}below/")
    writer = house.begin(f"{PLACE}below/model.safetensors")
    house.clear_up()
    writer.commit()
    house.finish(second)
    house.clear_up()
    assert f"{PLACE}below/model.safetensors" in house.listed()


def test_an_upload_by_another_name_is_somebody_elses(house: House) -> None:
    job = house.submit()
    writer = house.begin(f"{PLACE}notes/film.bin")
    house.fail(job)
    house.clear_up()
    writer.commit()
    assert f"{PLACE}notes/film.bin" in house.listed()


def test_what_was_written_a_moment_ago_is_let_be(house: House) -> None:
    """A worker that does not know yet that its job has ended drops it itself."""
    job = house.submit()
    house.begin(f"{PLACE}model.safetensors")
    house.fail(job)
    house.clear_up(quiet_seconds=600.0)
    assert len(house.unfinished()) == 1


def test_scratch_is_kept_for_a_retry_and_goes_with_a_result(house: House) -> None:
    failed, done = house.submit(f"{PLACE}a/"), house.submit(f"{PLACE}b/")
    kept, gone = (house.put(f"{WORKSPACE}scratch/{job.id}/trim-log-00001.jsonl") for job in (failed, done))
    house.fail(failed)
    house.finish(done)
    house.clear_up()
    assert kept in house.listed()
    assert gone not in house.listed()


def test_a_manifest_without_a_result_is_taken_back(house: House) -> None:
    """The worker that wrote it died before it could say so, and the deadline passed."""
    job = house.submit()
    manifest = house.put(f"{PLACE}merge/manifest.json", json.dumps({"job": job.id, "files": []}).encode())
    house.fail(job)
    house.clear_up()
    assert manifest not in house.listed()


def test_the_manifest_of_another_job_stays(house: House) -> None:
    job = house.submit()
    manifest = house.put(f"{PLACE}merge/manifest.json", json.dumps({"job": "mrg_other", "files": []}).encode())
    house.fail(job)
    house.clear_up()
    assert manifest in house.listed()


def test_a_job_is_cleared_up_behind_once_and_again_after_a_retry(house: House) -> None:
    job = house.submit()
    house.fail(job)
    house.clear_up()
    assert EndedJobs(house.database).untidied(0.0, 10) == []
    house.jobs.retry(ME, job.id)
    house.begin(f"{PLACE}model.safetensors")
    house.jobs.cancel(ME, job.id)
    assert [ended.id for ended in EndedJobs(house.database).untidied(0.0, 10)] == [job.id]
    house.clear_up()
    assert house.unfinished() == []


@pytest.mark.parametrize("artifacts_too", [False, True])
def test_an_expired_job_is_forgotten_and_its_artifacts_where_that_is_asked_for(
    house: House, artifacts_too: bool
) -> None:
    job, other = house.submit(f"{PLACE}a/"), house.submit(f"{PLACE}b/")
    names = ["model.safetensors", "merge/manifest.json"]
    data = json.dumps({"job": job.id, "files": []}).encode()
    written = [house.put(f"{PLACE}a/{name}", data) for name in names]
    notes = house.put(f"{PLACE}a/notes.txt")
    rows = [
        {"name": name, "role": "weights", "media_type": "text/plain", "size": 1, "sha256": "0" * 64} for name in names
    ]
    house.finish(job, artifacts=rows)
    house.expire(job)
    house.clear_up(expire_artifacts=artifacts_too)
    assert [found.id for found in house.jobs.page(Listing(ME))[0]] == [other.id]
    assert set(house.listed()) == {notes, *(() if artifacts_too else written)}


def test_a_failed_job_that_expires_leaves_no_scratch(house: House) -> None:
    job = house.submit()
    house.put(f"{WORKSPACE}scratch/{job.id}/trim-log-00001.jsonl")
    house.fail(job)
    house.expire(job)
    house.clear_up()
    assert house.listed() == []


def test_the_cache_keeps_within_its_limit_what_was_of_use_last(house: House) -> None:
    old, used, never = (house.put(f"{WORKSPACE}cache/statistics/{name}.safetensors", bytes(1000)) for name in "abc")
    for address in (old, used):
        job = house.submit(f"{PLACE}{address[-13]}/")
        plan(house.parts, job.id, NewPart(Stage.CALIBRATE, 0, "cars", 1.0))
        house.parts.complete(
            claim(house.parts, job.id, Stage.CALIBRATE),
            Done({"statistics": address}, status=Status.SUCCEEDED),
            Counters(),
        )
        _long_ago(house, job, 7200.0 if address == old else 0.0)
    house.clear_up(cache_bytes=2500)
    assert house.listed() == [used, never]
    house.clear_up(cache_bytes=2500)
    assert house.listed() == [used, never], "within the limit nothing goes"


def test_statistics_of_a_job_at_work_stay_whatever_the_limit(house: House) -> None:
    address = house.put(f"{WORKSPACE}cache/statistics/a.safetensors", bytes(1000))
    job = house.submit()
    plan(house.parts, job.id, NewPart(Stage.CALIBRATE, 0, "cars", 1.0), NewPart(Stage.MERGE, 0, "model", 1.0))
    house.parts.complete(claim(house.parts, job.id, Stage.CALIBRATE), Done({"statistics": address}), Counters())
    house.clear_up(cache_bytes=0, in_use_seconds=1.0)
    assert house.listed() == [address]


def test_what_has_been_half_written_for_a_week_is_nobodys(tmp_path: Path) -> None:
    """Its job may be forgotten; in the service's own folders age says enough."""
    database = Database(f"sqlite:///{tmp_path / 'jobs.db'}")
    database.migrate()
    house = House(database, open_objects(Connections(object_store=f"file://{tmp_path / 'objects'}")))
    for name in ("old", "young"):
        house.begin(f"{WORKSPACE}scratch/mrg_forgotten/{name}")
    (old, _) = sorted((tmp_path / "objects").rglob(".catmerge-staging-*"))
    long_ago = time.time() - 8 * 86400
    os.utime(old, (long_ago, long_ago))
    house.clear_up()
    assert len(house.unfinished()) == 1
    house.close()


def _long_ago(house: House, job: Job, seconds: float) -> None:
    with house.database.write() as connection:
        ended = update(job_table).where(job_table.c.id == job.id)
        connection.execute(ended.values(finished_at=job_table.c.finished_at - seconds))
