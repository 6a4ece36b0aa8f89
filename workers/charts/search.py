"""The search: its best value so far, and which parameter made the difference."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from workers.charts.chart import Chart, Spec, titles, tooltips, x_axis, y_axis
from workers.figures import figure, percent
from workers.languages import token
from workers.palette import variable


def search_charts(search: Mapping[str, Any]) -> Iterator[Chart]:
    """The best value so far, trial by trial, and which parameter made the difference."""
    if search.get("trials"):
        yield _trials(search["trials"])
    if search.get("importances"):
        yield _importances(search["importances"])


def _trials(trials: Sequence[Mapping[str, Any]]) -> Chart:
    rows = [{"number": t["number"], "value": t["value"], "best": t["best"]} for t in trials if t["value"] is not None]
    number = {
        "field": "number",
        "type": "quantitative",
        "title": token("trial"),
        "axis": {"tickMinStep": 1, "grid": False},
    }
    value: Spec = {"type": "quantitative", "title": token("objective"), "scale": {"zero": False}}
    spec = {
        "data": {"values": rows},
        "height": 240,
        "encoding": {"x": number},
        "layer": [
            {
                "mark": {"type": "point", "filled": True, "size": 55, "opacity": 1, "color": variable("base")},
                "encoding": {
                    "y": {**value, "field": "value"},
                    "tooltip": tooltips([("number", "trial"), ("value", "objective")]),
                },
            },
            {
                "mark": {"type": "line", "interpolate": "step-after", "color": variable("merged"), "strokeWidth": 2},
                "encoding": {"y": {**value, "field": "best"}},
            },
        ],
    }
    table = tuple(
        (
            figure(trial["number"]),
            token(f"state_{trial['state']}"),
            figure(trial["value"]),
            figure(trial["best"]),
            named_values(trial.get("parameters") or {}),
        )
        for trial in trials
    )
    columns = titles("trial", "state", "objective", "best", "parameters")
    return Chart("search", "search_chart", "search_alt", spec, columns, table, 5)


def _importances(importances: Mapping[str, float]) -> Chart:
    ordered = sorted(importances.items(), key=lambda item: -item[1])
    rows = [{"parameter": name, "value": value} for name, value in ordered]
    spec = {
        "data": {"values": rows},
        "height": 24 * len(rows),
        "mark": {"type": "bar", "color": variable("expert")},
        "encoding": {
            "y": y_axis("parameter"),
            "x": x_axis("value", token("importance"), percents=True, domain=[0, 1]),
            "tooltip": tooltips([("parameter", "parameter"), ("value", "importance")], share=("value",)),
        },
    }
    table = tuple((name, percent(value)) for name, value in ordered)
    return Chart("importance", "importance_chart", "importance_alt", spec, titles("parameter", "importance"), table)


def named_values(values: Mapping[str, Any]) -> str:
    """Parameters with their values, in one line."""
    return ", ".join(f"{name} = {_plain(value)}" for name, value in values.items())


def _plain(value: object) -> str:
    return figure(value) if isinstance(value, int | float) and not isinstance(value, bool) else str(value)
