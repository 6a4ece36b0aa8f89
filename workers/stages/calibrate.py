"""Calibrates one task: sees its parameters' inputs once, and how large its task vector's entries are."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from service.contract import artifacts
from service.contract.adapter import ADAPTER_CONFIG
from service.contract.checkpoint import Checkpoint
from service.contract.errors import BadTensor
from service.contract.methods import Cat
from service.contract.notices import Notice
from service.contract.parts import Done
from service.contract.plan import Plan
from service.contract.recipe import Task, canonical_sha256
from service.stores.objects import failures
from workers.exemplars import naming
from workers.forward import check_inputs, watch_inputs
from workers.loading import load_model
from workers.machine import allow_tf32
from workers.skeleton import read_skeleton
from workers.statistics import Statistic
from workers.statistics_file import StatisticsFile, write_statistics
from workers.streaming import bytes_in_memory, load_streamed
from workers.survey import as_json, survey
from workers.tensors import TensorReader, batches
from workers.version import ENGINE
from workers.work import Work
from workers.writing import write_artifact

BATCH_SIZE = 16
BATCH_BYTES = 64 << 20


def run(work: Work) -> Done:
    """Leave the addresses of what later stages need to know about the task: its statistics, a survey, or both.

    Statistics are the recipe's own file, one in the cache, or one made now.

    Raises:
        BadInput: the exemplars or the statistics do not fit the model.
        InputChanged, StorageFailure, UnsupportedArchitecture.
    """
    allow_tf32(work.recipe.allow_tf32)
    plan = work.plan()
    task = work.recipe.tasks[work.part]
    output: dict[str, Any] = {}
    warnings: tuple[str, ...] = ()
    with TensorReader(work.objects) as reader:
        if plan.wanted() and work.recipe.has_features:
            output, warnings = _statistics(work, plan, task, reader)
        if work.recipe.method.surveys and work.recipe.search is None:  # else trials look for themselves
            output["survey"] = survey_task(work, plan, task, reader)
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
    without = work.recipe.method.combining.without or "kept untrimmed"
    shown = ", ".join(sorted(unseen)[:8]) + (" ..." if len(unseen) > 8 else "")
    return (Notice("no_statistics", task=task.name, count=len(unseen), treated=without, parameters=shown),)


def survey_task(work: Work, plan: Plan, task: Task, reader: TensorReader) -> str:
    """Where the largest entries of the whole task vector end; the address of what was found."""
    cuts = survey(lambda: _task_vector(work, plan, task, reader), work.recipe.method.surveys)
    address = artifacts.survey(work.workspace, work.claim.job_id, work.recipe.tasks.index(task))
    write_artifact(work.objects, "", address, as_json(cuts).encode())
    return address


def _task_vector(work: Work, plan: Plan, task: Task, reader: TensorReader) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Each merged tensor's name, the base's and the task's, in the order of the plan, a batch of them in memory."""
    base = reader.open(work.recipe.base, plan.inputs["base"])
    checkpoint = reader.open(task.checkpoint, plan.inputs[f"task:{task.name}"], base)
    merged = [tensor for shard in plan.shards for tensor in shard.tensors if tensor.source == "merged"]
    for names in batches([(tensor.name, 2 * tensor.nbytes_in) for tensor in merged], BATCH_BYTES):
        before, after = reader.start(base, names), reader.start(checkpoint, names)
        start, tuned = before.wait(), after.wait()
        for name in names:
            yield name, start[name], tuned[name]
        work.watch.step(bytes_read=sum(start[name].nbytes + tuned[name].nbytes for name in names))


