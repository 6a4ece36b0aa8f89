"""What is made of scores: retention, intervals, gains over baselines, doubts; and the verdicts of gates."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from service.contract.evaluation import Evaluation, Gate
from service.contract.metrics import Metric
from workers.figures_file import ModelScores, from_bytes, to_bytes
from workers.gates import judge
from workers.scores import TaskScores, doubts, measured, task_scores

SPREAD = np.array([-0.1, 0.0, 0.1])


def evaluation(*tasks: str, **changes: Any) -> Evaluation:
    rows = [{"task": task, "labeled": f"s3://data/{task}.safetensors", **changes.pop("row", {})} for task in tasks]
    return Evaluation.model_validate({"tasks": rows, "confidence": 0.8, "resamples": 100, **changes})


def scores_of(asked: Evaluation, samples: int = 1000, **figures: list[float]) -> list[TaskScores]:
    """Scores of each task by the models' order, spread a tenth to either side over three resamples."""
    made = []
    for row in asked.tasks:
        found = [
            ModelScores(samples, {row.primary: np.array([point, *(point + SPREAD)])}) for point in figures[row.task]
        ]
        made.append(task_scores(asked, row, found))
    return made


def test_retention_is_the_share_of_the_experts_score() -> None:
    asked = evaluation("cars", "pets", "food")
    found = measured(asked, scores_of(asked, cars=[0.1, 0.8, 0.6], pets=[0.1, 0.5, 0.5], food=[0.1, 0.0, 0.2]))
    assert [found["tasks"][task]["retention"] for task in ("cars", "pets", "food")] == [pytest.approx(0.75), 1.0, None]
    assert found["mean_retention"] == pytest.approx((0.75 + 1.0) / 2)
    assert (found["worst_retention"], found["worst_task"]) == (pytest.approx(0.75), "cars")
    assert found["mean_accuracy"]["merged"] == pytest.approx(1.3 / 3)
    assert found["tasks"]["cars"]["drop"] == pytest.approx(0.2)


def test_retention_of_a_score_of_which_less_is_better() -> None:
    asked = evaluation("text", row={"kind": "language_modeling"})
    row = measured(asked, scores_of(asked, text=[30.0, 10.0, 12.5]))["tasks"]["text"]
    assert (row["metric"], row["better"]) == ("perplexity", "lower")
    assert row["retention"] == pytest.approx(0.8)
    assert row["drop"] == pytest.approx(2.5)


def test_intervals_are_those_of_pairs() -> None:
    """Where expert and merged model rise and fall together, their ratio is surer than either."""
    asked = evaluation("cars")
    row = measured(asked, scores_of(asked, cars=[0.1, 0.8, 0.6]))["tasks"]["cars"]
    low, high = row["intervals"]["merged"]
    assert (low, high) == (pytest.approx(0.52), pytest.approx(0.68))
    ratios = sorted((0.6 + step) / (0.8 + step) for step in SPREAD)
    assert row["intervals"]["retention"] == [
        pytest.approx(ratios[0] + 0.2 * (ratios[1] - ratios[0])),
        pytest.approx(ratios[2] - 0.2 * (ratios[2] - ratios[1])),
    ]
    assert row["intervals"]["drop"] == [pytest.approx(0.2), pytest.approx(0.2)]
    assert row["distinguishable"] is True


def test_a_mean_needs_one_metric() -> None:
    asked = Evaluation.model_validate(
        {
            "tasks": [
                {"task": "cars", "labeled": "s3://data/cars.safetensors"},
                {"task": "text", "labeled": "s3://data/text.jsonl", "kind": "language_modeling"},
            ]
        }
    )
    found = measured(asked, scores_of(asked, cars=[0.1, 0.8, 0.6], text=[30.0, 10.0, 12.5]))
    assert found["mean_accuracy"] == {"base": None, "expert": None, "merged": None}
    assert found["mean_retention"] == pytest.approx((0.75 + 0.8) / 2)


@pytest.mark.parametrize(("kind", "figures", "gain"), [
    ("classification", [0.1, 0.8, 0.6, 0.5], 0.1), ("language_modeling", [30.0, 10.0, 12.0, 13.0], 1.0),
])  # fmt: skip
def test_a_gain_over_a_baseline_is_better_where_it_is_above_zero(kind: str, figures: list[float], gain: float) -> None:
    asked = evaluation("cars", row={"kind": kind}, baselines=["ties"])
    row = measured(asked, scores_of(asked, cars=figures))["tasks"]["cars"]["baselines"]["ties"]
    assert row["score"] == figures[-1]
    assert row["gain"] == pytest.approx(gain)
    assert row["gain_interval"] == [pytest.approx(gain), pytest.approx(gain)]


