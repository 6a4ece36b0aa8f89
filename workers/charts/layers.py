"""What was removed layer by layer, conflict before and after, and the eigenvalues behind it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from workers.charts.chart import (
    SHAPES,
    STEP,
    Chart,
    Rows,
    Spec,
    choice,
    coloring,
    column_axis,
    ramp,
    ramp_legend,
    titles,
    tooltips,
    y_axis,
)
from workers.figures import figure, percent
from workers.languages import known, token
from workers.palette import RAMP, TASK_COLORS, variable

TITLE_ROOM = 26  # pixels between a legend at the top and the chart, where the title of the y axis stands
CONFLICT_FLOOR = 1e-6  # of the largest: a logarithmic axis has no place for zero


def layer_charts(layers: Mapping[str, Any]) -> Iterator[Chart]:
    """Energy removed, conflict before and after, and the eigenvalues behind it."""
    yield _energy(layers)
    if layers["conflict"]:
        yield _conflict(layers)
    if layers["spectra"]:
        yield _spectrum(layers)


def _energy(layers: Mapping[str, Any]) -> Chart:
    rows: Rows = layers["energy"]
    top = max(row["removed"] for row in rows)
    scale = {"type": "quantize", "domain": [0, top or 1.0], "range": ramp("ramp", len(RAMP))}
    spec = {
        "data": {"values": [{key: row[key] for key in ("layer", "task", "removed")} for row in rows]},
        "height": STEP * len(layers["names"]),
        "mark": {"type": "rect", "stroke": variable("paper"), "strokeWidth": 1},
        "encoding": {
            "y": y_axis("layer"),
            "x": column_axis("task"),
            "color": {
                "field": "removed",
                "type": "quantitative",
                "scale": scale,
                "legend": {**ramp_legend("energy_removed"), "format": ".1%"},
            },
            "tooltip": tooltips(
                [("layer", "layer"), ("task", "task"), ("removed", "energy_removed")], share=("removed",), digits=2
            ),
        },
    }
    cells = {(row["layer"], row["task"]): percent(row["removed"]) for row in rows}
    table = tuple((layer, *(cells[layer, task] for task in layers["tasks"])) for layer in layers["names"])
    return Chart("energy", "energy_chart", "energy_alt", spec, (token("layer"), *layers["tasks"]), table)


def _conflict(layers: Mapping[str, Any]) -> Chart:
    found = [*_all_roles(layers), *layers["conflict"]]
    floor = CONFLICT_FLOOR * max(max(row["before"], row["after"]) for row in found) or CONFLICT_FLOOR
    rows = [
        {
            "layer": row["layer"],
            "role": _role(row["role"]),
            "when": token(when),
            "at": max(row[when], floor),
            "value": row[when],
        }
        for row in found
        for when in ("before", "after")
    ]
    roles = list(dict.fromkeys(row["role"] for row in rows))
    at = {
        "field": "at",
        "type": "quantitative",
        "scale": {"type": "log"},
        "title": token("conflict"),
        "axis": {"format": "~g", "tickCount": 4, "grid": False},
    }
    whens = [token("before"), token("after")]
    spec = {
        "params": [choice("role", roles)],
        "data": {"values": rows},
        "transform": [{"filter": "datum.role === role"}],
        "height": STEP * len(layers["names"]),
        "encoding": {"y": {**y_axis("layer"), "scale": {"domain": list(layers["names"])}}},
        "layer": [
            {
                "mark": {"type": "line", "color": variable("soft"), "strokeWidth": 1.5, "aria": False},
                "encoding": {"x": at, "detail": {"field": "layer"}},
            },
            {
                "mark": {"type": "point", "filled": True, "size": 75, "opacity": 1},
                "encoding": {
                    "x": at,
                    "color": coloring("when", whens, [variable("expert"), variable("merged")]),
                    "size": {"condition": {"test": {"field": "when", "equal": whens[1]}, "value": 40}, "value": 130},
                    "shape": {"field": "when", "scale": {"domain": whens, "range": SHAPES[:2]}},
                    "tooltip": tooltips([("layer", "layer"), ("when", "conflict"), ("value", "value")]),
                },
            },
        ],
    }
    table = tuple(
        (row["layer"], _role(row["role"]), figure(row["before"]), figure(row["after"]), _change(row)) for row in found
    )
    columns = titles("layer", "role", "before", "after", "change")
    return Chart("conflict", "conflict_chart", "conflict_alt", spec, columns, table, 2)


def _all_roles(layers: Mapping[str, Any]) -> Rows:
    """Each layer's conflict over all roles."""
    sums = {name: {"layer": name, "role": "all", "before": 0.0, "after": 0.0} for name in layers["names"]}
    for row in layers["conflict"]:
        sums[row["layer"]]["before"] += row["before"]
        sums[row["layer"]]["after"] += row["after"]
    return [row for row in sums.values() if row["before"] or row["after"]]


def _change(row: Mapping[str, Any]) -> str:
    return f"{100 * (row['after'] / row['before'] - 1):+.1f} %" if row["before"] else percent(None)


def _role(role: str) -> str:
    return token(f"role_{role}") if known(f"role_{role}") else role


def _spectrum(layers: Mapping[str, Any]) -> Chart:
    rows = [
        {"parameter": row["parameter"], "task": row["task"], "number": number, "value": value}
        for row in layers["spectra"]
        for number, value in enumerate(row["scores"], 1)
    ]
    names = list(dict.fromkeys(row["parameter"] for row in rows))
    few = len(layers["tasks"]) <= len(TASK_COLORS)
    longest = max(row["number"] for row in rows)
    encoding: Spec = {
        "x": {
            "field": "number",
            "type": "quantitative",
            "title": token("number"),
            "axis": {"tickMinStep": 1, "format": "d", "grid": False},
            "scale": {"domain": [1, max(2, longest)], "nice": False, "padding": 12},
        },
        "y": {"field": "value", "type": "quantitative", "title": token("eigenvalue"), "axis": {"format": "~g"}},
        "detail": {"field": "task"},
        "tooltip": tooltips([("task", "task"), ("number", "number"), ("value", "eigenvalue")]),
    }
    if few:
        colors = [variable(name) for name in TASK_COLORS]
        color = coloring("task", layers["tasks"], colors[: len(layers["tasks"])])
        color["legend"]["offset"] = TITLE_ROOM
        encoding["color"] = color
        shapes = {"domain": list(layers["tasks"]), "range": SHAPES[: len(layers["tasks"])]}
        encoding["shape"] = {**color, "scale": shapes}
    fixed = {} if few else {"color": variable("expert")}
    spec = {
        "params": [choice("parameter", names, first=max(rows, key=lambda row: row["value"])["parameter"])],
        "data": {"values": rows},
        "transform": [{"filter": "datum.parameter === parameter"}],
        "height": 260,
        "encoding": encoding,
        "layer": [
            {"mark": {"type": "line", "strokeWidth": 1.5, **fixed}},
            {"mark": {"type": "point", "filled": True, "size": 60, "opacity": 1, **fixed}},
        ],
    }
    table = tuple(
        (row["parameter"], row["task"], ", ".join(figure(value) for value in row["scores"][:8]))
        for row in layers["spectra"]
    )
    columns = titles("parameter", "task", "eigenvalues")
    return Chart("spectrum", "spectrum_chart", "spectrum_alt", spec, columns, table, 3)
