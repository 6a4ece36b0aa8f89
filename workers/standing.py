"""Puts an evaluation's scores together: every model's on every task, and where models stand beside their reference."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from service.contract.evaluating import EvaluatedModel, EvaluationRecipe
from service.contract.evaluation import Gate, TaskEvaluation
from service.contract.notices import Notice
from workers.figures_file import ModelScores
from workers.gates import judge
from workers.scores import (
    FEW_SAMPLES,
    TaskScores,
    distinguishable,
    ends,
    every_metric,
    finite,
    kept_over,
    point,
)

Found = Mapping[tuple[str, str], ModelScores]  # by task and model


def evaluated(
    recipe: EvaluationRecipe, found: Found, sizes: Mapping[str, int], speed: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The scores as the report has them; ``sizes`` are the bytes of each model, ``speed`` is how fast they were."""
    return {
        "tasks": {row.task: _task(recipe, row, found) for row in recipe.evaluation.tasks},
        "models": {model.name: _model(recipe, model, found, sizes[model.name]) for model in recipe.models},
        "confidence": recipe.evaluation.confidence,
        "resamples": recipe.evaluation.resamples,
        "speed": speed,
    }


def judged(recipe: EvaluationRecipe, metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every gate for every model that it is about, as ``gates.judge`` has them, with the model's name."""
    return [
        {**verdict, "model": model.name}
        for model in recipe.judged
        for verdict in judge(
            [gate for gate in recipe.gates if _is_about(gate, model)],
            _as_merged(metrics, model.name),
            metrics["models"][model.name]["bytes"],
        )
    ]


def uncertain(recipe: EvaluationRecipe, found: Found) -> list[Notice]:
    """Where samples are too few to trust a figure, or to tell a model from its reference; a sentence each."""
    return [sentence for row in recipe.evaluation.tasks for sentence in _uncertain(recipe, row, found)]


def _task(recipe: EvaluationRecipe, row: TaskEvaluation, found: Found) -> dict[str, Any]:
    reference, confidence = recipe.reference_on(row.task), recipe.evaluation.confidence
    models = recipe.measured_on(row.task)
    return {
        "kind": row.kind.value,
        "metric": row.primary.value,
        "better": row.better,
        "samples": found[row.task, models[0].name].samples,
        "reference": None if reference is None else reference.name,
        "models": {model.name: _beside(recipe, row, model, found) for model in models},
        "all": {model.name: every_metric(found[row.task, model.name].figures, confidence) for model in models},
    }


def _beside(recipe: EvaluationRecipe, row: TaskEvaluation, model: EvaluatedModel, found: Found) -> dict[str, Any]:
    """A model's score on a task, and what that is of the reference's."""
    values, confidence = found[row.task, model.name].figures[row.primary], recipe.evaluation.confidence
    pair = _pair(recipe, row, model, found)
    kept = None if pair is None else pair.retention("merged")
    drop = None if pair is None else -pair.gain("expert")
    return {
        "score": point(values),
        "interval": ends(values, confidence),
        "retention": point(kept),
        "retention_interval": ends(kept, confidence),
        "drop": point(drop),
        "drop_interval": ends(drop, confidence),
        "distinguishable": None if pair is None else distinguishable(recipe.evaluation, pair),
    }


def _pair(recipe: EvaluationRecipe, row: TaskEvaluation, model: EvaluatedModel, found: Found) -> TaskScores | None:
    """A model's scores as a merged model's beside its expert's; None where there is no reference, or it is one."""
    reference = recipe.reference_on(row.task)
    if reference is None or model.reference:
        return None
    scores = found[row.task, model.name]
    figures = {"merged": scores.figures, "expert": found[row.task, reference.name].figures}
    return TaskScores(row, scores.samples, figures)


def _model(recipe: EvaluationRecipe, model: EvaluatedModel, found: Found, size: int) -> dict[str, Any]:
    """A model over all of its tasks."""
    rows = [row for row in recipe.evaluation.tasks if model.is_measured_on(row.task)]
    pairs = [pair for row in rows if (pair := _pair(recipe, row, model, found)) is not None]
    points = [float(found[row.task, model.name].figures[row.primary][0]) for row in rows]
    one_metric = len({row.primary for row in rows}) == 1
    return {
        "reference": model.reference,
        "bytes": size,
        "mean_score": finite(float(np.mean(points))) if one_metric else None,
        **kept_over({pair.row.task: pair.retention("merged") for pair in pairs}, recipe.evaluation.confidence),
    }


def _is_about(gate: Gate, model: EvaluatedModel) -> bool:
    return gate.task is None or model.is_measured_on(gate.task)


def _as_merged(metrics: Mapping[str, Any], model: str) -> dict[str, Any]:
    """A model's figures in the words in which gates know those of a merged one."""
    tasks = {
        name: {"samples": row["samples"], **_as_merged_on(row["models"][model])}
        for name, row in metrics["tasks"].items()
        if model in row["models"]
    }
    speed = (metrics["speed"] or {"models": {}})["models"].get(model)
    return {**metrics["models"][model], "tasks": tasks, "speed": speed}


def _as_merged_on(row: Mapping[str, Any]) -> dict[str, Any]:
    intervals = {"merged": row["interval"], "retention": row["retention_interval"], "drop": row["drop_interval"]}
    return {"merged": row["score"], "retention": row["retention"], "drop": row["drop"], "intervals": intervals}


def _uncertain(recipe: EvaluationRecipe, row: TaskEvaluation, found: Found) -> Iterator[Notice]:
    models = recipe.measured_on(row.task)
    samples = found[row.task, models[0].name].samples
    if samples < FEW_SAMPLES:
        yield Notice("few_samples", task=row.task, count=samples, enough=FEW_SAMPLES)
    for model in models:
        yield from _of_pair(recipe, row, model, found)
        figures = found[row.task, model.name].figures
        lacking = [metric for metric, values in figures.items() if not math.isfinite(values[0])]
        if lacking:
            yield Notice("no_figure", task=row.task, metrics=", ".join(lacking), model=model.name)


def _of_pair(recipe: EvaluationRecipe, row: TaskEvaluation, model: EvaluatedModel, found: Found) -> Iterator[Notice]:
    pair, reference = _pair(recipe, row, model, found), recipe.reference_on(row.task)
    if pair is None or reference is None:
        return
    ours, theirs = pair.primary("merged")[0], pair.primary("expert")[0]
    said = {"task": row.task, "metric": row.primary.value, "model": model.name}
    said |= {"reference": reference.name, "theirs": f"{theirs:.4g}"}
    if not math.isfinite(pair.retention("merged")[0]):
        yield Notice("nothing_to_keep_of", **said)
    if ours != theirs and distinguishable(recipe.evaluation, pair) is False:
        yield Notice("within_noise_of", count=pair.samples, ours=f"{ours:.4g}", **said)
