from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from service.cli.app import app
from service.contract.errors import BadTensor
from service.contract.job import Status
from service.contract.parts import Counters, Done
from service.contract.stages import PartMessage, Stage
from service.stores.database import Database
from tests.servers import free_port
from tests.service.api import test_evaluations as evaluations
from tests.service.front import Front, checkpoint, open_front, recipe

FILES = {"model.safetensors": bytes(range(256)), "merge/report.json": b"{}"}


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    with open_front(tmp_path_factory.mktemp("front")) as opened:
        for name in ("base", "cars"):
            opened.put(f"s3://models/{name}.safetensors", checkpoint(weight=(2, 3), bias=(2,)))
        yield opened


@pytest.fixture
def recipe_file(tmp_path: Path) -> str:
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(recipe()))
    return str(path)


def call(front: Front, *arguments: str, text: str | None = None) -> Result:
    return CliRunner().invoke(app, ["--url", str(front.http.base_url), *arguments], input=text)


def said(front: Front, *arguments: str) -> Any:
    result = call(front, *arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def fail(front: Front, job_id: str) -> None:
    claim = front.house.parts.claim(PartMessage(Stage.PLAN, job_id, 0), "worker")
    assert claim is not None
    front.house.parts.fail(claim, BadTensor("weight holds NaN", tensor="weight"))


def test_submit_and_look(front: Front, recipe_file: str) -> None:
    job = said(front, "submit", recipe_file)
    assert said(front, "get", job["id"])["status"] == "queued"
    assert job["id"] in call(front, "get", job["id"]).stdout
    assert said(front, "ls", "--limit", "1")[0]["id"] == job["id"]
    assert job["id"] in call(front, "ls").stdout
    assert said(front, "ls", "--status", "failed", "--label", "a=b") == []
    assert said(front, "cancel", job["id"])["status"] == "cancelled"
    assert said(front, "retry", job["id"])["status"] == "queued"
    assert "cancelled" in call(front, "cancel", job["id"]).stdout
    assert said(front, "delete", job["id"], "--artifacts") == {"id": job["id"], "deleted": True}
    assert call(front, "get", job["id"]).exit_code == 1


def test_a_key_makes_one_job(front: Front, recipe_file: str) -> None:
    assert (
        said(front, "submit", recipe_file, "--key", "k")["id"] == said(front, "submit", recipe_file, "--key", "k")["id"]
    )


def test_a_recipe_from_standard_input(front: Front) -> None:
    result = call(front, "submit", "-", "--json", text=json.dumps(recipe(seed=7)))
    assert json.loads(result.stdout)["recipe"]["seed"] == 7


@pytest.mark.parametrize(
    ("text", "reason"), [("{", "line 1, column 2"), ("[]", "JSON object"), (None, "can't be read"), ("\udcff", "UTF-8")]
)
def test_a_file_that_holds_no_recipe(front: Front, tmp_path: Path, text: str | None, reason: str) -> None:
    path = tmp_path / "recipe.json"
    if text is not None:
        path.write_text(text, errors="surrogateescape")
    result = call(front, "submit", str(path))
    assert (result.exit_code, reason in result.stderr) == (1, True), result.stderr


def test_a_refusal_says_where(front: Front) -> None:
    wrong = json.dumps({**recipe(), "metod": 1})
    result = call(front, "submit", "-", text=wrong)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "/metod" in result.stderr
    result = call(front, "submit", "-", "--json", text=wrong)
    error = json.loads(result.stderr)["error"]
    assert (error["code"], error["errors"][0]["pointer"]) == ("validation_error", "/metod")


def test_what_a_refusal_quotes_is_not_taken_for_markup(front: Front) -> None:
    result = call(front, "submit", "-", text=json.dumps({**recipe(), "[red]x[/red]": 1}))
    assert "[red]x[/red]" in result.stderr


@pytest.mark.parametrize(("outcome", "code"), [("succeeded", 0), ("rejected", 3), ("failed", 4), ("cancelled", 5)])
def test_the_exit_code_tells_how_it_came_out(front: Front, recipe_file: str, outcome: str, code: int) -> None:
    job = said(front, "submit", recipe_file)
    if outcome == "failed":
        fail(front, job["id"])
    elif outcome == "cancelled":
        said(front, "cancel", job["id"])
    else:
        front.finish(job, FILES, Status(outcome))
    result = call(front, "watch", job["id"], "--json")
    assert (result.exit_code, json.loads(result.stdout)["status"]) == (code, outcome)
    result = call(front, "watch", job["id"])
    assert outcome in result.stdout
    assert ("weight holds NaN" in result.stdout) == (outcome == "failed")


def test_submit_and_watch(front: Front, recipe_file: str) -> None:
    def finish_newest() -> None:
        while (job := front.http.get("/v1/merges").json()["data"][0])["metadata"] != {"watched": "yes"}:
            continue
        front.finish(job, FILES)

    text = json.dumps(recipe(metadata={"watched": "yes"}))
    thread = threading.Thread(target=finish_newest)
    thread.start()
    result = call(front, "submit", "-", "--watch", "--json", text=text)
    thread.join()
    assert (result.exit_code, json.loads(result.stdout)["status"]) == (0, "succeeded")
    assert "Submitted mrg_" in result.stderr


def test_watching_ends_before_the_job(front: Front, recipe_file: str) -> None:
    job = said(front, "submit", recipe_file)
    assert call(front, "watch", job["id"], "--timeout", "0.1").exit_code == 6


def test_download(front: Front, recipe_file: str, tmp_path: Path) -> None:
    job = said(front, "submit", recipe_file)
    result = call(front, "download", job["id"], "--json")
    assert json.loads(result.stderr)["error"]["code"] == "not_ready"
    front.finish(job, FILES)
    out = tmp_path / "out"
    assert len(said(front, "download", job["id"], "--out", str(out))["files"]) == 2
    assert {name: (out / name).read_bytes() for name in FILES} == FILES
    (out / "model.safetensors").write_bytes(b"mine")
    assert call(front, "download", job["id"], "--out", str(out)).exit_code == 1
    assert "2 files" in call(front, "download", job["id"], "--out", str(out), "--overwrite").stdout


def test_events(front: Front, recipe_file: str) -> None:
    job = said(front, "submit", recipe_file)
    front.finish(job)
    lines = call(front, "events", job["id"], "--follow", "--json").stdout.splitlines()
    events = [json.loads(line) for line in lines]
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    assert events[-1]["type"] == "job.succeeded"
    assert "job.queued" in call(front, "events", job["id"]).stdout


def test_a_plan_of_an_evaluation(front: Front, tmp_path: Path) -> None:
    for name, classes in (("merged", 2), ("expert", 3)):
        front.put(f"s3://models/{name}/model.safetensors", evaluations.file(evaluations.head(classes)))
        front.put(f"s3://models/{name}/config.json", evaluations.config(classes))
    front.put("s3://models/merged/heads/cars.safetensors", evaluations.file(evaluations.head(3)))
    samples: dict[str, tuple[str, tuple[int, ...]]] = {"input_ids": ("I64", (6, 4)), "labels": ("I64", (6,))}
    front.put("s3://data/cars.safetensors", evaluations.file(samples))
    path = tmp_path / "check.json"
    models = [
        {"name": name, "checkpoint": f"s3://models/{name}/", "reference": name == "expert"}
        for name in ("merged", "expert")
    ]
    rows = [{"task": "cars", "labeled": "s3://data/cars.safetensors"}]
    path.write_text(json.dumps({"models": models, "evaluation": {"tasks": rows}}))
    shown = call(front, "plan", str(path))
    assert shown.exit_code == 0, shown.output
    lines = {re.split(r"\s{2,}", line.strip())[0]: line for line in shown.stdout.splitlines()}
    assert "on cars (heads for cars)" in lines["model merged"]
    assert "on cars (reference)" in lines["model expert"]
    assert "peak memory" in lines
    assert said(front, "plan", str(path))["parts"] == 2


def test_plan_and_methods(front: Front, recipe_file: str) -> None:
    assert said(front, "plan", recipe_file)["tensors"] == 2
    assert "peak memory" in call(front, "plan", recipe_file).stdout
    assert {method["name"] for method in said(front, "methods")["methods"]} >= {"cat", "ties"}
    assert {preset["name"] for preset in said(front, "methods")["presets"]} == {"auto", "paper"}
    assert "task_arithmetic" in call(front, "methods").stdout
    assert "auto" in call(front, "methods").stdout


def test_analyze(front: Front, tmp_path: Path) -> None:
    path = tmp_path / "two.json"
    tasks = [{"name": name, "checkpoint": "s3://models/cars.safetensors"} for name in ("cars", "pets")]
    path.write_text(json.dumps(recipe(tasks=tasks)))
    job = said(front, "analyze", str(path), "--key", "analysis")
    assert job["recipe"]["mode"] == "analysis"
    assert said(front, "analyze", str(path), "--key", "analysis")["id"] == job["id"]
    rows = {
        "cars": {"verdict": "leave_out", "why": "drowns_others", "suffers": None, "causes": 2.5},
        "pets": {"verdict": "well", "why": "calm", "suffers": 0.25, "causes": 0.125},
    }
    claim = front.house.parts.claim(PartMessage(Stage.PLAN, job["id"], 0), "worker")
    assert claim is not None
    result = {"prefix": job["recipe"]["output"]["prefix"], "artifacts": [], "analysis": {"verdict": {"tasks": rows}}}
    front.house.parts.complete(claim, Done(status=Status.SUCCEEDED, result=result), Counters())
    shown = call(front, "analyze", str(path), "--key", "analysis", "--watch")
    assert shown.exit_code == 0, shown.output
    lines = [line.split() for line in shown.stdout.splitlines()]
    assert ["cars", "leave", "this", "task", "out", "–", "2.50"] in lines
    assert ["pets", "merge", "well", "0.25", "0.12"] in lines


def test_wrong_usage(front: Front) -> None:
    assert call(front, "submit").exit_code == 2
    assert call(front, "nothing").exit_code == 2
    assert call(front, "ls", "--label", "x").exit_code == 1


def test_the_program_says_one_sentence_where_nobody_answers(tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "service.cli", "ls"]
    done = subprocess.run(
        command, env={**os.environ, "CATMERGE_URL": url}, capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert url in done.stderr
    assert "Traceback" not in done.stderr


def test_the_service_of_this_folder_is_found(front: Front, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {"url": str(front.http.base_url), "pid": os.getpid()}
    (tmp_path / "up.json").write_text(json.dumps(state))
    monkeypatch.setenv("CATMERGE_DATA", str(tmp_path))
    monkeypatch.delenv("CATMERGE_URL", raising=False)
    assert CliRunner().invoke(app, ["methods", "--json"]).exit_code == 0


def test_calibrate_needs_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["calibrate", "--checkpoint", str(tmp_path), "--exemplars", str(tmp_path / "x"), "--out", "y"]
    monkeypatch.setitem(sys.modules, "torch", None)
    result = CliRunner().invoke(app, options)
    assert (result.exit_code, "pip install 'catmerge[worker]'" in result.stderr) == (1, True)


def test_version() -> None:
    assert CliRunner().invoke(app, ["version"]).stdout.startswith("catmerge ")
    assert "version" in json.loads(CliRunner().invoke(app, ["version", "--json"]).stdout)


def test_migrate_brings_the_schema_up_to_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"sqlite:///{tmp_path / 'jobs.db'}"
    monkeypatch.setenv("CATMERGE_DATABASE_URL", url)
    for _ in range(2):
        result = CliRunner().invoke(app, ["migrate", "--json"])
        assert result.exit_code == 0, result.output
    database = Database(url)
    assert database.is_current()
    assert json.loads(result.stdout) == {"revision": database.revision()}
    database.close()


def test_migrate_says_when_the_database_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CATMERGE_DATABASE_URL", f"postgresql://catmerge:hidden@127.0.0.1:{free_port()}/catmerge")
    result = CliRunner().invoke(app, ["migrate"])
    assert result.exit_code == 1
    assert "can't be migrated" in result.stderr
    assert "hidden" not in result.output
