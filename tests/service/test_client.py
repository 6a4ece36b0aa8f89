from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from service.client import (
    CatmergeClient,
    DownloadError,
    DownloadProgress,
    ProblemError,
    ServiceUnreachable,
    WaitTimeout,
)
from service.contract.recipe import Recipe
from service.downloading import safe_path
from tests.servers import free_port
from tests.service.front import Front, artifact, checkpoint, open_front, recipe
from tests.service.scripted import Line, answer, cut_short, hang_up, scripted

JOB = "mrg_" + "0" * 32
WEIGHTS = bytes(range(256)) * 40
FILES = {"model.safetensors": WEIGHTS, "merge/report.json": b"{}", "merge/empty.jsonl": b""}
FILE = f"/v1/merges/{JOB}/artifacts/model.safetensors"
LIST = f"/v1/merges/{JOB}/artifacts"


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    with open_front(tmp_path_factory.mktemp("front")) as opened:
        for name in ("base", "cars"):
            opened.put(f"s3://models/{name}.safetensors", checkpoint(weight=(2, 3), bias=(2,)))
        yield opened


@pytest.fixture
def client(front: Front) -> Iterator[CatmergeClient]:
    with CatmergeClient(str(front.http.base_url)) as opened:
        yield opened


def finished(front: Front, client: CatmergeClient, files: dict[str, bytes]) -> str:
    job = client.submit(recipe())
    front.finish(job, files)
    return str(job["id"])


def test_a_job_from_submit_to_delete(client: CatmergeClient) -> None:
    job = client.submit(Recipe.model_validate(recipe(metadata={"team": "search"})))
    assert (job["status"], job["metadata"]) == ("queued", {"team": "search"})
    assert client.get(job["id"])["id"] == job["id"]
    assert client.cancel(job["id"])["status"] == "cancelled"
    assert client.retry(job["id"])["status"] == "queued"
    client.cancel(job["id"])
    client.delete(job["id"], artifacts=True)
    with pytest.raises(ProblemError) as caught:
        client.get(job["id"])
    assert (caught.value.code, caught.value.status) == ("not_found", 404)


def test_a_key_makes_two_submits_one_job(client: CatmergeClient) -> None:
    first = client.submit(recipe(), idempotency_key="a-key")
    assert client.submit(recipe(), idempotency_key="a-key")["id"] == first["id"]
    assert client.submit(recipe())["id"] != client.submit(recipe())["id"]


def test_a_refusal_lists_every_fault(client: CatmergeClient) -> None:
    with pytest.raises(ProblemError) as caught:
        client.submit({"base": "http://x", "tasks": [], "metod": 1})
    pointers = {fault["pointer"] for fault in caught.value.errors}
    assert {"/base", "/tasks", "/metod"} <= pointers
    assert all(pointer in str(caught.value) for pointer in pointers)


def test_a_plan_stores_nothing(front: Front, client: CatmergeClient) -> None:
    before = front.count()
    assert client.plan(recipe())["tensors"] == 2
    assert front.count() == before


def test_a_list_goes_on_over_pages(client: CatmergeClient) -> None:
    ids = [client.submit(recipe(metadata={"batch": "pages"}))["id"] for _ in range(5)]
    listed = client.list(metadata={"batch": "pages"}, page_size=2)
    assert [job["id"] for job in listed] == ids[::-1]
    assert [job["id"] for job in client.list(metadata={"batch": "pages"}, order="asc")] == ids
    assert list(client.list(metadata={"batch": "pages"}, status="failed")) == []


def test_the_catalogue(client: CatmergeClient) -> None:
    assert {"cat", "task_arithmetic"} <= {method["name"] for method in client.methods()}
    assert {"auto", "paper"} == {preset["name"] for preset in client.presets()}
    assert "projection" in {treatment["name"] for treatment in client.treatments()}
    assert client.ready()["status"] == "ready"


def test_waiting_ends_with_the_job(front: Front, client: CatmergeClient) -> None:
    job = client.submit(recipe())
    timer = threading.Timer(0.3, front.finish, [job])
    timer.start()
    seen: list[str] = []
    ended = client.wait(job["id"], on_change=lambda state: seen.append(state["status"]))
    timer.join()
    assert ended["status"] == "succeeded"
    assert seen[-1] == "succeeded"


def test_waiting_can_be_given_up(client: CatmergeClient) -> None:
    job = client.submit(recipe())
    with pytest.raises(WaitTimeout, match="is still queued"):
        client.wait(job["id"], timeout_seconds=0.1)


def test_events_are_read_and_followed(front: Front, client: CatmergeClient) -> None:
    job = client.submit(recipe())
    timer = threading.Timer(0.5, front.finish, [job])
    timer.start()
    followed = list(client.events(job["id"], follow=True))
    timer.join()
    assert [event["seq"] for event in followed] == list(range(1, len(followed) + 1))
    assert followed[-1]["type"] == "job.succeeded"
    assert list(client.events(job["id"])) == followed
    assert list(client.events(job["id"], after=1, follow=True)) == followed[1:]
    assert list(client.events(job["id"], after=len(followed), follow=True)) == []


