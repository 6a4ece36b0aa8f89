"""Calibrates one task: sees its parameters' inputs once, and how large its task vector's entries are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from service.contract import artifacts
from service.contract.errors import BadTensor
from service.contract.methods import Cat
from service.contract.parts import Done
from service.contract.plan import Plan
from service.contract.recipe import Task, canonical_sha256
from service.stores.objects import failures
from workers.exemplars import naming
from workers.forward import check_inputs, load_model, watch_inputs
from workers.skeleton import read_skeleton
from workers.statistics import Statistic
from workers.statistics_file import StatisticsFile, write_statistics
from workers.survey import as_json, survey
from workers.tensors import TensorReader, batches, write_artifact
from workers.version import ENGINE
from workers.work import Work

BATCH_SIZE = 16
BATCH_BYTES = 64 << 20


def run(work: Work) -> Done:
    """Leave the addresses of what later stages need to know about the task: its statistics, a survey, or both.

    Statistics are the recipe's own file, one in the cache, or one made now.

    Raises:
        BadInput: the exemplars or the statistics do not fit the model.
        InputChanged, StorageFailure, UnsupportedArchitecture.
    """
    plan = work.plan()
    task = work.recipe.tasks[work.part]
    output: dict[str, Any] = {}
    warnings: tuple[str, ...] = ()
    with TensorReader(work.objects) as reader:
        if plan.wanted() and work.recipe.has_features:
            output, warnings = _statistics(work, plan, task, reader)
        if work.recipe.method.surveys:
            output["survey"] = _survey(work, plan, task, reader)
    return Done(output=output, warnings=warnings)


def _statistics(work: Work, plan: Plan, task: Task, reader: TensorReader) -> tuple[dict[str, Any], tuple[str, ...]]:
    address, is_cached = task.statistics or "", False
    if task.statistics:
        file = StatisticsFile(reader, address, plan.inputs[f"statistics:{task.name}"])
    else:
        address = artifacts.cached_statistics(work.workspace, _digest(work, plan, task))
        with failures():
            is_cached = work.objects.exists(address)
        if not is_cached:
            _make(work, plan, task, reader, address)
        file = StatisticsFile(reader, address)
    unseen = plan.wanted() - file.parameters
    return {"statistics": address, "cached": is_cached}, _warn(work, task, unseen)


def _warn(work: Work, task: Task, unseen: frozenset[str]) -> tuple[str, ...]:
    if not unseen:
        return ()
    without = "averaged" if work.recipe.method.needs_statistics else "kept untrimmed"
    shown = ", ".join(sorted(unseen)[:8]) + (" ..." if len(unseen) > 8 else "")
    return (f"{task.name}: no statistics for {len(unseen)} parameters, which are {without}: {shown}",)


def _survey(work: Work, plan: Plan, task: Task, reader: TensorReader) -> str:
    """Where the largest entries of the whole task vector end; the address of what was found."""
    cuts = survey(lambda: _task_vector(work, plan, task, reader), work.recipe.method.surveys)
    address = artifacts.survey(work.workspace, work.claim.job_id, work.part)
    write_artifact(work.objects, "", address, as_json(cuts).encode())
    return address


def _task_vector(work: Work, plan: Plan, task: Task, reader: TensorReader) -> Iterator[tuple[str, Tensor]]:
    """The task vector's tensors by name, in the order of the plan, a batch of them in memory."""
    base = reader.open(work.recipe.base, plan.inputs["base"])
    checkpoint = reader.open(task.checkpoint, plan.inputs[f"task:{task.name}"])
    merged = [tensor for shard in plan.shards for tensor in shard.tensors if tensor.source == "merged"]
    for names in batches([(tensor.name, 2 * tensor.nbytes_in) for tensor in merged], BATCH_BYTES):
        before, after = reader.start(base, names), reader.start(checkpoint, names)
        start, tuned = before.wait(), after.wait()
        for name in names:
            compute = torch.promote_types(start[name].dtype, torch.float32)
            yield name, tuned[name].to(work.device, compute) - start[name].to(work.device, compute)
        work.watch.step(bytes_read=sum(start[name].nbytes + tuned[name].nbytes for name in names))


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
    _refuse_non_finite(plan, task, weights)
    config = checkpoint.config or {}
    model = load_model(config, weights, work.device)
    with naming(task.exemplars or ""):
        check_inputs(model, inputs)
    skeleton = read_skeleton(config, {name: info.shape for name, info in checkpoint.tensors.items()})
    statistics = watch_inputs(model, skeleton, inputs, BATCH_SIZE, plan.wanted(), lambda _done, _of: work.watch.step())
    _refuse_overflow(task, statistics)
    folder, _, name = address.rpartition("/")
    written = write_statistics(work.objects, folder + "/", name, statistics)
    work.watch.step(bytes_written=written.size)


def _refuse_non_finite(plan: Plan, task: Task, weights: Mapping[str, Tensor]) -> None:
    """NaN spreads through a forward pass: it is named where it is, and not where it shows."""
    for shard in plan.shards:
        for tensor in shard.tensors:
            if tensor.source == "merged" and not torch.isfinite(weights[tensor.name]).all():
                raise BadTensor(
                    f"task {task.name!r} holds NaN or infinity in {tensor.name!r} ({task.checkpoint}); merge finite "
                    "checkpoints",
                    tensor=tensor.name,
                )


def _refuse_overflow(task: Task, statistics: Mapping[str, Statistic]) -> None:
    for name, statistic in statistics.items():
        if not torch.isfinite(statistic.held).all():
            raise BadTensor(
                f"{task.exemplars}: sent through task {task.name!r}, these samples give NaN or infinity at {name!r}",
                tensor=name,
            )


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
