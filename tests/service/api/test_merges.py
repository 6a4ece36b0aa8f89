from __future__ import annotations

import threading
from typing import Any

import pytest

from service.contract import artifacts
from service.contract.errors import StorageFailure
from service.contract.job import Status
from service.contract.parts import Counters
from service.contract.stages import PartMessage, Stage
from tests.service.api.test_submit_merge import refused
from tests.service.front import Front, recipe

NO_JOB = "mrg_" + "0" * 32


def claim(front: Front, job: dict[str, Any]) -> Any:
    claimed = front.house.parts.claim(PartMessage(Stage.PLAN, job["id"], 0), "worker")
    assert claimed is not None
    return claimed


@pytest.mark.parametrize("job_id", [NO_JOB, "mrg_x", "%00", "..%2f..", "a" * 500])
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", ""),
        ("POST", "/cancel"),
        ("POST", "/retry"),
        ("DELETE", ""),
        ("GET", "/events"),
        ("GET", "/artifacts"),
        ("GET", "/artifacts/config.json"),
        ("GET", "/trim-log"),
    ],
)
def test_a_merge_that_is_not_there(empty_front: Front, job_id: str, method: str, path: str) -> None:
    response = empty_front.http.request(method, f"/v1/merges/{job_id}{path}")
    assert (response.status_code, response.json()["code"]) == (404, "not_found")


def test_a_merge_that_has_not_changed_is_not_sent_again(front: Front) -> None:
    job = front.submit()
    etag = front.http.get(job["links"]["self"]).headers["etag"]
    for given in (etag, f"W/{etag}", f'"other", {etag}', "*"):
        response = front.http.get(job["links"]["self"], headers={"If-None-Match": given})
        assert (response.status_code, response.content, response.headers["etag"]) == (304, b"", etag)
    assert front.http.get(job["links"]["self"], headers={"If-None-Match": '"other"'}).status_code == 200
    held = claim(front, job)
    assert front.http.get(job["links"]["self"], headers={"If-None-Match": etag}).status_code == 200
    running = front.http.get(job["links"]["self"]).headers["etag"]
    front.house.parts.heartbeat(held, Counters(bytes_read=1))
    assert front.http.get(job["links"]["self"]).headers["etag"] != running


def test_a_place_in_the_queue_is_part_of_the_tag(front: Front) -> None:
    first, second = front.submit(), front.submit()
    before = front.http.get(second["links"]["self"])
    claim(front, first)
    after = front.http.get(second["links"]["self"])
    assert (before.json()["queue_position"], after.json()["queue_position"]) == (2, 1)
    assert before.headers["etag"] != after.headers["etag"]


def test_retry_after_is_for_merges_underway(front: Front) -> None:
    job = front.submit()
    assert "retry-after" in front.http.get(job["links"]["self"]).headers
    front.finish(job)
    assert "retry-after" not in front.http.get(job["links"]["self"]).headers


def test_who_prefers_to_wait_is_answered_at_the_end(front: Front) -> None:
    job = front.submit()
    timer = threading.Timer(0.3, front.finish, [job])
    timer.start()
    response = front.http.get(job["links"]["self"], headers={"Prefer": "respond-async, wait=50"})
    timer.join()
    assert (response.json()["status"], response.headers["preference-applied"]) == ("succeeded", "wait=50")


def test_waiting_has_an_end(front: Front) -> None:
    response = front.http.post("/v1/merges", json=recipe(), headers={"Prefer": "wait=1"})
    assert (response.status_code, response.json()["status"]) == (202, "queued")
    assert response.headers["preference-applied"] == "wait=1"
    ended = front.http.post(response.json()["links"]["cancel"]).json()
    response = front.http.get(ended["links"]["self"], headers={"Prefer": "wait=3600"})
    assert response.headers["preference-applied"] == "wait=60"


@pytest.mark.parametrize("prefer", ["wait=x", "wait", "wait=-1", "handling=strict"])
def test_a_preference_that_is_not_understood_is_ignored(front: Front, prefer: str) -> None:
    response = front.http.get(front.submit()["links"]["self"], headers={"Prefer": prefer})
    assert response.status_code == 200
    assert "preference-applied" not in response.headers


def test_many_can_wait_at_once(front: Front) -> None:
    """More than there are threads: waiting holds none."""
    job = front.submit()
    seen: list[str] = []

    def wait() -> None:
        seen.append(front.http.get(job["links"]["self"], headers={"Prefer": "wait=50"}).json()["status"])

    threads = [threading.Thread(target=wait) for _ in range(60)]
    for thread in threads:
        thread.start()
    assert front.http.get("/healthz").status_code == 200
    front.finish(job)
    for thread in threads:
        thread.join()
    assert seen == ["succeeded"] * 60


