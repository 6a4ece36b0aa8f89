"""Compares merge methods on real models: each at the scaling that is best on validation, then read once on test.

    python tests/benchmarks/quality.py --base deploy/demo/base --tasks deploy/demo/tasks/*

``--sweep`` compares the parameters of CAT and of shrinkage instead of methods. Tables are Markdown; behind a figure is
its standard error, that of drawing other samples.

A task's folder is a checkpoint with ``exemplars.safetensors``, ``val.safetensors`` and ``test.safetensors`` beside it,
and ``head.safetensors`` where features are multiplied with a head matrix. Merging goes through the workers' own stages.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from service.contract.parts import Claim, SoFar
from service.contract.recipe import Recipe
from service.contract.settings import Connections
from service.contract.stages import Stage
from service.stores.objects import open_objects
from workers.forward import class_scores, load_model, pooled_features
from workers.stages import RUN
from workers.watch import Watch
from workers.work import Work

SCALINGS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.4)
METHODS: dict[str, dict[str, Any]] = {
    "Average": {"name": "average"},
    "Task Arithmetic": {"name": "task_arithmetic"},
    "TIES": {"name": "ties"},
    "CAT (paper: rank 4, balance 5)": {"name": "cat"},
    "CAT rank 16, balance 5": {"name": "cat", "rank": 16},
    "CAT rank 4, balance 1": {"name": "cat", "balance": 1.0},
    "CAT without data, rank 8": {"name": "cat", "rank": 8, "data": False},
    "LOT": {"name": "lot"},
    "TSV-M": {"name": "tsv_m"},
    "Iso-C": {"name": "iso_c"},
    "Iso-CTS": {"name": "iso_cts"},
    "WUDI (closed form)": {"name": "wudi", "solver": "closed"},
    "PCB": {"name": "pcb"},
    "Consensus": {"name": "consensus"},
    "CAT, then TIES": {"name": "cat", "then": {"name": "ties"}},
    "CAT, then TSV-M": {"name": "cat", "then": {"name": "tsv_m"}},
    "CAT, then Iso-C": {"name": "cat", "then": {"name": "iso_c"}},
    "Shrinkage (auto)": {"name": "shrinkage"},
    "Shrinkage without data": {"name": "shrinkage", "data": False},
}
SWEEP: dict[str, dict[str, Any]] = {
    **{f"CAT rank {r}, balance {b}": {"name": "cat", "rank": r, "balance": b} for r in (1, 4, 16, 64) for b in (1, 5)},
    "CAT, second moments summed": {"name": "cat", "moments": "sum"},
    "CAT, norms restored": {"name": "cat", "rank": 16, "balance": 1, "restore_norm": True},
    "CAT, features at W0 + 0.4 T": {"name": "cat", "features_at": "scaled", "scaling": 0.4},
    "CAT, no masks": {"name": "cat", "scale_rank": 0, "shift_rank": 0},
    "CAT, then shrinkage": {"name": "cat", "then": {"name": "shrinkage"}},
    **{f"Shrinkage, proxy {p}": {"name": "shrinkage", "proxy": p} for p in (0, 0.5, 0.75, 0.9, 1)},
    **{f"Shrinkage, damping {d}": {"name": "shrinkage", "damping": d} for d in (0.0001, 0.025, 0.25)},
}


@dataclass(frozen=True)
class Task:
    """One expert with its data."""

    name: str
    folder: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    head: dict[str, Tensor] | None
    samples: int

    @classmethod
    def read(cls, folder: Path, samples: int) -> Task:
        head = folder / "head.safetensors"
        config = json.loads((folder / "config.json").read_text())
        tensors = load_file(folder / "model.safetensors")
        return cls(folder.name, folder, config, tensors, load_file(head) if head.exists() else None, samples)

    def accuracy(self, body: Mapping[str, Tensor], split: str) -> float:
        """The share of right answers with this body, and the task's own head where it has one."""
        samples = self._labeled(split)
        labels = samples.pop("labels").long()
        own = {
            name: tensor
            for name, tensor in self.tensors.items()
            if name not in body or body[name].shape != tensor.shape
        }
        model = load_model(self.config, {**{n: t for n, t in body.items() if n in self.tensors}, **own}, "cpu")
        if self.head is None:
            scores = class_scores(model, samples, 128)
        else:
            scores = pooled_features(model, samples, 128, "mean", True) @ self.head["weight"].float().T
        return float((scores.argmax(1) == labels).double().mean())

    def count(self, split: str) -> int:
        """How many samples of a split are used."""
        return len(self._labeled(split)["labels"])

    def _labeled(self, split: str) -> dict[str, Tensor]:
        read = load_file(self.folder / f"{split}.safetensors")
        return {name: values[: self.samples] for name, values in read.items()}


