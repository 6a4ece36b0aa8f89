"""Draws what a merge did: charts in Vega-Lite, each with a table that says the same."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import vl_convert

from service.contract.metrics import Metric
from workers.figures import IN_PERCENT, figure, percent, score
from workers.languages import known, token
from workers.palette import DIVERGING, MODELS, OTHERS, RAMP, TASK_COLORS, variable

Rows = list[dict[str, Any]]
Spec = dict[str, Any]

VEGA_LITE = "6.4"  # the schema that these charts are written in
STEP, ROOMY_STEP = 18, 28  # pixels for a row of a heat map, and for one with numbers in it
TITLE_ROOM = 26  # pixels between a legend at the top and the chart, where the title of the y axis stands
PHONE_PIXELS, LETTER_PIXELS, SYMBOL_PIXELS = 290, 7, 26  # what a legend has there, and what its entries take
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down")
LABELED_CELLS = 12  # tasks up to which a matrix has room for numbers
CONFLICT_FLOOR = 1e-6  # of the largest: a logarithmic axis has no place for zero
TABLE_ROWS = 1500  # of one chart's table; the trim log has the rest


@dataclass(frozen=True)
class Chart:
    """One picture: the names of its title's and its description's texts, how to draw it, and the same as a table.

    What starts as a token in ``columns`` and ``rows`` is one; ``numeric`` says from which column on figures stand.
    ``of`` names a text that completes the title.
    """

    name: str
    title: str
    alt: str
    spec: Spec
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numeric: int = 1
    of: str | None = None

    @property
    def shown(self) -> tuple[tuple[str, ...], ...]:
        """The table's rows, as many as a page can carry."""
        return self.rows[:TABLE_ROWS]


