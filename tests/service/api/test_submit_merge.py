from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.contract.recipe import Recipe
from service.contract.stages import PartMessage, Stage
from service.stores.jobs import IdempotencyKey
from tests.service.front import Front, checkpoint, connections_to, open_front, recipe, with_checkpoints
from tests.service.jobs_by_hand import at_once

JSON = {"Content-Type": "application/json"}


def refused(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """The problem document of a response, checked for what all of them have."""
    assert (response.status_code, response.headers["content-type"]) == (status, "application/problem+json")
    problem: dict[str, Any] = response.json()
    assert (problem["status"], problem["code"]) == (status, code)
    assert problem["type"] == f"urn:catmerge:problem:{code}"
    assert problem["request_id"] == response.headers["x-request-id"]
    assert problem["instance"] == response.request.url.path
    assert problem["detail"]
    return problem


def test_a_merge_is_taken_in(front: Front) -> None:
    response = front.http.post("/v1/merges", json=recipe(metadata={"team": "search"}))
    job = response.json()
    assert response.status_code == 202
    assert response.headers["location"] == f"/v1/merges/{job['id']}"
    assert response.headers["retry-after"].isdecimal()
    assert response.headers["etag"].startswith('"mrg_')
    assert (job["object"], job["status"], job["stage"], job["queue_position"]) == ("merge", "queued", None, 1)
    assert job["recipe"]["method"]["scaling"] == 0.4, "defaults are filled in"
    assert job["recipe"]["output"]["prefix"] == f"s3://workspace/merges/{job['id']}/"
    assert job["recipe_sha256"] == Recipe.model_validate(recipe(metadata={"team": "search"})).sha256
    assert (job["metadata"], job["error"], job["result"], job["warnings"]) == ({"team": "search"}, None, None, [])
    assert job["created_at"].endswith("Z")
    assert len(job["created_at"]) == len("2026-01-31T12:00:00.000Z")
    assert job["links"]["trim_log"] == f"/v1/merges/{job['id']}/trim-log"
    assert front.http.get(job["links"]["self"]).json() == job


def test_a_broker_that_is_away_is_left_to_the_sweeper(front: Front) -> None:
    job = front.submit()
    assert front.house.parts.due(3600, 10) == [PartMessage(Stage.PLAN, job["id"], 0)]


def test_the_result_goes_where_the_recipe_says(front: Front) -> None:
    job = front.submit(output={"prefix": "s3://merged/run-1"})
    assert job["recipe"]["output"]["prefix"] == "s3://merged/run-1/"


def test_one_job_too_many_is_refused_until_another_has_ended(tmp_path: Path) -> None:
    with open_front(tmp_path, max_active_jobs=1) as front:
        job = with_checkpoints(front).submit()
        for body in (recipe(), recipe(base="s3://models/missing.safetensors")):  # nothing is read first
            response = front.http.post("/v1/merges", json=body, headers={"Idempotency-Key": "one more"})
            problem = refused(response, 429, "too_many_active_jobs")
            assert (response.headers["retry-after"], problem["retryable"]) == ("10", True)
        front.http.post(f"/v1/merges/{job['id']}/cancel")
        accepted = front.http.post("/v1/merges", json=recipe(), headers={"Idempotency-Key": "one more"})
        assert accepted.status_code == 202
        refused(front.http.post(f"/v1/merges/{job['id']}/retry"), 429, "too_many_active_jobs")


def test_the_queue_is_ordered_by_priority(front: Front) -> None:
    usual = front.submit()
    urgent = front.submit(priority=10)
    places = [front.http.get(job["links"]["self"]).json()["queue_position"] for job in (usual, urgent)]
    assert (places, urgent["recipe"]["priority"]) == ([2, 1], 10)


def test_links_begin_with_the_public_address(tmp_path: Path) -> None:
    with open_front(tmp_path, public_url="https://merge.example.org/") as front:
        job = with_checkpoints(front).submit()
        assert job["links"]["self"] == f"https://merge.example.org/v1/merges/{job['id']}"


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Content-Type": "text/plain"},
        {"Content-Type": "application/x-www-form-urlencoded"},
        {"Content-Type": "application/json; charset=latin-1"},
        {**JSON, "Content-Encoding": "gzip"},
    ],
)
def test_a_body_that_is_not_json_is_refused(empty_front: Front, headers: dict[str, str]) -> None:
    refused(empty_front.http.post("/v1/merges", content=b"{}", headers=headers), 415, "unsupported_media_type")


