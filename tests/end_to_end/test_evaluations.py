"""An evaluation over HTTP: is a merge's result what its report says? Real processes, the demo's models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from service.client import ProblemError
from tests.end_to_end.test_embedded import DEMO, TASKS, WAIT_SECONDS, recipe, up


@pytest.mark.slow
def test_a_merged_model_is_what_its_report_says(tmp_path: Path) -> None:
    with up(tmp_path) as opened, opened.client() as client:
        asked = {**recipe(0.4), "output": {"prefix": "s3://merged/run/"}}
        merged = client.wait(client.submit(asked)["id"], timeout_seconds=WAIT_SECONDS)
        assert merged["status"] == "succeeded", merged["error"]
        told = merged["result"]["metrics"]

        models: list[dict[str, Any]] = [{"name": "merged", "checkpoint": "s3://merged/run/"}]
        for task in TASKS:
            place = f"file://{DEMO}/tasks/{task}/"
            models.append({"name": f"{task}-expert", "checkpoint": place, "tasks": [task], "reference": True})
        gate = {"metric": "worst_task_retention", "at_least": told["worst_retention"]}
        check = {"models": models, "evaluation": asked["evaluation"], "gates": [gate]}
        job = client.wait(client.evaluate(check)["id"], timeout_seconds=WAIT_SECONDS)
        assert job["status"] == "succeeded", (job["error"], job["result"])
        found = job["result"]["metrics"]
        for task, row in told["tasks"].items():
            ours, theirs = (found["tasks"][task]["models"][name] for name in ("merged", f"{task}-expert"))
            assert (ours["score"], ours["interval"]) == (row["merged"], row["intervals"]["merged"])
            assert theirs["score"] == row["expert"]
            assert (ours["retention"], ours["retention_interval"]) == (row["retention"], row["intervals"]["retention"])
        assert found["models"]["merged"]["worst_retention"] == told["worst_retention"]

        (path,) = client.download(job["id"], tmp_path / "report", match=["merge/report.html"])
        assert "Evaluation: 5 models on 4 tasks" in path.read_text()
        listed = [[row["id"] for row in client.list(kind=kind)] for kind in ("merge", "evaluation")]
        assert listed == [[merged["id"]], [job["id"]]]

        strict = {**check, "gates": [{**gate, "at_least": min(told["worst_retention"] + 0.01, 10)}]}
        rejected = client.wait(client.evaluate(strict)["id"], timeout_seconds=WAIT_SECONDS)
        assert rejected["status"] == "rejected"
        with pytest.raises(ProblemError, match="does not exist"):
            client.evaluate(json.loads(json.dumps(check).replace("s3://merged/run/", "s3://merged/gone/")))
