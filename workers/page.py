"""Renders a report as one page that needs nothing but itself: no network, no fonts, no scripts from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from service.contract.metrics import METRICS
from workers import figures
from workers.charts.chart import Chart, library
from workers.charts.layers import layer_charts
from workers.charts.quality import evaluation_charts, metric_of, models_of, quality_charts
from workers.charts.search import named_values, search_charts
from workers.charts.tasks import conflict_charts
from workers.languages import LANGUAGES, MARK, both, known, noticed, plain, said, texts
from workers.palette import all_colors

# What a report may lack: an older one, or one of a merge that nothing was measured on.
MAY_LACK = ("layers", "conflict", "analysis", "search", "recipe", "inputs", "made_by", "plan", "trimmed", "mode")
METRICS_MAY_LACK = (
    "mean_retention_interval",
    "worst_retention_interval",
    "confidence",
    "resamples",
    "speed",
    "parameters",
)
COST_MAY_LACK = ("peak_memory_bytes", "idle_memory_bytes", "peak_is_exact", "device", "device_peak_bytes", "stages")
GATES_MAY_LACK = ("at_least", "at_most", "task", "use", "model")
SEARCH_MAY_LACK = ("measures", "chosen", "validation", "test")

RECIPE_LIMIT_CHARACTERS = 60_000
INPUTS_SHOWN = 200
WARNINGS_SHOWN = 100
POINTS = 100  # in one: differences of shares are told in points


@dataclass(frozen=True)
class Section:
    """The charts of one chapter."""

    charts: tuple[Chart, ...]

    def named(self, *starts: str) -> list[Chart]:
        """Those whose names begin so."""
        return [chart for chart in self.charts if chart.name.startswith(starts)]


def render_page(report: Mapping[str, Any]) -> str:
    """The page of a report; reports that lack a chapter are rendered without it."""
    report = _whole(report)
    metrics, gates = report["metrics"], report["gates"]
    merged = None if _is_evaluation(report) else metrics
    drawn = Section(tuple(_charts(report)))
    scripts = [_library(), _file("report.js")] if drawn.charts else [_file("report.js")]
    return (
        _environment()
        .get_template("report.html")
        .render(
            report=report,
            metrics=metrics,
            gates=gates,
            analysis=report["analysis"],
            missed=[gate for gate in gates if not gate["passed"]],
            charts=drawn,
            evaluated=metrics if _is_evaluation(report) else None,
            rows=_score_rows(merged) if merged else [],
            baselines=_baselines(merged) if merged else [],
            unsure=_unsure(merged) if merged else [],
            trimming=_trimming(report),
            failed_trials=_failed_trials(report),
            facts=Markup(_data(drawn.charts)),  # noqa: S704  # escaped for a script element
            scripts=[Markup(script) for script in scripts],  # noqa: S704  # our own, and the library's
            hashes=[_hash(script) for script in scripts],
            language=report.get("language") or LANGUAGES[0],
            recipe=_recipe_text(report),
            limits={"inputs": INPUTS_SHOWN, "warnings": WARNINGS_SHOWN},
        )
    )


def _whole(report: Mapping[str, Any]) -> dict[str, Any]:
    """The report with None for everything that it may lack, so that a misspelled name in the template is an error."""
    metrics, search = report.get("metrics"), report.get("search")
    return {
        **dict.fromkeys(MAY_LACK),
        **report,
        "cost": {**dict.fromkeys(COST_MAY_LACK), **report["cost"]},
        "metrics": {**dict.fromkeys(METRICS_MAY_LACK), **metrics} if metrics else None,
        "search": {**dict.fromkeys(SEARCH_MAY_LACK), **search} if search else None,
        "gates": [{**dict.fromkeys(GATES_MAY_LACK), **gate} for gate in report.get("gates") or ()],
    }


def _is_evaluation(report: Mapping[str, Any]) -> bool:
    """Whether models were only measured; else the report is about a merge, or its analysis."""
    return report.get("mode") == "evaluation"


def _charts(report: Mapping[str, Any]) -> Iterator[Chart]:
    if report.get("metrics"):
        draw = evaluation_charts if _is_evaluation(report) else quality_charts
        yield from draw(report["metrics"], report.get("gates") or [])
    if report.get("layers"):
        yield from layer_charts(report["layers"])
    if report.get("conflict"):
        yield from conflict_charts(report["conflict"])
    if report.get("search"):
        yield from search_charts(report["search"])


# What is worked out before it is said


def _score_rows(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per task, its scores written as its metric is usually given."""
    return [
        {
            "task": name,
            "metric": metric_of(row),
            "lower": row.get("better") == "lower" or _lower(metric_of(row)),
            "samples": row["samples"],
            "retention": figures.percent(row["retention"]),
            "retention_span": figures.span((row.get("intervals") or {}).get("retention"), "accuracy"),
            "distinguishable": row.get("distinguishable"),
            "cells": list(_cells(metrics, row)),
        }
        for name, row in metrics["tasks"].items()
    ]


def _cells(metrics: Mapping[str, Any], row: Mapping[str, Any]) -> Iterator[tuple[str, str | None, str | None]]:
    """Score, interval and what trimming gains over it: of merged, expert, every baseline that any task has, base."""
    found, metric, baselines = models_of(row), metric_of(row), row.get("baselines") or {}
    for model in ("merged", "expert", *_baseline_names(metrics), "base"):  # small screens show what comes first
        value, ends = found.get(model, (None, None))
        gain = figures.difference((baselines.get(model) or {}).get("gain"), metric)
        yield figures.score(value, metric), figures.span(ends, metric), gain