@dataclass(frozen=True)
class Merger:
    """Runs the workers' stages on folders, without a broker or a database."""

    base: Path
    tasks: Sequence[Task]
    exemplars: int
    scratch: Path

    def merged(self, method: Mapping[str, Any]) -> tuple[dict[str, Tensor], float]:
        """The merged tensors, and the seconds that planning, calibrating and merging took."""
        start = time.perf_counter()
        recipe = self._recipe(method)
        outputs: dict[Stage, list[dict[str, Any]]] = {}
        for stage, parts in self._stages(recipe, outputs):
            outputs[stage] = [
                dict(RUN[stage](self._work(recipe, stage, part, outputs)).output) for part in range(parts)
            ]
        seconds = time.perf_counter() - start
        return load_file(self.scratch / "objects" / "out" / "model.safetensors"), seconds

    def _stages(self, recipe: Recipe, outputs: dict[Stage, list[dict[str, Any]]]) -> Iterator[tuple[Stage, int]]:
        planned = RUN[Stage.PLAN](self._work(recipe, Stage.PLAN, 0, outputs)).parts
        for stage in (Stage.CALIBRATE, Stage.MERGE):
            yield stage, sum(part.stage is stage for part in planned)

    def _recipe(self, method: Mapping[str, Any]) -> Recipe:
        asked = dict(method)
        with_data = asked.pop("data", True)
        tasks = []
        for task in self.tasks:
            row = {"name": task.name, "checkpoint": f"file://{task.folder}/"}
            tasks.append({**row, "exemplars": f"file://{self._exemplars(task)}"} if with_data else row)
        output = {"prefix": "s3://out/", "overwrite": True, "shard_bytes": 10**12}
        return Recipe.model_validate(
            {"base": f"file://{self.base}/", "tasks": tasks, "method": asked, "output": output}
        )

    def _exemplars(self, task: Task) -> Path:
        path = self.scratch / "exemplars" / f"{task.name}.safetensors"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            samples = load_file(task.folder / "exemplars.safetensors")
            save_file({name: values[: self.exemplars].contiguous() for name, values in samples.items()}, path)
        return path

    def _work(self, recipe: Recipe, stage: Stage, part: int, outputs: Mapping[Stage, list[dict[str, Any]]]) -> Work:
        roots = ",".join(str(path) for path in [self.base, *(task.folder for task in self.tasks), self.scratch])
        environ = {"CATMERGE_OBJECT_STORE": f"file://{self.scratch}/objects", "CATMERGE_FILE_ROOTS": roots}
        claim = Claim("quality", stage, part, stage.value, "token", 1, recipe, "s3://out/")
        return Work(
            claim=claim,
            objects=open_objects(Connections.from_environment(environ)),
            watch=Watch(lambda: True),
            workspace="s3://catmerge/",
            device="cpu",
            outputs=lambda of: outputs.get(of, []),
            so_far=lambda: SoFar(0.0, 0.0, 0.0, 0, 0),
        )


@dataclass(frozen=True)
class Score:
    """Retention, the share of the expert's accuracy, over all tasks, with standard errors."""

    mean: float
    worst: float
    mean_error: float
    worst_error: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} ({self.mean_error:.3f}) | {self.worst:.3f} ({self.worst_error:.3f})"


