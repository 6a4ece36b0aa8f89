"""Compares merge methods on real models: each at the scaling that is best on validation, then read once on test.

    python tests/benchmarks/quality.py --base deploy/demo/base --tasks deploy/demo/tasks/*

A task's folder is a checkpoint with ``exemplars.safetensors``, ``val.safetensors`` and ``test.safetensors`` beside it,
and ``head.safetensors`` where features are multiplied with a head matrix. Merging goes through the workers' own stages.
"""

from __future__ import annotations

import argparse
import json
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

SCALINGS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0, 1.2, 1.4, 1.6)
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
        split_file = load_file(self.folder / f"{split}.safetensors")
        samples = {name: values[: self.samples] for name, values in split_file.items()}
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
    """Retention, the share of the expert's accuracy, over all tasks."""

    mean: float
    worst: float


def score(tasks: Sequence[Task], experts: Mapping[str, float], body: Mapping[str, Tensor], split: str) -> Score:
    kept = [task.accuracy(body, split) / experts[task.name] for task in tasks]
    return Score(sum(kept) / len(kept), min(kept))


def scaled(base: Mapping[str, Tensor], merged: Mapping[str, Tensor], by: float) -> dict[str, Tensor]:
    """W0 + by * (merged - W0): methods with a scaling are linear in it, so one merge serves all scalings."""
    return {n: b + by * (merged[n] - b) if b.is_floating_point() else b for n, b in base.items()}


def compare(merger: Merger, tasks: Sequence[Task], names: Sequence[str], all_scalings: Sequence[float]) -> None:
    base = load_file(merger.base / "model.safetensors")
    experts = {split: {task.name: task.accuracy(task.tensors, split) for task in tasks} for split in ("val", "test")}
    print("experts, test:", ", ".join(f"{name} {value:.3f}" for name, value in experts["test"].items()))
    print(f"{'method':34s} scaling   val mean  worst   test mean  worst   seconds")
    for name in names:
        method = METHODS[name]
        scalings = all_scalings if has_scaling(method) else (1.0,)
        merged, seconds = merger.merged(at_one(method))
        found = {s: score(tasks, experts["val"], scaled(base, merged, s), "val") for s in scalings}
        best = max(found, key=lambda s: (found[s].mean, -s))
        test = score(tasks, experts["test"], scaled(base, merged, best), "test")
        val = found[best]
        figures = f"{val.mean:8.3f} {val.worst:6.3f}   {test.mean:8.3f} {test.worst:6.3f}  {seconds:8.1f}"
        print(f"{name:34s} {best:7.1f} {figures}", flush=True)


def has_scaling(method: Mapping[str, Any]) -> bool:
    return method["name"] not in ("average", "slerp", "karcher", "model_stock", "regmean")


def at_one(method: Mapping[str, Any]) -> dict[str, Any]:
    """The method with its scaling, or that of what follows it, at 1."""
    if "then" in method:
        return {**method, "then": {**method["then"], "scaling": 1.0}}
    return {**method, "scaling": 1.0} if has_scaling(method) else dict(method)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--tasks", type=Path, nargs="+", required=True)
    parser.add_argument("--exemplars", type=int, default=8)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--scalings", type=float, nargs="+", default=SCALINGS)
    parser.add_argument("--samples", type=int, default=10**9, help="labeled samples to use of each split, at most")
    options = parser.parse_args()
    tasks = [Task.read(folder.resolve(), options.samples) for folder in options.tasks]
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder).resolve()
        merger = Merger(options.base.resolve(), tasks, options.exemplars, scratch)
        compare(merger, tasks, options.methods, options.scalings)


if __name__ == "__main__":
    main()
