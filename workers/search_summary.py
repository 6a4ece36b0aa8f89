"""What a search found, for the report: its trials, what made the difference, and the chosen one on both data sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from service.contract.errors import BadInput
from service.contract.recipe import Recipe
from service.contract.search import Objective, Search
from service.contract.trials import TrialRecord, best_so_far, best_trial
from workers.proposing import importances


def summary(
    asked: Recipe, trials: Sequence[TrialRecord], metrics: Mapping[str, Any] | None, *, skipped: int
) -> dict[str, Any]:
    """The search of a recipe, with the trial table; ``metrics`` are those of the merge by the chosen parameters.

    Raises:
        BadInput: no trial has a value.
    """
    search = asked.search
    if search is None:
        raise BadInput("the recipe asks for no search")
    best = best_trial(trials)
    return {
        "objective": _said(search),
        "sampler": search.sampler,
        "trials": [_row(search, trial, so_far) for trial, so_far in zip(trials, best_so_far(trials), strict=True)],
        "skipped": skipped,
        "importances": importances(asked, search, trials),
        "chosen": dict(best.parameters),
        "validation": best.value,
        "measures": search.measures,
        "test": _on_test(search, metrics or {}),
    }


def _row(search: Search, trial: TrialRecord, best: float | None) -> dict[str, Any]:
    return {
        "number": trial.number,
        "state": trial.state,
        "value": trial.value,
        "best": best,
        "parameters": dict(trial.parameters),
        search.measures: trial.output.get(search.measures),
        "detail": trial.detail,
        "why": trial.output.get("why"),
    }


def _said(search: Search) -> str:
    if not isinstance(search.objective, Objective):
        return search.objective
    return " + ".join(f"{weight:g} * {name}" for name, weight in search.objective.model_dump().items() if weight)


def _on_test(search: Search, metrics: Mapping[str, Any]) -> float | None:
    """The objective on the labeled samples; None where it is not about labels, or a task has no figure there."""
    rows = metrics.get("tasks", {}).values()
    kept = [row["retention"] for row in rows]
    return None if search.measures != "retention" or not kept or None in kept else search.value(kept)
