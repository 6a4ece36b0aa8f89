"""Searches by how like the experts' the merged model's features or predictions are, from recipe to report."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import AutoModel, AutoModelForSequenceClassification

from service.contract.errors import BadInput
from service.contract.job import Status
from service.contract.recipe import Recipe
from tests.workers.architectures import Case
from tests.workers.stage_runs import Run, family
from tests.workers.tiny_models import TEXT, tokens
from workers.likeness import feature_likeness, prediction_likeness

WEIGHT = "bert.encoder.layer.0.output.dense.weight"
FIGURES = {"feature_likeness": "likeness", "prediction_likeness": "prediction_likeness"}
Make = Callable[..., Run]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A run of two tasks, which bring exemplars and no labels."""
    recipe = family(tmp_path, "BertForSequenceClassification", Case("bert", {**TEXT, "num_labels": 3}, tokens(8)))

    def run(space: dict[str, Any], method: dict[str, Any], objective: str = "feature_likeness", **changes: Any) -> Run:
        search = {"space": space, "sampler": "grid", "objective": objective}
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


def predictions(folder: Path, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Probabilities of classes, by transformers' own model."""
    with torch.no_grad():
        return torch.as_tensor(AutoModelForSequenceClassification.from_pretrained(folder)(**inputs).logits.softmax(1))


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


def test_the_chosen_model_predicts_as_its_experts_do_as_the_report_says(make: Make) -> None:
    run = make({"scaling": [0.1, 0.5, 2.0]}, {"name": "task_arithmetic"}, "prediction_likeness")
    run.finish()
    found = report_of(run)["search"]
    assert found["measures"] == found["objective"] == "prediction_likeness"
    assert found["test"] is None
    best = max(found["trials"], key=lambda row: row["value"])
    assert found["chosen"] == best["parameters"]
    for task, figure in best["prediction_likeness"].items():
        inputs = load_file(run.folder / f"{task}.safetensors")
        expert, merged = predictions(run.folder / task, inputs), predictions(run.folder / "result", inputs)
        assert figure == pytest.approx(float(torch.minimum(expert, merged).sum(1).mean()), abs=1e-5)
    page = (run.folder / "result/merge/report.html").read_text()
    assert "compared without labels: by how like the experts&#39; the merged model&#39;s predictions" in page
    assert "without labels" in (run.folder / "result/README.md").read_text()


def test_classes_may_be_predicted_by_a_head_of_features(make: Make, tmp_path: Path) -> None:
    asked = []
    for seed, task in enumerate(("task1", "task2")):
        width = load_file(tmp_path / "base/model.safetensors")[WEIGHT].shape[0]
        weight = torch.randn(4, width, generator=torch.Generator().manual_seed(seed))
        save_file({"weight": weight, "logit_scale": torch.tensor(1.0)}, tmp_path / f"{task}-head.safetensors")
        labeled = {**load_file(tmp_path / f"{task}.safetensors"), "labels": torch.zeros(8, dtype=torch.int64)}
        save_file(labeled, tmp_path / f"{task}-test.safetensors")
        head = {"weight": f"file://{tmp_path}/{task}-head.safetensors"}
        asked.append({"task": task, "labeled": f"file://{tmp_path}/{task}-test.safetensors", "head": head})
    run = make({"scaling": [0.5]}, {"name": "task_arithmetic"}, "prediction_likeness", evaluation={"tasks": asked})
    run.finish()
    (trial,) = run.study.known
    for task, figure in trial.output["prediction_likeness"].items():
        inputs, matrix = load_file(tmp_path / f"{task}.safetensors"), load_file(tmp_path / f"{task}-head.safetensors")
        rows = matrix["weight"].T * matrix["logit_scale"].exp()
        expert, merged = (
            (functional.normalize(features(place, inputs)) @ rows).softmax(1)
            for place in (tmp_path / task, tmp_path / "result")
        )
        assert figure == pytest.approx(float(torch.minimum(expert, merged).sum(1).mean()), abs=1e-5)


@pytest.mark.parametrize(("objective", "figure"), [*FIGURES.items()])
def test_of_one_task_the_expert_itself_is_the_likest(make: Make, objective: str, figure: str) -> None:
    space = {"scaling": [0.5, 1.0, 1.5], "weights.task2": [0.0]}
    run = make(space, {"name": "task_arithmetic"}, objective, heads=["classifier.*"])
    run.go()
    below, same, above = (trial.output[figure]["task1"] for trial in run.study.known)
    assert same == pytest.approx(1, abs=1e-5)
    assert max(below, above) < same - 1e-5


@pytest.mark.parametrize("objective", FIGURES)
def test_experts_are_looked_at_once(make: Make, objective: str) -> None:
    run = make({"scaling": [0.1, 0.5, 2.0]}, {"name": "task_arithmetic"}, objective)
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
    run.finish()
    assert [trial.state for trial in run.study.known] == ["failed", "complete"]
    assert run.study.known[0].detail == "the likeness of task1, task2 on exemplars is no number"
    page = (run.folder / "result/merge/report.html").read_text()
    assert "the likeness of task1, task2 on exemplars is no number" in page
    assert "task1, task2 の代表サンプルでの特徴量の近さを数値として求められません" in page


def test_exemplars_that_do_not_fit_are_named(make: Make) -> None:
    run = make({"scaling": [0.3]}, {"name": "task_arithmetic"})
    file = run.folder / "task2.safetensors"
    samples = load_file(file)
    samples["input_ids"][0, 0] = 10**6
    save_file(samples, file)
    with pytest.raises(BadInput, match=r"task2.safetensors: the input 'input_ids'"):
        run.finish()


def test_a_head_that_gives_one_number_predicts_no_classes(make: Make) -> None:
    run = make({"scaling": [0.3]}, {"name": "task_arithmetic"}, "prediction_likeness")
    for name in ("base", "task1", "task2"):
        file = run.folder / name / "model.safetensors"
        tensors = load_file(file)
        tensors |= {name: tensors[name][:1].contiguous() for name in ("classifier.weight", "classifier.bias")}
        save_file(tensors, file, {"format": "pt"})
        config = json.loads((run.folder / name / "config.json").read_text())
        config |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
        (run.folder / name / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, match="the head of task 'task1' gives one number, and predicts no classes"):
        run.finish()


def test_likeness_of_features() -> None:
    expert = torch.tensor([[1.0, -3.0], [0.0, 4.0]])
    assert feature_likeness(expert, expert) == 1
    assert feature_likeness(expert + torch.tensor([[0.0, 2.0], [0.0, 0.0]]), expert) == pytest.approx(0.75)
    assert math.isnan(feature_likeness(expert * math.nan, expert))
    assert math.isnan(feature_likeness(expert, torch.zeros(2, 2)))


def test_likeness_of_predictions() -> None:
    """Of two samples the first is predicted alike; of the second the expert gives 3/4 and 1/4, the other 1/2 each."""
    expert = torch.tensor([[5.0, 5.0], [math.log(3), 0.0]])
    other = torch.tensor([[-2.0, -2.0], [0.0, 0.0]])
    assert prediction_likeness(expert, expert) == pytest.approx(1)
    assert prediction_likeness(other, expert) == pytest.approx((1 + 0.5 + 0.25) / 2)
    assert prediction_likeness(torch.tensor([[1e9, 0.0], [0.0, 1e9]]), expert) == pytest.approx((0.5 + 0.25) / 2)
    assert math.isnan(prediction_likeness(other * math.nan, expert))
