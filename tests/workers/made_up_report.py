"""Reports with every chapter that there can be, made up from a seed: a small one, and one of the largest size."""

import random
from collections.abc import Sequence
from typing import Any

from service.contract.metrics import METRICS, Kind, metrics_of
from service.contract.notices import Notice, as_rows
from workers.trim_log import summarize_rows
from workers.usage import Usage, summed

TASKS = ("cars", "pets", "news", "novels")
KINDS = (Kind.CLASSIFICATION, Kind.CLASSIFICATION, Kind.CLASSIFICATION, Kind.LANGUAGE_MODELING)
ROLES = ("linear", "scale", "shift")


def made_up(tasks: Sequence[str] = TASKS, layers: int = 6, seed: int = 0, files_per_task: int = 2) -> dict[str, Any]:
    """A report in which every key is filled; the first task's difference is within noise, and one gate is missed."""
    chance = random.Random(seed)
    return {
        "title": "",
        "language": "en",
        "method": {"name": "cat", "rank": 4, "balance": 5.0, "scaling": 0.4, "then": None},
        "paper": "CAT, Sun et al., ICML 2025, arXiv:2505.06977",
        "base": "s3://models/base/",
        "tasks": [{"name": task, "checkpoint": f"s3://models/{task}/", "weight": 1.0} for task in tasks],
        "metrics": metrics(tasks, chance),
        "gates": gates(tasks),
        "trimmed": {
            "linear": {
                "vectors": 24,
                "trimmed": 24,
                "energy_removed": 0.12,
                "conflict_before": 3.0,
                "conflict_after": 1.0,
            }
        },
        "layers": summarize_rows(trim_rows(tasks, layers, chance)),
        "conflict": conflict(tasks, chance),
        "search": search(chance),
        "cost": {
            "seconds": 381.5,
            "seconds_queued": 2.0,
            "bytes_read": 31_000_000_000,
            "bytes_written": 7_000_000_000,
            "bytes_found": 12_000_000_000,
            **summed({"merge": [Usage(300.0, 6_100_000_000, 900_000_000, True, "cuda", 4_000_000_000)]}),
        },
        "savings": {
            "models_before": len(tasks),
            "models_after": 1,
            "bytes_before": 7_000_000_000 * len(tasks),
            "bytes_after": 7_000_000_000,
            "bytes_saved_share": 1 - 1 / len(tasks),
        },
        "plan": {"peak_memory_bytes": 5_000_000_000},
        "recipe": {
            "base": "s3://models/base/",
            "method": {"name": "cat"},
            "note": "</script><script>alert(1)</script>",
        },
        "inputs": [
            {
                "role": f"task:{task}",
                "address": f"s3://models/{task}/model-{i}.safetensors",
                "size": 7,
                "sha256": "ab" * 32,
            }
            for task in tasks
            for i in range(files_per_task)
        ],
        "made_by": {"device": "cuda", "engine": "1", "versions": {"torch": "2.13.0"}},
        "licenses": {"inputs": {"base": "apache-2.0", **{f"task:{task}": None for task in tasks}}, "result": None},
        "warnings": as_rows(
            [
                Notice("few_samples", task="cars", count=24, enough=100),
                Notice("within_noise", task="cars", count=24, metric="accuracy", merged="0.8", expert="0.9"),
                Notice("head", task="<b>pets</b>", tensors="classifier.weight"),
            ]
        ),
    }


def metrics(tasks: Sequence[str], chance: random.Random) -> dict[str, Any]:
    rows = {}
    for position, task in enumerate(tasks):
        kind = KINDS[position % len(KINDS)]
        metric = metrics_of(kind)[0]
        rows[task] = _task(metric, METRICS[metric].better, kind, chance, sure=position > 0)
    retained = {name: row["retention"] for name, row in rows.items()}
    worst = min(retained, key=lambda name: retained[name])
    mean = sum(retained.values()) / len(retained)
    return {
        "tasks": rows,
        "mean_accuracy": {"base": 0.5, "expert": 0.9, "merged": 0.85},
        "mean_retention": mean,
        "mean_retention_interval": [mean - 0.02, mean + 0.02],
        "worst_retention": retained[worst],
        "worst_retention_interval": [retained[worst] - 0.03, retained[worst] + 0.03],
        "worst_task": worst,
        "confidence": 0.95,
        "resamples": 1000,
        "speed": {
            "device": "cuda",
            "batch": 64,
            "merged": {"latency_seconds": 0.041, "samples_per_second": 1561.0},
            "experts": {task: {"latency_seconds": 0.04, "samples_per_second": 1600.0} for task in tasks},
            "latency_ratio": 1.02,
        },
        "parameters": {"merged": 86_567_656, "experts": 86_567_656 * len(tasks)},
    }


