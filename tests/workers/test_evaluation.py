"""Evaluation from labeled samples to the report, on real checkpoints: every model on every task, and baselines."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from service.contract.errors import BadInput
from service.contract.evaluation import Gate
from service.contract.job import Status
from service.contract.recipe import Recipe
from service.contract.stages import Stage
from tests.workers import tiny_tokenizers
from tests.workers.architectures import Case, whole
from tests.workers.stage_runs import Run, family
from tests.workers.tiny_models import TEXT, build, configuration, tokens

SAMPLES = 24
Make = Callable[..., Run]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A run whose two tasks have labels: those that their experts give, but for every fourth."""

    def run(kind: str = "classification", labels: int = 3, **evaluation: Any) -> Run:
        case = Case("bert", {**TEXT, "num_labels": labels}, tokens(SAMPLES))
        recipe = family(tmp_path, "BertForSequenceClassification", case)
        rows = []
        for seed in (1, 2):
            write_labeled(tmp_path, f"task{seed}", tokens(SAMPLES, seed=seed))
            rows.append(
                {"task": f"task{seed}", "kind": kind, "labeled": f"file://{tmp_path}/task{seed}-test.safetensors"}
            )
        recipe["evaluation"] = {"tasks": rows, "resamples": 200, **evaluation}
        return Run(tmp_path, Recipe.model_validate(recipe))

    return run


def write_labeled(folder: Path, task: str, inputs: dict[str, Tensor]) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(folder / task)
    with torch.no_grad():
        logits = model(**inputs).logits
    labels = logits.argmax(1) if logits.shape[1] > 1 else logits[:, 0]
    labels[::4] = 0
    save_file({**inputs, "labels": labels.contiguous()}, folder / f"{task}-test.safetensors")


def accuracy(folder: Path, model: Path | dict[str, Tensor], task: str) -> float:
    """By transformers alone: a checkpoint's hits on a task's samples."""
    samples = load_file(folder / f"{task}-test.safetensors")
    labels = samples.pop("labels")
    loaded = AutoModelForSequenceClassification.from_pretrained(folder / task)
    if isinstance(model, dict):
        loaded.load_state_dict(model)
    with torch.no_grad():
        return float((loaded(**samples).logits.argmax(1) == labels).double().mean())


def report_of(run: Run) -> dict[str, Any]:
    return dict(json.loads((run.folder / "result/merge/report.json").read_text()))


def test_every_model_is_measured_on_every_task(make: Make) -> None:
    run = make(baselines=["task_arithmetic", "ties"])
    done = run.finish()
    names = [part.name for part in run.done[Stage.PLAN][0].parts if part.stage is Stage.EVALUATE]
    models = ["base", "expert", "merged", "task_arithmetic", "ties"]
    assert names == [f"{task}/{model}" for task in ("task1", "task2") for model in models] + ["speed"]
    metrics = report_of(run)["metrics"]
    assert (done.result or {})["metrics"] == metrics
    for name, row in metrics["tasks"].items():
        assert row["samples"] == SAMPLES
        assert (row["kind"], row["metric"], row["better"]) == ("classification", "accuracy", "higher")
        assert row["merged"] == pytest.approx(accuracy(run.folder, run.merged(), name))
        assert row["expert"] == pytest.approx(
            accuracy(run.folder, load_file(run.folder / name / "model.safetensors"), name)
        )
        assert row["base"] == pytest.approx(
            accuracy(run.folder, load_file(run.folder / "base/model.safetensors"), name)
        )
        assert row["retention"] == pytest.approx(row["merged"] / row["expert"])
        assert row["baselines"].keys() == {"task_arithmetic", "ties"}
        assert row["all"].keys() == set(models)
        for model in models:
            for figure in row["all"][model].values():
                assert figure["low"] <= figure["high"]
    assert metrics["speed"]["experts"].keys() == {"task1", "task2"}
    assert metrics["speed"]["batch"] == 16
    assert metrics["speed"]["latency_ratio"] > 0
    numbers = sum(tensor.numel() for tensor in load_file(run.folder / "base/model.safetensors").values())
    assert metrics["parameters"] == {"merged": numbers, "experts": 2 * numbers}


