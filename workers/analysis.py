"""Says what an analysis found: by layer and role, and in total, with a verdict on every task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from workers.conflict import Conflict, off_diagonal, total
from workers.verdict import verdict


@dataclass(frozen=True)
class Analysis:
    """What task vectors do to each other, by layer and role; ``stand_ins`` says that no task brought its inputs."""

    tasks: tuple[str, ...]
    places: Mapping[tuple[str, str], Conflict]
    stand_ins: bool

    @property
    def total(self) -> Conflict:
        return total(self.places.values(), len(self.tasks))

    def summary(self) -> dict[str, Any]:
        """What a report and a job's result carry: everything but the matrices."""
        whole = self.total
        return {
            "inputs": "stand-ins" if self.stand_ins else "exemplars or statistics",
            "parameters": whole.parameters,
            "measured": whole.measured,
            "verdict": verdict(whole, self.tasks, stand_ins=self.stand_ins),
            "conflict": _removed(whole),
            "largest": {"all": largest(whole), "tasks": dict(zip(self.tasks, largest_by_task(whole), strict=True))},
        }

    def conflict(self) -> dict[str, Any]:
        """The matrices over all parameters: row by column, what a task's vector does to another's inputs."""
        whole = self.total
        return {**whole.summary(self.tasks), "disturbance_after": whole.disturbance(whole.after)}

    def as_dict(self) -> dict[str, Any]:
        """Everything, as ``merge/analysis.json`` holds it."""
        rows = [
            {
                "layer": layer,
                "role": role,
                "parameters": found.parameters,
                "measured": found.measured,
                "cosine": found.cosine(),
                **(_measured(found) if found.measured else {}),
            }
            for (layer, role), found in self.places.items()
        ]
        return {"tasks": list(self.tasks), **self.summary(), "total": self.conflict(), "layers": rows}


def merged_places(parts: Sequence[Sequence[Mapping[str, Any]]]) -> dict[tuple[str, str], Conflict]:
    """Sums by layer and role, over shards: each part is what one shard left."""
    found: dict[tuple[str, str], Conflict] = {}
    for row in (row for part in parts for row in part):
        values = dict(row)
        place = (str(values.pop("layer")), str(values.pop("role")))
        conflict = Conflict.from_dict(values)
        found[place] = found[place] + conflict if place in found else conflict
    return found


def largest(conflict: Conflict) -> dict[str, float | None]:
    """What the largest 1 % of entries alone hold, over all tasks: shares of energy, of conflict, of own answers.

    Shares of second moments: parts of a vector may cancel, so that the share of one part and that of the rest need not
    add up to 1.
    """
    return {
        "energy": _share(conflict.large_energy.sum(), conflict.seen_energy.sum()),
        "conflict": _share(off_diagonal(conflict.large).sum(), off_diagonal(conflict.before).sum()),
        "own": _share(np.trace(conflict.large), np.trace(conflict.before)),
    }


def largest_by_task(conflict: Conflict) -> list[dict[str, float | None]]:
    """As ``largest``, of each task's vector: the conflict is what that vector does to the others' inputs."""
    few, all_ = off_diagonal(conflict.large).sum(1), off_diagonal(conflict.before).sum(1)
    return [
        {
            "energy": _share(conflict.large_energy[i], conflict.seen_energy[i]),
            "conflict": _share(few[i], all_[i]),
            "own": _share(conflict.large[i, i], conflict.before[i, i]),
        }
        for i in range(len(few))
    ]


def _measured(found: Conflict) -> dict[str, Any]:
    return {
        "disturbance": found.disturbance(found.before),
        "disturbance_after": found.disturbance(found.after),
        "conflict": _removed(found),
        "largest": largest(found),
    }


def _removed(found: Conflict) -> dict[str, float]:
    """The sum of all answers to other tasks' inputs, before and after trimming."""
    return {"before": float(off_diagonal(found.before).sum()), "after": float(off_diagonal(found.after).sum())}


def _share(part: float, whole: float) -> float | None:
    return float(f"{part / whole:.6g}") if whole > 0 else None
