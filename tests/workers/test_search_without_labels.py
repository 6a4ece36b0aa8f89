"""Searches by how like the experts' the merged model's features are, from the recipe to the report."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from service.contract.errors import BadInput
from service.contract.job import Status
from service.contract.recipe import Recipe
from tests.workers.architectures import Case
from tests.workers.stage_runs import Run, family
from tests.workers.tiny_models import TEXT, tokens
from workers.likeness import likeness

WEIGHT = "bert.encoder.layer.0.output.dense.weight"
Make = Callable[..., Run]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A run of two tasks, which bring exemplars and no labels."""
    recipe = family(tmp_path, "BertForSequenceClassification", Case("bert", {**TEXT, "num_labels": 3}, tokens(8)))

    def run(space: dict[str, Any], method: dict[str, Any], **changes: Any) -> Run:
        search = {"space": space, "sampler": "grid", "objective": "feature_likeness"}
        return Run(tmp_path, Recipe.model_validate({**recipe, "method": method, "search": search, **changes}))

    return run


def report_of(run: Run) -> dict[str, Any]:
    return dict(json.loads((run.folder / "result/merge/report.json").read_text()))


def features(folder: Path, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Means of what transformers' own model gives attended positions."""
    model = AutoModel.from_pretrained(folder)
    with torch.no_grad():
        hidden = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"][..., None].float()
    return torch.as_tensor((hidden * mask).sum(1) / mask.sum(1))


def test_the_chosen_model_is_as_like_its_experts_as_the_report_says(make: Make) -> None:
    run = make({"scaling": [0.1, 0.5, 2.0]}, {"name": "task_arithmetic"})
    done = run.finish()
    assert done.status is Status.SUCCEEDED
    found = report_of(run)["search"]
    assert (found["measures"], found["test"], len(found["trials"])) == ("likeness", None, 3)
    best = max(found["trials"], key=lambda row: row["value"])
    assert found["chosen"] == best["parameters"]
    for task, figure in best["likeness"].items():
        inputs = load_file(run.folder / f"{task}.safetensors")
        expert, merged = features(run.folder / task, inputs), features(run.folder / "result", inputs)
        share = (merged - expert).abs().sum() / expert.abs().sum()
        assert figure == pytest.approx(1 - float(share), abs=1e-5)
    assert "without labels" in (run.folder / "result/README.md").read_text()
    assert "compared without labels" in (run.folder / "result/merge/report.html").read_text()


def test_of_one_task_the_expert_itself_is_the_likest(make: Make) -> None:
    space = {"scaling": [0.5, 1.0, 1.5], "weights.task2": [0.0]}
    run = make(space, {"name": "task_arithmetic"})
    run.go()
    assert [trial.output["likeness"]["task1"] for trial in run.study.known][1] == pytest.approx(1, abs=1e-5)
    assert all(trial.output["likeness"]["task1"] < 0.999 for trial in (run.study.known[0], run.study.known[2]))


def test_experts_are_looked_at_once(make: Make) -> None:
    run = make({"scaling": [0.1, 0.5, 2.0]}, {"name": "task_arithmetic"})
    run.go()
    assert len(list((run.folder / "workspace/cache/features").iterdir())) == 2


def test_a_trial_whose_features_are_no_numbers_fails_alone(make: Make) -> None:
    """At this scaling the merged model's features are infinite."""
    run = make({"scaling": [100.0, 0.3]}, {"name": "task_arithmetic"}, output={"dtype": "F16"})
    for task in ("task1", "task2"):
        file = run.folder / task / "model.safetensors"
        tensors = load_file(file)
        tensors[WEIGHT][0, 0] += 1e4
        save_file(tensors, file, {"format": "pt"})
    run.go()
    assert [trial.state for trial in run.study.known] == ["failed", "complete"]
    assert run.study.known[0].detail == "the likeness of task1, task2 on exemplars is no number"


def test_exemplars_that_do_not_fit_are_named(make: Make) -> None:
    run = make({"scaling": [0.3]}, {"name": "task_arithmetic"})
    file = run.folder / "task2.safetensors"
    samples = load_file(file)
    samples["input_ids"][0, 0] = 10**6
    save_file(samples, file)
    with pytest.raises(BadInput, match=r"task2.safetensors: the input 'input_ids'"):
        run.finish()


def test_likeness() -> None:
    expert = torch.tensor([[1.0, -3.0], [0.0, 4.0]])
    assert likeness(expert, expert) == 1
    assert likeness(expert + torch.tensor([[0.0, 2.0], [0.0, 0.0]]), expert) == pytest.approx(0.75)
    assert math.isnan(likeness(expert * math.nan, expert))
    assert math.isnan(likeness(expert, torch.zeros(2, 2)))
