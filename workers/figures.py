"""Writes numbers as people read them: shares in percent, bytes in units, scores as their metric is usually given."""

from __future__ import annotations

import math
from collections.abc import Sequence

from service.contract.metrics import Metric

NONE = "–"
UNITS = ("B", "kB", "MB", "GB", "TB")
# Scores from 0 to 1 that people quote in percent; the rest are quoted as they are.
IN_PERCENT = frozenset(
    {
        Metric.ACCURACY,
        Metric.BALANCED_ACCURACY,
        Metric.MACRO_F1,
        Metric.CALIBRATION_ERROR,
        Metric.ENTITY_F1,
        Metric.EXACT_MATCH,
        Metric.RECALL_AT_1,
        Metric.RECALL_AT_5,
        Metric.RECALL_AT_10,
    }
)


def percent(value: float | None) -> str:
    """``0.951`` as ``95.1 %``."""
    return NONE if _missing(value) else f"{100 * (value or 0):.1f} %"


def figure(value: float | None) -> str:
    """A number with four digits, or whole where that is more."""
    if value is None or math.isnan(value):
        return NONE
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e15 else f"{value:.4g}"


def score(value: float | None, metric: str) -> str:
    """A score as its metric is usually given."""
    return percent(value) if metric in IN_PERCENT else figure(value)


def span(ends: Sequence[float | None] | None, metric: str) -> str | None:
    """An interval's two ends; None where there is none."""
    if not ends or any(_missing(end) for end in ends):
        return None
    low, high = (score(end, metric) for end in ends)
    return f"{low.removesuffix(' %')}–{high}"


def difference(value: float | None, metric: str) -> str | None:
    """By how much a score is better than another, in points where its metric is given in percent."""
    if value is None or not math.isfinite(value):
        return None
    return f"{100 * value:+.1f}" if metric in IN_PERCENT else f"{value:+.3g}"


def size(value: float) -> str:
    """``1234567`` bytes as ``1.2 MB``."""
    for unit in UNITS[:-1]:
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} {UNITS[-1]}"


def seconds(value: float | None) -> str:
    """Seconds in the unit that suits them."""
    if value is None:
        return NONE
    if value < 1:
        return f"{1000 * value:.3g} ms"
    if value < 120:
        return f"{value:.3g} s"
    minutes = value / 60
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def _missing(value: float | None) -> bool:
    return value is None or not math.isfinite(value)