def test_a_baseline_is_the_same_merge_without_trimming(make: Make) -> None:
    run = make(baselines=["task_arithmetic"])
    run.go()
    (found,) = (run.folder / "workspace").rglob("baselines/task_arithmetic/model.safetensors")
    base, *experts = (load_file(run.folder / name / "model.safetensors") for name in ("base", "task1", "task2"))
    for name, tensor in load_file(found).items():
        plain = base[name] + 0.4 * sum(expert[name] - base[name] for expert in experts)
        torch.testing.assert_close(tensor, plain)
    weight = "bert.encoder.layer.0.output.dense.weight"
    assert not run.merged()[weight].allclose(load_file(found)[weight])


def test_a_job_leaves_no_baseline_behind(make: Make) -> None:
    plain = make()
    plain.finish()
    kept = {file.relative_to(plain.folder) for file in (plain.folder / "result").rglob("*") if file.is_file()}
    run = replace(make(baselines=["task_arithmetic", "ties"], resamples=100), done={})
    before = (run.folder / "result/model.safetensors").read_bytes()
    log = (run.folder / "result/merge/trim-log.jsonl").read_bytes()
    run.finish()
    assert {file.relative_to(run.folder) for file in (run.folder / "result").rglob("*") if file.is_file()} == kept
    assert not list((run.folder / "workspace").rglob("scratch/**/*.*"))
    assert (run.folder / "result/model.safetensors").read_bytes() == before
    assert (run.folder / "result/merge/trim-log.jsonl").read_bytes() == log


def test_what_a_base_and_an_expert_score_is_measured_once(make: Make) -> None:
    run = make()
    run.finish()
    cached = sorted((run.folder / "workspace/cache/scores").iterdir())
    assert len(cached) == 4
    again = replace(run, done={})
    before = [file.stat().st_mtime_ns for file in cached]
    again.finish()
    assert sorted((run.folder / "workspace/cache/scores").iterdir()) == cached
    assert [file.stat().st_mtime_ns for file in cached] == before
    assert report_of(again)["metrics"]["tasks"] == report_of(run)["metrics"]["tasks"]


@pytest.mark.parametrize(
    "change",
    [{"resamples": 300}, {"rows": {"metrics": ["macro_f1"]}}, {"seed": 3}],
    ids=["resamples", "metrics", "seed"],
)
def test_other_questions_are_measured_anew(make: Make, change: dict[str, Any]) -> None:
    run = make()
    run.finish()
    recipe = run.recipe.model_dump(mode="json")
    recipe["seed"] = change.get("seed", 0)
    recipe["evaluation"]["resamples"] = change.get("resamples", 200)
    recipe["evaluation"]["tasks"][0] |= change.get("rows", {})
    replace(run, recipe=Recipe.model_validate(recipe), done={}).finish()
    assert len(list((run.folder / "workspace/cache/scores").iterdir())) > 4


def test_regression_keeps_correlations_and_errors(make: Make) -> None:
    run = make("regression", labels=1)
    run.finish()
    row = report_of(run)["metrics"]["tasks"]["task1"]
    assert (row["metric"], row["better"]) == ("pearson", "higher")
    assert row["all"]["expert"].keys() == {"pearson", "spearman", "mse"}
    samples = load_file(run.folder / "task1-test.safetensors")
    labels = samples.pop("labels")
    with torch.no_grad():
        numbers = AutoModelForSequenceClassification.from_pretrained(run.folder / "task1")(**samples).logits[:, 0]
    assert row["all"]["expert"]["mse"]["value"] == pytest.approx(float(((numbers - labels) ** 2).mean()), rel=1e-4)
    assert row["expert"] == pytest.approx(float(torch.corrcoef(torch.stack([numbers, labels]))[0, 1]), rel=1e-4)


