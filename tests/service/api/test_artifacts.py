from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.api import artifacts as artifacts_module
from service.contract.settings import Connections
from tests.servers import s3_server
from tests.service.api.test_submit_merge import refused
from tests.service.front import Front, artifact, connections_to, open_front, with_checkpoints

WEIGHTS = bytes(range(256)) * 40
FILES = {
    "model.safetensors": WEIGHTS,
    "merge/manifest.json": b'{"job": "?"}',
    "heads/cars.safetensors": b"head",
    "empty.txt": b"",
    "v\u00f6cab \u2603.txt": b"snow",
}


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    """One for all tests here: they only read."""
    with open_front(tmp_path_factory.mktemp("front")) as opened:
        yield with_checkpoints(opened)


@pytest.fixture(scope="module")
def job(front: Front) -> dict[str, Any]:
    submitted = front.submit()
    front.finish(submitted, FILES)
    return submitted


def get(front: Front, job: dict[str, Any], name: str, **headers: str) -> httpx.Response:
    return front.http.get(f"{job['links']['artifacts']}/{name}", headers=headers)


def test_artifacts_are_listed(front: Front, job: dict[str, Any]) -> None:
    response = front.http.get(job["links"]["artifacts"])
    assert response.json() == {
        "object": "list",
        "data": [artifact(name, data) for name, data in FILES.items()],
        "has_more": False,
    }


def test_there_are_none_before_the_end(front: Front) -> None:
    job = front.submit()
    for path in ("artifacts", "artifacts/model.safetensors", "trim-log"):
        response = front.http.get(f"{job['links']['self']}/{path}")
        assert refused(response, 409, "not_ready")["retryable"]
        assert "retry-after" in response.headers
    front.http.post(job["links"]["cancel"])
    refused(front.http.get(job["links"]["artifacts"]), 409, "not_ready")


@pytest.mark.parametrize("name", list(FILES))
def test_an_artifact_is_downloaded(front: Front, job: dict[str, Any], name: str) -> None:
    response = get(front, job, name)
    assert (response.status_code, response.content) == (200, FILES[name])
    assert response.headers["etag"] == f'"{hashlib.sha256(FILES[name]).hexdigest()}"'
    assert response.headers["content-length"] == str(len(FILES[name]))
    assert response.headers["accept-ranges"] == "bytes"


def test_a_download_is_saved_under_its_name(front: Front, job: dict[str, Any]) -> None:
    saved = get(front, job, "heads/cars.safetensors").headers["content-disposition"]
    assert saved == 'attachment; filename="cars.safetensors"'
    saved = get(front, job, "v\u00f6cab \u2603.txt").headers["content-disposition"]
    assert saved == "attachment; filename*=UTF-8''v%C3%B6cab%20%E2%98%83.txt"


def test_a_download_comes_in_pieces(front: Front, job: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifacts_module, "CHUNK_BYTES", 1000)
    assert get(front, job, "model.safetensors").content == WEIGHTS
    assert get(front, job, "model.safetensors", Range="bytes=999-5000").content == WEIGHTS[999:5001]


SIZE = len(WEIGHTS)


@pytest.mark.parametrize(
    ("asked", "start", "end"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=10-19", 10, 20),
        ("bytes=10-", 10, SIZE),
        ("bytes=-5", SIZE - 5, SIZE),
        (f"bytes=-{SIZE + 5}", 0, SIZE),
        (f"bytes=5-{SIZE + 100}", 5, SIZE),
        (f"bytes={SIZE - 1}-", SIZE - 1, SIZE),
        ("Bytes = 1 - 2", 1, 3),
    ],
)
def test_a_range_is_sent(front: Front, job: dict[str, Any], asked: str, start: int, end: int) -> None:
    response = get(front, job, "model.safetensors", Range=asked)
    assert (response.status_code, response.content) == (206, WEIGHTS[start:end])
    assert response.headers["content-range"] == f"bytes {start}-{end - 1}/{SIZE}"


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("model.safetensors", f"bytes={SIZE}-"),
        ("model.safetensors", f"bytes={SIZE + 10}-{SIZE + 20}"),
        ("model.safetensors", "bytes=-0"),
        ("empty.txt", "bytes=0-"),
    ],
)
def test_a_range_outside_the_file_is_refused(front: Front, job: dict[str, Any], name: str, asked: str) -> None:
    response = get(front, job, name, Range=asked)
    refused(response, 416, "range_not_satisfiable")
    assert response.headers["content-range"] == f"bytes */{len(FILES[name])}"


@pytest.mark.parametrize("asked", ["bytes=5-1", "bytes=-", "bytes=x-y", "lines=1-2", "bytes=0-1,5-6", "", "bytes=1"])
def test_a_range_that_may_be_ignored_is(front: Front, job: dict[str, Any], asked: str) -> None:
    response = get(front, job, "model.safetensors", Range=asked)
    assert (response.status_code, response.content) == (200, WEIGHTS)


def test_a_range_is_of_the_version_the_caller_has(front: Front, job: dict[str, Any]) -> None:
    etag = get(front, job, "model.safetensors").headers["etag"]
    ranged = {"Range": "bytes=0-3"}
    assert get(front, job, "model.safetensors", **ranged, **{"If-Range": etag}).status_code == 206
    for other in ('"other"', f"W/{etag}", "Wed, 21 Oct 2026 07:28:00 GMT"):
        assert get(front, job, "model.safetensors", **ranged, **{"If-Range": other}).status_code == 200


def test_what_the_caller_has_is_not_sent_again(front: Front, job: dict[str, Any]) -> None:
    etag = get(front, job, "model.safetensors").headers["etag"]
    response = get(front, job, "model.safetensors", **{"If-None-Match": etag, "Range": "bytes=0-3"})
    assert (response.status_code, response.content) == (304, b"")


