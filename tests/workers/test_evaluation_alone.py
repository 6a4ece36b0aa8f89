"""An evaluation by itself, from checkpoints to the report: it measures what a merge did, and what transformers does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForSequenceClassification

from service.contract.errors import BadInput, InputChanged
from service.contract.evaluating import EvaluationRecipe
from service.contract.job import Status
from service.contract.recipe import Recipe
from service.contract.stages import Stage
from tests.checkpoints import Family, write_family
from tests.workers.stage_runs import Run
from tests.workers.test_adapters import QUERY, RANK, pair, write_adapter
from workers import speed

CLASSES = {"cars": 3, "pets": 5}
Evaluate = Callable[..., Run]


@pytest.fixture
def family(tmp_path: Path) -> Family:
    return write_family(tmp_path, "bert", CLASSES, samples=8)


@pytest.fixture
def evaluate(family: Family) -> Evaluate:
    """An evaluation of models on the family's labeled samples, in a folder of its own."""

    def run(models: list[dict[str, Any]], tasks: tuple[str, ...] = tuple(CLASSES), **changes: Any) -> Run:
        place = f"file://{family.folder}/"
        rows = [{"task": task, "labeled": f"{place}{task}-labeled.safetensors"} for task in tasks]
        for model in models:
            model["checkpoint"] = place + model["checkpoint"]
        asked = {"models": models, "evaluation": {"tasks": rows, "resamples": 200}, **changes}
        return Run(family.folder, EvaluationRecipe.model_validate(asked), output="evaluated")

    return run


def merge(family: Family, **changes: Any) -> dict[str, Any]:
    """A merge of the family under ``result/``, evaluated; returns its metrics."""
    asked = family.recipe(f"file://{family.folder}/", evaluated=True, **changes)
    asked["evaluation"]["resamples"] = 200
    done = Run(family.folder, Recipe.model_validate(asked)).finish()
    assert done.status is Status.SUCCEEDED
    return dict((done.result or {})["metrics"])


def report_of(run: Run) -> dict[str, Any]:
    return dict(json.loads((run.folder / run.output / "merge/report.json").read_text()))


def experts() -> list[dict[str, Any]]:
    return [
        {"name": f"{task}-expert", "checkpoint": f"{task}/", "tasks": [task], "reference": True} for task in CLASSES
    ]


def test_a_merged_model_is_measured_by_its_prefix_alone_as_its_own_report_has_it(
    family: Family, evaluate: Evaluate
) -> None:
    merged = merge(family)
    run = evaluate([{"name": "merged", "checkpoint": "result/"}, *experts()])
    done = run.finish()
    found = report_of(run)["metrics"]
    assert (done.result or {})["metrics"] == found
    for task, row in merged["tasks"].items():
        ours, theirs = found["tasks"][task]["models"]["merged"], found["tasks"][task]["models"][f"{task}-expert"]
        assert found["tasks"][task]["reference"] == f"{task}-expert"
        assert (ours["score"], theirs["score"]) == (row["merged"], row["expert"])
        assert (ours["interval"], theirs["interval"]) == (row["intervals"]["merged"], row["intervals"]["expert"])
        assert (ours["retention"], ours["retention_interval"]) == (row["retention"], row["intervals"]["retention"])
        assert (ours["drop"], ours["drop_interval"]) == (row["drop"], row["intervals"]["drop"])
        assert found["tasks"][task]["all"]["merged"] == row["all"]["merged"]
    for name in ("mean_retention", "mean_retention_interval", "worst_retention", "worst_task"):
        assert found["models"]["merged"][name] == merged[name]
    files = [family.folder / "result/model.safetensors", *(family.folder / "result/heads").glob("*.safetensors")]
    assert found["models"]["merged"]["bytes"] == sum(file.stat().st_size for file in files)


def test_an_experts_scores_are_those_that_a_merge_has_kept(family: Family, evaluate: Evaluate) -> None:
    merge(family)
    cache = family.folder / "workspace/cache/scores"
    before = set(cache.iterdir())
    evaluate([{"name": "expert", "checkpoint": "cars/", "tasks": ["cars"]}], ("cars",)).finish()
    assert set(cache.iterdir()) == before, "nothing was measured anew"
    evaluate([{"name": "merged", "checkpoint": "result/"}], ("cars",)).finish()
    assert len(set(cache.iterdir())) == len(before) + 1


def test_a_heads_configuration_is_that_of_its_task(family: Family) -> None:
    merge(family)
    for task, classes in CLASSES.items():
        config = AutoConfig.from_pretrained(family.folder / f"result/heads/{task}.json")
        assert config.num_labels == classes
        config = AutoConfig.from_pretrained(family.folder / f"result/heads/{task}.json")
        head = load_file(family.folder / f"result/heads/{task}.safetensors")
        assert head["classifier.weight"].shape[0] == config.num_labels