def test_gates_reject_and_all_are_told(make: Make) -> None:
    run = make()
    gates = (
        Gate(metric="min_samples", at_least=SAMPLES + 1),
        Gate(metric="model_bytes", at_most=1),
        Gate(metric="task_drop", task="task1", at_most=2.0, use="bound"),
        Gate(metric="task_score", task="task2", at_least=0.0),
        Gate(metric="latency_ratio", at_most=1000),
        Gate(metric="mean_retention", at_least=0.0, use="bound"),
    )
    done = replace(run, recipe=run.recipe.model_copy(update={"gates": gates}), done={}).finish()
    assert done.status is Status.REJECTED
    verdicts = report_of(run)["gates"]
    assert [verdict["passed"] for verdict in verdicts] == [False, False, True, True, True, True]
    assert verdicts[0] == {
        "metric": "min_samples", "task": None, "at_least": SAMPLES + 1, "at_most": None, "use": "point",
        "value": SAMPLES, "passed": False,
    }  # fmt: skip


def test_few_samples_are_warned_of(make: Make) -> None:
    done = make().finish()
    assert any("task 'task1' has only 24 labeled samples" in warning for warning in done.warnings)


def test_validation_samples_that_are_measured_on_too(make: Make) -> None:
    run = make()
    test = load_file(run.folder / "task1-test.safetensors")
    other = tokens(5, length=12, seed=9)  # padded to another length
    other["input_ids"][0] = 0
    other["input_ids"][0, :8] = test["input_ids"][3]
    other["attention_mask"][0] = 0
    other["attention_mask"][0, :8] = test["attention_mask"][3]
    save_file({**other, "labels": torch.zeros(5, dtype=torch.long)}, run.folder / "validation.safetensors")
    recipe = run.recipe.model_dump(mode="json")
    recipe["evaluation"]["tasks"][0]["validation"] = f"file://{run.folder}/validation.safetensors"
    leaky = replace(run, recipe=Recipe.model_validate(recipe), done={})
    leaky.finish()
    (warning,) = leaky.warnings(Stage.EVALUATE)
    assert warning.startswith("1 samples of task 'task1' are in")
    assert [row["code"] for row in report_of(leaky)["warnings"] if row["detail"] == warning] == ["leak"]


def test_labels_that_the_head_has_no_class_for(make: Make) -> None:
    run = make()
    samples = load_file(run.folder / "task2-test.safetensors")
    samples["labels"][3] = 3
    save_file(samples, run.folder / "task2-test.safetensors")
    with pytest.raises(BadInput, match=r"task2-test\.safetensors: labels reach from 0 to 3.*3 classes, 0 to 2"):
        run.finish()


def test_a_head_that_gives_several_numbers_is_no_regression(make: Make) -> None:
    with pytest.raises(BadInput, match=r"one number per sample, but that of task 'task1' gives 3"):
        make("regression").finish()


def test_a_figure_that_can_not_be_computed_is_left_out(make: Make) -> None:
    run = make()
    samples = load_file(run.folder / "task1-test.safetensors")
    save_file({**samples, "labels": torch.zeros(SAMPLES, dtype=torch.long)}, run.folder / "task1-test.safetensors")
    done = run.finish()
    row = report_of(run)["metrics"]["tasks"]["task1"]
    assert row["all"]["merged"]["auroc"] == {"value": None, "low": None, "high": None}
    assert any("auroc of merged can't be computed" in warning for warning in done.warnings)


def test_text_is_read_by_the_tasks_own_tokenizer(make: Make) -> None:
    run = make(labels=2)
    rows = [{"text": text, "label": label} for text, label in (("good film", 1), ("bad film", 0), ("a good cat", 1))]
    text = run.folder / "reviews.jsonl"
    text.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for task in ("task1", "task2"):
        tiny_tokenizers.bert_like(run.folder / task)
    recipe = run.recipe.model_dump(mode="json")
    recipe["evaluation"]["tasks"][0]["labeled"] = f"file://{text}"
    asked = replace(run, recipe=Recipe.model_validate(recipe), done={})
    asked.finish()
    row = report_of(asked)["metrics"]["tasks"]["task1"]
    assert row["samples"] == 3
    tokenizer = AutoTokenizer.from_pretrained(run.folder / "task1")
    inputs = tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = AutoModelForSequenceClassification.from_pretrained(run.folder / "task1")(**inputs).logits
    assert row["expert"] == pytest.approx(float((logits.argmax(1) == torch.tensor([1, 0, 1])).double().mean()))
    known = len(list((run.folder / "workspace/cache/scores").iterdir()))
    text.write_text(text.read_text() + json.dumps({"text": "dogs bark", "label": 0}) + "\n")
    replace(asked, done={}).finish()
    assert len(list((run.folder / "workspace/cache/scores").iterdir())) == known + 2


