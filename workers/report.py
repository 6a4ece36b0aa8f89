"""Says what a merge did, for managers and for machines: report.json, report.html and the model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from service.contract.job import Artifact
from service.contract.parts import SoFar
from service.contract.plan import Plan
from service.contract.recipe import Recipe
from workers.licenses import conjunction


@dataclass(frozen=True)
class Facts:
    """What a report is made from."""

    recipe: Recipe
    plan: Plan
    metrics: dict[str, Any] | None
    gates: list[dict[str, Any]]
    trimmed: dict[str, dict[str, float | None]]
    so_far: SoFar
    files: tuple[Artifact, ...]
    licenses: dict[str, str | None]


def build_report(facts: Facts) -> dict[str, Any]:
    """The report as data."""
    recipe = facts.recipe
    return {
        "title": f"{len(recipe.tasks)} models merged into one by {recipe.method.name}",
        "method": recipe.method.model_dump(mode="json"),
        "paper": type(recipe.method).paper,
        "base": recipe.base,
        "tasks": [task.model_dump(mode="json") for task in recipe.tasks],
        "metrics": facts.metrics,
        "gates": facts.gates,
        "trimmed": facts.trimmed,
        "cost": _cost(facts.so_far),
        "savings": _savings(facts),
        "plan": facts.plan.summary(),
        "licenses": {"inputs": facts.licenses, "result": conjunction(facts.licenses)},
        "warnings": list(facts.plan.warnings),
    }


def _cost(so_far: SoFar) -> dict[str, Any]:
    return {
        "seconds": round(so_far.now - so_far.started_at, 3),
        "seconds_queued": round(so_far.started_at - so_far.created_at, 3),
        "bytes_read": so_far.bytes_read,
        "bytes_written": so_far.bytes_written,
    }


def _savings(facts: Facts) -> dict[str, Any]:
    """What one model saves against one per task, in models deployed and in bytes stored."""
    tasks = [name for name in facts.plan.inputs if name.startswith("task:")]
    before = sum(file.size for name in tasks for file in facts.plan.inputs[name])
    after = sum(file.size for file in facts.files if file.role in ("weights", "head"))
    return {
        "models_before": len(tasks),
        "models_after": 1,
        "bytes_before": before,
        "bytes_after": after,
        "bytes_saved_share": 1 - after / before if before else 0.0,
    }


def render_html(report: Mapping[str, Any]) -> str:
    """A page that needs nothing but itself."""
    return _environment().get_template("report.html").render(report=report)


def render_card(report: Mapping[str, Any]) -> str:
    """The model card: README.md with the metadata that model hubs read."""
    return _environment().get_template("card.md").render(report=report)


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("workers"),
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["percent"] = _percent
    environment.filters["bytes"] = _bytes
    environment.filters["figure"] = _figure
    return environment


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _bytes(value: float) -> str:
    units: Sequence[str] = ("B", "kB", "MB", "GB", "TB")
    for unit in units:
        if value < 1000 or unit == units[-1]:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return ""