@pytest.mark.parametrize("is_told", [True, False])
def test_a_head_of_ones_own_replaces_the_checkpoints(family: Family, evaluate: Evaluate, is_told: bool) -> None:
    heads = family.folder / "mine"
    heads.mkdir()
    expert = load_file(family.checkpoint("cars") / "model.safetensors")
    save_file({n: t for n, t in expert.items() if n.startswith("classifier")}, heads / "cars.safetensors")
    if is_told:
        (heads / "cars.json").write_bytes((family.checkpoint("cars") / "config.json").read_bytes())
    run = evaluate([{"name": "base", "checkpoint": "base/", "heads": f"file://{heads}/"}], ("cars",))
    run.finish()
    samples = load_file(family.labeled("cars"))
    labels = samples.pop("labels")
    model = AutoModelForSequenceClassification.from_pretrained(family.checkpoint("cars"))
    base = load_file(family.base / "model.safetensors")
    model.load_state_dict({n: expert[n] if n.startswith("classifier") else base[n] for n in expert})
    with torch.no_grad():
        expected = float((model(**samples).logits.argmax(1) == labels).double().mean())
    assert report_of(run)["metrics"]["tasks"]["cars"]["models"]["base"]["score"] == pytest.approx(expected)


def test_an_adapter_is_measured_on_its_base(family: Family, evaluate: Evaluate) -> None:
    added = {name: 20 * tensor for name, tensor in pair(f"bert.{QUERY}", 16, 16, seed=1).items()}
    write_adapter(family.folder / "adapter", added)
    place = f"file://{family.folder}/cars/"
    run = evaluate([{"name": "adapter", "checkpoint": "adapter/"}], ("cars",), base=place)
    run.finish()
    samples = load_file(family.labeled("cars"))
    labels = samples.pop("labels")
    model = AutoModelForSequenceClassification.from_pretrained(family.checkpoint("cars"))
    up, down = (added[f"base_model.model.bert.{QUERY}.lora_{side}.weight"] for side in "BA")
    with torch.no_grad():
        model.get_parameter(f"bert.{QUERY}.weight").add_(6 / RANK * up @ down)
        expected = float((model(**samples).logits.argmax(1) == labels).double().mean())
    assert expected < 1, "the labels are what the base answers"
    assert report_of(run)["metrics"]["tasks"]["cars"]["models"]["adapter"]["score"] == pytest.approx(expected)


def test_two_checkpoints_are_compared_on_the_same_samples(evaluate: Evaluate) -> None:
    models = [{"name": "new", "checkpoint": "cars/"}, {"name": "old", "checkpoint": "cars/", "reference": True}]
    run = evaluate(models, ("cars",), gates=[{"metric": "worst_task_retention", "at_least": 1.0, "use": "bound"}])
    assert run.finish().status is Status.SUCCEEDED
    row = report_of(run)["metrics"]["tasks"]["cars"]["models"]["new"]
    assert row["drop_interval"] == [0, 0], "the same resamples: a difference of nothing has no width"
    assert row["distinguishable"] is False


def test_every_model_but_a_reference_is_held_to_every_gate(family: Family, evaluate: Evaluate) -> None:
    merge(family)
    gates = [
        {"metric": "task_score", "task": "cars", "at_least": 1.0},
        {"metric": "task_score", "task": "pets", "at_least": 1.0},
        {"metric": "min_samples", "at_least": 32},
        {"metric": "model_bytes", "at_most": 10},
    ]
    models = [
        {"name": "perfect", "checkpoint": "cars/", "tasks": ["cars"]},
        {"name": "merged", "checkpoint": "result/"},
        {"name": "pets-expert", "checkpoint": "pets/", "tasks": ["pets"], "reference": True},
    ]
    run = evaluate(models, gates=gates)
    done = run.finish()
    assert done.status is Status.REJECTED
    found = {(gate["model"], gate["metric"], gate["task"]): gate["passed"] for gate in report_of(run)["gates"]}
    assert found.keys() == {
        ("perfect", "task_score", "cars"),
        ("perfect", "min_samples", None),
        ("perfect", "model_bytes", None),
        ("merged", "task_score", "cars"),
        ("merged", "task_score", "pets"),
        ("merged", "min_samples", None),
        ("merged", "model_bytes", None),
    }
    assert found["perfect", "task_score", "cars"]
    assert found["merged", "min_samples", None]
    assert not found["perfect", "model_bytes", None]
    page = (run.folder / "evaluated/merge/report.html").read_text()
    assert "Rejected" in page
    assert "(perfect)" in page