def test_a_kind_of_which_less_is_better(tmp_path: Path) -> None:
    values = {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 20}
    recipe = family(tmp_path, "GPT2LMHeadModel", Case("gpt2", values, tokens(6)))
    rows = []
    for seed in (1, 2):
        save_file(tokens(12, seed=seed), tmp_path / f"task{seed}-test.safetensors")
        labeled = f"file://{tmp_path}/task{seed}-test.safetensors"
        rows.append({"task": f"task{seed}", "kind": "language_modeling", "labeled": labeled})
    recipe["evaluation"] = {"tasks": rows, "resamples": 100, "baselines": ["average"]}
    recipe["gates"] = [{"metric": "task_score", "task": "task1", "at_most": 1.0}]
    run = Run(tmp_path, Recipe.model_validate(recipe))
    assert run.finish().status is Status.REJECTED
    row = report_of(run)["metrics"]["tasks"]["task1"]
    assert row["better"] == "lower"
    assert row["retention"] == pytest.approx(row["expert"] / row["merged"])
    assert row["drop"] == pytest.approx(row["merged"] - row["expert"])
    gain = row["baselines"]["average"]["score"] - row["merged"]
    assert row["baselines"]["average"]["gain"] == pytest.approx(gain)


def test_shards_are_put_together(make: Make) -> None:
    whole = make(baselines=["task_arithmetic"])
    whole.finish()
    scores = report_of(whole)["metrics"]["tasks"]
    output = whole.recipe.output.model_copy(update={"shard_bytes": 8192})
    sharded = replace(whole, recipe=whole.recipe.model_copy(update={"output": output}), done={})
    sharded.finish()
    merges = [part.name for part in sharded.done[Stage.PLAN][0].parts if part.stage is Stage.MERGE]
    assert len(merges) > 2
    assert len(merges) % 2 == 0
    assert all(name.startswith("task_arithmetic/") for name in merges[len(merges) // 2 :])
    assert report_of(sharded)["metrics"]["tasks"] == scores


def test_an_expert_that_can_not_do_the_first_task_is_not_timed(tmp_path: Path) -> None:
    """The first task writes text, the second tells classes."""
    values = {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 20, "pad_token_id": 0}
    values |= {"bos_token_id": 2, "eos_token_id": 3}
    recipe = family(tmp_path, "GPT2LMHeadModel", Case("gpt2", values, whole(6)))
    classes = build("GPT2ForSequenceClassification", configuration("gpt2", **values, num_labels=3))
    classes.transformer.load_state_dict(
        build("GPT2LMHeadModel", configuration("gpt2", **values), 5).transformer.state_dict()
    )
    classes.save_pretrained(tmp_path / "task2")
    tiny_tokenizers.plain(tmp_path / "task1")
    save_file(
        {"input_ids": tokens(6)["input_ids"].clamp(4), "labels": torch.full((6, 3), 7)},
        tmp_path / "task1-test.safetensors",
    )
    save_file({**whole(6), "labels": torch.arange(6) % 3}, tmp_path / "task2-test.safetensors")
    rows: list[dict[str, Any]] = [
        {"task": task, "labeled": f"file://{tmp_path}/{task}-test.safetensors"} for task in ("task1", "task2")
    ]
    rows[0] |= {"kind": "sequence_to_sequence", "max_new_tokens": 3}
    recipe["evaluation"] = {"tasks": rows, "resamples": 100}
    run = Run(tmp_path, Recipe.model_validate(recipe))
    run.finish()
    metrics = report_of(run)["metrics"]
    assert metrics["speed"]["experts"].keys() == {"task1"}
    assert [row["kind"] for row in metrics["tasks"].values()] == ["sequence_to_sequence", "classification"]
    assert metrics["mean_accuracy"]["merged"] is None
