"""What a chart is, and the parts that charts are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import vl_convert

from workers.languages import token
from workers.palette import variable

Rows = list[dict[str, Any]]
Spec = dict[str, Any]

VEGA_LITE = "6.4"  # the schema that these charts are written in
STEP, ROOMY_STEP = 18, 28  # pixels for a row of a heat map, and for one with numbers in it
PHONE_PIXELS, LETTER_PIXELS, SYMBOL_PIXELS = 290, 7, 26  # what a legend has there, and what its entries take
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down")
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


def x_axis(field: str, title: str, *, percents: bool, domain: Sequence[float] | None) -> Spec:
    """Figures from left to right, over a domain where there is one."""
    axis = {"format": ".0%" if percents else "~g", "tickCount": 6}
    scale = {"domain": list(domain), "nice": False} if domain else {"zero": False}
    return {"field": field, "type": "quantitative", "title": title, "axis": axis, "scale": scale}


def y_axis(field: str, title: str | None = None) -> Spec:
    """Rows in the order of the data."""
    return {"field": field, "type": "nominal", "sort": None, "title": title, "axis": {"labelLimit": 150}}


def column_axis(field: str) -> Spec:
    """Columns in the order of the data, named at the top."""
    axis = {"orient": "top", "labelAngle": -40, "labelLimit": 90, "labelOverlap": True}
    return {"field": field, "type": "nominal", "sort": None, "title": None, "axis": axis}


def coloring(field: str, names: Sequence[str], colors: Sequence[str]) -> Spec:
    """A color for each name, and the legend at the top."""
    scale = {"domain": list(names), "range": list(colors)}
    legend = {"orient": "top", "title": None, "columns": _legend_columns(names)}
    return {"field": field, "type": "nominal", "scale": scale, "legend": legend}


def _legend_columns(names: Sequence[str]) -> int:
    """As many as fit on a phone."""
    return max(1, min(len(names), PHONE_PIXELS // (LETTER_PIXELS * max(map(len, names)) + SYMBOL_PIXELS)))


def ramp_legend(title: str) -> Spec:
    """The legend of a color that tells how much."""
    return {"title": token(title), "orient": "top", "gradientLength": 240, "labelOverlap": True, "labelSeparation": 10}


def tooltips(fields: Sequence[tuple[str, str]], *, share: Sequence[str] = (), digits: int = 1) -> list[Spec]:
    """What a pointer is told: fields and the names of their texts."""
    return [
        {
            "field": field,
            "title": token(name),
            **({"type": "quantitative", "format": f".{digits}%"} if field in share else {}),
        }
        for field, name in fields
    ]


def choice(name: str, options: Sequence[str], first: str | None = None) -> Spec:
    """A list above a chart from which one value is chosen."""
    return {
        "name": name,
        "value": first or options[0],
        "bind": {"input": "select", "options": list(options), "name": token(name)},
    }


def titles(*names: str) -> tuple[str, ...]:
    """The tokens of a table's titles."""
    return tuple(token(name) for name in names)


def ramp(name: str, steps: int) -> list[str]:
    """The colors of a ramp, from little to much."""
    return [variable(f"{name}-{step}") for step in range(steps)]
