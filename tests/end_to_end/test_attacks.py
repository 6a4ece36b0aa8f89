"""The service under attack: each test is named for the fault, and afterwards everything that was promised holds."""

from __future__ import annotations

import os
import resource
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import save_file
from sqlalchemy import select

from service.stores.schema import leaders
from tests import faulty
from tests.checkpoints import Family
from tests.end_to_end.arena import BUCKET, WORKSPACE, Arena, open_arena
from tests.end_to_end.stack import Program, until
from tests.faulty import Harm, Rule
from tests.servers import free_port, s3_server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # workers take their time to start on a busy machine

PLACE = f"s3://{BUCKET}/models/"
SHARDS = 12_000  # a few parts


@pytest.fixture(scope="module")
def arena(tmp_path_factory: pytest.TempPathFactory, vit: Family) -> Iterator[Arena]:
    with (
        s3_server("rclone", buckets=(BUCKET,)) as s3,  # it checks signatures, and knows when uploads began
        open_arena(tmp_path_factory.mktemp("arena"), s3, file_roots=(tmp_path_factory.mktemp("disk"),)) as opened,
    ):
        opened.stack.upload(vit.folder, PLACE)
        yield opened


@pytest.fixture(autouse=True)
def ready(arena: Arena) -> Iterator[None]:
    arena.ready()
    yield
    arena.ready()


@pytest.fixture(scope="module")
def pair(vit: Family) -> Family:
    return Family(vit.folder, ("cars", "pets"))


def recipe(pair: Family, **changes: Any) -> dict[str, Any]:
    return pair.recipe(PLACE, method={"name": "cat", "rank": 2}, output={"shard_bytes": SHARDS}, **changes)


@pytest.fixture(scope="module")
def undisturbed(arena: Arena, pair: Family) -> dict[str, str]:
    """The digests of the merge that all tests disturb, undisturbed."""
    arena.ready()
    job_id = arena.stack.submit(recipe(pair))["id"]
    arena.check(job_id)
    return arena.digests(job_id)