def test_the_manifest_names_every_input_once_and_comes_last(family: Family, evaluate: Evaluate) -> None:
    merge(family)
    run = evaluate([{"name": "merged", "checkpoint": "result/"}])
    done = run.finish()
    manifest = json.loads((run.folder / "evaluated/merge/manifest.json").read_text())
    addresses = [row["address"].rpartition("/")[2] for row in manifest["inputs"]]
    assert sorted(addresses) == sorted(
        [
            "model.safetensors",
            *(f"{t}{end}" for t in CLASSES for end in (".safetensors", ".json", "-labeled.safetensors")),
        ]
    )
    names = [file["name"] for file in (done.result or {})["artifacts"]]
    assert names == [
        f"merge/{name}" for name in ("recipe.json", "plan.json", "report.json", "report.html", "manifest.json")
    ]
    assert not list(run.folder.rglob("scratch/*"))


def test_a_task_without_a_head_among_others_is_warned_of(family: Family, evaluate: Evaluate) -> None:
    merge(family)
    save_file({**load_file(family.labeled("cars")), "labels": torch.zeros(32).long()}, family.labeled("carz"))
    run = evaluate([{"name": "merged", "checkpoint": "result/"}], ("cars", "carz"))
    run.finish()
    (warning,) = [text for text in run.warnings(Stage.PLAN) if "heads" in text]
    assert "has heads for cars, pets, and none for carz" in warning


def test_a_checkpoint_that_changes_after_planning_is_told(family: Family, evaluate: Evaluate) -> None:
    run = evaluate([{"name": "expert", "checkpoint": "cars/"}], ("cars",))
    run._do(Stage.PLAN, 0)
    file = family.checkpoint("cars") / "model.safetensors"
    tensors = load_file(file)
    tensors["classifier.bias"] = tensors["classifier.bias"] + 1
    save_file(tensors, file.with_suffix(".new"), metadata={"format": "pt"})
    file.with_suffix(".new").replace(file)
    with pytest.raises(InputChanged, match="submit the evaluation again"):
        run._do(Stage.EVALUATE, 0)


def test_labels_that_the_model_has_no_class_for_are_told(family: Family, evaluate: Evaluate) -> None:
    save_file({**load_file(family.labeled("cars")), "labels": torch.full((32,), 7)}, family.labeled("cars"))
    run = evaluate([{"name": "expert", "checkpoint": "cars/"}], ("cars",))
    with pytest.raises(BadInput, match="label"):
        run.finish()


def test_models_are_timed_where_that_is_asked_for(family: Family, evaluate: Evaluate) -> None:
    merge(family)
    gate = {"metric": "latency_ratio", "at_most": 1000}
    run = evaluate([{"name": "merged", "checkpoint": "result/"}, *experts()], speed=True, gates=[gate])
    done = run.finish()
    report = report_of(run)
    told = report["metrics"]["speed"]
    assert (told["device"], told["batch"]) == ("cpu", 16)
    assert list(told["models"]) == ["merged", "cars-expert", "pets-expert"]
    paces = {name: pace["latency_seconds"] for name, pace in told["models"].items()}
    usual = (paces["cars-expert"] + paces["pets-expert"]) / 2
    assert told["models"]["merged"]["latency_ratio"] == pytest.approx(paces["merged"] / usual)
    assert told["models"]["cars-expert"]["latency_ratio"] is None
    for pace in told["models"].values():
        assert pace["samples_per_second"] == pytest.approx(16 / pace["latency_seconds"])
    (verdict,) = report["gates"]
    assert (verdict["model"], verdict["value"]) == ("merged", told["models"]["merged"]["latency_ratio"])
    assert done.status is Status.SUCCEEDED
    page = (family.folder / "evaluated/merge/report.html").read_text()
    assert "Against the references&#39; mean" in page


def test_models_are_not_timed_unasked(family: Family, evaluate: Evaluate) -> None:
    run = evaluate([{"name": "expert", "checkpoint": "cars/"}], ("cars",))
    run.finish()
    assert report_of(run)["metrics"]["speed"] is None
    assert len(run.done[Stage.EVALUATE]) == 1


def test_where_there_is_no_time_every_model_and_one_reference_are_timed(
    family: Family, evaluate: Evaluate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, "ALL_SECONDS", 0.0)
    merge(family)
    models = [*experts(), {"name": "merged", "checkpoint": "result/"}, {"name": "again", "checkpoint": "result/"}]
    run = evaluate(models, speed=True)
    run.finish()
    paces = report_of(run)["metrics"]["speed"]["models"]
    assert list(paces) == ["cars-expert", "merged", "again"]
    assert paces["again"]["latency_ratio"] is not None