@pytest.mark.parametrize("media_type", ["application/json; charset=utf-8", "Application/JSON"])
def test_json_has_several_spellings(empty_front: Front, media_type: str) -> None:
    response = empty_front.http.post("/v1/merges", content=b"{}", headers={"Content-Type": media_type})
    refused(response, 422, "validation_error")


@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_body_that_is_too_large_is_refused(empty_front: Front, is_chunked: bool) -> None:
    def pieces() -> Iterator[bytes]:
        for _ in range(3):
            yield b" " * (1 << 19)

    content = pieces() if is_chunked else b"".join(pieces())
    refused(empty_front.http.post("/v1/merges", content=content, headers=JSON), 413, "payload_too_large")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "Line 1"),
        (b"{", "Line 1"),
        (b'{"seed": 1, "seed": 2}', "'seed' appears twice"),
        (b'{"method": {"name": "cat", "scaling": NaN}}', "NaN"),
        (b'{"seed": -Infinity}', "Infinity"),
        (b'{"seed": 1e999}', "1e999"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "digits"),
        (b'{"base": "\xff"}', "UTF-8"),
        (b'{"base": "\\ud800"}', "surrogate"),
        (b'{"metadata": {"a": "\\u0000"}}', "U+0000"),
        (b"[" * 100_000, "nested"),
        (b"{} {}", "Extra data"),
    ],
)
def test_json_that_could_be_read_in_two_ways_is_refused(empty_front: Front, content: bytes, says: str) -> None:
    problem = refused(empty_front.http.post("/v1/merges", content=content, headers=JSON), 400, "malformed_json")
    assert says in problem["detail"]
    assert empty_front.count() == 0


def test_a_recipe_is_checked_and_every_fault_is_named(empty_front: Front) -> None:
    body = recipe(method={"name": "cat", "rnak": 3}, seed=-1)
    problem = refused(empty_front.http.post("/v1/merges", json=body), 422, "validation_error")
    assert {(fault["pointer"], fault["code"]) for fault in problem["errors"]} == {
        ("/method/rnak", "extra_forbidden"),
        ("/seed", "greater_than_equal"),
    }
    assert not problem["retryable"]
    assert empty_front.count() == 0


def test_a_search_without_validation_samples_is_refused(empty_front: Front) -> None:
    body = recipe(search={"space": {"scaling": [0.3, 0.5]}})
    problem = refused(empty_front.http.post("/v1/merges", json=body), 422, "validation_error")
    assert [fault["pointer"] for fault in problem["errors"]] == ["/search"]
    assert "validation samples of every task" in problem["detail"]
    assert empty_front.count() == 0


def test_a_checkpoint_that_is_missing_is_named(empty_front: Front) -> None:
    body = recipe(tasks=[{"name": "cars", "checkpoint": "s3://models/lost.safetensors"}])
    problem = refused(empty_front.http.post("/v1/merges", json=body), 422, "checkpoint_not_found")
    assert [fault["pointer"] for fault in problem["errors"]] == ["/tasks/0/checkpoint"]
    assert empty_front.count() == 0


def test_a_checkpoint_that_is_no_checkpoint_is_named(front: Front) -> None:
    front.put("s3://models/cars.safetensors", b"not a checkpoint at all")
    problem = refused(front.http.post("/v1/merges", json=recipe()), 422, "malformed_checkpoint")
    assert [fault["pointer"] for fault in problem["errors"]] == ["/tasks/0/checkpoint"]


def test_checkpoints_that_do_not_fit_are_refused(front: Front) -> None:
    front.put("s3://models/cars.safetensors", checkpoint(weight=(2, 4), bias=(2,)))
    refused(front.http.post("/v1/merges", json=recipe()), 422, "incompatible_checkpoints")


def test_exemplars_that_do_not_fit_are_refused(front: Front) -> None:
    front.put("s3://data/cars.safetensors", checkpoint(pixel_values=(4, 3)))
    task = {
        "name": "cars",
        "checkpoint": "s3://models/cars.safetensors",
        "exemplars": "s3://data/cars.safetensors",
    }
    refused(front.http.post("/v1/merges", json=recipe(tasks=[task])), 422, "exemplars_do_not_fit")


def test_an_address_out_of_bounds_is_refused(empty_front: Front) -> None:
    refused(empty_front.http.post("/v1/merges", json=recipe(base="file:///etc/passwd")), 403, "forbidden")


def test_a_bucket_that_is_not_allowed_is_refused(tmp_path: Path) -> None:
    with open_front(tmp_path, connections_to(tmp_path, buckets=("theirs",))) as front:
        refused(front.http.post("/v1/merges", json=recipe()), 403, "bucket_not_allowed")


