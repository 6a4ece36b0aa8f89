"""Compares merge methods on real models: each at the scaling that is best on validation, then read once on test.

    python tests/benchmarks/quality.py --base deploy/demo/base --tasks deploy/demo/tasks/*

``--sweep`` compares the parameters of CAT and of shrinkage instead of methods. Tables are Markdown; behind a figure on
test is its 95 % interval by paired bootstrap: every method and the experts on the same resamples of a task's samples.
The last figure is how many points more than Task Arithmetic at its best a method keeps on average.

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

import numpy as np
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from service.contract.methods import METHODS as ROWS
from service.contract.parts import Claim, SoFar
from service.contract.recipe import Recipe
from service.contract.settings import Connections
from service.contract.stages import Stage
from service.stores.objects import open_objects
from workers.bootstrap import draws, interval
from workers.forward import class_scores, load_model, pooled_features
from workers.stages import RUN
from workers.watch import Watch
from workers.work import Work

SCALINGS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.4)
RESAMPLES = 10_000
CONFIDENCE = 0.95
YARDSTICK = "Task Arithmetic"
METHODS: dict[str, dict[str, Any]] = {
    YARDSTICK: {"name": "task_arithmetic"},
    "Average": {"name": "average"},
    "Karcher mean": {"name": "karcher"},
    "Model Stock": {"name": "model_stock"},
    "TIES": {"name": "ties"},
    "DARE, linear": {"name": "dare"},
    "DELLA": {"name": "della"},
    "Breadcrumbs": {"name": "breadcrumbs"},
    "SCE": {"name": "sce"},
    "PCB": {"name": "pcb"},
    "Consensus": {"name": "consensus"},
    "CAT (paper: rank 4, balance 5)": {"name": "cat"},
    "CAT rank 16, balance 5": {"name": "cat", "rank": 16},
    "CAT rank 4, balance 1": {"name": "cat", "balance": 1.0},
    "CAT without data, rank 8": {"name": "cat", "rank": 8, "data": False},
    "RegMean": {"name": "regmean"},
    "LOT": {"name": "lot"},
    "TSV-M": {"name": "tsv_m"},
    "Iso-C": {"name": "iso_c"},
    "Iso-CTS": {"name": "iso_cts"},
    "WUDI (closed form)": {"name": "wudi", "solver": "closed"},
    "CAT, then TIES": {"name": "cat", "then": {"name": "ties"}},
    "CAT, then TSV-M": {"name": "cat", "then": {"name": "tsv_m"}},
    "CAT, then Iso-C": {"name": "cat", "then": {"name": "iso_c"}},
    "Shrinkage (auto)": {"name": "shrinkage"},
    "Shrinkage without data": {"name": "shrinkage", "data": False},
}
SWEEP: dict[str, dict[str, Any]] = {
    YARDSTICK: {"name": "task_arithmetic"},
    **{f"CAT rank {r}, balance {b}": {"name": "cat", "rank": r, "balance": b} for r in (1, 4, 16, 64) for b in (1, 5)},
    "CAT, second moments summed": {"name": "cat", "moments": "sum"},
    "CAT, norms restored": {"name": "cat", "rank": 16, "balance": 1, "restore_norm": True},
    "CAT, features at W0 + 0.4 T": {"name": "cat", "features_at": "scaled", "scaling": 0.4},
    "CAT, no masks": {"name": "cat", "scale_rank": 0, "shift_rank": 0},
    "CAT, then shrinkage": {"name": "cat", "then": {"name": "shrinkage"}},
    **{f"Shrinkage, proxy {p}": {"name": "shrinkage", "proxy": p} for p in (0, 0.5, 0.75, 0.9, 1)},
    **{f"Shrinkage, damping {d}": {"name": "shrinkage", "damping": d} for d in (0.0001, 0.025, 0.25)},
}


Right = NDArray[np.bool_]
Figures = NDArray[np.float64]


@dataclass(frozen=True)
class Task:
    """One expert with its data."""

    name: str
    folder: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    head: dict[str, Tensor] | None
    samples: Mapping[str, int]

    @classmethod
    def read(cls, folder: Path, samples: Mapping[str, int]) -> Task:
        head = folder / "head.safetensors"
        config = json.loads((folder / "config.json").read_text())
        tensors = load_file(folder / "model.safetensors")
        return cls(folder.name, folder, config, tensors, load_file(head) if head.exists() else None, samples)

    def right(self, body: Mapping[str, Tensor], split: str) -> Right:
        """Which samples this body answers rightly, ``[samples]``, with the task's own head where it has one."""
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
        right: Right = (scores.argmax(1) == labels).numpy()
        return right

    def _labeled(self, split: str) -> dict[str, Tensor]:
        read = load_file(self.folder / f"{split}.safetensors")
        return {name: values[: self.samples[split]] for name, values in read.items()}


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