def _digest(work: Work, plan: Plan, task: Task) -> str:
    """Of everything that the statistics depend on: two jobs with the same need them only once."""
    pinned = [*plan.inputs[f"task:{task.name}"], *plan.inputs[f"exemplars:{task.name}"]]
    scaling = _scaling(work)
    is_adapter = any(file.address.endswith(ADAPTER_CONFIG) for file in pinned)
    if scaling is not None or is_adapter:
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
    base = reader.open(work.recipe.base, plan.inputs["base"])
    checkpoint = reader.open(task.checkpoint, plan.inputs[f"task:{task.name}"], base)
    exemplars = reader.open(task.exemplars or "", plan.inputs[f"exemplars:{task.name}"])
    inputs = reader.read(exemplars, exemplars.tensors)
    work.watch.step(bytes_read=exemplars.nbytes)
    weights = _Weights.of(work, plan, task, reader, checkpoint, base)
    model = _model(weights)
    with naming(task.exemplars or ""):
        check_inputs(model, inputs)
    skeleton = read_skeleton(checkpoint.config or {}, weights.shapes)
    statistics = watch_inputs(model, skeleton, inputs, BATCH_SIZE, plan.wanted(), lambda _done, _of: work.watch.step())
    _refuse_overflow(task, statistics)
    folder, _, name = address.rpartition("/")
    written = write_statistics(work.objects, folder + "/", name, statistics)
    work.watch.step(bytes_written=written.size)


def _model(weights: _Weights) -> nn.Module:
    """The task's model, whole; or block by block, where the whole of it takes more memory than it may."""
    config, work = weights.checkpoint.config or {}, weights.work
    limit = work.calibration_bytes
    if limit is None or bytes_in_memory(weights.shapes.values()) <= limit:
        return load_model(config, weights.read(weights.shapes), work.device)
    return load_streamed(config, weights.shapes, weights.read, work.device, limit)


@dataclass(frozen=True)
class _Weights:
    """Where a task's weights come from: its own, W0 + T_k, or W0 + scaling * T_k if the method takes features there."""

    work: Work
    task: Task
    reader: TensorReader
    checkpoint: Checkpoint
    base: Checkpoint
    merged: frozenset[str]

    @classmethod
    def of(
        cls, work: Work, plan: Plan, task: Task, reader: TensorReader, checkpoint: Checkpoint, base: Checkpoint
    ) -> _Weights:
        merged = (tensor.name for shard in plan.shards for tensor in shard.tensors if tensor.source == "merged")
        return cls(work, task, reader, checkpoint, base, frozenset(merged))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the model. An adapter's is its base's model: a head that only the adapter has stays out."""
        known = self.checkpoint if self.checkpoint.adapter is None else self.base
        return {name: info.shape for name, info in known.tensors.items()}

    def read(self, names: Collection[str]) -> Mapping[str, Tensor]:
        """These weights. Raises BadTensor where one holds NaN or infinity."""
        shapes = self.shapes
        own = [name for name in names if self.checkpoint.tensors[name].shape == shapes[name]]
        weights = self.reader.read(self.checkpoint, own)
        weights |= self.reader.read(self.base, set(names).difference(own))
        self.work.watch.step(bytes_read=sum(tensor.nbytes for tensor in weights.values()))
        shared = [name for name in weights if name in self.merged]
        _refuse_non_finite(self.task, weights, shared)
        scaling = _scaling(self.work)
        if scaling is None:
            return weights
        for name, before in self.reader.read(self.base, shared).items():
            weights[name] = before.float().lerp(weights[name].float(), scaling)
        return weights


def _refuse_non_finite(task: Task, weights: Mapping[str, Tensor], merged: Iterable[str]) -> None:
    """NaN spreads through a forward pass: it is named where it is, and not where it shows."""
    for name in merged:
        if not torch.isfinite(weights[name]).all():
            raise BadTensor(
                Notice("task_not_finite", task=task.name, parameter=name, checkpoint=task.checkpoint), tensor=name
            )


def _refuse_overflow(task: Task, statistics: Mapping[str, Statistic]) -> None:
    for name, statistic in statistics.items():
        if not torch.isfinite(statistic.held).all():
            raise BadTensor(
                f"{task.exemplars}: sent through task {task.name!r}, these samples give NaN or infinity at {name!r}",
                tensor=name,
            )