@pytest.fixture(scope="module")
def large(arena: Arena, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A recipe whose one shard is written in three requests and more."""
    folder = tmp_path_factory.mktemp("large")
    for seed, name in enumerate(("base", "one")):
        weight = torch.randn(9 << 20, generator=torch.Generator().manual_seed(seed))
        save_file({"weight": weight}, folder / f"{name}.safetensors")
    arena.stack.upload(folder, f"s3://{BUCKET}/large/")
    one = {"name": "one", "checkpoint": f"s3://{BUCKET}/large/one.safetensors"}
    return {"base": f"s3://{BUCKET}/large/base.safetensors", "tasks": [one], "method": {"name": "average"}}


# --- workers


def test_a_worker_is_killed_in_every_stage_and_what_it_had_sent_arrives_late(
    arena: Arena, pair: Family, undisturbed: dict[str, str]
) -> None:
    """The proxy holds what a worker writes, the worker is killed, and in the end the proxy lets go."""
    stages = {
        "plan": "PUT .*merge/plan.json",
        "calibrate": "PUT .*cache/statistics/",
        "merge": "PUT .*model-00002-of",
        "evaluate": "PUT .*/figures-00001",
        "finalize": "PUT .*merge/report.json",
    }
    arena.forget_cache()
    held = {stage: arena.store.hold(pattern) for stage, pattern in stages.items()}
    after_the_manifest = arena.store.hold("HEAD .*merge/manifest.json", times=0)
    job_id = arena.stack.submit(recipe(pair, evaluation={"tasks": _labeled(pair), "resamples": 100}, search=None))["id"]
    for stage, rule in held.items():
        arena.caught(rule)
        program, _ = arena.holder(job_id, stage, "model-00002-of" if stage == "merge" else "")
        if stage == "finalize":
            after_the_manifest.times = 1  # whoever writes it looks at it then
        program.kill()
        program.start()
    arena.caught(after_the_manifest)
    program, _ = arena.holder(job_id, "finalize")
    program.kill()
    program.start()
    arena.stack.succeeded(job_id)
    arena.store.heal()
    arena.check(job_id)
    lost = [row["data"]["stage"] for row in arena.stack.events(job_id) if row["type"] == "part.retried"]
    assert lost == [*stages, "finalize"]
    weights = {name: digest for name, digest in arena.digests(job_id).items() if name in undisturbed}
    assert weights == undisturbed


def test_a_worker_is_killed_in_the_stages_of_a_search(arena: Arena, pair: Family, undisturbed: dict[str, str]) -> None:
    """What the killed ones had sent arrives late here too: the first plan is not the result's."""
    rows = [{**row, "validation": row["labeled"]} for row in _labeled(pair)]
    search = {"space": {"scaling": [0.4]}, "sampler": "grid"}  # the default, so that the result is the same
    held = {
        "plan": arena.store.hold("PUT .*plan.json"),
        "search": arena.store.hold("PUT .*/search/"),
        "finalize": arena.store.hold("PUT .*merge/report.json"),
    }
    job_id = arena.stack.submit(recipe(pair, evaluation={"tasks": rows, "resamples": 100}, search=search))["id"]
    _kill_in_each(arena, job_id, held)
    arena.check(job_id)
    weights = {name: digest for name, digest in arena.digests(job_id).items() if name in undisturbed}
    assert weights == undisturbed


def test_a_worker_is_killed_in_the_stages_of_an_analysis(arena: Arena, pair: Family) -> None:
    asked = recipe(pair, mode="analysis")
    undisturbed = arena.digests(arena.check(arena.stack.submit(asked)["id"])["id"])
    held = {
        "analyze": arena.store.hold("PUT .*/analysis-00001"),
        "finalize": arena.store.hold("PUT .*merge/analysis.json"),
    }
    job_id = arena.stack.submit(asked)["id"]
    _kill_in_each(arena, job_id, held)
    arena.check(job_id, undisturbed)


def test_a_worker_is_killed_in_every_stage_of_an_evaluation(arena: Arena, pair: Family) -> None:
    models = [{"name": task, "checkpoint": f"{PLACE}{task}/", "tasks": [task]} for task in pair.tasks]
    asked = {"models": models, "evaluation": {"tasks": _labeled(pair), "resamples": 100}}
    undisturbed = arena.check(arena.stack.submit(asked, "/v1/evaluations")["id"])
    arena.forget_cache()
    held = {
        "plan": arena.store.hold("PUT .*merge/plan.json"),
        "evaluate": arena.store.hold("PUT .*/figures-00001"),
        "finalize": arena.store.hold("PUT .*merge/report.json"),
    }
    job_id = arena.stack.submit(asked, "/v1/evaluations")["id"]
    _kill_in_each(arena, job_id, held)
    assert arena.check(job_id)["result"]["metrics"] == undisturbed["result"]["metrics"]


def _labeled(pair: Family) -> list[dict[str, Any]]:
    return [{"task": task, "labeled": f"{PLACE}{task}-labeled.safetensors"} for task in pair.tasks]


def _kill_in_each(arena: Arena, job_id: str, held: Mapping[str, Rule]) -> None:
    """Kill the worker whose request is held, stage after stage; then let go."""
    for stage, rule in held.items():
        arena.caught(rule)
        program, _ = arena.holder(job_id, stage)
        program.kill()
        program.start()
    arena.stack.succeeded(job_id)
    arena.store.heal()
    lost = [row["data"]["stage"] for row in arena.stack.events(job_id) if row["type"] == "part.retried"]
    assert list(dict.fromkeys(lost)) == list(held)  # on a busy machine one may be slow, and be lost beside it


@pytest.mark.parametrize(
    ("stage", "pattern"),
    [
        ("plan", "(GET|HEAD) .*merge/manifest.json"),
        ("merge", "PUT .*model-00002-of"),
        ("finalize", "PUT .*merge/report.json"),
        ("finalize", "PUT .*merge/manifest.json"),
    ],
    ids=["planning", "merging", "reporting", "publishing"],
)
def test_a_worker_is_frozen_and_goes_on_when_another_has_finished_the_job(
    arena: Arena, pair: Family, undisturbed: dict[str, str], stage: str, pattern: str
) -> None:
    rule = arena.store.hold(pattern)
    job_id = arena.stack.submit(recipe(pair))["id"]
    arena.caught(rule)
    program, _ = arena.holder(job_id, stage)
    program.signal(signal.SIGSTOP)
    arena.stack.succeeded(job_id)
    program.signal(signal.SIGCONT)
    rule.release()
    until(lambda: _has_let_go(program, job_id), "the late worker has noticed", arena.logs)
    arena.check(job_id, undisturbed)


def _has_let_go(program: Program, job_id: str) -> bool:
    lines = [line for line in program.log().splitlines() if job_id in line]
    return any("Too late with" in line or "Left" in line for line in lines)


def test_the_child_of_a_worker_is_killed(arena: Arena, pair: Family, undisturbed: dict[str, str]) -> None:
    rule = arena.store.hold("PUT .*model-00002-of")
    job_id = arena.stack.submit(recipe(pair))["id"]
    arena.caught(rule)
    program, pid = arena.holder(job_id, "merge", "model-00002-of")
    os.kill(pid, signal.SIGKILL)
    arena.check(job_id, undisturbed)
    assert program.is_running


def test_the_parent_of_a_worker_is_killed(arena: Arena, pair: Family, undisturbed: dict[str, str]) -> None:
    """Its child finds out at the next tensor, gives its part back, and ends."""
    rule = arena.store.hold("PUT .*model-00002-of")
    job_id = arena.stack.submit(recipe(pair))["id"]
    arena.caught(rule)
    program, pid = arena.holder(job_id, "merge", "model-00002-of")
    os.kill(program.group, signal.SIGKILL)
    rule.release()
    arena.check(job_id, undisturbed)
    until(lambda: not Path(f"/proc/{pid}").exists(), "the child has ended", arena.logs)


def test_two_workers_are_killed_at_once(arena: Arena, pair: Family, undisturbed: dict[str, str]) -> None:
    rule = arena.store.hold("PUT .*model-0000[23]-of", times=2)
    job_id = arena.stack.submit(recipe(pair))["id"]
    until(lambda: rule.hits == 2, "both workers hold a part", arena.logs)
    for worker in arena.workers:
        worker.kill()
    for worker in arena.workers:
        worker.start()
    rule.release()
    arena.check(job_id, undisturbed)


def test_a_worker_is_asked_to_stop_while_its_store_hangs(
    arena: Arena, pair: Family, undisturbed: dict[str, str]
) -> None:
    """It does not wait for the store: the part goes on elsewhere, and the process ends in time."""
    rule = arena.store.hold("PUT .*model-00002-of")
    job_id = arena.stack.submit(recipe(pair))["id"]
    arena.caught(rule)
    program, _ = arena.holder(job_id, "merge", "model-00002-of")
    program.stop()  # within STOP_SECONDS, or it says so in the log
    assert "did not stop" not in program.log()
    arena.check(job_id, undisturbed)
    assert "part.retried" not in [row["type"] for row in arena.stack.events(job_id)]


def test_the_clock_of_one_worker_is_an_hour_fast(arena: Arena, pair: Family, undisturbed: dict[str, str]) -> None:
    """It does its share, and no time that it knows enters anything: see the order of events in ``Arena.check``."""
    arena.workers[0].signal(signal.SIGSTOP)
    before = arena.database.clock()
    job_id = arena.stack.submit(recipe(pair))["id"]
    job = arena.check(job_id, undisturbed)
    after = arena.database.clock()
    row = arena.row(job_id)
    assert row is not None
    assert before <= row.created_at <= row.started_at <= row.finished_at <= after
    assert job["result"]["cost"]["seconds"] <= after - before


# --- the API


def test_the_api_is_killed_between_commit_and_answer(arena: Arena, pair: Family, undisturbed: dict[str, str]) -> None:
    body = recipe(pair, metadata={"name": "killed-api"})
    arena.broker.proxy.hangs = True  # after the commit the API rings the broker, and then it answers
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(_post, arena.stack.url, body, "key-killed")
        until(lambda: bool(arena.jobs_named("killed-api")), "the job is in the database", arena.logs, every=0.01)
        arena.stack.api.kill()
        assert isinstance(answer.result(), httpx.TransportError)
    arena.broker.proxy.hangs = False
    arena.stack.start_api()
    again = _post(arena.stack.url, body, "key-killed")
    assert isinstance(again, httpx.Response)
    assert (again.status_code, again.headers.get("Idempotent-Replayed")) == (202, "true")
    assert arena.jobs_named("killed-api") == [again.json()["id"]]
    arena.check(again.json()["id"], undisturbed)


def test_the_api_is_frozen_between_commit_and_answer_and_another_one_asked(
    arena: Arena, pair: Family, undisturbed: dict[str, str]
) -> None:
    """Two APIs: the second knows the key, and sweeps; when the first goes on, it gives the same answer."""
    body = recipe(pair, metadata={"name": "frozen-api"})
    port = free_port()
    second = arena.stack.api.twin(CATMERGE_PORT=str(port))
    second.start()
    try:
        until(lambda: _answers(f"http://127.0.0.1:{port}"), "the second API answers", second.log)
        arena.broker.proxy.hangs = True
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(_post, arena.stack.url, body, "key-frozen")
            until(lambda: bool(arena.jobs_named("frozen-api")), "the job is in the database", arena.logs, every=0.01)
            arena.stack.api.signal(signal.SIGSTOP)
            arena.broker.proxy.hangs = False
            answer = _post(f"http://127.0.0.1:{port}", body, "key-frozen")
            assert isinstance(answer, httpx.Response)
            job_id = answer.json()["id"]
            assert (answer.status_code, answer.headers.get("Idempotent-Replayed")) == (202, "true")
            until(lambda: arena.states(job_id, "finalize").get("done") == 1, "the second one sweeps", arena.logs)
            arena.stack.api.signal(signal.SIGCONT)
            late = first.result()
        assert isinstance(late, httpx.Response)
        assert (late.status_code, late.json()["id"]) == (202, job_id)
        arena.check(job_id, undisturbed)
    finally:
        second.kill()


def test_of_two_sweepers_the_one_at_work_is_killed(arena: Arena, pair: Family, undisturbed: dict[str, str]) -> None:
    """Messages are lost too, so that only a sweeper can bring the job to its end."""
    second = arena.stack.api.twin(CATMERGE_PORT=str(free_port()))
    second.start()
    try:
        rule = arena.store.hold("PUT .*model-00002-of")
        job_id = arena.stack.submit(recipe(pair))["id"]
        arena.caught(rule)
        program, _ = arena.holder(job_id, "merge", "model-00002-of")
        with arena.database.read() as connection:
            owner = connection.execute(select(leaders.c.owner).where(leaders.c.duty == "sweep")).scalar_one()
        sweeping = second if int(owner.split(":")[1]) == second.group else arena.stack.api
        sweeping.kill()
        program.kill()
        with arena.redis() as client:
            client.flushall()
        program.start()
        if sweeping is arena.stack.api:
            until(lambda: arena.states(job_id, "finalize").get("done") == 1, "the other one sweeps", arena.logs)
            arena.stack.start_api()
        arena.check(job_id, undisturbed)
    finally:
        second.kill()


def _post(url: str, body: dict[str, Any], key: str) -> httpx.Response | httpx.TransportError:
    try:
        return httpx.post(f"{url}/v1/merges", json=body, headers={"Idempotency-Key": key}, timeout=60)
    except httpx.TransportError as error:
        return error


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/healthz", timeout=10).status_code == 200
    except httpx.TransportError:
        return False


# --- the broker and the database


def _restart_empty(arena: Arena) -> None:
    arena.broker.stop()
    arena.broker.start()


def _flush(arena: Arena) -> None:
    with arena.redis() as client:
        client.flushall()


def _kill_clients(arena: Arena) -> None:
    with arena.redis() as client:
        client.client_kill_filter(_type="normal", skipme=True)


def _slow_broker(arena: Arena) -> None:
    arena.broker.proxy.delay_seconds = 0.05


def _cut_broker(arena: Arena) -> None:
    arena.broker.proxy.refuses = True
    arena.broker.proxy.cut()
    threading.Timer(2, arena.broker.proxy.heal).start()


@pytest.mark.parametrize("harm", [_restart_empty, _flush, _kill_clients, _slow_broker, _cut_broker])
def test_the_broker_is_harmed_underway(
    arena: Arena, pair: Family, undisturbed: dict[str, str], harm: Callable[[Arena], None]
) -> None:
    _harmed_underway(arena, pair, undisturbed, harm)


def _restart_database(arena: Arena) -> None:
    arena.postgres.stop()
    arena.postgres.start()


def _terminate(arena: Arena) -> None:
    assert sum(arena.terminate_backends() for _ in range(3))


def _cut_database(arena: Arena) -> None:
    for _ in range(3):
        arena.postgres.proxy.cut()


def _slow_database(arena: Arena) -> None:
    arena.postgres.proxy.delay_seconds = 0.01


def _hanging_database(arena: Arena) -> None:
    arena.postgres.proxy.hangs = True
    threading.Timer(2, arena.postgres.proxy.heal).start()


@pytest.mark.parametrize("harm", [_restart_database, _terminate, _cut_database, _slow_database, _hanging_database])
def test_the_database_is_harmed_underway(
    arena: Arena, pair: Family, undisturbed: dict[str, str], harm: Callable[[Arena], None]
) -> None:
    _harmed_underway(arena, pair, undisturbed, harm)


def _harmed_underway(arena: Arena, pair: Family, undisturbed: dict[str, str], harm: Callable[[Arena], None]) -> None:
    """While a worker is in the middle of a part, and others are done and to be done."""
    rule = arena.store.hold("PUT .*model-00002-of")
    job_id = arena.stack.submit(recipe(pair))["id"]
    arena.caught(rule)
    harm(arena)
    rule.release()
    until(lambda: _has_ended(arena, job_id), "the job has ended", arena.logs)
    arena.ready()
    arena.check(job_id, undisturbed)


def _has_ended(arena: Arena, job_id: str) -> bool:
    row = arena.row(job_id)
    return row is not None and row.finished_at is not None


# --- the object store


@pytest.mark.parametrize(
    ("pattern", "harm", "times"),
    [
        ("GET|PUT", faulty.slow(0.05), 100),
        ("GET .*models/cars/model.safetensors", faulty.cut_after(100), 2),
        ("GET .*models/cars/model.safetensors", faulty.truncated, 2),
        ("GET .*models/", faulty.failing(500), 3),
        ("PUT .*model-", faulty.failing(503), 3),
        ("PUT .*model-", faulty.refused, 2),
        ("PUT .*(model-|merge/)", faulty.unanswered, 3),
        ("PUT", faulty.doubled, 1000),
    ],
    ids=["latency", "cut", "short", "500", "503", "refused", "unanswered", "twice"],
)
def test_the_object_store_does_harm(
    arena: Arena, pair: Family, undisturbed: dict[str, str], pattern: str, harm: Harm, times: int
) -> None:
    """The server behind the proxy ignores conditions and answers ranges with status 200, as some do, by itself."""
    rule = arena.store.harm(pattern, harm, times=times)
    job_id = arena.stack.submit(recipe(pair))["id"]
    arena.check(job_id, undisturbed)
    assert rule.hits


def test_another_etag_in_the_middle_of_a_checkpoint_is_no_part_of_the_result(arena: Arena, pair: Family) -> None:
    """The store says that the object is another one by now: rather none than a mixture of both."""
    arena.store.harm("GET .*models/cars/model.safetensors", faulty.another_etag)
    job_id = arena.stack.submit(recipe(pair))["id"]
    job = arena.stack.ended(job_id)
    assert (job["status"], job["error"]["code"]) == ("failed", "input_changed")
    assert arena.stack.listed(f"{WORKSPACE}merges/{job_id}/") == []


def test_a_worker_is_killed_in_the_middle_of_a_large_upload(arena: Arena, large: dict[str, Any]) -> None:
    """The next one sends the part that is missing, and no other; somebody else's upload beside it is let be."""
    client = arena.s3_client()
    theirs = client.create_multipart_upload(Bucket=BUCKET, Key="theirs/notes.bin")["UploadId"]
    rule, job_id = _in_the_middle_of_a_large_upload(arena, large, f"s3://{BUCKET}/theirs/")
    program, _ = arena.holder(job_id, "merge")
    program.kill()
    before = len(arena.store.seen)
    program.start()
    arena.check(job_id)
    assert arena.store.parts_sent(before) == [2]
    assert arena.uploads() == ["theirs/notes.bin"]
    rule.release()
    client.abort_multipart_upload(Bucket=BUCKET, Key="theirs/notes.bin", UploadId=theirs)


def test_a_worker_is_frozen_in_the_middle_of_a_large_upload_that_another_goes_on_with(
    arena: Arena, large: dict[str, Any]
) -> None:
    """When it wakes, the upload has ended: it is told so, and takes nothing away."""
    rule, job_id = _in_the_middle_of_a_large_upload(arena, large, f"s3://{BUCKET}/frozen/")
    program, _ = arena.holder(job_id, "merge")
    program.signal(signal.SIGSTOP)
    before = len(arena.store.seen)
    arena.stack.succeeded(job_id)
    assert arena.store.parts_sent(before) == [2]
    program.signal(signal.SIGCONT)
    rule.release()
    noticed = f"merge of {job_id}: store_unavailable"
    until(lambda: noticed in program.log() or _has_let_go(program, job_id), "the late worker has noticed", arena.logs)
    arena.check(job_id)
    assert arena.uploads() == []


def _in_the_middle_of_a_large_upload(arena: Arena, large: dict[str, Any], prefix: str) -> tuple[Rule, str]:
    """A job whose worker has sent two parts of three, and the proxy's rule that holds the other."""
    rule = arena.store.hold("PUT .*partNumber=2")
    job_id = arena.stack.submit({**large, "output": {"prefix": prefix}})["id"]
    arena.caught(rule)
    (upload,) = arena.stack.objects.unfinished(f"{prefix}model.safetensors")
    of_it = {"Bucket": BUCKET, "Key": upload.address.removeprefix(f"s3://{BUCKET}/"), "UploadId": upload.handle}

    def sent() -> list[int]:
        return [part["PartNumber"] for part in arena.s3_client().list_parts(**of_it).get("Parts", [])]

    until(lambda: sent() == [1, 3], "the other parts are there", arena.logs)
    return rule, job_id


def test_the_disk_is_full_and_has_room_again(arena: Arena, large: dict[str, Any]) -> None:
    """As far as the workers' processes can write: what does not fit is dropped, and the job goes on when it does."""
    (folder,) = arena.stack.connections.file_roots
    _limit_files(arena, 20_000_000)  # a shard has 38 MB
    job_id = arena.stack.submit({**large, "output": {"prefix": f"file://{folder}/full/"}})["id"]
    until(lambda: "part.retried" in _types(arena, job_id), "there is no room for the shard", arena.logs)
    (told,) = [row["data"] for row in arena.stack.events(job_id) if row["type"] == "part.retried"][:1]
    assert (told["stage"], told["code"]) == ("merge", "store_unavailable")
    assert "model.safetensors" in told["detail"]
    assert not (folder / "full" / "model.safetensors").exists()
    _limit_files(arena, resource.RLIM_INFINITY)
    arena.check(job_id)
    assert list(folder.rglob(".catmerge-staging-*")) == []


def _limit_files(arena: Arena, size: int) -> None:
    """How large the files may be that the workers' processes write."""
    groups = {worker.group for worker in arena.workers}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if os.getpgid(int(folder.name)) in groups:
                resource.prlimit(int(folder.name), resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def _types(arena: Arena, job_id: str) -> list[str]:
    return [row["type"] for row in arena.stack.events(job_id)]


# --- time


def test_a_cancel_takes_effect_while_a_tensor_is_read(arena: Arena, pair: Family) -> None:
    rule = arena.store.hold("PUT .*model-00002-of")
    job_id = arena.stack.submit(recipe(pair))["id"]
    arena.caught(rule)
    program, _ = arena.holder(job_id, "merge", "model-00002-of")
    assert arena.stack.client.post(f"/v1/merges/{job_id}/cancel").json()["status"] == "cancelled"
    rule.release()
    until(lambda: _has_let_go(program, job_id), "the worker has left it", arena.logs)
    assert arena.states(job_id, "merge").get("claimed") is None
    assert arena.stack.client.get(f"/v1/merges/{job_id}/artifacts").json()["code"] == "not_ready"


def test_a_deadline_ends_a_job_whose_store_hangs(arena: Arena, pair: Family) -> None:
    rule = arena.store.hold("PUT .*model-00002-of")
    job_id = arena.stack.submit(recipe(pair, deadline_seconds=3))["id"]
    job = arena.stack.ended(job_id)
    assert (job["status"], job["error"]["code"]) == ("failed", "deadline_exceeded")
    rule.release()


def test_nothing_is_left_of_all_this(arena: Arena) -> None:
    arena.check_nothing_left()
