"""A search that nobody asked for, as its caller sees it: before the merge, in the job, and in the plan."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from service.cli.app import app
from tests.service.front import Front, connections_to, open_front

DEMO = Path(__file__).parents[3] / "deploy" / "demo"
TASKS = ("digits", "rotated")
SCALINGS = [1.4, 1.05, 1.75, 0.7, 2.1]


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    folder = tmp_path_factory.mktemp("front")
    with open_front(folder, connections_to(folder, file_roots=(str(DEMO),))) as opened:
        yield opened


def recipe(**changes: Any) -> dict[str, Any]:
    place = f"file://{DEMO}"
    tasks = [{"name": name, "checkpoint": f"{place}/tasks/{name}/"} for name in TASKS]
    rows = [
        {"task": name, **{key: f"{place}/tasks/{name}/{file}.safetensors" for key, file in FILES.items()}}
        for name in TASKS
    ]
    return {"base": f"{place}/base/", "tasks": tasks, "method": "auto", "evaluation": {"tasks": rows}, **changes}


FILES = {"labeled": "test", "validation": "val"}


def test_the_job_says_what_is_searched_for(front: Front) -> None:
    key = {"Idempotency-Key": "default-search"}
    first, again = (front.http.post("/v1/merges", json=recipe(), headers=key) for _ in range(2))
    assert (first.status_code, again.json()["id"]) == (202, first.json()["id"])
    job = first.json()
    assert job["recipe"]["search"]["space"] == {"scaling": SCALINGS}
    assert front.http.get(job["links"]["self"]).json()["recipe"] == job["recipe"]
    stored = {**job["recipe"], "output": {}}
    assert front.http.post("/v1/merges", json=stored).json()["recipe_sha256"] == job["recipe_sha256"]


def test_null_says_no(front: Front) -> None:
    job = front.http.post("/v1/merges", json=recipe(search=None)).json()
    assert job["recipe"]["search"] is None
    assert front.http.post("/v1/merges:plan", json=recipe(search=None)).json()["trials"] == 0


def test_the_plan_counts_trials(front: Front, tmp_path: Path) -> None:
    plan = front.http.post("/v1/merges:plan", json=recipe()).json()
    assert (plan["method"]["name"], plan["trials"]) == ("tsv_m", 5)
    assert plan["search"]["space"] == {"scaling": SCALINGS}
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(recipe()))
    said = CliRunner().invoke(app, ["--url", str(front.http.base_url), "plan", str(file)])
    assert "5 trials over scaling by mean_retention" in said.stdout


def test_one_wrong_field_is_one_fault(front: Front) -> None:
    """The search can't be told then, and nothing is said about it."""
    asked = recipe()
    asked["method"] = {"name": "tsv_m", "scaling": "large"}
    problem = front.http.post("/v1/merges", json=asked).json()
    assert [fault["pointer"] for fault in problem["errors"]] == ["/method/scaling"]
