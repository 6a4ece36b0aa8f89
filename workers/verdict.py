"""Says of each task whether to merge it, by one plain rule over how strongly task vectors disturb each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np

from workers.conflict import Conflict, Matrix

WELL_UP_TO = 0.5
CARE_UP_TO = 2.0
OPPOSED_BELOW = -0.2
RULE = (
    "A task's disturbance by another is the other vector's answer to its inputs after trimming, as a share of its own "
    f"vector's answer before. While some task disturbs the others by more than {CARE_UP_TO:g} on average, the worst "
    "such task is to be left out. Those that stay are then judged among themselves by what disturbs them on average: "
    f"up to {WELL_UP_TO:g} they merge well, up to {CARE_UP_TO:g} with care, beyond that they are to be left out. A "
    f"task whose vector points against another's (cosine below {OPPOSED_BELOW:g}), and any task without exemplars or "
    "statistics, merges with care at best; one whose vector does not answer its own inputs at all is to be left out."
)


class Verdict(StrEnum):
    """What to do, from best to worst."""

    WELL = "well"
    CARE = "care"
    LEAVE_OUT = "leave_out"


class Why(StrEnum):
    """What decided it."""

    CALM = "calm"
    DISTURBED = "disturbed"
    DROWNED = "drowned"
    DROWNS_OTHERS = "drowns_others"
    OPPOSED = "opposed"
    STAND_INS = "stand_ins"
    SILENT = "silent"
    UNMEASURED = "unmeasured"


ORDER = tuple(Verdict)


@dataclass(frozen=True)
class Judged:
    """One task's verdict: by how much the others that stay disturb it on average, and it them."""

    verdict: Verdict
    why: Why
    suffers: float | None = None
    causes: float | None = None

    def as_dict(self) -> dict[str, Any]:
        return {"verdict": self.verdict, "why": self.why, "suffers": self.suffers, "causes": self.causes}


def verdict(conflict: Conflict, tasks: Sequence[str], *, stand_ins: bool) -> dict[str, Any]:
    """The rule, every task's verdict, and that of the whole: the worst of them, since all would be merged.

    ``stand_ins`` says that nobody brought exemplars or statistics.
    """
    judged = dict(zip(tasks, judge(conflict, stand_ins=stand_ins), strict=True))
    worst = max((row.verdict for row in judged.values()), key=ORDER.index)
    return {
        "overall": worst,
        "tasks": {name: row.as_dict() for name, row in judged.items()},
        "leave_out": [name for name, row in judged.items() if row.verdict is Verdict.LEAVE_OUT],
        "rule": RULE,
        "limits": {"well_up_to": WELL_UP_TO, "care_up_to": CARE_UP_TO, "opposed_below": OPPOSED_BELOW},
    }


def judge(conflict: Conflict, *, stand_ins: bool) -> list[Judged]:
    """``RULE``, task by task."""
    count = len(conflict.inner)
    if not conflict.measured:
        return [Judged(Verdict.CARE, Why.UNMEASURED)] * count
    own = np.diag(conflict.before)
    found = {k: Judged(Verdict.LEAVE_OUT, Why.SILENT) for k in range(count) if not own[k] > 0}
    disturbance = conflict.after / np.where(own > 0, own, 1.0)[None, :]
    for loudest, causes in _drowning(disturbance, [k for k in range(count) if k not in found]):
        found[loudest] = Judged(Verdict.LEAVE_OUT, Why.DROWNS_OTHERS, causes=_short(causes))
    stay = [k for k in range(count) if k not in found]
    found |= {k: _among(k, stay, disturbance, conflict.cosine(), stand_ins) for k in stay}
    return [found[k] for k in range(count)]


def _drowning(disturbance: Matrix, stay: Sequence[int]) -> Iterator[tuple[int, float]]:
    """The tasks that disturb the others too much, the worst first, each judged by what it does to those that stay."""
    stay = list(stay)
    while len(stay) > 1:
        caused = {i: _mean(disturbance[i, k] for k in stay if k != i) for i in stay}
        worst = max(stay, key=lambda i: caused[i])
        if not caused[worst] > CARE_UP_TO:
            return
        yield worst, caused[worst]
        stay.remove(worst)


def _among(
    k: int, stay: Sequence[int], disturbance: Matrix, cosine: Sequence[Sequence[float | None]], stand_ins: bool
) -> Judged:
    others = [i for i in stay if i != k]
    if not others:
        return Judged(Verdict.CARE, Why.CALM)
    suffers, causes = _mean(disturbance[i, k] for i in others), _mean(disturbance[k, i] for i in others)
    figures: Mapping[str, Any] = {"suffers": _short(suffers), "causes": _short(causes)}
    if suffers > CARE_UP_TO:
        return Judged(Verdict.LEAVE_OUT, Why.DROWNED, **figures)
    if suffers > WELL_UP_TO:
        return Judged(Verdict.CARE, Why.DISTURBED, **figures)
    if any((cosine[k][i] or 0.0) < OPPOSED_BELOW for i in others):
        return Judged(Verdict.CARE, Why.OPPOSED, **figures)
    return Judged(Verdict.CARE, Why.STAND_INS, **figures) if stand_ins else Judged(Verdict.WELL, Why.CALM, **figures)


def _mean(values: Iterator[float]) -> float:
    return float(np.mean(list(values)))


def _short(value: float) -> float:
    return float(f"{value:.6g}")