def test_a_stream_that_breaks_is_taken_up_again() -> None:
    def event(seq: int) -> dict[str, Any]:
        return {"seq": seq, "type": "note", "data": {"text": "a\u2028b"}}

    def stream(*seqs: int, rest: str = "") -> bytes:
        # An event may be cut in the middle, and come with other line ends.
        whole = "".join(
            f': hm\r\nid: {seq}\r\ndata: {{"seq": {seq},\r\ndata: "type": "\u2028"}}\r\n\r\n' for seq in seqs
        )
        return (whole + rest).encode()

    kind = {"Content-Type": "text/event-stream"}
    events = [
        cut_short(stream(1, 2, rest='data: {"seq": 3'), 10_000, headers=kind),
        hang_up,
        answer(stream(2, 3), headers=kind),
        answer({"data": [event(4)], "has_more": False}),
    ]
    job: list[Line] = [answer({"status": "succeeded"})]
    with scripted({f"/v1/merges/{JOB}/events": events, f"/v1/merges/{JOB}": job}) as server:
        with CatmergeClient(server.url) as client:
            assert [event["seq"] for event in client.events(JOB, follow=True)] == [1, 2, 3, 4]
        assert [headers.get("last-event-id") for _, _, headers in server.asked[:3]] == ["0", "2", "2"]


def test_a_request_is_repeated_while_the_service_is_busy() -> None:
    problem = {"title": "Busy", "status": 503, "detail": "Later.", "code": "store_unavailable", "errors": []}
    soon = {"Retry-After": "0", "Content-Type": "application/problem+json"}
    busy = answer(problem, 503, soon)
    underway = {**problem, "status": 409, "code": "idempotency_in_progress"}
    held = answer(underway, 409, soon)
    with scripted([busy, hang_up, held, answer({"id": JOB}, 202)]) as server, CatmergeClient(server.url) as client:
        assert client.submit({})["id"] == JOB
        keys = {headers["idempotency-key"] for _, _, headers in server.asked}
        assert (len(server.asked), len(keys)) == (4, 1), "all attempts are one request"
    with scripted([busy] * 9) as server, CatmergeClient(server.url, attempts=3) as client:
        with pytest.raises(ProblemError, match=r"Busy: Later\."):
            client.get(JOB)
        assert len(server.asked) == 3


def test_what_may_have_been_done_is_not_repeated() -> None:
    with scripted([hang_up] * 2) as server, CatmergeClient(server.url) as client:
        with pytest.raises(ServiceUnreachable):
            client.retry(JOB)
        with pytest.raises(ServiceUnreachable):
            client.delete(JOB)
        assert len(server.asked) == 2


def test_nobody_there() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with CatmergeClient(url, attempts=2) as client, pytest.raises(ServiceUnreachable, match=url):
        client.get(JOB)


def test_an_answer_that_is_no_problem_document() -> None:
    with scripted([answer(b"<html>nginx</html>", 404)]) as server, CatmergeClient(server.url) as client:
        with pytest.raises(ProblemError, match="nginx") as caught:
            client.get(JOB)
        assert caught.value.code == "http_404"


def test_a_download_is_whole_and_checked(front: Front, client: CatmergeClient, tmp_path: Path) -> None:
    job_id = finished(front, client, FILES)
    seen: list[DownloadProgress] = []
    paths = client.download(job_id, tmp_path / "out", progress=seen.append)
    assert {path.relative_to(tmp_path / "out").as_posix(): path.read_bytes() for path in paths} == FILES
    assert seen[-1].bytes_done == seen[-1].bytes_total == sum(map(len, FILES.values()))
    assert [path.name for path in client.download(job_id, tmp_path / "some", match=["merge/*.json"])] == ["report.json"]
    with pytest.raises(DownloadError, match="no file that matches"):
        client.download(job_id, tmp_path, match=["nothing"])


def test_a_download_goes_on_where_it_stopped(front: Front, client: CatmergeClient, tmp_path: Path) -> None:
    job_id = finished(front, client, {"model.safetensors": WEIGHTS})
    digest = hashlib.sha256(WEIGHTS).hexdigest()
    part = tmp_path / f"model.safetensors.{digest[:12]}.part"
    part.write_bytes(WEIGHTS[:7000])
    seen: list[DownloadProgress] = []
    (path,) = client.download(job_id, tmp_path, progress=seen.append)
    assert path.read_bytes() == WEIGHTS
    assert seen[0].bytes_done == 7000
    assert not part.exists()


def test_what_was_half_there_and_wrong_is_fetched_anew(front: Front, client: CatmergeClient, tmp_path: Path) -> None:
    job_id = finished(front, client, {"model.safetensors": WEIGHTS})
    part = tmp_path / f"model.safetensors.{hashlib.sha256(WEIGHTS).hexdigest()[:12]}.part"
    for wrong in (b"x" * 100, b"x" * len(WEIGHTS), b"x" * 2 * len(WEIGHTS)):
        part.write_bytes(wrong)
        (path,) = client.download(job_id, tmp_path)
        assert path.read_bytes() == WEIGHTS
        path.unlink()