def test_a_list_is_read_page_by_page(front: Front) -> None:
    ids = [front.submit()["id"] for _ in range(5)]
    page = front.http.get("/v1/merges", params={"limit": 2})
    assert page.json()["object"] == "list"
    assert (page.json()["first_id"], page.json()["last_id"], page.json()["has_more"]) == (ids[4], ids[3], True)
    seen = [job["id"] for job in page.json()["data"]]
    while "next" in page.links:
        page = front.http.get(page.links["next"]["url"])
        seen += [job["id"] for job in page.json()["data"]]
    assert seen == ids[::-1]
    assert not page.json()["has_more"]
    assert front.http.get("/v1/merges", params={"order": "asc"}).json()["first_id"] == ids[0]


def test_a_list_of_nothing(empty_front: Front) -> None:
    assert empty_front.http.get("/v1/merges").json() == {
        "object": "list",
        "data": [],
        "has_more": False,
        "first_id": None,
        "last_id": None,
    }


def test_a_list_neither_skips_nor_repeats_while_merges_are_submitted(front: Front) -> None:
    before = [front.submit()["id"] for _ in range(8)]
    stop = threading.Event()

    def create() -> None:
        while not stop.is_set():
            front.submit()

    threads = [threading.Thread(target=create) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        down = walk(front, "desc", until=before[0])
        up = walk(front, "asc", until=before[-1])
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    everything = walk(front, "asc", until=None)
    assert down == [job_id for job_id in reversed(everything) if job_id <= down[0]]
    assert up == everything[: len(up)]


def walk(front: Front, order: str, until: str | None) -> list[str]:
    seen: list[str] = []
    url = f"/v1/merges?limit=3&order={order}"
    while url and until not in seen:
        page = front.http.get(url)
        seen += [job["id"] for job in page.json()["data"]]
        url = page.links.get("next", {}).get("url", "")
    return seen


def test_a_list_is_filtered(front: Front) -> None:
    other, wanted = front.submit(metadata={"team": "ads"}), front.submit(metadata={"team": "search", "a/b": "ü [x]"})
    front.finish(wanted)

    def ids(**params: str) -> list[str]:
        return [job["id"] for job in front.http.get("/v1/merges", params=params).json()["data"]]

    assert ids(status="succeeded") == [wanted["id"]]
    assert ids(**{"metadata[team]": "search", "metadata[a/b]": "ü [x]"}) == [wanted["id"]]
    assert ids(**{"metadata[team]": "ads"}, status="succeeded") == []
    assert ids(created_after=other["created_at"]) == [wanted["id"], other["id"]], "milliseconds are rounded down"
    assert ids(created_after="2100-01-01T00:00:00+02:00") == []
    assert ids(created_after="4102444800.5") == []


@pytest.mark.parametrize(
    ("query", "names"),
    [
        ("limit=0", "limit"),
        ("limit=101", "limit"),
        ("limit=many", "limit"),
        ("order=up", "order"),
        ("status=done", "status"),
        ("created_after=yesterday", "created_after"),
        ("created_after=2026-01-31T12:00:00", "created_after"),
        ("created_after=nan", "created_after"),
        ("statsu=failed", "statsu"),
        ("metadata[]=x", "metadata"),
        ("limit=1&limit=2", "limit"),
        ("metadata[a]=%00", "metadata[a]"),
    ],
)
def test_a_parameter_that_is_not_valid_is_named(empty_front: Front, query: str, names: str) -> None:
    problem = refused(empty_front.http.get(f"/v1/merges?{query}"), 400, "invalid_parameter")
    assert names in problem["detail"]


@pytest.mark.parametrize("cursor", [NO_JOB, "", "x", "mrg_"])
def test_a_cursor_that_names_nothing_is_refused(empty_front: Front, cursor: str) -> None:
    refused(empty_front.http.get("/v1/merges", params={"after": cursor}), 400, "invalid_cursor")


def test_a_merge_is_cancelled(front: Front) -> None:
    job = front.submit()
    response = front.http.post(job["links"]["cancel"])
    assert (response.status_code, response.json()["status"]) == (202, "cancelled")
    again = front.http.post(job["links"]["cancel"])
    assert (again.status_code, again.json()) == (200, response.json())


def test_what_has_ended_can_not_be_cancelled(front: Front) -> None:
    job = front.submit()
    front.finish(job)
    response = front.http.post(job["links"]["cancel"])
    assert (response.status_code, response.json()["status"]) == (200, "succeeded")


def test_a_condition_must_hold(front: Front) -> None:
    job = front.submit()
    etag = front.http.get(job["links"]["self"]).headers["etag"]
    for given in ('"other"', f"W/{etag}"):
        response = front.http.post(job["links"]["cancel"], headers={"If-Match": given})
        refused(response, 412, "precondition_failed")
    response = front.http.post(job["links"]["cancel"], headers={"If-Match": f'"other", {etag}'})
    assert response.status_code == 202
    for query in ("", "?artifacts=true"):
        response = front.http.delete(job["links"]["self"] + query, headers={"If-Match": etag})
        refused(response, 412, "precondition_failed")
    assert front.http.delete(job["links"]["self"], headers={"If-Match": "*"}).status_code == 204


def test_a_failed_merge_is_retried(front: Front) -> None:
    job = front.submit()
    for _ in range(3):
        front.house.parts.fail(claim(front, job), StorageFailure("the store is away"))
    failed = front.http.get(job["links"]["self"]).json()
    assert failed["error"] == {
        "code": "store_unavailable",
        "blame": "storage",
        "retryable": True,
        "detail": "the store is away",
        "tensor": None,
    }
    response = front.http.post(job["links"]["retry"])
    again = response.json()
    assert (response.status_code, again["status"], again["attempt"], again["error"]) == (202, "queued", 2, None)
    assert claim(front, job).attempt == 4
    refused(front.http.post(job["links"]["retry"]), 409, "job_not_retryable")


def test_a_merge_underway_is_not_deleted(front: Front) -> None:
    job = front.submit()
    for query in ("", "?artifacts=true"):
        refused(front.http.delete(job["links"]["self"] + query), 409, "job_not_terminal")


FILES = {
    "model.safetensors": b"weights",
    "heads/cars.safetensors": b"head",
    "merge/plan.json": b"{}",
}


def merged(front: Front, **changes: Any) -> dict[str, Any]:
    job = front.submit(output={"prefix": "s3://merged/run/", **changes})
    front.finish(job, {**FILES, "merge/manifest.json": b'{"job": "%s"}' % job["id"].encode()})
    return job


def test_deleting_a_merge_leaves_its_files(front: Front) -> None:
    job = merged(front)
    assert front.http.delete(job["links"]["self"]).status_code == 204
    assert front.http.get(job["links"]["self"]).status_code == 404
    assert front.has("s3://merged/run/model.safetensors")


def test_deleting_a_merge_with_its_files_leaves_all_others(front: Front) -> None:
    job = merged(front)
    others = ("s3://merged/run/notes.txt", "s3://merged/run/merge/notes.txt", "s3://merged/run2/model.safetensors")
    for other in others:
        front.put(other, b"mine")
    front.put("s3://merged/run/merge/removed-00001.safetensors", b"")
    workspace = front.house.connections.workspace
    scratch = artifacts.scratch(workspace, job["id"])
    front.put(f"{scratch}baselines/ties/model.safetensors", b"large")
    front.put(artifacts.scratch(workspace, "mrg_other") + "trim-log-00001.jsonl", b"another's")
    assert front.http.delete(job["links"]["self"], params={"artifacts": "true"}).status_code == 204
    left = [info.address for info in front.house.objects.list("s3://merged/")]
    assert left == sorted(others)
    assert not list(front.house.objects.list(scratch))
    assert list(front.house.objects.list(artifacts.scratch(workspace, "mrg_other")))
    assert front.http.get(job["links"]["self"]).status_code == 404


def test_files_of_a_later_merge_in_the_same_folder_are_safe(front: Front) -> None:
    first = merged(front)
    second = merged(front, overwrite=True)
    refused(front.http.delete(first["links"]["self"] + "?artifacts=true"), 409, "output_exists")
    assert front.http.delete(second["links"]["self"]).status_code == 204
    problem = refused(front.http.delete(first["links"]["self"] + "?artifacts=true"), 409, "output_exists")
    assert second["id"] in problem["detail"], "the manifest says whose the files are"
    assert front.has("s3://merged/run/model.safetensors")


def test_a_misspelt_parameter_deletes_nothing(front: Front) -> None:
    job = merged(front)
    problem = refused(front.http.delete(job["links"]["self"] + "?artefacts=true"), 400, "invalid_parameter")
    assert problem["errors"][0]["pointer"] == "/query/artefacts"
    assert front.http.get(job["links"]["self"]).status_code == 200


def test_a_rejected_merge_has_a_result(front: Front) -> None:
    job = front.submit()
    front.finish(job, FILES, Status.REJECTED)
    seen = front.http.get(job["links"]["self"]).json()
    assert (seen["status"], seen["progress"]["fraction"]) == ("rejected", 1.0)
    assert [row["name"] for row in seen["result"]["artifacts"]] == list(FILES)
