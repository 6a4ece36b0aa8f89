"""Tables of figures, as the README has them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def heading(*cells: str) -> None:
    print(f"| {' | '.join(cells)} |")
    print(f"|---|{'---:|' * (len(cells) - 1)}", flush=True)


def row(*cells: str) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


def milliseconds(took: Sequence[float]) -> str:
    """Median and 99th percentile of seconds."""
    cuts = statistics.quantiles(took, n=100, method="inclusive")
    return f"{_short(1000 * cuts[49])} / {_short(1000 * cuts[98])} ms"


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"
