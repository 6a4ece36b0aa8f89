"""Evaluates one checkpoint on one task's labeled samples, in an evaluation by itself."""

from __future__ import annotations

from service.contract import artifacts
from service.contract.parts import Done
from workers.candidate import Candidate
from workers.figures_file import write_scores
from workers.machine import allow_tf32
from workers.scoring import cached_scores
from workers.stages.evaluate import noted
from workers.tensors import TensorReader
from workers.work import Work


def run(work: Work) -> Done:
    """Leave the scores of one model on one task, each with those of its resamples.

    Raises:
        BadInput: samples, labels or head do not fit the model.
        InputChanged, StorageFailure, UnsupportedArchitecture.
    """
    recipe = work.evaluation_recipe
    allow_tf32(recipe.allow_tf32)
    row, model = recipe.parts[work.part]
    with TensorReader(work.objects) as reader:
        candidate = Candidate.open(work, reader, row, model)
        scores = cached_scores(candidate, candidate.digest(), candidate.load)
        warnings = candidate.warnings
    write_scores(work.objects, artifacts.figures(work.workspace, work.claim.job_id, work.part), scores)
    return Done(noted(row, model.name, scores), warnings)