def score(tasks: Sequence[Task], experts: Mapping[str, float], body: Mapping[str, Tensor], split: str) -> Score:
    """The experts' accuracies count as known; errors are those of a share of independent samples."""
    shares = {task.name: task.accuracy(body, split) for task in tasks}
    kept = {name: share / experts[name] for name, share in shares.items()}
    errors = {
        task.name: math.sqrt(shares[task.name] * (1 - shares[task.name]) / task.count(split)) / experts[task.name]
        for task in tasks
    }
    worst = min(kept, key=lambda name: kept[name])
    mean_error = math.sqrt(sum(error**2 for error in errors.values())) / len(tasks)
    return Score(sum(kept.values()) / len(kept), kept[worst], mean_error, errors[worst])


def scaled(base: Mapping[str, Tensor], merged: Mapping[str, Tensor], by: float) -> dict[str, Tensor]:
    """W0 + by * (merged - W0): methods with a scaling are linear in it, so one merge serves all scalings."""
    return {n: b + by * (merged[n] - b) if b.is_floating_point() else b for n, b in base.items()}


def compare(
    merger: Merger, tasks: Sequence[Task], methods: Mapping[str, Mapping[str, Any]], all_scalings: Sequence[float]
) -> None:
    base = load_file(merger.base / "model.safetensors")
    experts = {split: {task.name: task.accuracy(task.tensors, split) for task in tasks} for split in ("val", "test")}
    print("experts, test:", ", ".join(f"{name} {value:.3f}" for name, value in experts["test"].items()))
    print("\n| method | scaling | val mean | val worst | test mean | test worst | merge seconds |")
    print("|---|---|---|---|---|---|---|")
    for name, method in methods.items():
        scalings = all_scalings if has_scaling(method) else (1.0,)
        merged, seconds = merger.merged(at_one(method))
        made_at = at_one(method).get("scaling", 1.0)
        found = {s: score(tasks, experts["val"], scaled(base, merged, s / made_at), "val") for s in scalings}
        best = max(found, key=lambda s: (found[s].mean, -s))
        test = score(tasks, experts["test"], scaled(base, merged, best / made_at), "test")
        print(f"| {name} | {best:.1f} | {found[best]} | {test} | {seconds:.1f} |", flush=True)


def has_scaling(method: Mapping[str, Any]) -> bool:
    return method["name"] not in ("average", "slerp", "karcher", "model_stock", "regmean")


def at_one(method: Mapping[str, Any]) -> dict[str, Any]:
    """The method with its scaling, or that of what follows it, at 1; features stay where they are to be taken."""
    if method.get("features_at") == "scaled":
        return dict(method)
    if "then" in method:
        return {**method, "then": {**method["then"], "scaling": 1.0}}
    return {**method, "scaling": 1.0} if has_scaling(method) else dict(method)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--tasks", type=Path, nargs="+", required=True)
    parser.add_argument("--exemplars", type=int, default=8)
    parser.add_argument("--sweep", action="store_true", help="compare parameters of CAT and of shrinkage")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="rows of the table; omitted, all of them")
    parser.add_argument("--scalings", type=float, nargs="+", default=SCALINGS)
    parser.add_argument("--samples", type=int, default=10**9, help="labeled samples to use of each split, at most")
    options = parser.parse_args()
    table = SWEEP if options.sweep else METHODS
    unknown = sorted(set(options.methods or ()) - table.keys())
    if unknown:
        parser.error(f"no row is called {', '.join(unknown)}; rows are {', '.join(table)}")
    methods = {name: table[name] for name in options.methods or table}
    tasks = [Task.read(folder.resolve(), options.samples) for folder in options.tasks]
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder).resolve()
        merger = Merger(options.base.resolve(), tasks, options.exemplars, scratch)
        compare(merger, tasks, methods, options.scalings)


if __name__ == "__main__":
    main()
