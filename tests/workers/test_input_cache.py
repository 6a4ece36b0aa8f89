"""Workers on a machine that keeps inputs: the same results, less asked of the store, parts where their files are."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from service.contract.job import Job, Status
from service.contract.settings import Connections
from service.contract.stages import Stage
from service.stores.blocks import ABOUT, LOCK
from service.stores.database import Database
from service.stores.jobs import JobStore
from service.stores.objects import Objects, open_objects
from service.stores.schema import parts as part_table
from tests.faulty import StoreProxy, store_proxy
from tests.servers import S3Server, s3_server
from tests.service.jobs_by_hand import submit
from tests.workers.demo_merge import DEMO, TASKS
from workers.runner import Runner
from workers.stages import RUN
from workers.tensors import TensorReader
from workers.unread import Landing

BASE = "s3://catmerge/models/base/"
ADDED = {"name": "task_arithmetic", "scaling": 0.3}
TRIMMED = {"name": "cat", "scaling": 0.3}


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server("moto") as found:
        environ = Connections.from_environment(found.environment())
        objects = open_objects(environ)
        for path in (*DEMO.glob("base/*"), *DEMO.glob("tasks/*/*")):
            name = path.relative_to(DEMO).as_posix().removeprefix("tasks/")
            objects.put(f"s3://catmerge/models/{name}", path.read_bytes(), "application/octet-stream")
        yield found


@dataclass
class Place:
    """A database, an S3 server that one can look at, and a machine's disk."""

    connections: Connections
    proxy: StoreProxy
    disk: Path

    def __post_init__(self) -> None:
        self.database = Database(self.connections.database_url)
        self.database.migrate()
        self.jobs = JobStore(self.database)

    def worker(self, *, keeps: bool = True, limit_bytes: int = 10**9) -> Runner:
        """A worker process that starts now."""
        cache = {"input_cache": self.disk, "input_cache_bytes": limit_bytes} if keeps else {}
        connections = self.connections.model_copy(update=cache)
        return Runner(connections, RUN, lambda _: None, lambda: False, "cpu")

    @property
    def objects(self) -> Objects:
        return open_objects(self.connections)

    def submit(self, method: dict[str, Any], **changes: Any) -> Job:
        tasks = [
            {
                "name": name,
                "checkpoint": f"s3://catmerge/models/{name}/",
                "exemplars": f"s3://catmerge/models/{name}/exemplars.safetensors",
            }
            for name in TASKS
        ]
        return submit(
            self.jobs,
            prefix=f"s3://catmerge/merged/{secrets.token_hex(4)}/",
            base=BASE,
            tasks=tasks,
            method=method,
            **changes,
        )

    def job(self, job: Job) -> Job:
        return self.jobs.get("anonymous", job.id)

    def merged(self, job: Job) -> bytes:
        assert self.job(job).status is Status.SUCCEEDED, self.job(job).error
        return self.objects.read_all(f"{job.prefix}model.safetensors", 1 << 30)

    def merge(self, runner: Runner, method: dict[str, Any]) -> bytes:
        """What one worker makes of a job."""
        return self.merged(self.finish(runner, method))

    def finish(self, runner: Runner, method: dict[str, Any]) -> Job:
        job = self.submit(method)
        work(runner)
        return self.job(job)

    def asked(self) -> int:
        """Requests for the content of models since this was last asked."""
        seen, self.proxy.seen = self.proxy.seen, []
        return sum(bool(re.match(r"GET /catmerge/models/\w+/model\.safetensors", line)) for line in seen)

    def inputs(self, job: Job, stage: Stage) -> list[list[str]]:
        of_stage = (part_table.c.job_id == job.id, part_table.c.stage == stage.value)
        with self.database.read() as connection:
            rows = connection.execute(part_table.select().where(*of_stage).order_by(part_table.c.part))
            return [row.inputs for row in rows]

    def done(self, job: Job) -> list[tuple[str, str]]:
        events = self.jobs.events("anonymous", job.id, 0, 1000)[0]
        return [(event.data["stage"], event.data["name"]) for event in events if event.type == "part.done"]


@pytest.fixture
def place(server: S3Server, tmp_path: Path) -> Iterator[Place]:
    with store_proxy(server.url) as proxy:
        environ = {**server.environment(), "CATMERGE_S3_ENDPOINT": proxy.url}
        environ["CATMERGE_DATABASE_URL"] = f"sqlite:///{tmp_path / 'jobs.db'}"
        found = Place(Connections.from_environment(environ), proxy, tmp_path / "disk")
        yield found
        found.database.close()


def work(runner: Runner) -> None:
    while runner.run_next():
        pass


