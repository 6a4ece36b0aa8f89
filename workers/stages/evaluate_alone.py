"""Evaluates one checkpoint on one task's labeled samples, in an evaluation by itself; or how fast its models are."""

from __future__ import annotations

from typing import Any

from service.contract import artifacts
from service.contract.evaluating import EvaluatedModel
from service.contract.evaluation import TaskEvaluation
from service.contract.parts import Done
from workers.candidate import Candidate
from workers.figures_file import write_scores
from workers.machine import allow_tf32
from workers.scoring import cached_scores
from workers.speed import compare_candidates
from workers.stages.evaluate import noted
from workers.tensors import TensorReader
from workers.work import Work


def run(work: Work) -> Done:
    """Leave the scores of one model on one task, each with those of its resamples; or the speed of the models.

    Raises:
        BadInput: samples, labels or head do not fit the model.
        InputChanged, StorageFailure, UnsupportedArchitecture.
    """
    recipe = work.evaluation_recipe
    allow_tf32(recipe.allow_tf32)
    if work.part == len(recipe.parts):
        return Done(output={"speed": _speed(work)})
    row, model = recipe.parts[work.part]
    with TensorReader(work.objects) as reader:
        candidate = Candidate.open(work, reader, row, model)
        scores = cached_scores(candidate, candidate.digest(), candidate.load)
        warnings = candidate.warnings
    write_scores(work.objects, artifacts.figures(work.workspace, work.claim.job_id, work.part), scores)
    return Done(noted(row, model.name, scores), warnings)


def _speed(work: Work) -> dict[str, Any]:
    """Every model timed as it is on the first of its tasks; the model of the first part gives the samples."""
    firsts = dict[str, tuple[TaskEvaluation, EvaluatedModel]]()
    for row, model in work.evaluation_recipe.parts:
        firsts.setdefault(model.name, (row, model))
    with TensorReader(work.objects) as reader:
        return compare_candidates([Candidate.open(work, reader, row, model) for row, model in firsts.values()])
