"""Tasks against tasks: who disturbs whom, and whose vectors are alike."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from workers.charts.chart import ROOMY_STEP, STEP, Chart, Spec, column_axis, ramp, ramp_legend, tooltips, y_axis
from workers.figures import figure
from workers.languages import token
from workers.palette import DIVERGING, RAMP, variable

LABELED_CELLS = 12  # tasks up to which a matrix has room for numbers


def conflict_charts(conflict: Mapping[str, Any]) -> Iterator[Chart]:
    """Task against task: ``disturbance[i][k]`` is what task i's vector does to task k's inputs, ``cosine`` likeness."""
    tasks = conflict["tasks"]
    if conflict.get("disturbance"):
        top = max((v for i, row in enumerate(conflict["disturbance"]) for v in _off_diagonal(row, i)), default=1.0)
        scale = {"type": "quantize", "domain": [0, top or 1.0], "range": ramp("ramp", len(RAMP))}
        yield _matrix("disturbance", tasks, conflict["disturbance"], scale)
        if conflict.get("disturbance_after"):
            yield _matrix("disturbance_after", tasks, conflict["disturbance_after"], scale)
    if conflict.get("cosine"):
        scale = {"type": "quantize", "domain": [-1, 1], "range": ramp("diverging", len(DIVERGING))}
        yield _matrix("cosine", tasks, conflict["cosine"], scale)


def _matrix(what: str, tasks: Sequence[str], cells: Sequence[Sequence[float | None]], scale: Spec) -> Chart:
    colors = DIVERGING if what == "cosine" else RAMP
    rows = [
        {"from": one, "to": other, "value": value, "step": _step(value, scale["domain"], len(colors))}
        for one, row in zip(tasks, cells, strict=True)
        for other, value in zip(tasks, row, strict=True)
        if value is not None
    ]
    unit = what.removesuffix("_after")
    legend = {**ramp_legend(unit), "format": ".2f"}
    tips = tooltips([("from", "disturbing"), ("to", "disturbed"), ("value", unit)])
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
        "encoding": {"y": y_axis("from"), "x": column_axis("to")},
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
