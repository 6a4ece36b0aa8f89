"""After a search, a part goes on with the recipe that was chosen, as if that had been asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from service.contract.planning import replanned
from service.contract.recipe import Recipe
from service.contract.stages import Stage
from service.contract.trials import best_trial
from workers.work import Work


def as_chosen(work: Work) -> Work:
    """The work of a part with the best trial's recipe and plan; as it is where nothing was searched for.

    Raises:
        BadInput: no trial of the search has a value.
    """
    if work.study is None:
        return work
    best = best_trial(work.study.trials())
    return as_tried(work, work.recipe.tried(best.parameters), best.output.get("surveys", ()))


def as_tried(work: Work, recipe: Recipe, surveys: Sequence[str]) -> Work:
    """The work of a part with the recipe of a trial, its plan and the addresses of its surveys, one for each task."""
    plan = replanned(work.plan(), recipe)

    def outputs(stage: Stage) -> list[dict[str, Any]]:
        found = work.outputs(stage)
        return _calibrated(found, surveys, is_wanted=bool(plan.wanted())) if stage is Stage.CALIBRATE else found

    return replace(work, claim=replace(work.claim, recipe=recipe), planned=plan, outputs=outputs, study=None)


def _calibrated(found: list[dict[str, Any]], surveys: Sequence[str], *, is_wanted: bool) -> list[dict[str, Any]]:
    """What calibration left for this recipe: statistics where they are wanted, and its own surveys."""
    kept = [output if is_wanted else {} for output in found]
    if not surveys:
        return kept
    return [{**output, "survey": address} for output, address in zip(kept or [{}] * len(surveys), surveys, strict=True)]
