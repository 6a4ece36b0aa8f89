"""Merges the demo's models in this process, through every stage, so that there is a real report to look at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from service.contract import artifacts
from service.contract.parts import Claim, Done, SoFar
from service.contract.recipe import Recipe
from service.contract.stages import NewPart, Stage
from service.stores.local import LocalStore
from service.stores.objects import Objects
from workers.stages import RUN
from workers.watch import Watch
from workers.work import Work

DEMO = Path(__file__).resolve().parents[2] / "deploy" / "demo"
TASKS = tuple(sorted(folder.name for folder in (DEMO / "tasks").iterdir() if folder.is_dir()))


def merge_demo(folder: Path, **changes: Any) -> Path:
    """The folder of a result with its report; ``changes`` are to the recipe."""
    recipe = Recipe.model_validate({**_recipe(folder), **changes})
    outputs: dict[Stage, list[Done]] = {}
    for part in _run(folder, recipe, NewPart(Stage.PLAN, 0, "plan", 1.0), outputs):
        _run(folder, recipe, part, outputs)
    return folder / "result"


def report_of(result: Path) -> Path:
    """Where a result's page lies."""
    return result / artifacts.REPORT_HTML


def _recipe(folder: Path) -> dict[str, Any]:
    address = f"file://{DEMO}/tasks"
    return {
        "base": f"file://{DEMO}/base/",
        "tasks": [
            {
                "name": task,
                "checkpoint": f"{address}/{task}/",
                "exemplars": f"{address}/{task}/exemplars.safetensors",
            }
            for task in TASKS
        ],
        "method": {"name": "cat", "scaling": 0.5},
        "evaluation": {
            "tasks": [{"task": task, "labeled": f"{address}/{task}/test.safetensors"} for task in TASKS],
            "batch_size": 350,
        },
        "gates": [{"metric": "worst_task_retention", "at_least": 0.5}],
        "output": {"prefix": f"file://{folder}/result/"},
    }


def _run(folder: Path, recipe: Recipe, part: NewPart, outputs: dict[Stage, list[Done]]) -> tuple[NewPart, ...]:
    place = f"file://{folder}/"
    work = Work(
        claim=Claim("job", part.stage, part.part, part.name, "token", 1, recipe, f"{place}result/"),
        objects=Objects({"file": LocalStore(roots=(folder, DEMO))}, buckets=None, workspace=f"{place}workspace/"),
        watch=Watch(lambda: True),
        workspace=f"{place}workspace/",
        device="cpu",
        outputs=lambda stage: [dict(done.output) for done in outputs.get(stage, [])],
        so_far=lambda: SoFar(0.0, 1.0, 12.5, 30_000_000, 5_000_000),
    )
    done = RUN[part.stage](work)
    outputs.setdefault(part.stage, []).append(done)
    return done.parts
