"""What each task keeps, and every model's score."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from service.contract.metrics import Metric
from workers.charts.chart import Chart, Rows, Spec, coloring, titles, tooltips, x_axis, y_axis
from workers.figures import IN_PERCENT, percent, score
from workers.languages import token
from workers.palette import MODELS, OTHERS, variable


def quality_charts(metrics: Mapping[str, Any], gates: Sequence[Mapping[str, Any]]) -> Iterator[Chart]:
    """What each task keeps, and every model's score, one chart for each metric."""
    tasks = metrics["tasks"]
    if any(row["retention"] is not None for row in tasks.values()):
        yield _retention(tasks, gates)
    yield from _by_metric(tasks)


def evaluation_charts(metrics: Mapping[str, Any], gates: Sequence[Mapping[str, Any]]) -> Iterator[Chart]:
    """The same of an evaluation by itself: what models keep of their reference's scores, and all scores."""
    is_one = sum(not model["reference"] for model in metrics["models"].values()) == 1
    kept = {
        name if is_one else f"{name} ({model})": {**row, "intervals": {"retention": row["retention_interval"]}}
        for name, task in metrics["tasks"].items()
        for model, row in task["models"].items()
        if row["retention"] is not None
    }
    if kept:
        yield _retention(kept, gates, "retention_reference_alt")
    yield from _by_metric(_with_one_reference(metrics))


def _with_one_reference(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The tasks, their references called so where each task has its own: they share a place and a color."""
    tasks = dict(metrics["tasks"])
    if sum(model["reference"] for model in metrics["models"].values()) < 2:
        return tasks
    called = token("reference")
    return {
        name: {**row, "models": {called if m == row["reference"] else m: found for m, found in row["models"].items()}}
        for name, row in tasks.items()
    }


def _by_metric(tasks: Mapping[str, Any]) -> Iterator[Chart]:
    found: dict[str, dict[str, Any]] = {}
    for name, row in tasks.items():
        found.setdefault(metric_of(row), {})[name] = row
    for metric, rows in found.items():
        yield _scores(metric, rows)


def metric_of(row: Mapping[str, Any]) -> str:
    """The metric of a task's scores; reports from before there was a choice measured accuracy."""
    return str(row.get("metric") or Metric.ACCURACY)


def models_of(row: Mapping[str, Any]) -> dict[str, tuple[float | None, Sequence[float] | None]]:
    """Score and interval of every model on one task: base, expert, the baselines, merged; or those of an evaluation."""
    if "models" in row:
        return {name: (found["score"], found["interval"]) for name, found in row["models"].items()}
    intervals = row.get("intervals") or {}
    baselines = {name: (found["score"], found.get("interval")) for name, found in (row.get("baselines") or {}).items()}
    own = {name: (row[name], intervals.get(name)) for name in MODELS}
    return {"base": own["base"], "expert": own["expert"], **baselines, "merged": own["merged"]}


def model_name(model: str) -> str:
    """The token of base, expert and merged; a baseline is called as its method is."""
    return token(f"model_{model}") if model in MODELS else model


def _retention(tasks: Mapping[str, Any], gates: Sequence[Mapping[str, Any]], alt: str = "retention_alt") -> Chart:
    rows = [
        {"task": name, "value": row["retention"], **_ends((row.get("intervals") or {}).get("retention"))}
        for name, row in tasks.items()
        if row["retention"] is not None
    ]
    agreed = sorted({g["at_least"] for g in gates if g["metric"] == "worst_task_retention" and g.get("at_least")})
    x = x_axis("value", token("kept"), percents=True, domain=_near_one([*_numbers(rows), *agreed]))
    rules = [{"at": 1.0}, *({"at": limit} for limit in agreed)]
    spec = {
        "data": {"values": rows},
        "height": 24 * len(rows),
        "encoding": {"y": y_axis("task")},
        "layer": [
            {
                "data": {"values": rules},
                "mark": {"type": "rule", "strokeDash": [5, 4], "color": variable("soft"), "aria": False},
                "encoding": {"x": {**x, "field": "at"}, "y": None},
            },
            _whisker("merged", x),
            {
                "mark": {"type": "point", "filled": True, "size": 90, "opacity": 1, "color": variable("merged")},
                "encoding": {"x": x, "tooltip": tooltips([("task", "task"), ("value", "kept")], share=("value",))},
            },
        ],
    }
    table = tuple((row["task"], percent(row["value"]), percent(row["low"]), percent(row["high"])) for row in rows)
    title = alt.replace("_alt", "_chart")
    return Chart("retention", title, alt, spec, titles("task", "kept", "low", "high"), table)


def _scores(metric: str, tasks: Mapping[str, Any]) -> Chart:
    rows: Rows = [
        {"task": name, "model": model_name(model), "value": value, **_ends(interval)}
        for name, row in tasks.items()
        for model, (value, interval) in models_of(row).items()
        if value is not None and math.isfinite(value)
    ]
    is_share = metric in IN_PERCENT
    names = list(dict.fromkeys(row["model"] for row in rows))
    x = x_axis("value", token(f"metric_{metric}"), percents=is_share, domain=[0, 1] if is_share else None)
    color = coloring("model", names, _model_colors(names))
    tips = tooltips([("task", "task"), ("model", "model"), ("value", "score")], share=("value",) if is_share else ())
    mark = {"type": "bar"} if is_share else {"type": "point", "filled": True, "size": 80, "opacity": 1}
    spec = {
        "data": {"values": rows},
        "height": 13 * (len(names) + 1) * len(tasks),
        "encoding": {"y": y_axis("task"), "yOffset": {"field": "model", "sort": names}},
        "layer": [
            {"mark": mark, "encoding": {"x": x, "color": color, "tooltip": tips}},
            _whisker("ink", x),
        ],
    }
    table = tuple(
        (row["task"], row["model"], *(score(row[key], metric) for key in ("value", "low", "high"))) for row in rows
    )
    columns = titles("task", "model", "score", "low", "high")
    alt = "scores_alt" if is_share else "scores_points_alt"
    return Chart(f"scores-{metric}", "scores_chart", alt, spec, columns, table, 2, f"metric_{metric}")


def _whisker(color: str, x: Spec) -> Spec:
    """An interval as a thin line, where there is one."""
    return {
        "transform": [{"filter": "isValid(datum.low) && isValid(datum.high)"}],
        "mark": {"type": "rule", "color": variable(color), "strokeWidth": 1.5},
        "encoding": {"x": {**x, "field": "low"}, "x2": {"field": "high"}},
    }


def _model_colors(names: Sequence[str]) -> list[str]:
    fixed = {token(f"model_{name}"): variable(name) for name in MODELS} | {token("reference"): variable("expert")}
    others = iter(OTHERS * len(names))
    return [fixed.get(name) or variable(next(others)) for name in names]


def _near_one(values: Iterable[float]) -> list[float]:
    """From below the least to above the most of some shares, by tenths, with 100 % well inside."""
    found = [*values, 1.0]
    return [max(0.0, min(0.8, math.floor(10 * min(found) - 0.5) / 10)), max(1.05, math.ceil(20 * max(found)) / 20)]


def _numbers(rows: Rows) -> list[float]:
    return [row[key] for row in rows for key in ("value", "low", "high") if row[key] is not None]


def _ends(interval: Sequence[float] | None) -> dict[str, float | None]:
    low, high = interval or (None, None)
    return {"low": low, "high": high}
