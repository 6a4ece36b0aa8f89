"""Holds the merged model against the rules agreed beforehand; all of them are reported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from service.contract.evaluation import Gate

ROUNDING = 1e-12  # 0.72 of 0.8 is 0.9, though floating point has it a little below


def judge(gates: Sequence[Gate], measured: Mapping[str, Any] | None, model_bytes: int) -> list[dict[str, Any]]:
    """Every gate with what was measured and whether it holds; a gate without a figure does not hold.

    ``measured`` are the metrics of the report, ``model_bytes`` what the merged model and its heads take up.
    """
    return [_verdict(gate, _figure(gate, measured or {}, model_bytes)) for gate in gates]


def _verdict(gate: Gate, value: float | None) -> dict[str, Any]:
    return {**gate.model_dump(mode="json"), "value": value, "passed": value is not None and _holds(gate, value)}


def _holds(gate: Gate, value: float) -> bool:
    slack = ROUNDING * max(1.0, abs(gate.limit))
    return value >= gate.limit - slack if gate.bound == "at_least" else value <= gate.limit + slack


def _figure(gate: Gate, measured: Mapping[str, Any], model_bytes: int) -> float | None:
    if gate.metric == "model_bytes":
        return float(model_bytes)
    if not measured:
        return None
    if gate.metric == "latency_ratio":
        speed = measured["speed"]
        return None if speed is None else speed["latency_ratio"]
    if gate.metric == "min_samples":
        return float(min(row["samples"] for row in measured["tasks"].values()))
    point, interval = _measured(gate, measured)
    if gate.use == "point":
        return point
    return None if interval is None else float(interval[0 if gate.bound == "at_least" else 1])


def _measured(gate: Gate, measured: Mapping[str, Any]) -> tuple[float | None, Sequence[float] | None]:
    """A gate's figure and its interval, where they could be computed.

    What a task keeps has no figure where its expert has no score to keep; then neither has what all tasks keep.
    """
    if gate.task is None:
        if any(row["retention"] is None for row in measured["tasks"].values()):
            return None, None
        name = {"worst_task_retention": "worst_retention"}.get(gate.metric, gate.metric)
        return measured[name], measured[f"{name}_interval"]
    row = measured["tasks"].get(gate.task)
    if row is None:
        return None, None
    name = {"task_retention": "retention", "task_score": "merged", "task_drop": "drop"}[gate.metric]
    return row[name], row["intervals"][name]
