"""Searches from the recipe to the report, on real checkpoints: trials, what they share, and what is chosen."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from service.contract.errors import BadInput
from service.contract.job import Status
from service.contract.methods import METHODS
from service.contract.plan import Plan
from service.contract.recipe import Recipe
from service.contract.stages import Stage
from tests.workers.architectures import Case
from tests.workers.stage_runs import Run, Trials, family
from tests.workers.tiny_models import TEXT, tokens
from workers.chosen import as_tried
from workers.stages import RUN
from workers.stages.merge import merge_shard
from workers.structures import structure_of
from workers.tensors import TensorReader
from workers.work import Work

SAMPLES = 32
WEIGHT = "bert.encoder.layer.0.output.dense.weight"
Make = Callable[..., Run]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A run whose two tasks have labels for validation and for test: those that their experts give, but a few."""
    case = Case("bert", {**TEXT, "num_labels": 3}, tokens(SAMPLES))
    recipe = family(tmp_path, "BertForSequenceClassification", case)
    for seed in (1, 2):
        for which, shift in (("test", 0), ("validation", 10)):
            write_labeled(tmp_path, f"task{seed}", which, seed + shift)

    def run(
        space: dict[str, Any], method: Any = None, changes: Any = None, evaluation: Any = None, **search: Any
    ) -> Run:
        rows = [
            {
                "task": task,
                "labeled": f"file://{tmp_path}/{task}-test.safetensors",
                "validation": f"file://{tmp_path}/{task}-validation.safetensors",
            }
            for task in ("task1", "task2")
        ]
        asked = {
            **recipe,
            "method": method or recipe["method"],
            "evaluation": {"tasks": rows, "resamples": 100, **(evaluation or {})},
            "search": {"space": space, **search},
            **(changes or {}),
        }
        return Run(tmp_path, Recipe.model_validate(asked))

    return run


def write_labeled(folder: Path, task: str, which: str, seed: int) -> None:
    inputs = tokens(SAMPLES, seed=seed)
    model = AutoModelForSequenceClassification.from_pretrained(folder / task)
    with torch.no_grad():
        labels = model(**inputs).logits.argmax(1)
    labels[::4] = 0
    save_file({**inputs, "labels": labels}, folder / f"{task}-{which}.safetensors")


def report_of(run: Run) -> dict[str, Any]:
    return dict(json.loads((run.folder / "result/merge/report.json").read_text()))


def test_a_search_ends_in_the_merge_of_its_best_trial(make: Make) -> None:
    run = make({"scaling": {"low": 0.1, "high": 1.5}, "rank": [0, 2]}, trials=12)
    done = run.finish()
    assert done.status is Status.SUCCEEDED
    found = report_of(run)["search"]
    assert [row["number"] for row in found["trials"]] == list(range(12))
    assert {row["state"] for row in found["trials"]} == {"complete"}
    best = max(found["trials"], key=lambda row: (row["value"], -row["number"]))
    assert (found["chosen"], found["validation"]) == (best["parameters"], best["value"])
    assert [row["best"] for row in found["trials"]][-1] == best["value"]
    assert found["test"] == pytest.approx(report_of(run)["metrics"]["mean_retention"])
    assert found["importances"].keys() <= {"scaling", "rank"}
    assert (done.result or {})["search"] == found
    manifest = json.loads((run.folder / "result/merge/manifest.json").read_text())
    for method in (report_of(run)["method"], manifest["method"]):
        assert {name: method[name] for name in found["chosen"]} == found["chosen"]
    asked = json.loads((run.folder / "result/merge/recipe.json").read_text())
    assert (asked["method"]["scaling"], asked["search"]["trials"]) == (0.4, 12)
    assert "Chosen by a search" in (run.folder / "result/README.md").read_text()
    assert not list((run.folder / "workspace").rglob("scratch/**/*.*"))


@pytest.mark.parametrize(
    ("space", "method"),
    [
        ({"method": ["task_arithmetic", "lot"], "scaling": [0.2, 0.7]}, {"name": "cat"}),
        ({"density": [0.1, 0.6], "scaling": [0.5, 0.7, 1.0]}, {"name": "ties"}),  # surveys whole task vectors first
        ({"density": {"low": 0.1, "high": 0.6}}, {"name": "breadcrumbs", "scope": "model"}),
        ({"rank": [0, 1, 2], "weights.task2": [0.5, 1.0]}, {"name": "cat", "balance": 0.5}),
        ({"then.scaling": [0.5, 1.0], "rank": [1, 2]}, {"name": "cat", "balance": 0.5, "then": {"name": "tsv_m"}}),
    ],
)
def test_the_result_is_the_merge_that_the_chosen_recipe_gives(make: Make, space: Any, method: Any) -> None:
    evaluation = {"baselines": ["ties"]}
    run = make(space, method, evaluation=evaluation, trials=6)
    run.finish()
    assert report_of(run)["metrics"]["mean_accuracy"].keys() == {"base", "expert", "merged", "ties"}
    searched, chosen = run.merged(), report_of(run)["search"]["chosen"]
    plain = replace(run, recipe=run.work(Stage.SEARCH, 0).recipe.tried(chosen), done={}, study=Trials())
    planned = Plan.model_validate_json((run.folder / "result/merge/plan.json").read_text())
    (run.folder / "result/merge/manifest.json").unlink()
    plain.finish()
    assert planned == Plan.model_validate_json((run.folder / "result/merge/plan.json").read_text())
    for name, tensor in plain.merged().items():
        assert tensor.equal(searched[name])


