"""Measures a loaded model on one task's labeled samples; what a base or an expert scores is kept."""

from __future__ import annotations

from torch import nn

from service.contract import artifacts
from service.stores.objects import failures
from workers.bootstrap import figures
from workers.exemplars import naming
from workers.figures_file import ModelScores, read_scores, write_scores
from workers.forward import check_inputs
from workers.metrics import KINDS
from workers.trial import Trial


def score(trial: Trial, loaded: nn.Module) -> ModelScores:
    """Every metric of a model's answers, on all samples and on each resample."""
    kind, row = KINDS[trial.row.kind], trial.row
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


def cached_scores(trial: Trial, model: str) -> ModelScores:
    """Scores that were measured before on the same bytes, or measured now and kept."""
    objects = trial.work.objects
    address = artifacts.cached_figures(trial.work.workspace, trial.digest(model))
    with failures():
        is_known = objects.exists(address)
    if is_known:
        return read_scores(objects, address)
    scores = score(trial, trial.load(model))
    write_scores(objects, address, scores)
    return scores