def test_doubts_are_told() -> None:
    asked = evaluation("cars")
    close = TaskScores(
        asked.tasks[0],
        40,
        {
            "base": {Metric.ACCURACY: np.array([math.nan, math.nan, math.nan, math.nan])},
            "expert": {Metric.ACCURACY: np.array([0.8, 0.7, 0.8, 0.9])},
            "merged": {Metric.ACCURACY: np.array([0.79, 0.72, 0.79, 0.85])},
        },
    )
    assert doubts(asked, [close]) == [
        "task 'cars' has only 40 labeled samples; with fewer than 100, intervals are rough",
        "task 'cars': 40 samples are too few to tell the merged model's accuracy (0.79) from the expert's (0.8)",
        "task 'cars': accuracy of base can't be computed, and is left out",
    ]
    assert measured(asked, [close])["tasks"]["cars"]["distinguishable"] is False
    assert doubts(asked, scores_of(asked, cars=[0.1, 0.8, 0.6])) == []
    assert doubts(asked, scores_of(asked, cars=[0.1, 0.8, 0.8])) == []
    (nothing,) = doubts(asked, scores_of(asked, cars=[0.1, 0.0, 0.2]))
    assert nothing.startswith("task 'cars': no share of the expert's accuracy (0) can be kept")


def test_scores_are_read_as_they_were_written() -> None:
    scores = ModelScores(7, {Metric.AUROC: np.array([0.5, math.nan, 0.25]), Metric.ACCURACY: np.array([1.0])})
    read = from_bytes(to_bytes(scores))
    assert read.samples == 7
    assert read.figures.keys() == scores.figures.keys()
    for metric, values in scores.figures.items():
        np.testing.assert_array_equal(read.figures[metric], values)


def test_scores_are_read_in_one_order_by_every_process() -> None:
    """The library gives them in another each time; a report that is written again has to be the same."""
    scores = ModelScores(7, {metric: np.array([0.5]) for metric in reversed(Metric)})
    assert list(from_bytes(to_bytes(scores)).figures) == list(Metric)


# Gates

FIGURES: dict[str, Any] = {
    "tasks": {
        "cars": {
            "samples": 300, "merged": 0.6, "retention": 0.75, "drop": 0.2,
            "intervals": {"merged": [0.55, 0.65], "retention": [0.7, 0.8], "drop": [0.15, 0.25]},
        },
        "food": {
            "samples": 90, "merged": 0.2, "retention": None, "drop": -0.2,
            "intervals": {"merged": None, "retention": None, "drop": [-0.3, -0.1]},
        },
    },
    "mean_retention": 0.875, "mean_retention_interval": [0.8, 0.95],
    "worst_retention": 0.75, "worst_retention_interval": [0.65, 0.8],
    "speed": {"latency_ratio": 1.02},
}  # fmt: skip


COMPLETE = {**FIGURES, "tasks": {"cars": FIGURES["tasks"]["cars"]}}


@pytest.mark.parametrize(
    ("gate", "value", "passed"),
    [
        (Gate(metric="worst_task_retention", at_least=0.75), 0.75, True),
        (Gate(metric="worst_task_retention", at_least=0.7500001), 0.75, False),
        (Gate(metric="worst_task_retention", at_least=0.7, use="bound"), 0.65, False),
        (Gate(metric="mean_retention", at_least=0.9), 0.875, False),
        (Gate(metric="mean_retention", at_least=0.8, use="bound"), 0.8, True),
    ],
)
def test_a_gate_on_all_tasks_needs_what_every_task_keeps(gate: Gate, value: float, passed: bool) -> None:
    (verdict,) = judge([gate], COMPLETE, model_bytes=0)
    assert (verdict["value"], verdict["passed"]) == (value, passed)
    (verdict,) = judge([gate], FIGURES, model_bytes=0)
    assert (verdict["value"], verdict["passed"]) == (None, False)


@pytest.mark.parametrize(
    ("gate", "value", "passed"),
    [
        (Gate(metric="task_retention", at_least=0.75, task="cars"), 0.75, True),
        (Gate(metric="task_retention", at_least=0.0, task="food"), None, False),
        (Gate(metric="task_retention", at_least=0.0, task="food", use="bound"), None, False),
        (Gate(metric="task_score", at_least=0.6, task="cars"), 0.6, True),
        (Gate(metric="task_score", at_least=0.6, task="cars", use="bound"), 0.55, False),
        (Gate(metric="task_score", at_most=0.6, task="cars", use="bound"), 0.65, False),
        (Gate(metric="task_drop", at_most=0.2, task="cars"), 0.2, True),
        (Gate(metric="task_drop", at_most=0.2, task="cars", use="bound"), 0.25, False),
        (Gate(metric="task_drop", at_most=0.0, task="food"), -0.2, True),
        (Gate(metric="model_bytes", at_most=500), 501, False),
        (Gate(metric="latency_ratio", at_most=1.05), 1.02, True),
        (Gate(metric="min_samples", at_least=100), 90, False),
    ],
)
def test_a_gate_holds_what_was_measured_against_what_was_agreed(gate: Gate, value: float | None, passed: bool) -> None:
    (verdict,) = judge([gate], FIGURES, model_bytes=501)
    assert verdict["value"] == value
    assert verdict["passed"] is passed


def test_rounding_fails_no_gate() -> None:
    figures = {**COMPLETE, "worst_retention": 0.72 / 0.8}
    assert judge([Gate(metric="worst_task_retention", at_least=0.9)], figures, 0)[0]["passed"]


def test_without_an_evaluation_only_size_is_known() -> None:
    size, other = judge([Gate(metric="model_bytes", at_most=1000), Gate(metric="mean_retention", at_least=0)], None, 10)
    assert (size["passed"], other["passed"]) == (True, False)