def test_the_plan_of_a_search_does_not_lie_where_that_of_the_result_will(make: Make) -> None:
    """What a planner that was killed has sent may arrive when the result is whole."""
    run = make({"scaling": [0.2, 0.7]})
    RUN[Stage.PLAN](run.work(Stage.PLAN, 0))
    assert (run.folder / "workspace/scratch/job/plan.json").exists()
    assert not (run.folder / "result/merge/plan.json").exists()


SCALED = [name for name, row in METHODS.items() if "scaling" in row.model_fields]


@pytest.mark.parametrize("method", SCALED)
def test_every_scaling_of_a_structure_is_as_if_merged_anew(make: Make, method: str) -> None:
    """Of every method that has a scaling, also where an override holds some parameters at another one."""
    held = [{"match": "*layer.1.output*", "parameters": {"scaling": 0.25}}]
    run = make({"scaling": [0.7, 1.3]}, {"name": method}, {"overrides": held}, sampler="grid")
    run.go()
    for scaling in (0.7, 1.3):
        recipe = run.work(Stage.SEARCH, 0).recipe.tried({"scaling": scaling})
        work = run.work(Stage.SEARCH, 0)
        kept = structure_of(work, recipe, 9, merge_shard, _no_surveys, is_kept=True)  # by a trial before
        with TensorReader(work.objects) as reader:
            found = kept.at_scaling(work, reader, recipe, as_tried(work, recipe, kept.surveys).plan())
        plain = Run(run.folder, recipe)
        plain.go()
        base = load_file(run.folder / "base/model.safetensors")
        assert any(not tensor.equal(base[name]) for name, tensor in found.items())
        for name, tensor in plain.merged().items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)


def test_every_scaling_of_what_follows_is_as_if_merged_anew(make: Make) -> None:
    held = [{"match": "*layer.1.output*", "parameters": {"rank": 1}}]
    method = {"name": "cat", "balance": 0.5, "then": {"name": "tsv_m"}}
    run = make({"then.scaling": [0.7, 1.3]}, method, {"overrides": held}, sampler="grid")
    run.go()
    work = run.work(Stage.SEARCH, 0)
    recipe = work.recipe.tried({"then.scaling": 1.3})
    kept = structure_of(work, recipe, 9, merge_shard, _no_surveys, is_kept=True)  # by a trial before
    with TensorReader(work.objects) as reader:
        found = kept.at_scaling(work, reader, recipe, as_tried(work, recipe, kept.surveys).plan())
    plain = Run(run.folder, recipe)
    plain.go()
    for name, tensor in plain.merged().items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)


def _no_surveys(_work: Work) -> list[str]:
    raise AssertionError("what was merged before is not surveyed again")


def test_trials_that_differ_by_scaling_read_the_checkpoints_once(make: Make) -> None:
    read = {}
    for trials in (1, 4):
        run = make({"scaling": [0.1, 0.2, 0.3, 0.4]}, sampler="grid", trials=trials)
        run.go()
        read[trials] = run.bytes_read[Stage.SEARCH]
        assert len(list((run.folder / "workspace").rglob("search/*/model.safetensors"))) == (trials > 1)
        for file in (run.folder / "workspace").rglob("scratch/**/*.*"):
            file.unlink()
    assert read[4] < 4 * read[1]


def test_the_same_seed_gives_the_same_search(make: Make) -> None:
    space = {"scaling": {"low": 0.1, "high": 2, "log": True}, "rank": {"low": 0, "high": 8}, "weights.task1": [0.5, 1]}
    found = []
    for seed in (1, 1, 2):
        run = make(space, trials=14, changes={"seed": seed})
        run.go()
        found.append([(dict(trial.parameters), trial.value) for trial in run.study.known])
    assert found[0] == found[1]
    assert found[0] != found[2]
    assert all(isinstance(parameters["rank"], int) for parameters, _ in found[0])


def test_the_first_trial_is_what_was_asked_for(make: Make) -> None:
    run = make({"scaling": {"low": 0.1, "high": 2}, "rank": {"low": 0, "high": 8}}, trials=1)
    run.go()
    assert run.study.known[0].parameters == {"scaling": 0.4, "rank": 4}


def test_calibration_sees_what_any_trial_may_need(make: Make) -> None:
    run = make({"method": ["task_arithmetic", "lot"]}, {"name": "task_arithmetic"}, sampler="grid")
    run.go()
    assert len(run.statistics()) == 2
    assert {trial.state for trial in run.study.known} == {"complete"}
    assert run.warnings(Stage.MERGE) == []


