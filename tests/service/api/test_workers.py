"""GET /v1/workers."""

from __future__ import annotations

from service.contract.stages import Queue
from service.contract.workers import InputCache, Worker
from tests.service.front import Front
from tests.service.jobs_by_hand import submit

WORKER = Worker("host:a:7", "host", 7, "cuda", 80, 40, 2, (Queue.HEAVY, Queue.LIGHT), "0.1.0", "1")


def test_nobody_works_where_nobody_is(front: Front) -> None:
    assert front.http.get("/v1/workers").json() == {"object": "list", "data": [], "has_more": False}


def test_workers_are_listed_with_what_they_do(front: Front) -> None:
    front.house.workers.enter(WORKER)
    (row,) = front.http.get("/v1/workers").json()["data"]
    assert (row["id"], row["device"], row["memory_bytes"], row["usable_bytes"]) == ("host:a:7", "cuda", 80, 40)
    assert (row["queues"], row["processes"], row["current"]) == (["heavy", "light"], 2, None)
    assert row["seen_at"].endswith("Z")
    job = front.submit()
    assert front.house.parts.claim_next([Queue.LIGHT], WORKER.id) is not None
    (row,) = front.http.get("/v1/workers").json()["data"]
    assert row["current"] == {"job": job["id"], "stage": "plan", "part": 0, "name": "plan"}
    front.house.workers.leave(WORKER.id)
    assert front.http.get("/v1/workers").json()["data"] == []


def test_the_jobs_of_others_are_not_told(front: Front) -> None:
    front.house.workers.enter(WORKER)
    submit(front.house.jobs, caller="somebody else")
    assert front.house.parts.claim_next([Queue.LIGHT], WORKER.id) is not None
    (row,) = front.http.get("/v1/workers").json()["data"]
    assert row["current"] == {"job": None, "stage": "plan", "part": 0, "name": None}


def test_what_workers_keep_of_inputs_is_shown_and_counted(front: Front) -> None:
    front.house.workers.enter(WORKER, InputCache(100, 60, 7, 8, (("s3://models/base/", 40),)))
    (row,) = front.http.get("/v1/workers").json()["data"]
    assert row["input_cache"] == {
        "limit_bytes": 100,
        "used_bytes": 60,
        "found_bytes": 7,
        "missed_bytes": 8,
        "checkpoints": [{"address": "s3://models/base/", "bytes": 40}],
    }
    text = front.http.get("/metrics").text
    for name, value in (("bytes", 60), ("limit_bytes", 100), ("found_bytes_total", 7), ("missed_bytes_total", 8)):
        assert f'catmerge_input_cache_{name}{{host="host",worker="host:a:7"}} {value}.0' in text
    front.house.workers.seen(WORKER)
    (row,) = front.http.get("/v1/workers").json()["data"]
    assert row["input_cache"] is None
    assert "catmerge_input_cache_bytes{" not in front.http.get("/metrics").text
