"""Merges checkpoints in folders by the workers' own stages, in this process, and prints what each stage took.

    python tests/benchmarks/one_merge.py \
        '{"base": "/models/base", "tasks": ["/models/a"], "method": {"name": "ties"}, "out": "/tmp/merged"}'

The result lies in ``out/objects/result``. Models may be addresses, with the variables of their store in
``environment``; then the result lies at ``s3://objects/result/``. With ``"profile": 20``, twenty rows of each stage's
profile come first. With ``"keep": false`` each merged shard is deleted before the next is begun. The last line gives
seconds and processor seconds (those of all threads together) by stage.
"""

from __future__ import annotations

import cProfile
import json
import os
import pstats
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from service.contract.parts import Claim, Done, SoFar
from service.contract.recipe import Recipe
from service.contract.settings import Connections
from service.contract.stages import Stage
from service.stores.cached import open_blocks
from service.stores.objects import open_objects
from workers.machine import prepare
from workers.settings import WorkerSettings
from workers.stages import RUN
from workers.watch import Watch
from workers.work import Work

PREFIX = "s3://objects/result/"


def run_stages(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Everything up to the merged weights; ``seconds`` and ``processor`` seconds by the names of the stages."""
    recipe = recipe_of(asked)
    device = prepare(WorkerSettings.from_environment(os.environ))
    outputs: dict[Stage, list[dict[str, Any]]] = {}
    seconds: dict[str, float] = {}
    processor: dict[str, float] = {}

    def timed(stage: Stage, parts: int) -> list[Done]:
        profile = cProfile.Profile()
        start, start_processor = time.perf_counter(), time.process_time()
        if asked.get("profile"):
            profile.enable()
        done = [one(_work(asked, recipe, device, stage, part, outputs)) for part in range(parts)]
        seconds[stage.value] = time.perf_counter() - start
        processor[stage.value] = time.process_time() - start_processor
        if asked.get("profile"):
            profile.disable()
            pstats.Stats(profile).sort_stats("tottime").print_stats(asked["profile"])
        return done

    def one(work: Work) -> Done:
        done = RUN[work.claim.stage](work)
        if work.claim.stage is Stage.MERGE and not asked.get("keep", True):
            for file in done.output["files"]:
                work.objects.delete(PREFIX + file["name"])
        return done

    planned = timed(Stage.PLAN, 1)[0].parts
    for stage in (Stage.CALIBRATE, Stage.MERGE):
        count = sum(part.stage is stage for part in planned)
        outputs[stage] = [dict(done.output) for done in timed(stage, count)]
    return {"seconds": seconds, "processor": processor}


def recipe_of(asked: Mapping[str, Any]) -> Recipe:
    tasks = [{"name": Path(task).name, "checkpoint": _address(task)} for task in asked["tasks"]]
    output = {"prefix": PREFIX, "overwrite": True, "shard_bytes": asked.get("shard_bytes", 10**12)}
    return Recipe.model_validate(
        {"base": _address(asked["base"]), "tasks": tasks, "method": asked["method"], "output": output}
    )


def _address(path: str) -> str:
    if "://" in path:
        return path
    return f"file://{path}" if path.endswith(".safetensors") else f"file://{path}/"


def _work(
    asked: Mapping[str, Any],
    recipe: Recipe,
    device: str,
    stage: Stage,
    part: int,
    outputs: Mapping[Stage, list[dict[str, Any]]],
) -> Work:
    connections = Connections.from_environment(_environment(asked))
    return Work(
        claim=Claim("benchmark", stage, part, stage.value, "token", 1, recipe, PREFIX),
        objects=open_objects(connections, open_blocks(connections)),
        watch=Watch(lambda: True),
        workspace="s3://workspace/",
        device=device,
        outputs=lambda of: outputs.get(of, []),
        so_far=lambda: SoFar(0.0, 0.0, 0.0, 0, 0),
    )


def _environment(asked: Mapping[str, Any]) -> dict[str, str]:
    if "environment" in asked:
        return dict(asked["environment"])
    roots = ",".join(sorted({str(Path(path).parent) for path in (asked["base"], *asked["tasks"])}))
    return {"CATMERGE_OBJECT_STORE": f"file://{asked['out']}", "CATMERGE_FILE_ROOTS": roots}


if __name__ == "__main__":
    print(json.dumps(run_stages(json.loads(sys.argv[1]))))