def test_a_file_can_be_looked_at_without_its_bytes(front: Front, job: dict[str, Any]) -> None:
    response = front.http.head(f"{job['links']['artifacts']}/model.safetensors", headers={"Range": "bytes=0-3"})
    assert (response.status_code, response.content) == (200, b"")
    assert response.headers["content-length"] == str(SIZE)


@pytest.mark.parametrize(
    "name",
    [
        "lost.txt",
        "",
        "heads",
        "heads/",
        "/etc/passwd",
        "../secret.txt",
        "..%2fsecret.txt",
        "heads/..%2f..%2fsecret.txt",
        "%2e%2e/secret.txt",
        "model.safetensors%00",
        "model.safetensors/",
        "MODEL.safetensors",
        "notes.txt",
    ],
)
def test_only_names_of_the_list_are_found(front: Front, job: dict[str, Any], name: str) -> None:
    prefix = job["recipe"]["output"]["prefix"]
    front.put(f"{prefix}notes.txt", b"not the job's")
    front.put("s3://workspace/merges/secret.txt", b"secret")
    # As the path stands, since httpx would take the dots out of it.
    url = front.http.base_url.copy_with(raw_path=f"{job['links']['artifacts']}/{name}".encode())
    assert refused_path(front.http.get(url)) == "not_found"


def refused_path(response: httpx.Response) -> str:
    assert response.headers["content-type"] == "application/problem+json"
    code: str = response.json()["code"]
    return code


def test_a_file_that_is_gone_or_another_is_not_sent(front: Front) -> None:
    job = front.submit()
    front.finish(job, FILES)
    prefix = job["recipe"]["output"]["prefix"]
    front.put(f"{prefix}model.safetensors", b"shorter")
    refused(get(front, job, "model.safetensors"), 404, "not_found")
    front.house.objects.delete(f"{prefix}model.safetensors")
    refused(get(front, job, "model.safetensors"), 404, "not_found")


def test_a_store_with_links_sends_the_caller_there(tmp_path: Path) -> None:
    with s3_server(buckets=("workspace", "models")) as store:
        connections = Connections.from_environment({**connections_to(tmp_path).to_environment(), **store.environment()})
        with open_front(tmp_path, connections, link_seconds=60) as front:
            job = with_checkpoints(front).submit()
            front.finish(job, FILES)
            response = get(front, job, "model.safetensors")
            assert (response.status_code, response.content) == (307, b"")
            assert response.headers["cache-control"] == "no-store"
            linked = httpx.get(response.headers["location"], headers={"Range": "bytes=0-3"})
            assert linked.content == WEIGHTS[:4]
            assert 'filename="model.safetensors"' in linked.headers["content-disposition"].replace("%22", '"')
            assert get(front, job, "model.safetensors?proxy=1").content == WEIGHTS
            head = front.http.head(f"{job['links']['artifacts']}/model.safetensors")
            assert (head.status_code, head.headers["content-length"]) == (200, str(SIZE))
            ready = front.http.get("/readyz").json()
            assert ready["checks"]["object_store"] == "ok"


def row(parameter: str, task: str, role: str) -> dict[str, Any]:
    return {"parameter": parameter, "task": task, "role": role, "treatment": "projection", "shape": [2, 2], "note": "ü"}


ROWS = [
    row(f"layer.{layer}.{name}", task, role)
    for layer in range(30)
    for name, role in (("weight", "linear"), ("bias", "shift"))
    for task in ("cars", "dogs")
]


@pytest.fixture(scope="module")
def logged(front: Front) -> dict[str, Any]:
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in ROWS)
    submitted = front.submit()
    front.finish(submitted, {"merge/trim-log.jsonl": text.encode()})
    return submitted


def test_the_trim_log_is_read_page_by_page(
    front: Front, logged: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artifacts_module, "CHUNK_BYTES", 100)  # rows are cut in two
    page = front.http.get(logged["links"]["trim_log"], params={"limit": 50})
    seen = page.json()["data"]
    assert page.json()["last_id"] == 50
    while "next" in page.links:
        page = front.http.get(page.links["next"]["url"])
        seen += page.json()["data"]
    assert seen == [{"row": number, **line} for number, line in enumerate(ROWS, start=1)]
    assert not page.json()["has_more"]


def test_the_trim_log_is_filtered(front: Front, logged: dict[str, Any]) -> None:
    def rows(**params: Any) -> list[dict[str, Any]]:
        data: list[dict[str, Any]] = front.http.get(logged["links"]["trim_log"], params=params).json()["data"]
        return data

    assert {line["task"] for line in rows(task="dogs")} == {"dogs"}
    assert {line["role"] for line in rows(role="shift")} == {"shift"}
    assert [line["parameter"] for line in rows(task="cars", name="layer.?.w*")] == [
        f"layer.{layer}.weight" for layer in range(10)
    ]
    assert [line["row"] for line in rows(task="cars", role="linear", after=100, limit=2)] == [101, 105]
    assert rows(task="none") == []


@pytest.mark.parametrize("query", ["limit=0", "limit=1001", "after=-1", "tsak=cars"])
def test_a_question_that_is_not_valid_is_refused(front: Front, logged: dict[str, Any], query: str) -> None:
    refused(front.http.get(f"{logged['links']['trim_log']}?{query}"), 400, "invalid_parameter")


def test_a_merge_without_a_trim_log_has_none(front: Front, job: dict[str, Any]) -> None:
    refused(front.http.get(job["links"]["trim_log"]), 404, "not_found")
