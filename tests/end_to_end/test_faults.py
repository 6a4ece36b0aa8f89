"""What breaks while a merge is underway: workers, the API and the broker die, jobs are cancelled and retried."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis
from sqlalchemy import func, select

from service.contract.stages import Queue
from service.stores.database import Database
from service.stores.schema import parts, trials
from tests.checkpoints import Family, change_tensors
from tests.end_to_end.conftest import connect
from tests.end_to_end.stack import Stack, open_stack, until
from tests.servers import PostgresServer, S3Server, redis_server

PLACE = "s3://models/faults/"
MANY_SHARDS = 4096  # a dozen parts


class Broker:
    """A broker that a test may stop and start again at the same port; what it held is lost then."""

    def __init__(self) -> None:
        self._context = redis_server()
        self._server = self._context.__enter__()
        self.url, self._port = self._server.url, self._server.port

    def stop(self) -> None:
        self._context.__exit__(None, None, None)

    def start(self) -> None:
        self._context = redis_server(port=self._port)
        self._server = self._context.__enter__()

    @contextmanager
    def client(self) -> Iterator[redis.Redis]:
        client = redis.Redis.from_url(self.url)
        try:
            yield client
        finally:
            client.close()


@pytest.fixture(scope="module")
def broker() -> Iterator[Broker]:
    opened = Broker()
    yield opened
    opened.stop()


@pytest.fixture(scope="module")
def pair(vit: Family) -> Family:
    """Two tasks: every part is done the quicker."""
    return Family(vit.folder, ("cars", "pets"))


@pytest.fixture(scope="module")
def stack(
    tmp_path_factory: pytest.TempPathFactory, postgres: PostgresServer, s3: S3Server, broker: Broker, vit: Family
) -> Iterator[Stack]:
    """A stack with short leases; its worker is started by each test."""
    values = {"lease_seconds": 3, "heartbeat_seconds": 1, "workspace": "s3://faults/"}
    connections = connect(postgres, s3, broker.url, "faults", **values)
    extra = {"CATMERGE_RESEND_AFTER_SECONDS": "2"}
    with open_stack(tmp_path_factory.mktemp("faults"), connections, extra, worker=False) as opened:
        opened.upload(vit.folder, PLACE)
        yield opened


@pytest.fixture(scope="module")
def database(stack: Stack) -> Iterator[Database]:
    opened = Database(stack.connections.database_url)
    yield opened
    opened.close()


@pytest.fixture
def worker(stack: Stack) -> Stack:
    """The stack with its worker running."""
    if not stack.worker.is_running:
        stack.worker.start()
    return stack


@pytest.fixture
def no_worker(stack: Stack) -> Stack:
    """The stack with no worker."""
    stack.worker.stop()
    return stack


@pytest.fixture(scope="module")
def undisturbed(stack: Stack, pair: Family) -> dict[str, str]:
    """The digests of the merge that all tests disturb, undisturbed."""
    if not stack.worker.is_running:
        stack.worker.start()
    return digests(stack, stack.run(recipe(pair))["id"])


def recipe(pair: Family, **changes: Any) -> dict[str, Any]:
    return pair.recipe(PLACE, method={"name": "cat", "rank": 2}, output={"shard_bytes": MANY_SHARDS}, **changes)


def digests(stack: Stack, job_id: str) -> dict[str, str]:
    """Of every file that does not tell when and where it was made."""
    made = (".safetensors", ".jsonl", "index.json", "config.json")
    rows = {name: row["sha256"] for name, row in stack.artifacts(job_id).items() if name.endswith(made)}
    assert len(rows) > 10
    return rows


def check_whole(stack: Stack, job_id: str) -> None:
    """Whether every file of the manifest is there, and nothing else."""
    prefix = stack.job(job_id)["result"]["prefix"]
    manifest = json.loads(stack.objects.read_all(f"{prefix}merge/manifest.json", 1 << 20))
    assert sorted(stack.listed(prefix)) == sorted([row["name"] for row in manifest["files"]] + ["merge/manifest.json"])
    until(lambda: not stack.listed(f"s3://faults/scratch/{job_id}/"), "nothing is left in scratch", stack.logs)


def states(database: Database, job_id: str, stage: str) -> dict[str, int]:
    """How many parts of a stage are in which state."""
    with database.read() as connection:
        query = select(parts.c.state, func.count()).where(parts.c.job_id == job_id, parts.c.stage == stage)
        return dict(connection.execute(query.group_by(parts.c.state)).all())


def frozen_at_work(stack: Stack, database: Database, job_id: str) -> None:
    """Freeze the worker while it holds a part of the merge stage, with some done and some to do."""

    def is_caught() -> bool:
        if states(database, job_id, "merge").get("done", 0) < 2:
            return False
        stack.worker.signal(signal.SIGSTOP)
        found = states(database, job_id, "merge")
        assert found.get("ready", 0), f"the merge stage was over too soon: {found}"
        if found.get("claimed", 0):
            return True
        stack.worker.signal(signal.SIGCONT)
        return False

    until(is_caught, "a worker holds a part of the merge", stack.logs, every=0.01)


def kinds(stack: Stack, job_id: str) -> list[str]:
    return [row["type"] for row in stack.events(job_id)]


def test_a_killed_worker(worker: Stack, database: Database, pair: Family, undisturbed: dict[str, str]) -> None:
    job_id = worker.submit(recipe(pair))["id"]
    frozen_at_work(worker, database, job_id)
    worker.worker.kill()
    worker.worker.start()
    worker.succeeded(job_id)
    lost = [row["data"] for row in worker.events(job_id) if row["type"] == "part.retried"]
    assert [(row["stage"], row["code"]) for row in lost] == [("merge", "worker_lost")]
    assert digests(worker, job_id) == undisturbed
    check_whole(worker, job_id)


def test_a_worker_that_is_late(worker: Stack, database: Database, pair: Family, undisturbed: dict[str, str]) -> None:
    """Its lease runs out while it is frozen; awake again, it must not count twice."""
    job_id = worker.submit(recipe(pair))["id"]
    frozen_at_work(worker, database, job_id)
    until(lambda: "part.retried" in kinds(worker, job_id), "the lease is taken back", worker.logs)
    worker.worker.signal(signal.SIGCONT)
    worker.succeeded(job_id)
    done = [(row["data"]["stage"], row["data"]["part"]) for row in worker.events(job_id) if row["type"] == "part.done"]
    assert len(done) == len(set(done))
    assert digests(worker, job_id) == undisturbed
    check_whole(worker, job_id)


def test_a_worker_that_is_asked_to_stop(
    worker: Stack, database: Database, pair: Family, undisturbed: dict[str, str]
) -> None:
    """It gives its part back: nobody waits for a lease, and nothing counts as tried in vain."""
    job_id = worker.submit(recipe(pair))["id"]
    frozen_at_work(worker, database, job_id)
    worker.worker.signal(signal.SIGCONT)
    assert worker.worker.stop() == 0
    assert not states(database, job_id, "merge").get("claimed", 0)
    assert worker.job(job_id)["status"] == "running"
    worker.worker.start()
    worker.succeeded(job_id)
    assert "part.retried" not in kinds(worker, job_id)
    assert digests(worker, job_id) == undisturbed


def test_cancelled_underway_and_retried(
    worker: Stack, database: Database, pair: Family, undisturbed: dict[str, str]
) -> None:
    job_id = worker.submit(recipe(pair))["id"]
    frozen_at_work(worker, database, job_id)
    answer = worker.client.post(f"/v1/merges/{job_id}/cancel")
    worker.worker.signal(signal.SIGCONT)
    assert (answer.status_code, answer.json()["status"]) == (202, "cancelled")
    again = worker.client.post(f"/v1/merges/{job_id}/cancel")
    assert (again.status_code, again.json()["status"]) == (200, "cancelled")
    done = states(database, job_id, "merge")["done"]
    # Another job passes through the same worker: it has left the cancelled one.
    worker.run(pair.recipe(PLACE, method={"name": "average"}))
    assert states(database, job_id, "merge").get("done") == done
    assert worker.job(job_id)["status"] == "cancelled"
    prefix = f"s3://faults/merges/{job_id}/"
    assert "merge/manifest.json" not in worker.listed(prefix)
    assert worker.client.get(f"/v1/merges/{job_id}/artifacts").json()["code"] == "not_ready"

    retried = worker.client.post(f"/v1/merges/{job_id}/retry")
    assert (retried.status_code, retried.json()["attempt"]) == (202, 2)
    worker.succeeded(job_id)
    assert kinds(worker, job_id).count("job.retried") == 1
    finished = [row["data"]["part"] for row in worker.events(job_id) if row["type"] == "part.done"]
    assert len(finished) == len(undisturbed_parts(database, job_id))  # what was done was not done again
    assert digests(worker, job_id) == undisturbed
    check_whole(worker, job_id)


def undisturbed_parts(database: Database, job_id: str) -> list[int]:
    with database.read() as connection:
        return list(connection.execute(select(parts.c.part).where(parts.c.job_id == job_id)).scalars())


def test_a_cancelled_job_is_overtaken_and_retried(
    worker: Stack, database: Database, pair: Family, undisturbed: dict[str, str]
) -> None:
    """Another job wrote into its folder meanwhile: what was done there is done again, and not believed."""
    output = {"shard_bytes": MANY_SHARDS, "prefix": "s3://faults/shared/", "overwrite": True}
    body = {**recipe(pair), "output": output}
    job_id = worker.submit(body)["id"]
    frozen_at_work(worker, database, job_id)
    worker.client.post(f"/v1/merges/{job_id}/cancel")
    worker.worker.signal(signal.SIGCONT)
    worker.run({**body, "method": {"name": "average"}})
    worker.client.post(f"/v1/merges/{job_id}/retry")
    worker.succeeded(job_id)
    assert digests(worker, job_id) == undisturbed
    check_whole(worker, job_id)


def test_a_retry_never_takes_the_place_of_anothers_result(worker: Stack, pair: Family, tmp_path: Path) -> None:
    shutil.copytree(pair.folder, tmp_path, dirs_exist_ok=True)
    spoil(tmp_path / "pets")
    worker.upload(tmp_path / "pets", "s3://models/nan/")
    output = {"prefix": "s3://faults/contested/"}
    body = pair.recipe(PLACE, method={"name": "average"}, output=output)
    body["tasks"][1]["checkpoint"] = "s3://models/nan/"
    job_id = worker.submit(body)["id"]
    assert worker.ended(job_id)["status"] == "failed"
    other = worker.run(pair.recipe(PLACE, method={"name": "average"}, output=output))
    worker.upload(pair.checkpoint("pets"), "s3://models/nan/")
    worker.client.post(f"/v1/merges/{job_id}/retry")
    job = worker.ended(job_id)
    assert (job["status"], job["error"]["code"]) == ("failed", "output_exists")
    assert other["id"] in job["error"]["detail"]
    check_whole(worker, other["id"])


def spoil(folder: Path) -> None:
    def change(tensors: dict[str, Any]) -> None:
        tensors["vit.layernorm.weight"][1] = float("nan")

    change_tensors(folder, change)


def test_a_failed_job_is_mended_and_retried(worker: Stack, pair: Family, tmp_path: Path) -> None:
    shutil.copytree(pair.checkpoint("pets"), tmp_path, dirs_exist_ok=True)
    spoil(tmp_path)
    worker.upload(tmp_path, "s3://models/mended/")
    body = pair.recipe(PLACE, method={"name": "average"})
    body["tasks"][1]["checkpoint"] = "s3://models/mended/"
    job = worker.ended(worker.submit(body)["id"])
    assert (job["status"], job["error"]["code"]) == ("failed", "non_finite_tensor")
    assert job["error"]["tensor"] == "vit.layernorm.weight"
    assert worker.listed(f"s3://faults/merges/{job['id']}/") == []

    worker.upload(pair.checkpoint("pets"), "s3://models/mended/")
    retried = worker.client.post(f"/v1/merges/{job['id']}/retry")
    assert (retried.status_code, retried.json()["error"]) == (202, None)
    worker.succeeded(job["id"])
    plain = worker.run(pair.recipe(PLACE, method={"name": "average"}))
    weights = [worker.artifacts(each)["model.safetensors"]["sha256"] for each in (job["id"], plain["id"])]
    assert weights[0] == weights[1]


def test_an_input_that_changes_underway(worker: Stack, database: Database, pair: Family) -> None:
    worker.upload(pair.checkpoint("pets"), "s3://models/moving/")
    body = recipe(pair)
    body["tasks"][1]["checkpoint"] = "s3://models/moving/"
    job_id = worker.submit(body)["id"]
    frozen_at_work(worker, database, job_id)
    worker.upload(pair.checkpoint("food"), "s3://models/moving/")
    worker.worker.signal(signal.SIGCONT)
    job = worker.ended(job_id)
    assert (job["status"], job["error"]["code"], job["error"]["blame"]) == ("failed", "input_changed", "user")
    assert "s3://models/moving/" in job["error"]["detail"]
    assert worker.listed(f"s3://faults/merges/{job_id}/") == []


def test_the_broker_forgets_everything_and_the_api_is_killed_right_after_its_answer(
    no_worker: Stack, broker: Broker, pair: Family, undisturbed: dict[str, str]
) -> None:
    no_worker.worker.stop()
    forgotten = no_worker.submit(recipe(pair))["id"]
    with broker.client() as client:
        until(lambda: bool(client.llen(Queue.LIGHT.value)), "the message is there", no_worker.logs)
        client.flushall()
        assert not client.llen(Queue.LIGHT.value)
    last = no_worker.submit(recipe(pair))["id"]
    no_worker.api.kill()
    with broker.client() as client:
        client.flushall()
    no_worker.worker.start()
    no_worker.start_api()
    for job_id in (forgotten, last):
        no_worker.succeeded(job_id)
        assert digests(no_worker, job_id) == undisturbed


def test_the_api_is_away_while_the_worker_works(
    worker: Stack, database: Database, pair: Family, undisturbed: dict[str, str]
) -> None:
    job_id = worker.submit(recipe(pair))["id"]
    worker.api.kill()
    until(lambda: bool(states(database, job_id, "finalize").get("done")), "the job ends without it", worker.logs)
    worker.start_api()
    worker.succeeded(job_id)
    assert digests(worker, job_id) == undisturbed


def test_the_broker_is_down_at_the_submit(
    worker: Stack, broker: Broker, pair: Family, undisturbed: dict[str, str]
) -> None:
    broker.stop()
    try:
        started = time.monotonic()
        job_id = worker.submit(recipe(pair))["id"]
        print(f"a submit without a broker took {time.monotonic() - started:.2f} s")
        assert worker.job(job_id)["status"] == "queued"
        checks = worker.client.get("/readyz").json()["checks"]
        assert (checks["broker"], checks["database"]) == ("does not answer", "ok")
    finally:
        broker.start()
    worker.succeeded(job_id)
    assert digests(worker, job_id) == undisturbed


def test_the_broker_dies_underway(
    worker: Stack, broker: Broker, database: Database, pair: Family, undisturbed: dict[str, str]
) -> None:
    job_id = worker.submit(recipe(pair))["id"]
    frozen_at_work(worker, database, job_id)
    broker.stop()
    try:
        worker.worker.signal(signal.SIGCONT)
    finally:
        broker.start()
    worker.succeeded(job_id)
    assert digests(worker, job_id) == undisturbed


def test_a_message_twice_counts_once(worker: Stack, broker: Broker, database: Database, pair: Family) -> None:
    job_id = worker.submit(recipe(pair))["id"]
    frozen_at_work(worker, database, job_id)
    with broker.client() as client:
        for queue in Queue:
            for message in client.lrange(queue.value, 0, -1):
                client.lpush(queue.value, message)
    worker.worker.signal(signal.SIGCONT)
    worker.succeeded(job_id)
    done = [(row["data"]["stage"], row["data"]["part"]) for row in worker.events(job_id) if row["type"] == "part.done"]
    assert len(done) == len(set(done))
    check_whole(worker, job_id)


def test_a_worker_killed_in_a_search(worker: Stack, database: Database, pair: Family) -> None:
    """Two workers do trials at once; the one that dies loses its trial, and the other one does it anew."""
    rows = [{"task": task, "labeled": f"{PLACE}{task}-labeled.safetensors"} for task in pair.tasks]
    rows = [{**row, "validation": row["labeled"]} for row in rows]
    search = {"space": {"scaling": {"low": 0.1, "high": 1.0}, "rank": [0, 1, 2]}, "trials": 16}
    worker.run(recipe(pair))  # it is at work for sure; and so is its twin when it says so
    twin = worker.worker.twin()
    twin.start()
    try:
        until(lambda: "Ready" in twin.log(), "the twin is ready", worker.logs)
        job_id = worker.submit(recipe(pair, evaluation={"tasks": rows, "resamples": 100}, search=search))["id"]
        until(lambda: _both_frozen(worker, twin, database, job_id), "two trials run at once", worker.logs, every=0.01)
        twin.kill()
        worker.worker.signal(signal.SIGCONT)
        found = worker.succeeded(job_id)["result"]["search"]
    finally:
        worker.worker.signal(signal.SIGCONT)
        twin.kill()
    known = [row["state"] for row in found["trials"]]
    assert (known.count("lost"), known.count("complete"), len(known)) == (1, 16, 17)
    lost = [row["data"] for row in worker.events(job_id) if row["type"] == "part.retried"]
    assert [(row["stage"], row["code"]) for row in lost] == [("search", "worker_lost")]
    best = max(found["trials"], key=lambda row: (row["value"] or 0, -row["number"]))
    assert found["chosen"] == best["parameters"]
    check_whole(worker, job_id)


def _both_frozen(stack: Stack, twin: Any, database: Database, job_id: str) -> bool:
    """Freeze both workers where each of them has a trial; let them go on where that was a moment ago."""
    if _running(database, job_id) < 2:
        return False
    for program in (stack.worker, twin):
        program.signal(signal.SIGSTOP)
    if _running(database, job_id) == 2:
        return True
    for program in (stack.worker, twin):
        program.signal(signal.SIGCONT)
    return False


def _running(database: Database, job_id: str) -> int:
    with database.read() as connection:
        query = select(func.count()).where(trials.c.job_id == job_id, trials.c.state == "running")
        return int(connection.execute(query).scalar_one())
