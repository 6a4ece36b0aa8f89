"""A shard's bytes are the same whatever is read at once, and however much is read ahead."""

from __future__ import annotations

import threading
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from service.contract.errors import BadTensor, InputChanged
from service.contract.recipe import Recipe
from service.contract.stages import Stage
from service.stores.objects import failures
from tests.workers.stage_runs import Run
from workers import merging, sources, tensors
from workers.merging import merge_unread
from workers.tensors import TensorReader

merge_stage = import_module("workers.stages.merge")

SIZES = {"embedding": (3000, 100), "scale": (100,), "tiny": (3,), "head": (700, 301), "last": (64, 64)}


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    """A base with a counter, and three tasks."""
    generator = torch.Generator().manual_seed(5)
    base = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in SIZES.items()}
    counter = torch.arange(90_000)
    save(tmp_path / "base.safetensors", {**base, "counter": counter})
    for task in "abc":
        moved = {name: t + 0.1 * torch.randn(t.shape, generator=generator).bfloat16() for name, t in base.items()}
        save(tmp_path / f"{task}.safetensors", {**moved, "counter": counter})
    rows = [{"name": task, "checkpoint": f"file://{tmp_path}/{task}.safetensors"} for task in "abc"]
    return {
        "base": f"file://{tmp_path}/base.safetensors",
        "tasks": rows,
        "output": {"prefix": f"file://{tmp_path}/result/", "overwrite": True},
    }


def save(path: Path, tensors: dict[str, Tensor]) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def merged(folder: Path, recipe: dict[str, Any], method: dict[str, Any]) -> tuple[bytes, Run]:
    run = Run(folder, Recipe.model_validate({**recipe, "method": method}))
    run.go()
    return (folder / "result" / "model.safetensors").read_bytes(), run


METHODS = [
    {"name": "task_arithmetic"},
    {"name": "average"},
    {"name": "dare", "density": 0.3},
    {"name": "ties", "density": 0.3},
]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method["name"])
def test_the_same_bytes_in_parts(
    recipe: dict[str, Any], tmp_path: Path, method: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = merged(tmp_path, recipe, method)
    monkeypatch.setattr(sources, "GROUP_BYTES", 200_000)
    monkeypatch.setattr(sources, "READ_AHEAD_BYTES", 500_000)
    monkeypatch.setattr(sources, "ALIGNED", 64)
    monkeypatch.setattr(tensors, "SPAN_BYTES", 30_000)
    parts, run = merged(tmp_path, recipe, method)
    assert parts == whole
    assert len(run.done[Stage.MERGE]) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("method", METHODS[:3], ids=lambda method: method["name"])
def test_the_same_bytes_read_in_spans_and_piece_by_piece(
    recipe: dict[str, Any],
    tmp_path: Path,
    method: dict[str, Any],
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for file in tmp_path.glob("*.safetensors"):
        save(file, {name: t.to(dtype) if t.is_floating_point() else t for name, t in load_file(file).items()})
    monkeypatch.setattr(sources, "SMALL_BYTES", 1 << 40)
    in_spans, _ = merged(tmp_path, recipe, method)
    monkeypatch.setattr(sources, "SMALL_BYTES", 1_000)
    monkeypatch.setattr(sources, "UNREAD_BYTES", 700_000)
    monkeypatch.setattr(sources, "ALIGNED", 64)
    monkeypatch.setattr(tensors, "OPEN_FILES", 2)  # fewer than one tensor takes
    piece_by_piece, run = merged(tmp_path, recipe, method)
    assert piece_by_piece == in_spans
    read = 4 * sum(t.nbytes for t in load_file(tmp_path / "base.safetensors").values()) - 3 * 90_000 * 8
    assert run.bytes_read[Stage.MERGE] == read


LAYERS = {f"layers.{layer}.{name}.weight": (60, 50) for layer in range(12) for name in ("key", "value")}
NORMS = {f"layers.{layer}.norm.{name}": (50,) for layer in range(12) for name in ("weight", "bias")}


@pytest.mark.parametrize(
    "method",
    [{"name": "cat", "scaling": 0.7}, {"name": "cat", "then": {"name": "ties"}}],
    ids=["cat", "cat, ties"],
)
def test_several_tensors_at_once_leave_the_bytes_of_one_after_the_other(
    tmp_path: Path, method: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(3)
    shapes = {"embeddings.weight": (2000, 50), **LAYERS, **NORMS, "last.weight": (700, 301)}
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save(tmp_path / "base.safetensors", base)
    for task in "abc":
        moved = {name: t + 0.1 * torch.randn(t.shape, generator=generator) for name, t in base.items()}
        save(tmp_path / f"{task}.safetensors", moved)
    tasks = [{"name": task, "checkpoint": f"file://{tmp_path}/{task}.safetensors"} for task in "abc"]
    output = {"prefix": f"file://{tmp_path}/result/", "overwrite": True}
    asked = {"base": f"file://{tmp_path}/base.safetensors", "tasks": tasks, "output": output}
    before, workers = torch.get_num_threads(), []
    merge = merging.merge_tensor

    def watched(*args: Any, **options: Any) -> merging.Merged:
        workers.append(threading.current_thread())
        return merge(*args, **options)

    monkeypatch.setattr(merge_stage, "merge_tensor", watched)
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            whole, _ = merged(tmp_path, asked, method)
            beside = [path.read_bytes() for path in sorted((tmp_path / "result").rglob("removed-*"))]
            found.append((whole, beside))
    finally:
        torch.set_num_threads(before)
    assert found[1] == found[0]
    assert found[2] == found[0]
    assert len(set(workers)) > 2


def test_a_file_that_changes_before_its_entries_are_read_is_found_out(recipe: dict[str, Any], tmp_path: Path) -> None:
    asked = Recipe.model_validate({**recipe, "method": {"name": "task_arithmetic"}})
    run = Run(tmp_path, asked)
    run.go()
    work = run.work(Stage.MERGE, 0)
    plan = work.plan()
    with TensorReader(work.objects) as reader:
        found = sources.Sources.open(work, plan, reader).read(work, plan.shards[0])
        unread = next(each for each in found if each.unread)
        with (tmp_path / "a.safetensors").open("r+b") as file:
            file.seek(-1, 2)
            file.write(b"!")
        with pytest.raises(InputChanged, match=r"a\.safetensors has changed"), failures():
            merge_unread(unread.plan, asked, unread.unread)


def test_a_bad_entry_in_the_last_part_names_the_tensor(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "GROUP_BYTES", 100_000)
    monkeypatch.setattr(sources, "ALIGNED", 64)
    bad = {name: torch.zeros(shape).bfloat16() for name, shape in SIZES.items()}
    bad["embedding"][-1, -1] = torch.inf
    save(tmp_path / "b.safetensors", {**bad, "counter": torch.arange(90_000)})
    with pytest.raises(BadTensor, match="'embedding'") as raised:
        merged(tmp_path, recipe, {"name": "task_arithmetic"})
    assert "'b'" in str(raised.value)
    assert not list((tmp_path / "result").rglob("model.safetensors"))