def test_a_scaling_that_nobody_gave_is_searched_for(make: Make) -> None:
    asked = make({"scaling": [1.0]}, {"name": "task_arithmetic"}).recipe.model_dump(exclude={"search", "method"})
    run = make({"scaling": [1.0]})
    run = replace(run, recipe=Recipe.model_validate({**asked, "method": {"name": "task_arithmetic"}}))
    run.finish()
    found = report_of(run)["search"]
    assert sorted(row["parameters"]["scaling"] for row in found["trials"]) == [0.2, 0.3, 0.4, 0.5, 0.6]
    assert len(list((run.folder / "workspace").rglob("search/*/model.safetensors"))) == 0
    assert report_of(run)["method"]["scaling"] == found["chosen"]["scaling"]


def test_a_trial_that_can_not_be_merged_fails_alone(make: Make) -> None:
    """DELLA's window of chances does not fit this density: only the combination is wrong."""
    run = make({"density": [0.05, 0.5]}, {"name": "della"}, sampler="grid")
    run.finish()
    first, second = report_of(run)["search"]["trials"]
    assert (first["state"], second["state"]) == ("failed", "complete")
    assert "epsilon" in first["detail"]
    assert report_of(run)["search"]["chosen"] == {"density": 0.5}


def test_a_trial_without_a_figure_fails_alone(make: Make) -> None:
    """At this scaling the merged model's answers are infinite."""
    run = make(
        {"scaling": [100.0, 0.3]}, {"name": "task_arithmetic"}, sampler="grid", changes={"output": {"dtype": "F16"}}
    )
    for task in ("task1", "task2"):
        file = run.folder / task / "model.safetensors"
        tensors = load_file(file)
        tensors[WEIGHT][0, 0] += 1e4
        save_file(tensors, file, {"format": "pt"})
    run.go()
    assert [trial.state for trial in run.study.known] == ["failed", "complete"]
    assert "NaN or infinity" in (run.study.known[0].detail or "")


def give_one_number(checkpoint: Path) -> None:
    """Leave the first row of a classifier, which makes a regression of it."""
    tensors = load_file(checkpoint / "model.safetensors")
    tensors |= {name: tensors[name][:1].contiguous() for name in ("classifier.weight", "classifier.bias")}
    save_file(tensors, checkpoint / "model.safetensors", {"format": "pt"})
    config = json.loads((checkpoint / "config.json").read_text())
    config |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    (checkpoint / "config.json").write_text(json.dumps(config))


def label_with_own_answers(checkpoint: Path, file: Path) -> None:
    inputs = load_file(file)
    del inputs["labels"]
    with torch.no_grad():
        answers = AutoModelForSequenceClassification.from_pretrained(checkpoint)(**inputs).logits[:, 0]
    save_file({**inputs, "labels": answers.contiguous()}, file)


def test_a_trial_whose_metric_is_no_number_fails_alone(make: Make) -> None:
    """At scaling 0 the merged model is the base, which gives every sample the same number: no correlation."""
    run = make({"scaling": [0.0, 0.3, 0.6]}, {"name": "task_arithmetic"}, sampler="grid")
    for name in ("base", "task1", "task2"):
        give_one_number(run.folder / name)
    base = run.folder / "base" / "model.safetensors"
    tensors = load_file(base)
    tensors["bert.pooler.dense.weight"].zero_()
    save_file(tensors, base, {"format": "pt"})
    recipe = run.recipe.model_dump(mode="json", exclude={"evaluation": {"tasks": {"__all__": {"metrics"}}}})
    for row in recipe["evaluation"]["tasks"]:
        row["kind"] = "regression"
        for file in (row["labeled"], row["validation"]):
            label_with_own_answers(run.folder / row["task"], Path(file.removeprefix("file://")))
    measured = replace(run, recipe=Recipe.model_validate(recipe))
    measured.finish()
    failed, *others = report_of(measured)["search"]["trials"]
    assert (failed["state"], failed["value"]) == ("failed", None)
    assert "retention of task1, task2 on validation samples is no number" in failed["detail"]
    assert len(others) == 2


def test_all_trials_failed(make: Make) -> None:
    run = make({"density": [0.05, 0.04]}, {"name": "della"}, sampler="grid")
    with pytest.raises(BadInput, match="none of the search's 2 trials could be merged and measured; the first one:"):
        run.finish()


def test_trials_after_the_time_are_skipped(make: Make) -> None:
    run = make({"scaling": {"low": 0.1, "high": 1}}, trials=5, seconds=1e-9)
    run.finish()
    found = report_of(run)["search"]
    assert (len(found["trials"]), found["skipped"]) == (1, 4)


def test_the_worst_task_may_decide(make: Make) -> None:
    run = make({"weights.task1": [0.0, 1.0], "scaling": [0.5, 1.0]}, sampler="grid", objective="worst_retention")
    run.go()
    for trial in run.study.known:
        assert trial.value == min(trial.output["retention"].values())
