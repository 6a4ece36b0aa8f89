"""Two workers share a job of many parts with a small one, and lose a child."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from tests.checkpoints import Family
from tests.end_to_end.conftest import connect
from tests.end_to_end.stack import Program, Stack, open_stack, until
from tests.servers import PostgresServer, S3Server, redis_server

PLACE = "s3://models/spread/"
TRIALS = 1000


@pytest.fixture(scope="module")
def pair(vit: Family) -> Family:
    return Family(vit.folder, ("cars", "pets"))


@pytest.fixture(scope="module")
def stack(
    tmp_path_factory: pytest.TempPathFactory, postgres: PostgresServer, s3: S3Server, vit: Family
) -> Iterator[Stack]:
    with redis_server() as broker:
        connections = connect(postgres, s3, broker.url, "spread", workspace="s3://faults/spread/", heartbeat_seconds=1)
        with open_stack(tmp_path_factory.mktemp("spread"), connections) as opened:
            opened.upload(vit.folder, PLACE)
            yield opened


@pytest.fixture(scope="module")
def twin(stack: Stack) -> Iterator[Program]:
    """The other worker; both have said that they are there."""
    other = stack.worker.twin()
    other.start()
    try:
        until(lambda: len(workers(stack)) == 2, "both workers say that they are there", stack.logs)
        yield other
    finally:
        other.stop()


def workers(stack: Stack) -> list[dict[str, Any]]:
    answer = stack.client.get("/v1/workers")
    assert answer.status_code == 200, answer.text
    rows: list[dict[str, Any]] = answer.json()["data"]
    return rows


def at_work_on(stack: Stack, job_id: str) -> list[int]:
    """The processes that do parts of a job."""
    return [row["pid"] for row in workers(stack) if (row["current"] or {}).get("job") == job_id]


@pytest.fixture(scope="module")
def large(stack: Stack, twin: Program, pair: Family) -> Iterator[str]:
    """A job of more than a thousand parts, underway on both workers."""
    rows = [{"task": task, "labeled": f"{PLACE}{task}-labeled.safetensors"} for task in pair.tasks]
    rows = [{**row, "validation": row["labeled"]} for row in rows]
    search = {"space": {"scaling": {"low": 0.1, "high": 1.0}}, "trials": TRIALS, "sampler": "random"}
    evaluation = {"tasks": rows, "resamples": 100}
    body = pair.recipe(PLACE, method={"name": "task_arithmetic"}, evaluation=evaluation, search=search)
    job_id = stack.submit(body)["id"]
    until(lambda: len(at_work_on(stack, job_id)) == 2, "both workers are at the large job", stack.logs)
    yield job_id
    stack.client.post(f"/v1/merges/{job_id}/cancel")


def test_a_job_of_a_thousand_parts_does_not_keep_a_small_one_waiting(stack: Stack, large: str, pair: Family) -> None:
    stack.run(pair.recipe(PLACE, method={"name": "average"}))
    job = stack.job(large)
    assert (job["status"], job["stage"]) == ("running", "search")
    assert job["progress"]["parts_done"] < TRIALS / 2
    until(lambda: len(at_work_on(stack, large)) == 2, "both are at the large job again", stack.logs)


def test_a_child_that_is_killed_is_told_of_at_once(stack: Stack, large: str) -> None:
    """Its lease has a minute to go; what it did is done again, and another child takes its place."""
    assert stack.connections.lease_seconds == 60
    victim = at_work_on(stack, large)[0]
    os.kill(victim, signal.SIGKILL)
    until(lambda: retried(stack, large) != [], "its part is ready again", stack.logs, seconds=50)
    (told,) = retried(stack, large)
    assert (told["stage"], told["code"]) == ("search", "worker_lost")
    assert f":{victim} was ended by signal 9 (SIGKILL)" in told["detail"]
    assert "a peak of" in told["detail"]
    assert victim not in [row["pid"] for row in workers(stack)]
    until(lambda: len(at_work_on(stack, large)) == 2, "another child is at it", stack.logs)


def retried(stack: Stack, job_id: str) -> list[dict[str, Any]]:
    rows = stack.client.get(f"/v1/merges/{job_id}/events", params={"limit": 1000}).json()["data"]
    return [row["data"] for row in rows if row["type"] == "part.retried"]


def test_a_worker_that_stops_is_gone_from_the_list(stack: Stack, twin: Program, large: str) -> None:
    """And the part that it gives back costs its job nothing."""
    assert len(workers(stack)) == 2
    assert twin.stop() == 0
    assert len(workers(stack)) == 1
    assert len(retried(stack, large)) == 1, "that of the killed child"