def _lower(metric: str) -> bool:
    return any(row.better == "lower" for name, row in METRICS.items() if name == metric)


def _baseline_names(metrics: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(name for row in metrics["tasks"].values() for name in row.get("baselines") or {}))


def _baselines(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What each baseline keeps on average, and how many points more trimming keeps."""
    found = []
    for name in _baseline_names(metrics):
        pairs = [
            (row["baselines"][name]["retention"], row["retention"])
            for row in metrics["tasks"].values()
            if name in (row.get("baselines") or {})
        ]
        whole = [(theirs, ours) for theirs, ours in pairs if theirs is not None and ours is not None]
        theirs = sum(pair[0] for pair in whole) / len(whole) if whole else None
        gain = POINTS * (sum(pair[1] for pair in whole) / len(whole) - theirs) if theirs is not None else None
        found.append({"name": name, "value": theirs, "gain": None if gain is None else f"{gain:+.1f}"})
    return found


def _unsure(metrics: Mapping[str, Any]) -> list[str]:
    return [name for name, row in metrics["tasks"].items() if row.get("distinguishable") is False]


def _trimming(report: Mapping[str, Any]) -> dict[str, float] | None:
    """Over all layers: the share of energy that was removed, and the share by which conflict fell."""
    layers = report.get("layers")
    if not layers:
        return None
    energy = sum(row["energy"] for row in layers["energy"])
    removed = sum(row["energy"] * row["removed"] for row in layers["energy"])
    before, after = (sum(row[when] for row in layers["conflict"]) for when in ("before", "after"))
    if not energy or not before or not removed:
        return None
    return {"energy": removed / energy, "conflict": 1 - after / before}


def _failed_trials(report: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """The numbers of the trials that failed, and why: those of one reason together, the first reasons first."""
    reasons: dict[str, tuple[list[str], Mapping[str, Any]]] = {}
    for trial in (report["search"] or {}).get("trials", ()):
        if trial.get("detail"):
            why = trial.get("why") or {"code": None, "values": {}, "detail": trial["detail"]}
            reasons.setdefault(trial["detail"], ([], why))[0].append(str(trial["number"]))
    return [(", ".join(numbers), why) for numbers, why in list(reasons.values())[:WARNINGS_SHOWN]]


def _recipe_text(report: Mapping[str, Any]) -> str | None:
    text = json.dumps(report["recipe"], indent=2, ensure_ascii=False) if report.get("recipe") else None
    return text if text is not None and len(text) <= RECIPE_LIMIT_CHARACTERS else None


# Putting it together


def _data(drawn: Sequence[Chart]) -> str:
    """The charts and their texts as JSON that no script element ends at."""
    text = json.dumps([{"name": chart.name, "alt": MARK + chart.alt, "spec": _packed(chart.spec)} for chart in drawn])
    used = {name: found for name, found in texts().items() if name == "chart_failed" or f'"{MARK}{name}"' in text}
    whole = json.dumps({"texts": used, "charts": json.loads(text)}, ensure_ascii=False, separators=(",", ":"))
    return whole.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _packed(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The chart with its data as lists of cells, words told once and then by number: a quarter of the size."""
    values: list[dict[str, Any]] = spec["data"]["values"]
    fields = list(values[0]) if values else []
    words = {word: place for place, word in enumerate(dict.fromkeys(_words(values)))}
    cells = [[words[row[f]] if isinstance(row[f], str) else row[f] for f in fields] for row in values]
    spoken = [field for field in fields if isinstance(values[0][field], str)]
    return {**spec, "data": {"fields": fields, "spoken": spoken, "words": list(words), "cells": cells}}


def _words(values: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    return (value for row in values for value in row.values() if isinstance(value, str))


@cache
def _library() -> str:
    """The chart library as text for a script element."""
    return library().replace("</script", "<\\/script")


def _file(name: str) -> str:
    return (files("workers") / "templates" / name).read_text("utf-8")


def _hash(script: str) -> str:
    """What the page's policy lets run: these very bytes and nothing else."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


@cache
def _environment() -> Environment:
    """Made once: compiling a template takes longer than many a merge."""
    environment = Environment(
        loader=PackageLoader("workers"),
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": _glued(figures.percent),
        "figure": figures.figure,
        "ratio": _ratio,
        "score": _glued(figures.score),
        "bytes": _glued(figures.size),
        "seconds": _glued(figures.seconds),
        "said": said,
        "gate_figure": _glued(_gate_figure),
        "parameters": named_values,
    }
    environment.globals |= {
        "t": both,
        "plain": plain,
        "known": known,
        "noticed": noticed,
        "span": figures.span,
        "metric_of": metric_of,
        "colors": all_colors(),
        "styles": Markup(_file("report.css")),  # noqa: S704  # our own
    }
    return environment


def _glued(write: Callable[..., str]) -> Callable[..., str]:
    """A number that no line break parts from its unit."""
    return lambda *values: write(*values).replace(" ", "\N{NO-BREAK SPACE}")


def _ratio(value: float | None) -> str:
    """Two decimals, as charts of ratios have them."""
    return figures.NONE if value is None else f"{value:.2f}"


def _gate_figure(value: float | None, gate: Mapping[str, Any], metrics: Mapping[str, Any] | None) -> str:
    """A gate's figure in the unit of what it is about."""
    if value is None or gate["metric"] in ("latency_ratio", "min_samples"):
        return figures.figure(value)
    if gate["metric"] == "model_bytes":
        return figures.size(value)
    if gate["metric"] in ("task_score", "task_drop"):
        row = (metrics or {}).get("tasks", {}).get(gate.get("task"), {})
        return figures.score(value, metric_of(row))
    return figures.percent(value)
