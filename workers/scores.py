"""Puts a job's scores together: what each task keeps, how sure that is, and what the merge is worth beside others."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from service.contract.evaluation import Evaluation, TaskEvaluation
from service.contract.metrics import Better, Metric
from service.contract.notices import Notice
from workers.bootstrap import Figures, interval
from workers.figures_file import ModelScores

FEW_SAMPLES = 100  # below, a share's interval is wider than ten points to either side


@dataclass(frozen=True, eq=False)
class TaskScores:
    """What every model scores on one task: by model and metric, the point and then its resamples ``[1 + B]``."""

    row: TaskEvaluation
    samples: int
    figures: Mapping[str, Mapping[Metric, Figures]]

    def primary(self, model: str) -> Figures:
        return self.figures[model][self.row.primary]

    def retention(self, model: str) -> Figures:
        """The share of the expert's score that a model keeps; NaN where the expert has none to keep."""
        return _share(self.row.better, self.primary(model), self.primary("expert"))

    def gain(self, over: str) -> Figures:
        """By how much the merged model is better than another; below zero where it is worse."""
        difference = self.primary("merged") - self.primary(over)
        return difference if self.row.better == "higher" else -difference


def task_scores(evaluation: Evaluation, row: TaskEvaluation, found: Sequence[ModelScores]) -> TaskScores:
    """A task's scores from those of its models, which come in the evaluation's order of models."""
    figures = {model: scores.figures for model, scores in zip(evaluation.models, found, strict=True)}
    return TaskScores(row, found[0].samples, figures)


def measured(evaluation: Evaluation, scores: Sequence[TaskScores]) -> dict[str, Any]:
    """The scores as the report has them: points, intervals, retention, and what tasks keep on average and at worst."""
    confidence = evaluation.confidence
    tasks = {task.row.task: _task(evaluation, task) for task in scores}
    return {
        "tasks": tasks,
        "mean_accuracy": {model: _mean_score(scores, model) for model in evaluation.models},
        **kept_over({task.row.task: task.retention("merged") for task in scores}, confidence),
        "confidence": confidence,
        "resamples": evaluation.resamples,
    }


def kept_over(retentions: Mapping[str, Figures], confidence: float) -> dict[str, Any]:
    """What is kept on average and at worst, of the tasks on which there is something to keep."""
    kept = {name: values for name, values in retentions.items() if math.isfinite(values[0])}
    mean, worst = _over(kept, lambda all_tasks: all_tasks.mean(0)), _over(kept, lambda all_tasks: all_tasks.min(0))
    return {
        "mean_retention": point(mean),
        "mean_retention_interval": ends(mean, confidence),
        "worst_retention": point(worst),
        "worst_retention_interval": ends(worst, confidence),
        "worst_task": min(kept, key=lambda name: kept[name][0]) if kept else None,
    }


def doubts(evaluation: Evaluation, scores: Sequence[TaskScores]) -> list[Notice]:
    """Where samples are too few to trust a figure, or to tell the merged model from the expert; a sentence each."""
    return [sentence for task in scores for sentence in _doubts(evaluation, task)]


def _doubts(evaluation: Evaluation, task: TaskScores) -> list[Notice]:
    name, found = task.row.task, list[Notice]()
    if task.samples < FEW_SAMPLES:
        found.append(Notice("few_samples", task=name, count=task.samples, enough=FEW_SAMPLES))
    merged, expert = task.primary("merged")[0], task.primary("expert")[0]
    scores = {"metric": task.row.primary.value, "expert": f"{expert:.4g}"}
    if not math.isfinite(task.retention("merged")[0]):
        found.append(Notice("nothing_to_keep", task=name, **scores))
    if merged != expert and distinguishable(evaluation, task) is False:
        found.append(Notice("within_noise", task=name, count=task.samples, merged=f"{merged:.4g}", **scores))
    for model, figures in task.figures.items():
        lacking = [metric for metric, values in figures.items() if not math.isfinite(values[0])]
        if lacking:
            found.append(Notice("no_figure", task=name, metrics=", ".join(lacking), model=model))
    return found


def _task(evaluation: Evaluation, task: TaskScores) -> dict[str, Any]:
    confidence = evaluation.confidence
    models = ("base", "expert", "merged")
    retention = task.retention("merged")
    return {
        "kind": task.row.kind.value,
        "metric": task.row.primary.value,
        "better": task.row.better,
        "samples": task.samples,
        **{model: point(task.primary(model)) for model in models},
        "retention": point(retention),
        "drop": point(-task.gain("expert")),
        "intervals": {
            **{model: ends(task.primary(model), confidence) for model in models},
            "retention": ends(retention, confidence),
            "drop": ends(-task.gain("expert"), confidence),
        },
        "baselines": {name: _baseline(task, name, confidence) for name in evaluation.baselines},
        "all": {model: every_metric(figures, confidence) for model, figures in task.figures.items()},
        "distinguishable": distinguishable(evaluation, task),
    }


def _baseline(task: TaskScores, name: str, confidence: float) -> dict[str, Any]:
    return {
        "score": point(task.primary(name)),
        "interval": ends(task.primary(name), confidence),
        "retention": point(task.retention(name)),
        "gain": point(task.gain(name)),
        "gain_interval": ends(task.gain(name), confidence),
    }


def every_metric(figures: Mapping[Metric, Figures], confidence: float) -> dict[str, Any]:
    """Every metric's figure and the ends of its interval."""
    found = {}
    for metric, values in figures.items():
        low, high = ends(values, confidence) or (None, None)
        found[metric.value] = {"value": point(values), "low": low, "high": high}
    return found


def distinguishable(evaluation: Evaluation, task: TaskScores) -> bool | None:
    """Whether the interval of the difference between the merged model and the expert leaves zero out."""
    found = ends(task.gain("expert"), evaluation.confidence)
    return None if found is None else not found[0] <= 0 <= found[1]


def _share(better: Better, score: Figures, expert: Figures) -> Figures:
    above, below = (score, expert) if better == "higher" else (expert, score)
    possible = (expert > 0) & (below > 0)
    return np.where(possible, above / np.where(possible, below, 1), np.nan)


def _over(kept: Mapping[str, Figures], together: Callable[[Figures], Figures]) -> Figures | None:
    return together(np.stack(list(kept.values()))) if kept else None


def _mean_score(scores: Sequence[TaskScores], model: str) -> float | None:
    """The mean of the tasks' primary scores, where they are of one metric; others have no common mean."""
    if len({task.row.primary for task in scores}) > 1:
        return None
    return finite(float(np.mean([task.primary(model)[0] for task in scores])))


def point(values: Figures | None) -> float | None:
    """The figure on all samples; None where there is none."""
    return None if values is None else finite(float(values[0]))


def ends(values: Figures | None, confidence: float) -> list[float] | None:
    """The ends of a figure's interval; None where there is none."""
    return None if values is None else interval(values, confidence)


def finite(value: float) -> float | None:
    """A figure as JSON can say it."""
    return value if math.isfinite(value) else None