def test_what_is_there_is_kept(front: Front, client: CatmergeClient, tmp_path: Path) -> None:
    job_id = finished(front, client, {"model.safetensors": WEIGHTS})
    (path,) = client.download(job_id, tmp_path)
    before = path.stat()
    client.download(job_id, tmp_path)
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    path.write_bytes(b"mine")
    with pytest.raises(DownloadError, match="other content"):
        client.download(job_id, tmp_path)
    assert path.read_bytes() == b"mine"
    client.download(job_id, tmp_path, overwrite=True)
    assert path.read_bytes() == WEIGHTS


def test_bytes_that_are_not_what_was_written(front: Front, client: CatmergeClient, tmp_path: Path) -> None:
    job = client.submit(recipe())
    front.finish(job, {"model.safetensors": WEIGHTS})
    front.put(job["recipe"]["output"]["prefix"] + "model.safetensors", WEIGHTS[::-1])
    with pytest.raises(DownloadError, match="SHA-256"):
        client.download(job["id"], tmp_path)
    assert not (tmp_path / "model.safetensors").exists()


def listed(name: str = "model.safetensors") -> list[Line]:
    return [answer({"data": [artifact(name, WEIGHTS)], "has_more": False})]


def ranged(start: int, end: int) -> Line:
    promised = {"Content-Range": f"bytes {start}-{len(WEIGHTS) - 1}/{len(WEIGHTS)}"}
    return cut_short(WEIGHTS[start:end], len(WEIGHTS) - start, 206, promised)


def test_a_line_that_breaks_again_and_again(tmp_path: Path) -> None:
    lines = [cut_short(WEIGHTS[:100], len(WEIGHTS)), hang_up, ranged(100, 5000), ranged(5000, len(WEIGHTS))]
    with scripted({LIST: listed(), FILE: lines}) as server:
        with CatmergeClient(server.url) as client:
            (path,) = client.download(JOB, tmp_path)
        assert path.read_bytes() == WEIGHTS
        assert [headers.get("range") for _, path, headers in server.asked if path == FILE] == [
            None,
            "bytes=100-",
            "bytes=100-",
            "bytes=5000-",
        ]


def test_a_server_that_ignores_ranges(tmp_path: Path) -> None:
    lines = [cut_short(WEIGHTS[:100], len(WEIGHTS)), answer(WEIGHTS)]
    with scripted({LIST: listed(), FILE: lines}) as server, CatmergeClient(server.url) as client:
        (path,) = client.download(JOB, tmp_path)
        assert path.read_bytes() == WEIGHTS


def test_a_server_that_sends_too_much(tmp_path: Path) -> None:
    with (
        scripted({LIST: listed(), FILE: [answer(WEIGHTS * 2)]}) as server,
        CatmergeClient(server.url) as client,
        pytest.raises(DownloadError, match="more bytes"),
    ):
        client.download(JOB, tmp_path)


def test_a_link_is_followed_without_our_headers(tmp_path: Path) -> None:
    with scripted([answer({}, 403), answer(WEIGHTS)]) as store:
        link = answer(b"", 307, {"Location": f"{store.url}/bucket/key?signature=x"})
        with scripted({LIST: listed(), FILE: [link, link]}) as server:
            with CatmergeClient(server.url, headers={"X-Api-Key": "secret"}) as client:
                (path,) = client.download(JOB, tmp_path)
            assert path.read_bytes() == WEIGHTS
            assert all(headers["x-api-key"] == "secret" for _, _, headers in server.asked)
        assert store.paths == ["/bucket/key?signature=x"] * 2, "an old link is replaced by a new one"
        assert not any("x-api-key" in headers for _, _, headers in store.asked)


NAMES = ["../x", "/etc/x", "a/../../x", "a//b", "./a", "a/", "", "..", "c:\\x", "a\\b", "x\x00"]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_leads_elsewhere(tmp_path: Path, name: str) -> None:
    with scripted({LIST: [*listed("fine"), *listed(name)]}) as server, CatmergeClient(server.url) as client:
        with pytest.raises(DownloadError):
            safe_path(tmp_path, name)
        client.artifacts(JOB)
        with pytest.raises(DownloadError, match="nothing was downloaded"):
            client.download(JOB, tmp_path / "out")
        assert len(server.asked) == 2
    assert not (tmp_path / "out").exists()


def test_a_symbolic_link_leads_nowhere(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "merge").symlink_to(tmp_path)
    with pytest.raises(DownloadError, match="symbolic link"):
        safe_path(tmp_path / "out", "merge/report.json")


def test_the_trim_log(front: Front, client: CatmergeClient) -> None:
    rows = b"".join(b'{"parameter": "w%d", "task": "cars", "role": "linear"}\n' % i for i in range(150))
    job_id = finished(front, client, {"merge/trim-log.jsonl": rows})
    assert [row["row"] for row in client.trim_log(job_id)] == list(range(1, 151))
    assert [row["parameter"] for row in client.trim_log(job_id, name="w14?", role="linear")] == [
        f"w{i}" for i in range(140, 150)
    ]
    assert list(client.trim_log(job_id, task="other")) == []