@dataclass(frozen=True, eq=False)
class Kept:
    """Retention, the share of the expert's accuracy, over all tasks: the point, then its resamples if there are any."""

    mean: Figures
    worst: Figures

    @property
    def points(self) -> str:
        return f"{self.mean[0]:.3f} | {self.worst[0]:.3f}"

    @property
    def with_intervals(self) -> str:
        return f"{ranged(self.mean)} | {ranged(self.worst)}"

    def over(self, other: Kept) -> str:
        """How many points more than another method this one keeps on average, on the same resamples."""
        return ranged(100 * (self.mean - other.mean), "+.1f")


def ranged(figures: Figures, form: str = ".3f") -> str:
    """A figure and where it may lie."""
    low, high = interval(figures, CONFIDENCE) or (np.nan, np.nan)
    return f"{figures[0]:{form}} ({low:{form}} to {high:{form}})"


def kept(tasks: Sequence[Task], experts: Mapping[str, Right], body: Mapping[str, Tensor], split: str) -> Kept:
    """What a merged model keeps; with resamples on test, none on validation, where only the point is looked at."""
    resamples = RESAMPLES if split == "test" else 0
    ratios = [
        _means(task.right(body, split), task.name, resamples) / _means(experts[task.name], task.name, resamples)
        for task in tasks
    ]
    return Kept(np.mean(ratios, axis=0), np.min(ratios, axis=0))


def _means(right: Right, task: str, resamples: int) -> Figures:
    """The share of right answers, on all samples and then on each resample: ``[1 + resamples]``."""
    drawn = [right[rows].mean(1) for rows in draws(0, task, len(right), resamples)]
    return np.concatenate([[right.mean()], *drawn])


def scaled(base: Mapping[str, Tensor], merged: Mapping[str, Tensor], by: float) -> dict[str, Tensor]:
    """W0 + by * (merged - W0): methods with a scaling are linear in it, so one merge serves all scalings."""
    return {n: b + by * (merged[n] - b) if b.is_floating_point() else b for n, b in base.items()}


def compare(
    merger: Merger, tasks: Sequence[Task], methods: Mapping[str, Mapping[str, Any]], all_scalings: Sequence[float]
) -> None:
    base = load_file(merger.base / "model.safetensors")
    experts = {split: {task.name: task.right(task.tensors, split) for task in tasks} for split in ("val", "test")}
    print("experts, test:", ", ".join(f"{name} {right.mean():.3f}" for name, right in experts["test"].items()))
    print("\n| method | scaling | val mean | val worst | test mean | test worst | over Task Arithmetic | seconds |")
    print("|---|---|---|---|---|---|---|---|")
    yardstick: Kept | None = None
    for name, method in methods.items():
        scalings = all_scalings if has_scaling(method) else (1.0,)
        merged, seconds = merger.merged(at_one(method))
        made_at = at_one(method).get("scaling", 1.0)
        found = {s: kept(tasks, experts["val"], scaled(base, merged, s / made_at), "val") for s in scalings}
        best = max(found, key=lambda s: (found[s].mean[0], -s))
        test = kept(tasks, experts["test"], scaled(base, merged, best / made_at), "test")
        yardstick = yardstick or test
        scaling = f"{best:.1f}" if has_scaling(method) else ""
        cells = [name, scaling, found[best].points, test.with_intervals, test.over(yardstick), f"{seconds:.1f}"]
        print(f"| {' | '.join(cells)} |", flush=True)


def has_scaling(method: Mapping[str, Any]) -> bool:
    """Whether the method has a factor on what it adds to the base."""
    return "scaling" in ROWS[method["name"]].model_fields


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
    parser.add_argument("--test-samples", type=int, help="labeled samples to use of test, where that is another number")
    options = parser.parse_args()
    table = SWEEP if options.sweep else METHODS
    unknown = sorted(set(options.methods or ()) - table.keys())
    if unknown:
        parser.error(f"no row is called {', '.join(unknown)}; rows are {', '.join(table)}")
    methods = {name: table[name] for name in (YARDSTICK, *(options.methods or table))}
    samples = {"val": options.samples, "test": options.test_samples or options.samples}
    tasks = [Task.read(folder.resolve(), samples) for folder in options.tasks]
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder).resolve()
        merger = Merger(options.base.resolve(), tasks, options.exemplars, scratch)
        compare(merger, tasks, methods, options.scalings)


if __name__ == "__main__":
    main()
