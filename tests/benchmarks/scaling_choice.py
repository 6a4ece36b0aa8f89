"""Compares what chooses a scaling: labels, how like the experts' features or predictions are, and the default.

    python -m tests.benchmarks.scaling_choice
    python -m tests.benchmarks.scaling_choice --base zoo/base --tasks zoo/election zoo/news20 zoo/reuters8 zoo/wordnet

For every method and choice: the scaling, of five around the default, and the shares of the experts' accuracy that are
kept with it on test, on average and at worst. Every search is the workers' own stages. A task's folder is a checkpoint
with ``exemplars.safetensors``, ``val.safetensors`` and ``test.safetensors`` beside it, and ``head.safetensors`` where
features are multiplied with a head matrix; the demo's are the default.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from service.contract.parts import Claim, Done, SoFar
from service.contract.recipe import Recipe
from service.contract.search import AROUND_DEFAULT as FACTORS
from service.contract.search import UNLABELED
from service.contract.stages import Stage
from service.stores.local import LocalStore
from service.stores.objects import Objects
from tests.workers.stage_runs import Trials
from workers.stages import RUN
from workers.watch import Watch
from workers.work import Work

DEMO = Path(__file__).resolve().parents[2] / "deploy" / "demo"
METHODS: dict[str, dict[str, Any]] = {
    "Task Arithmetic": {"name": "task_arithmetic"},
    "CAT": {"name": "cat"},
    "TIES": {"name": "ties"},
    "TSV-M": {"name": "tsv_m"},
    "Iso-C": {"name": "iso_c"},
    "Shrinkage": {"name": "shrinkage"},
}

Measured = dict[float, list[float]]  # each task's figure, by scaling


@dataclass(frozen=True)
class Models:
    """A base and its experts, and copies of their samples, as many as are to be used."""

    base: Path
    tasks: Sequence[Path]
    scratch: Path

    @classmethod
    def of(cls, base: Path, tasks: Sequence[Path], scratch: Path, samples: Mapping[str, int]) -> Models:
        for task in tasks:
            for kind, count in samples.items():
                read = load_file(task / f"{kind}.safetensors")
                (scratch / task.name).mkdir(exist_ok=True)
                kept = {name: values[:count].contiguous() for name, values in read.items()}
                save_file(kept, scratch / task.name / f"{kind}.safetensors")
        return cls(base, tasks, scratch)

    def scalings(self, method: Mapping[str, Any]) -> list[float]:
        """Those to choose from, the default first."""
        default = float(Recipe.model_validate(self._recipe(method, "val")).method.model_dump()["scaling"])
        return [round(default * factor, 6) for factor in FACTORS]

    def measured(self, method: Mapping[str, Any], split: str, objective: str, scalings: Sequence[float]) -> Measured:
        """Each task's figure at each scaling, by a search on a split's samples, or on exemplars."""
        search = {"space": {"scaling": scalings}, "sampler": "grid", "objective": objective}
        recipe = Recipe.model_validate({**self._recipe(method, split), "search": search})
        measures = recipe.search.measures if recipe.search else ""
        found = [list(trial.output[measures].values()) for trial in self._run(recipe).known]
        return dict(zip(scalings, found, strict=True))

    def _recipe(self, method: Mapping[str, Any], split: str) -> dict[str, Any]:
        return {
            "base": f"file://{self.base}/",
            "tasks": [
                {"name": task.name, "checkpoint": f"file://{task}/", "exemplars": self._samples(task, "exemplars")}
                for task in self.tasks
            ],
            "method": dict(method),
            "evaluation": {"tasks": [self._row(task, split) for task in self.tasks]},
        }

    def _row(self, task: Path, split: str) -> dict[str, Any]:
        row = {"task": task.name, "labeled": self._samples(task, split), "validation": self._samples(task, split)}
        head = task / "head.safetensors"
        return {**row, "head": {"weight": f"file://{head}"}} if head.exists() else row

    def _samples(self, task: Path, kind: str) -> str:
        return f"file://{self.scratch}/{task.name}/{kind}.safetensors"

    def _run(self, recipe: Recipe) -> Trials:
        """The stages up to the search's end."""
        trials, outputs = Trials(), dict[Stage, list[Done]]()
        planned = RUN[Stage.PLAN](self._work(recipe, Stage.PLAN, 0, trials, outputs)).parts
        for part in planned:
            if part.stage in (Stage.CALIBRATE, Stage.SEARCH):
                done = RUN[part.stage](self._work(recipe, part.stage, part.part, trials, outputs))
                outputs.setdefault(part.stage, []).append(done)
        return trials

    def _work(
        self, recipe: Recipe, stage: Stage, part: int, trials: Trials, outputs: Mapping[Stage, list[Done]]
    ) -> Work:
        place = f"file://{self.scratch}/"
        roots = (self.scratch, self.base, *self.tasks)
        return Work(
            claim=Claim("job", stage, part, stage.value, "token", 1, recipe, f"{place}result/"),
            objects=Objects({"file": LocalStore(roots=roots)}, buckets=None, workspace=f"{place}workspace/"),
            watch=Watch(lambda: True),
            workspace=f"{place}workspace/",
            device="cpu",
            outputs=lambda of: [dict(done.output) for done in outputs.get(of, [])],
            so_far=lambda: SoFar(0.0, 0.0, 0.0, 0, 0),
            study=trials,
        )


def best(measured: Measured) -> float:
    """The scaling of the best mean; of equal ones the first."""
    return max(measured, key=lambda scaling: sum(measured[scaling]))


def compare(models: Models, methods: Mapping[str, Mapping[str, Any]]) -> None:
    print("| method | labels | features | predictions | default |")
    print("|---|---|---|---|---|")
    for name, method in methods.items():
        scalings = models.scalings(method)
        by_labels = best(models.measured(method, "val", "mean_retention", scalings))
        by_likeness = [best(models.measured(method, "val", objective, scalings)) for objective in UNLABELED]
        chosen = [by_labels, *by_likeness, scalings[0]]
        test = models.measured(method, "test", "mean_retention", sorted(set(chosen)))
        cells = (said(scaling, test[scaling]) for scaling in chosen)
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def said(scaling: float, kept: Sequence[float]) -> str:
    return f"{scaling:.2f}: {sum(kept) / len(kept):.3f}, {min(kept):.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=DEMO / "base")
    parser.add_argument("--tasks", type=Path, nargs="+", default=sorted((DEMO / "tasks").iterdir()))
    parser.add_argument("--exemplars", type=int, default=16)
    parser.add_argument("--samples", type=int, default=10**9, help="labeled samples to use of each split, at most")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME")
    options = parser.parse_args()
    samples = {"exemplars": options.exemplars, "val": options.samples, "test": options.samples}
    with tempfile.TemporaryDirectory() as folder:
        tasks = [task.resolve() for task in options.tasks]
        models = Models.of(options.base.resolve(), tasks, Path(folder).resolve(), samples)
        compare(models, {name: METHODS[name] for name in options.methods})


if __name__ == "__main__":
    main()
