"""Calibrates one task: sends its exemplars through its model once, and keeps what its parameters' inputs look like."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from service.contract import artifacts
from service.contract.methods import Cat
from service.contract.parts import Done
from service.contract.plan import Plan
from service.contract.recipe import Task, canonical_sha256
from service.stores.objects import failures
from workers.forward import check_inputs, load_model, watch_inputs
from workers.skeleton import read_skeleton
from workers.statistics_file import StatisticsFile, write_statistics
from workers.tensors import TensorReader
from workers.version import ENGINE
from workers.work import Work

BATCH_SIZE = 16


def run(work: Work) -> Done:
    """Leave the address of the task's statistics: the recipe's own file, one in the cache, or one made now.

    Raises:
        BadInput: the exemplars or the statistics do not fit the model.
        InputChanged, StorageFailure, UnsupportedArchitecture.
    """
    plan = work.plan()
    task = work.recipe.tasks[work.part]
    with TensorReader(work.objects) as reader:
        if task.statistics:
            return _given(plan, task, reader)
        address = artifacts.cached_statistics(work.workspace, _digest(work, plan, task))
        with failures():
            is_cached = work.objects.exists(address)
        if not is_cached:
            _make(work, plan, task, reader, address)
        unseen = plan.wanted() - StatisticsFile(reader, address).parameters
    return Done(output={"statistics": address, "cached": is_cached}, warnings=_warn(task, unseen))


def _given(plan: Plan, task: Task, reader: TensorReader) -> Done:
    address = task.statistics or ""
    file = StatisticsFile(reader, address, plan.inputs[f"statistics:{task.name}"])
    return Done(output={"statistics": address, "cached": False}, warnings=_warn(task, plan.wanted() - file.parameters))


def _warn(task: Task, unseen: frozenset[str]) -> tuple[str, ...]:
    if not unseen:
        return ()
    shown = ", ".join(sorted(unseen)[:8]) + (" ..." if len(unseen) > 8 else "")
    return (f"{task.name}: no statistics for {len(unseen)} parameters, which are kept untrimmed: {shown}",)


def _digest(work: Work, plan: Plan, task: Task) -> str:
    """Of everything that the statistics depend on: two jobs with the same need them only once."""
    pinned = [*plan.inputs[f"task:{task.name}"], *plan.inputs[f"exemplars:{task.name}"]]
    scaling = _scaling(work)
    if scaling is not None:
        pinned += plan.inputs["base"]
    return canonical_sha256(
        {
            "engine": ENGINE,
            "files": [[file.size, file.etag, file.version_id] for file in pinned],
            "wanted": sorted(plan.wanted()),
            "scaling": scaling,
        }
    )


def _scaling(work: Work) -> float | None:
    """The scaling at which features are taken, where they are not taken at the task's own weights."""
    method = work.recipe.method
    return method.scaling if isinstance(method, Cat) and method.features_at == "scaled" else None


def _make(work: Work, plan: Plan, task: Task, reader: TensorReader, address: str) -> None:
    checkpoint = reader.open(task.checkpoint, plan.inputs[f"task:{task.name}"])
    exemplars = reader.open(task.exemplars or "", plan.inputs[f"exemplars:{task.name}"])
    inputs = reader.read(exemplars, exemplars.tensors)
    weights = _weights(work, plan, task, reader)
    work.watch.step(bytes_read=checkpoint.nbytes + exemplars.nbytes)
    config = checkpoint.config or {}
    model = load_model(config, weights, work.device)
    check_inputs(model, inputs)
    skeleton = read_skeleton(config, {name: info.shape for name, info in checkpoint.tensors.items()})
    statistics = watch_inputs(model, skeleton, inputs, BATCH_SIZE, plan.wanted(), lambda _done, _of: work.watch.step())
    folder, _, name = address.rpartition("/")
    written = write_statistics(work.objects, folder + "/", name, statistics)
    work.watch.step(bytes_written=written.size)


def _weights(work: Work, plan: Plan, task: Task, reader: TensorReader) -> Mapping[str, Tensor]:
    """The task's own weights, W0 + T_k; or W0 + scaling * T_k where the method takes features there."""
    checkpoint = reader.open(task.checkpoint, plan.inputs[f"task:{task.name}"])
    weights = reader.read(checkpoint, checkpoint.tensors)
    scaling = _scaling(work)
    if scaling is None:
        return weights
    base = reader.open(work.recipe.base, plan.inputs["base"])
    shared = [tensor.name for shard in plan.shards for tensor in shard.tensors if tensor.source == "merged"]
    for name, before in reader.read(base, shared).items():
        weights[name] = before.float().lerp(weights[name].float(), scaling)
    return weights
