"""What a plan says a worker will hold at most."""

from __future__ import annotations

from math import prod
from typing import Any

import pytest

from service.contract import peaks
from service.contract.checkpoint import Checkpoint, TensorInfo
from service.contract.fit import fit
from service.contract.plan import Plan
from service.contract.planning import STREAM_BYTES, make_plan
from service.contract.recipe import Recipe
from service.contract.roles import guess_parameter

SHAPE = (4096, 1024)
STORED = 2 * prod(SHAPE)  # bytes of the weight in one checkpoint
FLOAT = 4 * prod(SHAPE)
TASKS = 3


def checkpoint(name: str) -> Checkpoint:
    file = f"file:///{name}/model.safetensors"
    tensors = {
        "dense.weight": TensorInfo("dense.weight", "BF16", SHAPE, 0, STORED, file),
        "dense.bias": TensorInfo("dense.bias", "BF16", SHAPE[:1], STORED, STORED + 2 * SHAPE[0], file),
    }
    return Checkpoint(address=f"file:///{name}/", files=(), tensors=tensors, config=None)


def peak(method: dict[str, Any], **changes: Any) -> int:
    return planned(method, **changes)[1].peak_memory_bytes - STREAM_BYTES


def planned(method: dict[str, Any], **changes: Any) -> tuple[Recipe, Plan]:
    tasks = [{"name": f"t{k}", "checkpoint": f"file:///t{k}/"} for k in range(TASKS)]
    recipe = Recipe.model_validate({"base": "file:///base/", "tasks": tasks, "method": method, **changes})
    base, experts = checkpoint("base"), [checkpoint(f"t{k}") for k in range(TASKS)]
    found = fit(recipe, base, experts)
    plan = make_plan(recipe, "file:///out/", base, experts, found, lambda info: guess_parameter(info.name, info.shape))
    return recipe, plan


def test_what_is_merged_entry_by_entry_holds_no_tensor() -> None:
    assert peak({"name": "task_arithmetic"}) == peak({"name": "dare"}) == 0


@pytest.mark.parametrize("method", ["ties", "model_stock"])
def test_what_looks_first_holds_each_tensor_as_it_is_stored(method: str) -> None:
    asked = {"name": "ties", "scope": "tensor"} if method == "ties" else {"name": method}
    assert peak(asked) == (TASKS + 2) * STORED
    assert peak(asked, output={"dtype": "F32"}) == (TASKS + 1) * STORED + FLOAT


def test_what_looks_at_matrices_holds_them_in_float_and_in_double() -> None:
    assert peak({"name": "tsv_m"}) == (TASKS + 2) * STORED + FLOAT * (TASKS + 2 + 2 * TASKS)


def test_what_is_trimmed_is_held_whole_with_its_answers() -> None:
    trimmed = peak({"name": "cat"})
    assert trimmed == (TASKS + 2) * STORED + FLOAT * (TASKS + 2 + 2 * TASKS)
    kept = peak({"name": "cat"}, treatments=[{"match": "*", "use": "keep"}])
    assert kept == (TASKS + 2) * STORED + FLOAT * (TASKS + 2)


def test_a_part_needs_what_its_own_shard_does() -> None:
    recipe, plan = planned({"name": "cat"}, output={"shard_bytes": STORED})
    whole, bias = (peaks.of_shard(recipe, shard) for shard in sorted(plan.shards, key=lambda shard: -shard.bytes_out))
    assert whole == plan.peak_memory_bytes
    assert STREAM_BYTES < bias < STREAM_BYTES + 100 * SHAPE[0]


def test_a_baseline_is_merged_by_its_own_method() -> None:
    recipe, plan = planned({"name": "cat"})
    assert peaks.of_baseline(recipe, plan.shards[0], "task_arithmetic") == STREAM_BYTES


def test_a_model_is_run_in_float_beside_what_was_read() -> None:
    _, plan = planned({"name": "average"})
    assert peaks.of_model(plan) == (4 + 2) * (prod(SHAPE) + SHAPE[0])
    _, plan = planned({"name": "average"}, output={"dtype": "F32"})
    assert peaks.of_model(plan) == 4 * (prod(SHAPE) + SHAPE[0])
    assert peaks.of_speed(plan) == 2 * peaks.of_model(plan)
    assert peaks.of_trial(plan) == peaks.of_model(plan) + plan.peak_memory_bytes
