"""An analysis over HTTP: real processes, the demo's models, and no weights anywhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from service.client import ProblemError
from tests.end_to_end.test_embedded import TASKS, WAIT_SECONDS, recipe, up


@pytest.mark.slow
def test_tasks_are_analyzed_and_then_merged(tmp_path: Path) -> None:
    asked = {name: value for name, value in recipe(0.4).items() if name != "evaluation"}
    with up(tmp_path) as opened, opened.client() as client:
        with pytest.raises(ProblemError, match="leave evaluation out"):
            client.analyze(recipe(0.4))
        job = client.wait(client.analyze(asked)["id"], timeout_seconds=WAIT_SECONDS)
        assert job["status"] == "succeeded", job["error"]
        assert set(job["result"]["analysis"]["verdict"]["tasks"]) == set(TASKS)
        names = {row["name"] for row in client.artifacts(job["id"])}
        assert names == {
            f"merge/{name}"
            for name in (
                "recipe.json",
                "plan.json",
                "analysis.json",
                "trim-log.jsonl",
                "report.json",
                "report.html",
                "manifest.json",
            )
        }
        assert not list(opened.data.rglob("model*.safetensors"))
        assert {row["task"] for row in client.trim_log(job["id"], role="linear")} == set(TASKS)

        merged = client.wait(client.submit(asked)["id"], timeout_seconds=WAIT_SECONDS)
        assert merged["status"] == "succeeded", merged["error"]
        reports = []
        for each in (job, merged):
            client.download(each["id"], tmp_path / each["id"], match=["merge/report.json"])
            reports.append(json.loads((tmp_path / each["id"] / "merge" / "report.json").read_text()))
        for name in ("cosine", "disturbance"):
            analyzed, measured = (report["conflict"][name] for report in reports)
            assert analyzed == [pytest.approx(row, rel=1e-4) for row in measured]

        client.delete(job["id"], artifacts=True)
        assert not list(opened.data.rglob("analysis.json"))
