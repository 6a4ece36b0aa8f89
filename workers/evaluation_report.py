"""Says what an evaluation by itself found, in the words of a merge's report where they are the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from service.contract.evaluating import EvaluationRecipe
from service.contract.parts import SoFar
from service.contract.plan import Plan
from workers.report import cost_of


@dataclass(frozen=True)
class EvaluationFacts:
    """What the report of an evaluation is made from; the fields are as in ``report.Facts``."""

    recipe: EvaluationRecipe
    plan: Plan
    metrics: Mapping[str, Any]
    gates: Sequence[Mapping[str, Any]]
    so_far: SoFar
    inputs: Sequence[Mapping[str, Any]]
    made_by: Mapping[str, Any]
    licenses: Mapping[str, str | None]
    warnings: Sequence[Mapping[str, Any]] = ()
    usage: Mapping[str, Any] | None = None


def build_evaluation_report(facts: EvaluationFacts) -> dict[str, Any]:
    """The report as data."""
    recipe = facts.recipe
    return {
        "title": f"{len(recipe.models)} models evaluated on {len(recipe.evaluation.tasks)} tasks",
        "mode": recipe.mode,
        "language": recipe.output.language,
        "base": recipe.base,
        "models": [model.model_dump(mode="json") for model in recipe.models],
        "metrics": dict(facts.metrics),
        "gates": list(facts.gates),
        "cost": {**cost_of(facts.so_far), **(facts.usage or {})},
        "plan": {"bytes_in": facts.plan.bytes_in, "peak_memory_bytes": facts.plan.peak_memory_bytes},
        "recipe": recipe.model_dump(mode="json"),
        "inputs": list(facts.inputs),
        "made_by": facts.made_by,
        "licenses": {"inputs": dict(facts.licenses), "result": None},
        "warnings": list({row["detail"]: row for row in facts.warnings}.values()),
    }
