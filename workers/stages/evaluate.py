"""Evaluates one model on one task's labeled samples; and, in a part of its own, how fast the models are."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

from service.contract import artifacts
from service.contract.errors import BadInput
from service.contract.evaluation import TaskEvaluation
from service.contract.notices import Notice
from service.contract.parts import Done
from workers.chosen import as_chosen
from workers.figures_file import ModelScores, write_scores
from workers.machine import allow_tf32
from workers.scoring import cached_scores, score
from workers.speed import compare
from workers.tensors import TensorReader
from workers.trial import Trial, row_digests
from workers.work import Work

CACHED = ("base", "expert")


def run(work: Work) -> Done:
    """Leave the scores of one model on one task, each with those of its resamples; or the speed of the models.

    Raises:
        BadInput: samples, labels or head do not fit the model.
        InputChanged, StorageFailure, UnsupportedArchitecture.
    """
    allow_tf32(work.recipe.allow_tf32)
    work = as_chosen(work)
    evaluation = work.recipe.evaluation
    if evaluation is None:
        raise BadInput("the recipe asks for no evaluation")
    with TensorReader(work.objects) as reader:
        if work.part == len(evaluation.parts):
            trials = [Trial.open(work, reader, evaluation, row) for row in evaluation.tasks]
            return Done(output={"speed": compare(trials)})
        row, model = evaluation.parts[work.part]
        trial = Trial.open(work, reader, evaluation, row)
        load = partial(trial.load, model)
        scores = cached_scores(trial, trial.digest(model), load) if model in CACHED else score(trial, load())
        warnings = (*(trial.warnings if model == "merged" else ()), *(_leaks(trial) if model == "base" else ()))
    write_scores(work.objects, artifacts.figures(work.workspace, work.claim.job_id, work.part), scores)
    return Done(noted(row, model, scores), warnings)


def noted(row: TaskEvaluation, model: str, scores: ModelScores) -> dict[str, Any]:
    """What a part of the evaluation leaves in the database."""
    points = {metric.value: _number(values[0]) for metric, values in scores.figures.items()}
    return {
        "task": row.task,
        "model": model,
        "samples": scores.samples,
        "scores": points,
    }


def _leaks(trial: Trial) -> Iterator[str]:
    """Samples that a search may look at and that are measured on as well: no fair measure of what it finds."""
    if trial.row.validation is None:
        return
    both = row_digests(trial.samples) & row_digests(trial.read("validation").tensors)
    if both:
        row = trial.row
        yield Notice("leak", count=len(both), task=row.task, validation=row.validation, labeled=row.labeled)


def _number(value: float) -> float | None:
    """A figure as JSON can say it."""
    return float(value) if math.isfinite(value) else None
