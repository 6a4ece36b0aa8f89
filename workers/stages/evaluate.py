"""Evaluates one model on one task's labeled samples; and, in a part of its own, how fast the models are."""

from __future__ import annotations

import math
from collections.abc import Iterator

from service.contract import artifacts
from service.contract.errors import BadInput
from service.contract.parts import Done
from service.stores.objects import failures
from workers.bootstrap import figures
from workers.exemplars import naming
from workers.figures_file import ModelScores, read_scores, write_scores
from workers.forward import check_inputs
from workers.machine import allow_tf32
from workers.metrics import KINDS
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
    evaluation = work.recipe.evaluation
    if evaluation is None:
        raise BadInput("the recipe asks for no evaluation")
    with TensorReader(work.objects) as reader:
        if work.part == len(evaluation.parts):
            trials = [Trial.open(work, reader, evaluation, row) for row in evaluation.tasks]
            return Done(output={"speed": compare(trials)})
        row, model = evaluation.parts[work.part]
        trial = Trial.open(work, reader, evaluation, row)
        scores = _cached(trial, model) if model in CACHED else _measure(trial, model)
        warnings = (*(trial.warnings if model == "merged" else ()), *(_leaks(trial) if model == "base" else ()))
    write_scores(work.objects, artifacts.figures(work.workspace, work.claim.job_id, work.part), scores)
    points = {metric.value: _number(values[0]) for metric, values in scores.figures.items()}
    found = {"task": row.task, "model": model, "samples": scores.samples, "scores": points, "warnings": list(warnings)}
    return Done(found, warnings)


def _measure(trial: Trial, model: str) -> ModelScores:
    """Every metric of a model's answers, on all samples and on each resample."""
    kind, row = KINDS[trial.row.kind], trial.row
    loaded = trial.load(model)
    with naming(row.labeled):
        check_inputs(loaded, kind.inputs(loaded, trial.samples))
    answers = kind.gather(loaded, trial.samples, trial.setting)
    found, samples = {}, 0
    for metric in row.measured:
        measure = kind.measures[metric]
        contributions = measure.contributions(*answers)
        samples = len(contributions)
        found[metric] = figures(measure, contributions, trial.work.recipe.seed, row.task, trial.evaluation.resamples)
        trial.work.watch.step()
    return ModelScores(samples, found)


def _cached(trial: Trial, model: str) -> ModelScores:
    """Scores that were measured before on the same bytes, or measured now and kept."""
    objects = trial.work.objects
    address = artifacts.cached_figures(trial.work.workspace, trial.digest(model))
    with failures():
        is_known = objects.exists(address)
    if is_known:
        return read_scores(objects, address)
    scores = _measure(trial, model)
    write_scores(objects, address, scores)
    return scores


def _leaks(trial: Trial) -> Iterator[str]:
    """Samples that a search may look at and that are measured on as well: no fair measure of what it finds."""
    if trial.row.validation is None:
        return
    both = row_digests(trial.samples) & row_digests(trial.read("validation").tensors)
    if both:
        yield (
            f"{len(both)} samples of task {trial.row.task!r} are in {trial.row.validation} as well as in "
            f"{trial.row.labeled}; what a search chooses on the one is then not fairly measured on the other"
        )


def _number(value: float) -> float | None:
    """A figure as JSON can say it."""
    return float(value) if math.isfinite(value) else None
