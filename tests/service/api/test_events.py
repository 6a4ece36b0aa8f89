from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from service.api import events as events_module
from service.contract.parts import Counters, Done
from service.contract.stages import PartMessage, Stage
from tests.service.api.test_submit_merge import refused
from tests.service.front import Front
from tests.service.jobs_by_hand import merges, plan

STREAM = {"Accept": "text/event-stream"}


def messages(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """The messages of an event stream; comments are left out."""
    fields: dict[str, str] = {}
    for line in lines:
        name, _, text = line.partition(": ")
        if line and name:
            fields[name] = text
        elif fields:
            yield {"id": fields["id"], "event": fields["event"], "data": json.loads(fields["data"])}
            fields = {}


def follow(front: Front, job: dict[str, Any], **headers: str) -> list[dict[str, Any]]:
    with front.http.stream("GET", job["links"]["events"], headers={**STREAM, **headers}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        return list(messages(response.iter_lines()))


def test_events_are_listed(front: Front) -> None:
    job = front.submit()
    front.finish(job)
    first = front.http.get(job["links"]["events"], params={"limit": 2})
    page = first.json()
    assert [event["seq"] for event in page["data"]] == [1, 2]
    assert page["data"][0]["object"] == "event"
    assert page["data"][0]["type"] == "job.queued"
    assert page["data"][0]["created_at"].endswith("Z")
    assert (page["has_more"], page["first_id"], page["last_id"]) == (True, 1, 2)
    rest = front.http.get(first.links["next"]["url"]).json()
    assert rest["data"][0]["seq"] == 3
    everything = front.http.get(job["links"]["events"]).json()
    assert page["data"] + rest["data"] == everything["data"][: len(rest["data"]) + 2]
    assert everything["data"][-1]["type"] == "job.succeeded"
    assert not everything["has_more"]


@pytest.mark.parametrize("query", ["after=-1", "after=x", "limit=0", "limit=1001", "since=3", "after=99999999999999"])
def test_a_parameter_that_is_not_valid_is_refused(empty_front: Front, query: str) -> None:
    response = empty_front.http.get(f"/v1/merges/mrg_{'0' * 32}/events?{query}")
    refused(response, 400, "invalid_parameter")


def test_a_stream_tells_the_past_and_ends_with_the_merge(front: Front) -> None:
    job = front.submit()
    front.finish(job)
    seen = follow(front, job)
    listed = front.http.get(job["links"]["events"]).json()["data"]
    assert [message["data"] for message in seen] == listed
    assert [message["id"] for message in seen] == [str(event["seq"]) for event in listed]
    assert [message["event"] for message in seen] == [event["type"] for event in listed]


def test_a_stream_follows_what_happens(front: Front) -> None:
    job = front.submit()
    parts = front.house.parts
    with front.http.stream("GET", job["links"]["events"], headers=STREAM) as response:
        coming = messages(response.iter_lines())
        assert next(coming)["event"] == "job.queued"
        plan(parts, job["id"], *merges(1))
        assert [next(coming)["event"] for _ in range(3)] == ["job.started", "stage.started", "part.done"]
        claim = parts.claim(PartMessage(Stage.MERGE, job["id"], 0), "worker")
        assert claim is not None
        parts.complete(claim, Done(), Counters())
        assert [next(coming)["event"] for _ in range(2)] == ["stage.started", "part.done"]
        front.http.post(job["links"]["cancel"])
        assert [message["event"] for message in coming] == ["job.cancelled"]


def test_a_stream_goes_on_where_it_broke(front: Front) -> None:
    job = front.submit()
    front.finish(job)
    whole = follow(front, job)
    assert follow(front, job, **{"Last-Event-ID": "2"}) == whole[2:]


def test_a_stream_that_was_read_to_its_end_is_not_opened_again(front: Front) -> None:
    job = front.submit()
    front.finish(job)
    last = front.http.get(job["links"]["events"]).json()["last_id"]
    response = front.http.get(job["links"]["events"], headers={**STREAM, "Last-Event-ID": str(last)})
    assert (response.status_code, response.content) == (204, b"")


@pytest.mark.parametrize("last", ["x", "-1", "99999999999", "\u0663"])
def test_a_last_event_that_is_no_number_is_refused(front: Front, last: str) -> None:
    headers = httpx.Headers({**STREAM, "Last-Event-ID": last}, encoding="utf-8")
    refused(front.http.get(front.submit()["links"]["events"], headers=headers), 400, "invalid_parameter")


def test_a_silent_stream_gives_a_sign_of_life(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events_module, "HEARTBEAT_SECONDS", 0.1)
    with front.http.stream("GET", front.submit()["links"]["events"], headers=STREAM) as response:
        lines = response.iter_lines()
        assert next(line for line in lines if line.startswith(": still"))


def test_a_stream_ends_when_its_merge_is_deleted(front: Front) -> None:
    job = front.submit()
    with front.http.stream("GET", job["links"]["events"], headers=STREAM) as response:
        coming = messages(response.iter_lines())
        next(coming)
        front.http.post(job["links"]["cancel"])
        front.http.delete(job["links"]["self"])
        assert [message["event"] for message in coming] in ([], ["job.cancelled"])


def test_more_streams_than_threads(front: Front) -> None:
    job = front.submit()
    ends: list[str] = []
    threads = [threading.Thread(target=lambda: ends.append(follow(front, job)[-1]["event"])) for _ in range(60)]
    for thread in threads:
        thread.start()
    time.sleep(0.2)
    assert front.http.get("/healthz").status_code == 200
    front.http.post(job["links"]["cancel"])
    for thread in threads:
        thread.join()
    assert ends == ["job.cancelled"] * 60


def test_open_streams_end_when_the_service_stops(front: Front) -> None:
    job = front.submit()
    with front.http.stream("GET", job["links"]["events"], headers=STREAM) as response:
        coming = messages(response.iter_lines())
        next(coming)
        front.house.closing.set()
        assert list(coming) == []