def _task(metric: str, better: str, kind: str, chance: random.Random, *, sure: bool) -> dict[str, Any]:
    expert = chance.uniform(0.85, 0.97) if better == "higher" else chance.uniform(9, 12)
    kept = chance.uniform(0.86, 0.99)
    merged = expert * kept if better == "higher" else expert / kept
    width = 0.03 * expert
    scores = {"base": expert * (0.6 if better == "higher" else 3.0), "expert": expert, "merged": merged}
    found = {
        name: {metric: {"value": value, "low": value - width, "high": value + width}} for name, value in scores.items()
    }
    return {
        "kind": kind,
        "metric": metric,
        "better": better,
        "samples": 1234,
        **scores,
        "retention": kept,
        "intervals": {
            **{name: [value - width, value + width] for name, value in scores.items()},
            "retention": [kept - 0.03, kept + 0.03],
        },
        "baselines": {
            name: {
                "score": merged * by,
                "interval": [merged * by - width, merged * by + width],
                "retention": kept * 0.96,
                "gain": merged - merged * by,
                "gain_interval": [0.0, 0.1],
            }
            for name, by in (
                (("task_arithmetic", 0.96), ("ties", 0.94)) if better == "higher" else (("task_arithmetic", 1.1),)
            )
        },
        "all": found,
        "distinguishable": sure,
    }


def gates(tasks: Sequence[str]) -> list[dict[str, Any]]:
    rows: list[tuple[str, str | None, float | None, float | None, str, float, bool]] = [
        ("worst_task_retention", None, 0.85, None, "point", 0.871, True),
        ("mean_retention", None, 0.9, None, "bound", 0.905, True),
        ("task_drop", tasks[0], None, 0.02, "point", 0.045, False),
        ("model_bytes", None, None, 8e9, "point", 7e9, True),
        ("latency_ratio", None, None, 1.1, "point", 1.02, True),
        ("min_samples", None, 1000, None, "point", 1234, True),
    ]
    keys = ("metric", "task", "at_least", "at_most", "use", "value", "passed")
    return [dict(zip(keys, row, strict=True)) for row in rows]


def trim_rows(tasks: Sequence[str], layers: int, chance: random.Random) -> list[dict[str, Any]]:
    """A trim log with an embedding, some blocks of three parameters, and a norm."""
    parameters = [("model.embed_tokens.weight", "embedding")]
    parameters += [(f"model.layers.{i}.{role}.weight", role) for i in range(layers) for role in ROLES]
    return [
        {
            "parameter": name,
            "task": task,
            "role": role,
            "treatment": "projection" if role in ("linear", "embedding") else f"{role}_mask",
            "scores": sorted((chance.random() ** 4 for _ in range(8)), reverse=True),
            "energy": 1.0 + chance.random(),
            "energy_removed": 0.3 * chance.random(),
            "conflict_before": None if role == "shift" else 1.0 + 9 * chance.random(),
            "conflict_after": None if role == "shift" else chance.random(),
        }
        for name, role in [*parameters, ("model.norm.weight", "scale")]
        for task in tasks
    ]


def conflict(tasks: Sequence[str], chance: random.Random) -> dict[str, Any]:
    size = range(len(tasks))
    return {
        "tasks": list(tasks),
        "disturbance": [[1.0 if i == k else 0.8 * chance.random() for k in size] for i in size],
        "cosine": [[1.0 if i == k else chance.uniform(-0.4, 0.4) for k in size] for i in size],
    }


def search(chance: random.Random) -> dict[str, Any]:
    """Twenty trials, the fourth of which failed."""
    trials: list[dict[str, Any]] = []
    best = 0.0
    overflows = Notice("merged_overflows", parameter="model.layers.0.attention.query_key_value.weight", dtype="F16")
    for number in range(20):
        value = None if number == 3 else chance.uniform(0.7, 0.95)
        best = max(best, value or 0.0)
        trials.append(
            {
                "number": number,
                "state": "failed" if value is None else "complete",
                "value": value,
                "best": best,
                "parameters": {"scaling": round(chance.uniform(0.2, 1.0), 2), "rank": chance.choice((2, 4, 8))},
                "detail": str(overflows) if value is None else None,
                "why": as_rows([overflows])[0] if value is None else None,
            }
        )
    return {
        "measures": "retention",
        "objective": "mean_retention",
        "trials": trials,
        "importances": {"scaling": 0.82, "rank": 0.18},
        "chosen": {"scaling": 0.41, "rank": 4},
        "validation": 0.94,
        "test": 0.93,
    }
