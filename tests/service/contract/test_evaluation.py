"""What an evaluation and its gates may ask for, and the sentence where they may not."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from service.contract.evaluation import Evaluation, Gate, TaskEvaluation, baseline_method, is_text
from service.contract.methods import METHODS, Cat, TaskArithmetic, Ties
from service.contract.metrics import METRICS, Kind, Metric, metrics_of
from service.contract.recipe import Recipe

CARS: dict[str, Any] = {"task": "cars", "labeled": "s3://data/cars.safetensors"}


def recipe(evaluation: Any = None, *gates: dict[str, Any], **changes: Any) -> Recipe:
    tasks = [{"name": name, "checkpoint": f"s3://models/{name}/"} for name in ("cars", "pets")]
    body = {"base": "s3://models/base/", "tasks": tasks, "evaluation": evaluation, "gates": list(gates), **changes}
    return Recipe.model_validate(body)


def row(**changes: Any) -> TaskEvaluation:
    return TaskEvaluation.model_validate({**CARS, **changes})


def test_an_old_recipe_means_what_it_meant() -> None:
    both = [CARS, {"task": "pets", "labeled": "s3://data/pets.safetensors"}]
    made = recipe({"tasks": both}, {"metric": "worst_task_retention", "at_least": 0.9})
    assert made.evaluation is not None
    assert made.evaluation.tasks[0].kind is Kind.CLASSIFICATION
    assert made.evaluation.tasks[0].primary is Metric.ACCURACY
    assert made.evaluation.models == ("base", "expert", "merged")
    assert (made.gates[0].limit, made.gates[0].use) == (0.9, "point")
    assert Recipe.model_validate_json(made.model_dump_json()) == made


@pytest.mark.parametrize(
    ("kind", "primary", "better"),
    [
        ("classification", "accuracy", "higher"),
        ("regression", "pearson", "higher"),
        ("token_classification", "entity_f1", "higher"),
        ("language_modeling", "perplexity", "lower"),
        ("multiple_choice", "accuracy", "higher"),
        ("sequence_to_sequence", "rouge_l", "higher"),
        ("retrieval", "recall_at_1", "higher"),
    ],
)
def test_every_kind_has_a_primary_metric(kind: str, primary: str, better: str) -> None:
    asked = row(kind=kind)
    assert (asked.primary, asked.better) == (primary, better)
    assert asked.measured == metrics_of(Kind(kind))


def test_the_metric_named_first_is_the_primary_one() -> None:
    asked = row(kind="regression", metrics=["mse", "pearson"])
    assert (asked.primary, asked.better) == (Metric.MSE, "lower")
    assert asked.measured == (Metric.MSE, Metric.PEARSON)


def test_every_metric_has_a_row() -> None:
    assert set(METRICS) == set(Metric)
    assert all(row.kinds and row.says.endswith(".") for row in METRICS.values())


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"metrics": ["pearson"]}, "pearson does not measure classification; its metrics are accuracy, balanced"),
        ({"metrics": ["accuracy", "accuracy"]}, "named twice"),
        ({"metrics": []}, "at least 1"),
        ({"kind": "regression", "head": {"weight": "s3://a/b.safetensors"}}, "regression has none"),
        ({"max_new_tokens": 5}, "classification generates none"),
        ({"columns": {"text": "review"}}, "columns are about text files"),
        ({"labeled": "s3://data/cars.parquet"}, "must be a file that ends in .safetensors, .jsonl, .csv"),
        ({"validation": "s3://data/cars/"}, "must be a file that ends in"),
        ({"kind": "segmentation"}, "token_classification"),
    ],
)
def test_what_does_not_fit_its_kind_is_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError) as refused:
        row(**changes)
    assert sentence in str(refused.value)


def test_text_files_are_told_by_their_name() -> None:
    assert is_text("s3://data/reviews.JSONL")
    assert is_text("s3://data/reviews.csv")
    assert not is_text("s3://data/reviews.safetensors")
    assert row(labeled="s3://data/reviews.csv", columns={"label": "stars"}).columns is not None


# Baselines


def test_a_baseline_merges_without_data() -> None:
    assert baseline_method("ties") == Ties(scope="tensor")
    for name, method in METHODS.items():
        if method.trims or method.observes:
            with pytest.raises(ValueError, match=f"'{name}' is no method that merges without data; those are"):
                baseline_method(name)
        else:
            assert not baseline_method(name).surveys


def test_a_baseline_is_scaled_as_the_merge_it_is_compared_with() -> None:
    assert baseline_method("task_arithmetic", Cat(scaling=0.7)) == TaskArithmetic(scaling=0.7)
    assert baseline_method("ties", Cat(scaling=0.7)) == Ties(scope="tensor")
    after = Cat(scaling=0.7, then=Ties(scaling=0.9, density=0.5))
    assert baseline_method("ties", after) == Ties(scaling=0.9, density=0.5, scope="tensor")
    assert baseline_method("task_arithmetic", after) == TaskArithmetic()


def test_baselines_that_can_not_be_merged_are_refused() -> None:
    with pytest.raises(ValidationError, match="named twice"):
        Evaluation.model_validate({"tasks": [CARS], "baselines": ["ties", "ties"]})
    with pytest.raises(ValidationError, match="'lot' is no method that merges without data"):
        Evaluation.model_validate({"tasks": [CARS], "baselines": ["lot"]})
    three = [{"name": name, "checkpoint": f"s3://models/{name}/"} for name in ("cars", "pets", "food")]
    with pytest.raises(ValidationError, match="the baseline slerp takes at most 2 tasks, not 3"):
        recipe({"tasks": [CARS], "baselines": ["slerp"]}, tasks=three)
    assert recipe({"tasks": [CARS], "baselines": ["slerp"]}).evaluation is not None


def test_parts_come_task_by_task() -> None:
    evaluation = Evaluation.model_validate({"tasks": [CARS, {**CARS, "task": "pets"}], "baselines": ["ties"]})
    assert [(row.task, model) for row, model in evaluation.parts] == [
        (task, model) for task in ("cars", "pets") for model in ("base", "expert", "merged", "ties")
    ]


# Gates


@pytest.mark.parametrize(
    ("gate", "sentence"),
    [
        ({"metric": "mean_retention"}, "give at_least or at_most"),
        ({"metric": "mean_retention", "at_least": 0.9, "at_most": 1}, "give at_least or at_most"),
        ({"metric": "mean_retention", "at_most": 0.9}, "mean_retention takes at_least"),
        ({"metric": "mean_retention", "at_least": -0.1}, "from 0 to 10"),
        ({"metric": "mean_retention", "at_least": 90}, "from 0 to 10"),
        ({"metric": "mean_retention", "at_least": 0.9, "task": "cars"}, "the other metrics do not"),
        ({"metric": "task_drop", "at_most": 0.1}, "task_drop name a task"),
        ({"metric": "task_drop", "task": "cars", "at_least": 0.1}, "task_drop takes at_most"),
        ({"metric": "model_bytes", "at_most": 0}, "above 0"),
        ({"metric": "latency_ratio", "at_most": 1.1, "use": "bound"}, "latency_ratio has no interval"),
        ({"metric": "min_samples", "at_most": 100}, "min_samples takes at_least"),
        ({"metric": "accuracy", "at_least": 0.9}, "worst_task_retention"),
    ],
)
def test_a_gate_that_says_no_one_thing_is_refused(gate: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError) as refused:
        Gate.model_validate(gate)
    assert sentence in str(refused.value)


@pytest.mark.parametrize(
    ("evaluation", "gate", "sentence"),
    [
        (None, {"metric": "mean_retention", "at_least": 0.9}, "needs an evaluation, and the recipe has none"),
        (None, {"metric": "min_samples", "at_least": 9}, "needs an evaluation, and the recipe has none"),
        (None, {"metric": "latency_ratio", "at_most": 1.1}, "needs an evaluation, and the recipe has none"),
        ({"tasks": [CARS]}, {"metric": "worst_task_retention", "at_least": 0.9}, "missing: pets"),
        ({"tasks": [CARS]}, {"metric": "task_drop", "task": "pets", "at_most": 0.1}, "the score of task 'pets'"),
        (
            {"tasks": [CARS]},
            {"metric": "task_score", "task": "cars", "at_most": 0.9},
            "higher accuracy is better, so the score of task 'cars' is held to at_least",
        ),
        (
            {"tasks": [{**CARS, "kind": "language_modeling"}]},
            {"metric": "task_score", "task": "cars", "at_least": 9},
            "lower perplexity is better, so the score of task 'cars' is held to at_most",
        ),
    ],
)
def test_a_gate_that_can_not_be_computed_is_refused(evaluation: Any, gate: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError) as refused:
        recipe(evaluation, gate)
    assert sentence in str(refused.value)
    (fault,) = refused.value.errors()
    assert fault["loc"] == ("gates", 0)


def test_gates_that_can_be_computed() -> None:
    gates = [
        {"metric": "task_score", "task": "cars", "at_least": 0.9, "use": "bound"},
        {"metric": "task_drop", "task": "cars", "at_most": 0.0},
        {"metric": "latency_ratio", "at_most": 1.1},
        {"metric": "min_samples", "at_least": 200},
    ]
    assert len(recipe({"tasks": [CARS]}, *gates).gates) == 4
    assert recipe(None, {"metric": "model_bytes", "at_most": 10**9}).gates[0].limit == 10**9
