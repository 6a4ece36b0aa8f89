"""Says what a merge did, for managers and for machines: report.json, report.html and the model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from service.contract.job import Artifact
from service.contract.parts import SoFar
from service.contract.plan import Plan
from service.contract.recipe import Recipe
from workers import figures
from workers.charts.quality import metric_of
from workers.licenses import conjunction
from workers.page import render_page


@dataclass(frozen=True)
class Facts:
    """What a report is made from.

    ``layers`` is what ``workers.trim_log.summarize`` makes of the trim log; ``inputs`` has every input's role, address,
    size and SHA-256; ``made_by`` says on what: device, engine, versions. ``conflict`` and ``search`` are there where
    tasks were held against each other, and where parameters were searched for, ``analysis`` where nothing was merged;
    ``warnings`` are rows of ``service.contract.notices``, ``usage`` is what ``workers.usage`` sums up. ``recipe`` is
    what was merged by, ``asked`` what was asked for, where that left a choice.
    """

    recipe: Recipe
    plan: Plan
    metrics: dict[str, Any] | None
    gates: list[dict[str, Any]]
    trimmed: dict[str, dict[str, float | None]]
    so_far: SoFar
    files: tuple[Artifact, ...]
    licenses: dict[str, str | None]
    layers: Mapping[str, Any] | None = None
    inputs: Sequence[Mapping[str, Any]] = ()
    made_by: Mapping[str, Any] | None = None
    conflict: Mapping[str, Any] | None = None
    analysis: Mapping[str, Any] | None = None
    search: Mapping[str, Any] | None = None
    warnings: Sequence[Mapping[str, Any]] = ()
    usage: Mapping[str, Any] | None = None
    asked: Recipe | None = None


def build_report(facts: Facts) -> dict[str, Any]:
    """The report as data."""
    recipe = facts.recipe
    return {
        "title": f"{len(recipe.tasks)} models {_done(recipe)} by {recipe.method.name}",
        "mode": recipe.mode,
        "language": recipe.output.language,
        "method": recipe.method.model_dump(mode="json"),
        "paper": type(recipe.method).paper,
        "base": recipe.base,
        "tasks": [task.model_dump(mode="json") for task in recipe.tasks],
        "metrics": facts.metrics,
        "gates": facts.gates,
        "trimmed": facts.trimmed,
        "layers": facts.layers,
        "conflict": facts.conflict,
        "analysis": facts.analysis,
        "search": facts.search,
        "cost": {**cost_of(facts.so_far), **(facts.usage or {})},
        "savings": _savings(facts),
        "plan": facts.plan.summary(),
        "recipe": (facts.asked or recipe).model_dump(mode="json"),
        "inputs": list(facts.inputs),
        "made_by": facts.made_by,
        "licenses": {"inputs": facts.licenses, "result": conjunction(facts.licenses)},
        "warnings": list({row["detail"]: row for row in facts.warnings}.values()),
    }


def _done(recipe: Recipe) -> str:
    return "analyzed before merging" if recipe.mode == "analysis" else "merged into one"


def cost_of(so_far: SoFar) -> dict[str, Any]:
    """What a job has cost, as reports have it."""
    return {
        "seconds": round(so_far.now - so_far.started_at, 3),
        "seconds_queued": round(so_far.started_at - so_far.created_at, 3),
        "bytes_read": so_far.bytes_read,
        "bytes_written": so_far.bytes_written,
    }


def _savings(facts: Facts) -> dict[str, Any]:
    """What one model saves against one per task, in models deployed and in bytes stored; or would, once merged."""
    tasks = [name for name in facts.plan.inputs if name.startswith("task:")]
    before = sum(file.size for name in tasks for file in facts.plan.inputs[name])
    after = sum(file.size for file in facts.files if file.role in ("weights", "head"))
    if facts.recipe.mode == "analysis":
        after = facts.plan.bytes_out
    return {
        "models_before": len(tasks),
        "models_after": 1,
        "bytes_before": before,
        "bytes_after": after,
        "bytes_saved_share": 1 - after / before if before else 0.0,
    }


def render_html(report: Mapping[str, Any]) -> str:
    """A page that needs nothing but itself."""
    return render_page(report)


def render_card(report: Mapping[str, Any]) -> str:
    """The model card: README.md with the metadata that model hubs read."""
    return _environment().get_template("card.md").render(report=report)


@cache
def _environment() -> Environment:
    """Made once: compiling a template takes longer than many a merge."""
    environment = Environment(
        loader=PackageLoader("workers"),
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["percent"] = figures.percent
    environment.filters["score"] = figures.score
    environment.filters["figure"] = figures.figure
    environment.filters["metric_of"] = metric_of
    return environment
