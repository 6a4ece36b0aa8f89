"""Does one trial of a search: merges by the parameters that are proposed, and measures on what a search may look at."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from service.contract.errors import BadInput, BadTensor, Failure
from service.contract.evaluation import Evaluation, TaskEvaluation
from service.contract.notices import Notice, as_rows
from service.contract.parts import Done
from service.contract.plan import Plan
from service.contract.recipe import Recipe
from service.contract.search import Figure, Search
from service.contract.trials import TrialRecord
from workers.chosen import as_tried
from workers.likeness import likenesses
from workers.machine import allow_tf32
from workers.proposing import propose
from workers.scores import TaskScores
from workers.scoring import cached_scores, score
from workers.stages.calibrate import survey_task
from workers.stages.merge import merge_shard
from workers.structures import forget, is_worth_keeping, structure_of
from workers.tensors import TensorReader
from workers.trial import Trial
from workers.work import Work

# What may be wrong with one trial's parameters alone.
OWN_FAULTS = (
    BadInput,
    BadTensor,
    torch.linalg.LinAlgError,  # type: ignore[attr-defined]  # torch documents it there
    torch.OutOfMemoryError,
)


def run(work: Work) -> Done:
    """Ask for a trial, do it, and tell what came of it; nothing where the time is over.

    Raises:
        InputChanged, StorageFailure, UnsupportedArchitecture.
    """
    allow_tf32(work.recipe.allow_tf32)
    search, study = work.recipe.search, work.study
    if search is None or study is None:
        raise BadInput("the recipe asks for no search")
    work = replace(work, planned=work.plan())
    trial = study.ask(lambda known: propose(work.recipe, search, known), search.seconds)
    if trial is None:
        return Done(output={"skipped": True})
    if trial.state == "running":
        trial = _tried(work, search, trial)
        study.tell(trial)
    return Done(output={"trial": trial.number, "state": trial.state, "value": trial.value})


def _tried(work: Work, search: Search, trial: TrialRecord) -> TrialRecord:
    """The trial with what came of it. What is wrong with its own parameters fails the trial, not the search."""
    is_kept = is_worth_keeping(search, work.recipe)
    try:
        output = _measured(work, search, trial, is_kept=is_kept)
    except OWN_FAULTS as error:
        return _failed(trial, _reason(error))
    finally:
        if not is_kept:
            forget(work, trial.number)
    figures = output[search.measures]
    value = search.value(list(figures.values()))
    if not math.isfinite(value):
        lacking = [task for task, figure in figures.items() if not math.isfinite(figure)]
        return _failed(trial, Notice(f"no_{search.measures}", tasks=", ".join(lacking)))
    return replace(trial, state="complete", value=value, output=output)


def _failed(trial: TrialRecord, reason: str) -> TrialRecord:
    (why,) = as_rows([reason])
    return replace(trial, state="failed", detail=reason, output={"why": why})


def _reason(error: Exception) -> str:
    if isinstance(error, Failure):
        return error.detail
    is_full = isinstance(error, torch.OutOfMemoryError)
    return Notice("out_of_memory" if is_full else "not_factored", reason=str(error))


def _measured(work: Work, search: Search, trial: TrialRecord, *, is_kept: bool) -> dict[str, Any]:
    """What the search measures of each task, and the surveys that the merge needs if the trial is chosen."""
    recipe = work.recipe.tried(trial.parameters)
    structure = structure_of(work, recipe, trial.number, merge_shard, _survey_tasks, is_kept=is_kept)
    with TensorReader(work.objects) as reader:
        tried = as_tried(work, recipe, structure.surveys)
        merged = structure.at_scaling(work, reader, recipe, tried.plan())
        return {search.measures: MEASURE[search.measures](tried, reader, merged), "surveys": list(structure.surveys)}


def _survey_tasks(work: Work) -> list[str]:
    with TensorReader(work.objects) as reader:
        return [survey_task(work, work.plan(), task, reader) for task in work.recipe.tasks]


def _retentions(work: Work, reader: TensorReader, merged: dict[str, Tensor]) -> dict[str, float]:
    evaluation = validation_of(work.recipe)
    on_validation = replace(work, planned=_reading_validation(work.plan(), evaluation.tasks))
    found = {}
    for row in evaluation.tasks:
        trial = Trial.open(on_validation, reader, evaluation, row)
        expert = cached_scores(trial, trial.digest("expert"), partial(trial.load, "expert"))
        scores = score(trial, trial.load_merged(merged))
        figures = {"expert": expert.figures, "merged": scores.figures}
        found[row.task] = float(TaskScores(row, scores.samples, figures).retention("merged")[0])
    return found


MEASURE: Mapping[Figure, Callable[[Work, TensorReader, dict[str, Tensor]], dict[str, float]]] = {
    "retention": _retentions,
    "likeness": partial(likenesses, figure="likeness"),
    "prediction_likeness": partial(likenesses, figure="prediction_likeness"),
}


def validation_of(recipe: Recipe) -> Evaluation:
    """The evaluation with validation samples in place of the labeled ones, of nothing but the primary metrics."""
    evaluation = recipe.evaluation
    if evaluation is None:
        raise BadInput("a search needs an evaluation")
    rows = tuple(
        row.model_copy(update={"labeled": row.validation, "validation": None, "metrics": (row.primary,)})
        for row in evaluation.tasks
    )
    return evaluation.model_copy(update={"tasks": rows, "baselines": (), "resamples": 0})


def _reading_validation(plan: Plan, rows: Sequence[TaskEvaluation]) -> Plan:
    swapped = {f"labeled:{row.task}": plan.inputs[f"validation:{row.task}"] for row in rows}
    return plan.model_copy(update={"inputs": {**plan.inputs, **swapped}})