def test_a_folder_that_is_not_free_is_refused(front: Front) -> None:
    front.put("s3://merged/run-1/config.json", b"{}")
    body = recipe(output={"prefix": "s3://merged/run-1/"})
    problem = refused(front.http.post("/v1/merges", json=body), 409, "output_exists")
    assert [fault["pointer"] for fault in problem["errors"]] == ["/output/prefix"]


def test_a_folder_that_another_job_writes_to_is_refused(front: Front) -> None:
    job = front.submit(output={"prefix": "s3://merged/run-1/"})
    response = front.http.post("/v1/merges", json=recipe(output={"prefix": "s3://merged/run-1/sub/"}))
    assert job["id"] in refused(response, 409, "output_exists")["detail"]


def test_a_plan_counts_and_stores_nothing(empty_front: Front) -> None:
    response = empty_front.http.post("/v1/merges:plan", json=recipe())
    plan = response.json()
    assert response.status_code == 200
    assert (plan["object"], plan["tensors"], plan["bytes_out"]) == ("plan", 2, 4 * 8)
    assert plan["roles"] == {"linear": 1, "shift": 1}
    assert empty_front.count() == 0
    refused(empty_front.http.post("/v1/merges:plan", json={}), 422, "validation_error")


def with_key(front: Front, key: str, body: dict[str, Any] | None = None) -> httpx.Response:
    return front.http.post("/v1/merges", json=body or recipe(), headers={"Idempotency-Key": key})


def test_the_same_key_gets_the_same_answer(front: Front) -> None:
    first, second = with_key(front, "k1"), with_key(front, "k1")
    assert (second.status_code, second.json()) == (202, first.json())
    assert second.headers["idempotent-replayed"] == "true"
    assert second.headers["location"] == first.headers["location"]
    assert "idempotent-replayed" not in first.headers
    assert front.count() == 1


def test_the_same_body_in_another_spelling_is_the_same_request(front: Front) -> None:
    first = with_key(front, "k1")
    again = with_key(front, "k1", dict(reversed(recipe().items())))
    assert again.json()["id"] == first.json()["id"]


def test_a_key_serves_one_body(front: Front) -> None:
    with_key(front, "k1")
    refused(with_key(front, "k1", recipe(seed=7)), 422, "idempotency_key_reused")
    assert with_key(front, "k2", recipe(seed=7)).status_code == 202


@pytest.mark.parametrize("key", ["", "x" * 256, "k\u00e4"])
def test_a_key_is_printable_ascii(empty_front: Front, key: str) -> None:
    headers = {"Idempotency-Key": key.encode()}
    refused(empty_front.http.post("/v1/merges", json=recipe(), headers=headers), 400, "invalid_parameter")  # type: ignore[arg-type]


def test_an_invalid_recipe_stays_invalid_under_its_key(front: Front) -> None:
    first, second = with_key(front, "k1", recipe(seed=-1)), with_key(front, "k1", recipe(seed=-1))
    assert (first.status_code, second.status_code, second.json()) == (422, 422, first.json())
    assert second.headers["idempotent-replayed"] == "true"
    assert second.headers["content-type"] == "application/problem+json"
    refused(with_key(front, "k1", recipe()), 422, "idempotency_key_reused")


def test_a_refusal_that_may_pass_is_not_kept(front: Front) -> None:
    body = recipe(tasks=[{"name": "late", "checkpoint": "s3://models/late.safetensors"}])
    refused(with_key(front, "k1", body), 422, "checkpoint_not_found")
    front.put("s3://models/late.safetensors", checkpoint(weight=(2, 3), bias=(2,)))
    assert with_key(front, "k1", body).status_code == 202


def test_a_key_used_by_many_at_once_makes_one_job(front: Front) -> None:
    answers = at_once(12, lambda _: with_key(front, "k1"))
    assert front.count() == 1
    taken = [answer for answer in answers if answer.status_code == 202]
    assert len({answer.json()["id"] for answer in taken}) == 1
    for answer in answers:
        if answer.status_code != 202:
            refused(answer, 409, "idempotency_in_progress")
            assert answer.headers["retry-after"] == "1"


def test_a_request_in_flight_is_said_to_be(front: Front) -> None:
    with front.house.in_flight.hold(IdempotencyKey("anonymous POST /v1/merges", "k1", "f")):
        problem = refused(with_key(front, "k1"), 409, "idempotency_in_progress")
    assert problem["retryable"]
    assert with_key(front, "k1").status_code == 202