@cache
def library() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script that needs nothing else; made once, for that takes seconds."""
    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", VEGA_LITE)


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


def layer_charts(layers: Mapping[str, Any]) -> Iterator[Chart]:
    """Energy removed, conflict before and after, and the eigenvalues behind it."""
    yield _energy(layers)
    if layers["conflict"]:
        yield _conflict(layers)
    if layers["spectra"]:
        yield _spectrum(layers)


def conflict_charts(conflict: Mapping[str, Any]) -> Iterator[Chart]:
    """Task against task: ``disturbance[i][k]`` is what task i's vector does to task k's inputs, ``cosine`` likeness."""
    tasks = conflict["tasks"]
    if conflict.get("disturbance"):
        top = max((v for i, row in enumerate(conflict["disturbance"]) for v in _off_diagonal(row, i)), default=1.0)
        scale = {"type": "quantize", "domain": [0, top or 1.0], "range": _ramp("ramp", len(RAMP))}
        yield _matrix("disturbance", tasks, conflict["disturbance"], scale)
        if conflict.get("disturbance_after"):
            yield _matrix("disturbance_after", tasks, conflict["disturbance_after"], scale)
    if conflict.get("cosine"):
        scale = {"type": "quantize", "domain": [-1, 1], "range": _ramp("diverging", len(DIVERGING))}
        yield _matrix("cosine", tasks, conflict["cosine"], scale)


def search_charts(search: Mapping[str, Any]) -> Iterator[Chart]:
    """The best value so far, trial by trial, and which parameter made the difference."""
    if search.get("trials"):
        yield _trials(search["trials"])
    if search.get("importances"):
        yield _importances(search["importances"])


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


# Quality


def _retention(tasks: Mapping[str, Any], gates: Sequence[Mapping[str, Any]], alt: str = "retention_alt") -> Chart:
    rows = [
        {"task": name, "value": row["retention"], **_ends((row.get("intervals") or {}).get("retention"))}
        for name, row in tasks.items()
        if row["retention"] is not None
    ]
    agreed = sorted({g["at_least"] for g in gates if g["metric"] == "worst_task_retention" and g.get("at_least")})
    x = _x("value", token("kept"), percents=True, domain=_near_one([*_numbers(rows), *agreed]))
    rules = [{"at": 1.0}, *({"at": limit} for limit in agreed)]
    spec = {
        "data": {"values": rows},
        "height": 24 * len(rows),
        "encoding": {"y": _y("task")},
        "layer": [
            {
                "data": {"values": rules},
                "mark": {"type": "rule", "strokeDash": [5, 4], "color": variable("soft"), "aria": False},
                "encoding": {"x": {**x, "field": "at"}, "y": None},
            },
            _whisker("merged", x),
            {
                "mark": {"type": "point", "filled": True, "size": 90, "opacity": 1, "color": variable("merged")},
                "encoding": {"x": x, "tooltip": _tips([("task", "task"), ("value", "kept")], share=("value",))},
            },
        ],
    }
    table = tuple((row["task"], percent(row["value"]), percent(row["low"]), percent(row["high"])) for row in rows)
    title = alt.replace("_alt", "_chart")
    return Chart("retention", title, alt, spec, _titles("task", "kept", "low", "high"), table)


def _scores(metric: str, tasks: Mapping[str, Any]) -> Chart:
    rows: Rows = [
        {"task": name, "model": model_name(model), "value": value, **_ends(interval)}
        for name, row in tasks.items()
        for model, (value, interval) in models_of(row).items()
        if value is not None and math.isfinite(value)
    ]
    is_share = metric in IN_PERCENT
    names = list(dict.fromkeys(row["model"] for row in rows))
    x = _x("value", token(f"metric_{metric}"), percents=is_share, domain=[0, 1] if is_share else None)
    color = _color("model", names, _model_colors(names))
    tips = _tips([("task", "task"), ("model", "model"), ("value", "score")], share=("value",) if is_share else ())
    mark = {"type": "bar"} if is_share else {"type": "point", "filled": True, "size": 80, "opacity": 1}
    spec = {
        "data": {"values": rows},
        "height": 13 * (len(names) + 1) * len(tasks),
        "encoding": {"y": _y("task"), "yOffset": {"field": "model", "sort": names}},
        "layer": [
            {"mark": mark, "encoding": {"x": x, "color": color, "tooltip": tips}},
            _whisker("ink", x),
        ],
    }
    table = tuple(
        (row["task"], row["model"], *(score(row[key], metric) for key in ("value", "low", "high"))) for row in rows
    )
    columns = _titles("task", "model", "score", "low", "high")
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


# Layers


def _energy(layers: Mapping[str, Any]) -> Chart:
    rows: Rows = layers["energy"]
    top = max(row["removed"] for row in rows)
    scale = {"type": "quantize", "domain": [0, top or 1.0], "range": _ramp("ramp", len(RAMP))}
    spec = {
        "data": {"values": [{key: row[key] for key in ("layer", "task", "removed")} for row in rows]},
        "height": STEP * len(layers["names"]),
        "mark": {"type": "rect", "stroke": variable("paper"), "strokeWidth": 1},
        "encoding": {
            "y": _y("layer"),
            "x": _columns("task"),
            "color": {
                "field": "removed",
                "type": "quantitative",
                "scale": scale,
                "legend": {**_ramp_legend("energy_removed"), "format": ".1%"},
            },
            "tooltip": _tips(
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
        "params": [_choice("role", roles)],
        "data": {"values": rows},
        "transform": [{"filter": "datum.role === role"}],
        "height": STEP * len(layers["names"]),
        "encoding": {"y": {**_y("layer"), "scale": {"domain": list(layers["names"])}}},
        "layer": [
            {
                "mark": {"type": "line", "color": variable("soft"), "strokeWidth": 1.5, "aria": False},
                "encoding": {"x": at, "detail": {"field": "layer"}},
            },
            {
                "mark": {"type": "point", "filled": True, "size": 75, "opacity": 1},
                "encoding": {
                    "x": at,
                    "color": _color("when", whens, [variable("expert"), variable("merged")]),
                    "size": {"condition": {"test": {"field": "when", "equal": whens[1]}, "value": 40}, "value": 130},
                    "shape": {"field": "when", "scale": {"domain": whens, "range": SHAPES[:2]}},
                    "tooltip": _tips([("layer", "layer"), ("when", "conflict"), ("value", "value")]),
                },
            },
        ],
    }
    table = tuple(
        (row["layer"], _role(row["role"]), figure(row["before"]), figure(row["after"]), _change(row)) for row in found
    )
    columns = _titles("layer", "role", "before", "after", "change")
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
        "tooltip": _tips([("task", "task"), ("number", "number"), ("value", "eigenvalue")]),
    }
    if few:
        colors = [variable(name) for name in TASK_COLORS]
        color = _color("task", layers["tasks"], colors[: len(layers["tasks"])])
        color["legend"]["offset"] = TITLE_ROOM
        encoding["color"] = color
        shapes = {"domain": list(layers["tasks"]), "range": SHAPES[: len(layers["tasks"])]}
        encoding["shape"] = {**color, "scale": shapes}
    fixed = {} if few else {"color": variable("expert")}
    spec = {
        "params": [_choice("parameter", names, first=max(rows, key=lambda row: row["value"])["parameter"])],
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
    columns = _titles("parameter", "task", "eigenvalues")
    return Chart("spectrum", "spectrum_chart", "spectrum_alt", spec, columns, table, 3)


# Tasks against tasks


def _matrix(what: str, tasks: Sequence[str], cells: Sequence[Sequence[float | None]], scale: Spec) -> Chart:
    colors = DIVERGING if what == "cosine" else RAMP
    rows = [
        {"from": one, "to": other, "value": value, "step": _step(value, scale["domain"], len(colors))}
        for one, row in zip(tasks, cells, strict=True)
        for other, value in zip(tasks, row, strict=True)
        if value is not None
    ]
    unit = what.removesuffix("_after")
    legend = {**_ramp_legend(unit), "format": ".2f"}
    tips = _tips([("from", "disturbing"), ("to", "disturbed"), ("value", unit)])
    color = {"field": "value", "type": "quantitative", "scale": scale, "legend": legend}
    layers: list[Spec] = [
        {
            "mark": {"type": "rect", "stroke": variable("paper"), "strokeWidth": 1},
            "encoding": {"color": color, "tooltip": tips},
        }
    ]
    if len(tasks) <= LABELED_CELLS:
        name = "diverging" if what == "cosine" else "ramp"
        inks = [variable(f"on-{name}-{step}") for step in range(len(colors))]
        ink = {
            "field": "step",
            "type": "ordinal",
            "legend": None,
            "scale": {"domain": list(range(len(colors))), "range": inks},
        }
        text = {"field": "value", "type": "quantitative", "format": ".2f"}
        layers.append({"mark": {"type": "text", "aria": False}, "encoding": {"text": text, "color": ink}})
    spec = {
        "data": {"values": rows},
        "height": (ROOMY_STEP if len(tasks) <= LABELED_CELLS else STEP) * len(tasks),
        "encoding": {"y": _y("from"), "x": _columns("to")},
        "layer": layers,
        "resolve": {"scale": {"color": "independent"}},
    }
    table = tuple((task, *(figure(value) for value in cells[i])) for i, task in enumerate(tasks))
    return Chart(what, f"{what}_chart", f"{what}_alt", spec, (token("task"), *tasks), table)


def _step(value: float, domain: Sequence[float], steps: int) -> int:
    """Which of the colors a quantized scale gives to a value."""
    low, high = domain
    return max(0, min(steps - 1, math.floor(steps * (value - low) / (high - low))))


def _off_diagonal(row: Sequence[float | None], position: int) -> list[float]:
    return [value for k, value in enumerate(row) if k != position and value is not None]


# The search


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
                    "tooltip": _tips([("number", "trial"), ("value", "objective")]),
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
    columns = _titles("trial", "state", "objective", "best", "parameters")
    return Chart("search", "search_chart", "search_alt", spec, columns, table, 5)


def _importances(importances: Mapping[str, float]) -> Chart:
    ordered = sorted(importances.items(), key=lambda item: -item[1])
    rows = [{"parameter": name, "value": value} for name, value in ordered]
    spec = {
        "data": {"values": rows},
        "height": 24 * len(rows),
        "mark": {"type": "bar", "color": variable("expert")},
        "encoding": {
            "y": _y("parameter"),
            "x": _x("value", token("importance"), percents=True, domain=[0, 1]),
            "tooltip": _tips([("parameter", "parameter"), ("value", "importance")], share=("value",)),
        },
    }
    table = tuple((name, percent(value)) for name, value in ordered)
    return Chart("importance", "importance_chart", "importance_alt", spec, _titles("parameter", "importance"), table)


def named_values(values: Mapping[str, Any]) -> str:
    """Parameters with their values, in one line."""
    return ", ".join(f"{name} = {_plain(value)}" for name, value in values.items())


def _plain(value: object) -> str:
    return figure(value) if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


# Parts of charts


def _x(field: str, title: str, *, percents: bool, domain: Sequence[float] | None) -> Spec:
    axis = {"format": ".0%" if percents else "~g", "tickCount": 6}
    scale = {"domain": list(domain), "nice": False} if domain else {"zero": False}
    return {"field": field, "type": "quantitative", "title": title, "axis": axis, "scale": scale}


def _y(field: str, title: str | None = None) -> Spec:
    """Rows in the order of the data."""
    return {"field": field, "type": "nominal", "sort": None, "title": title, "axis": {"labelLimit": 150}}


def _columns(field: str) -> Spec:
    """Columns in the order of the data, named at the top."""
    axis = {"orient": "top", "labelAngle": -40, "labelLimit": 90, "labelOverlap": True}
    return {"field": field, "type": "nominal", "sort": None, "title": None, "axis": axis}


def _color(field: str, names: Sequence[str], colors: Sequence[str]) -> Spec:
    scale = {"domain": list(names), "range": list(colors)}
    legend = {"orient": "top", "title": None, "columns": _legend_columns(names)}
    return {"field": field, "type": "nominal", "scale": scale, "legend": legend}


def _legend_columns(names: Sequence[str]) -> int:
    """As many as fit on a phone."""
    return max(1, min(len(names), PHONE_PIXELS // (LETTER_PIXELS * max(map(len, names)) + SYMBOL_PIXELS)))


def _ramp_legend(title: str) -> Spec:
    return {"title": token(title), "orient": "top", "gradientLength": 240, "labelOverlap": True, "labelSeparation": 10}


def _tips(fields: Sequence[tuple[str, str]], *, share: Sequence[str] = (), digits: int = 1) -> list[Spec]:
    """What a pointer is told: fields and the names of their texts."""
    return [
        {
            "field": field,
            "title": token(name),
            **({"type": "quantitative", "format": f".{digits}%"} if field in share else {}),
        }
        for field, name in fields
    ]


def _choice(name: str, options: Sequence[str], first: str | None = None) -> Spec:
    """A list above a chart from which one value is chosen."""
    return {
        "name": name,
        "value": first or options[0],
        "bind": {"input": "select", "options": list(options), "name": token(name)},
    }


def _titles(*names: str) -> tuple[str, ...]:
    return tuple(token(name) for name in names)


def _ramp(name: str, steps: int) -> list[str]:
    return [variable(f"{name}-{step}") for step in range(steps)]