@pytest.mark.parametrize("method", [ADDED, TRIMMED], ids=["added", "trimmed"])
def test_with_and_without_the_result_is_the_same_and_the_second_job_asks_for_no_model(
    place: Place, method: dict[str, Any]
) -> None:
    results, requests, found = [], [], []
    for is_kept in (False, True, True):
        runner = place.worker(keeps=is_kept)
        place.asked()
        job = place.finish(runner, method)
        results.append(place.merged(job))
        requests.append(place.asked())
        found.append((job.result or {})["cost"]["bytes_found"])
    plain, cold, warm = requests
    assert results[0] == results[1] == results[2]
    assert (plain > cold > 0, warm) == (True, 0)
    assert found[0] == 0 < found[2], "as the report says"
    keeps = runner.keeps()
    assert keeps is not None
    assert (keeps.missed_bytes, keeps.found_bytes > 0) == (0, True)
    assert {address for address, _ in keeps.checkpoints} >= {BASE, *(f"s3://catmerge/models/{name}/" for name in TASKS)}


def test_an_input_that_changes_is_found_to_have_changed_whatever_is_kept(place: Place) -> None:
    before = place.merge(place.worker(), ADDED)
    address = "s3://catmerge/models/digits/model.safetensors"
    content = place.objects.read_all(address, 1 << 30)
    job, runner = place.submit(ADDED), place.worker()
    assert runner.run_next()
    place.objects.put(address, content[:-4] + bytes(4), "application/octet-stream")
    try:
        work(runner)
        error = place.job(job).error
        assert error is not None
        assert (error.code, place.job(job).status) == ("input_changed", Status.FAILED)
        assert place.merge(runner, ADDED) != before
    finally:
        place.objects.put(address, content, "application/octet-stream")


@pytest.mark.parametrize("harm", ["lost", "zeros", "cut"])
def test_what_happens_to_the_disk_harms_no_result(place: Place, harm: str) -> None:
    plain = place.merge(place.worker(keeps=False), ADDED)
    place.merge(place.worker(), ADDED)
    for path in place.disk.rglob("*"):
        if path.is_file() and path.name not in (ABOUT, LOCK):
            content = path.read_bytes()
            path.write_bytes(bytes(len(content)) if harm == "zeros" else content[:1000])
            if harm == "lost":
                path.unlink()
    assert place.merge(place.worker(), ADDED) == plain


def test_a_disk_with_no_room_makes_no_part_fail(place: Place) -> None:
    plain = place.merge(place.worker(keeps=False), ADDED)
    small = place.worker(limit_bytes=2_000_000)  # for five models of 1.2 MB
    assert place.merge(small, ADDED) == plain
    assert 0 < sum(path.stat().st_size for path in place.disk.rglob("0")) <= 2_000_000
    none = place.worker(limit_bytes=1000)
    assert place.merge(none, ADDED) == plain


def test_parts_know_their_files_and_go_where_these_are(place: Place) -> None:
    labeled = [{"task": name, "labeled": f"s3://catmerge/models/{name}/test.safetensors"} for name in TASKS]
    job = place.submit(TRIMMED, evaluation={"tasks": labeled})
    runner = place.worker()
    wanted = "s3://catmerge/models/mirrored/model.safetensors"
    info = runner._objects.head(wanted)
    runner._objects.read(wanted, 0, memoryview(bytearray(info.size)), etag=info.etag)
    runner.run_next()
    assert place.inputs(job, Stage.CALIBRATE) == [[f"s3://catmerge/models/{name}/model.safetensors"] for name in TASKS]
    experts = [files for files in place.inputs(job, Stage.EVALUATE) if files and BASE not in files[0]]
    assert experts == place.inputs(job, Stage.CALIBRATE)
    runner.run_next()
    assert place.done(job)[-1] == ("calibrate", "mirrored")
    work(runner)
    place.merged(job)


def test_a_checkpoint_is_near_once_all_its_files_are_and_stays_readable(place: Place, tmp_path: Path) -> None:
    folder, wanted = "s3://catmerge/models/sharded/", {"a": torch.arange(1000.0), "b": torch.arange(2000.0) / 3}
    for name, tensor in wanted.items():
        save_file({name: tensor}, tmp_path / "shard")
        place.objects.put(f"{folder}model-{name}.safetensors", (tmp_path / "shard").read_bytes(), "")
    index = {"weight_map": {name: f"model-{name}.safetensors" for name in wanted}}
    place.objects.put(f"{folder}model.safetensors.index.json", json.dumps(index).encode(), "")
    place.objects.put(f"{folder}config.json", b"{}", "")
    with TensorReader(place.worker()._objects) as reader:
        checkpoint = reader.open(folder, ())
        assert reader.are_near([checkpoint]), "opening has read small files whole"
    next(path for path in place.disk.rglob("0") if b"b.safetensors" in path.with_name(ABOUT).read_bytes()).unlink()
    with TensorReader(place.worker()._objects) as reader:
        is_near = [reader.are_near([checkpoint])]
        (entries,) = reader.unread([checkpoint], "b", slice(10, 1990))
        entries.expect()
        found = Landing().read(entries)
        assert (is_near, found.equal(wanted["b"][10:1990])) == ([False], True)
