"""Holds the merged model against the rules agreed beforehand; all of them are reported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from service.contract.recipe import Gate

ROUNDING = 1e-12  # 0.72 of 0.8 is 0.9, though floating point has it a little below


def metrics(scores: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Per task accuracies of base, expert and merged, and the mean and worst retention. None without an evaluation.

    Retention is the merged model's share of the expert's accuracy; a task whose expert is never right has none.
    """
    if not scores:
        return None
    tasks = {row["task"]: {key: value for key, value in row.items() if key != "task"} for row in scores}
    retained = {name: row["retention"] for name, row in tasks.items() if row["retention"] is not None}
    worst = min(retained, key=lambda name: retained[name]) if retained else None
    return {
        "tasks": tasks,
        "mean_accuracy": {
            model: sum(row[model] for row in tasks.values()) / len(tasks) for model in ("base", "expert", "merged")
        },
        "mean_retention": sum(retained.values()) / len(retained) if retained else None,
        "worst_retention": retained[worst] if worst else None,
        "worst_task": worst,
    }


def judge(gates: Sequence[Gate], measured: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Every gate with what was measured and whether it holds; a gate without a figure does not hold."""
    return [_verdict(gate, _figure(gate, measured or {})) for gate in gates]


def _verdict(gate: Gate, value: float | None) -> dict[str, Any]:
    passed = value is not None and value >= gate.at_least - ROUNDING
    return {"metric": gate.metric, "task": gate.task, "at_least": gate.at_least, "value": value, "passed": passed}


def _figure(gate: Gate, measured: Mapping[str, Any]) -> float | None:
    if gate.metric == "task_retention":
        value = measured["tasks"].get(gate.task, {}).get("retention") if measured else None
    else:
        value = measured.get({"worst_task_retention": "worst_retention"}.get(gate.metric, gate.metric))
    return None if value is None else float(value)
