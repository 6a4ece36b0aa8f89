"""How like its expert a merged model is on a task's exemplars: a figure to search by where there are no labels."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from safetensors.torch import load, save
from torch import Tensor, nn

from service.contract import artifacts
from service.contract.checkpoint import Checkpoint
from service.contract.recipe import Task, canonical_sha256
from service.stores.objects import ObjectMissing, failures
from workers.exemplars import naming
from workers.forward import check_inputs, pooled_features
from workers.loading import load_model
from workers.tensors import TensorReader
from workers.version import ENGINE
from workers.work import Work

BATCH_SIZE = 16
LIMIT_BYTES = 1 << 30
FEATURES = "features"


def likeness(merged: Tensor, expert: Tensor) -> float:
    """1 - sum |Z - Z_k| / sum |Z_k| of features ``[n, d]``: 1 for the expert itself; NaN where there is no figure.

    The L1 distance is the representation bias of Yang et al., Representation Surgery for Multi-Task Model Merging,
    ICML 2024, arXiv:2402.02705; the share makes tasks comparable.
    """
    size, distance = float(expert.abs().sum()), float((merged - expert).abs().sum())
    return 1 - distance / size if size and math.isfinite(distance) else math.nan


def likenesses(work: Work, reader: TensorReader, merged: Mapping[str, Tensor]) -> dict[str, float]:
    """The likeness of a merged model, whose tensors are at hand, to every task's expert.

    Raises:
        BadInput: exemplars do not fit the model.
        InputChanged, StorageFailure, UnsupportedArchitecture.
    """
    return {task.name: _Exemplified.open(work, reader, task).likeness(merged) for task in work.recipe.tasks}


@dataclass(frozen=True, eq=False)
class _Exemplified:
    """One task's expert and exemplars, opened and pinned."""

    work: Work
    task: Task
    reader: TensorReader
    base: Checkpoint
    checkpoint: Checkpoint
    inputs: Mapping[str, Tensor]

    @classmethod
    def open(cls, work: Work, reader: TensorReader, task: Task) -> _Exemplified:
        pinned = work.plan().inputs
        base = reader.open(work.recipe.base, pinned["base"])
        checkpoint = reader.open(task.checkpoint, pinned[f"task:{task.name}"], base)
        exemplars = reader.open(task.exemplars or "", pinned[f"exemplars:{task.name}"])
        return cls(work, task, reader, base, checkpoint, reader.read(exemplars, exemplars.tensors))

    def likeness(self, merged: Mapping[str, Tensor]) -> float:
        expert = self._expert_features()
        heads = self.work.plan().heads
        own = frozenset(name for head in heads if head.task == self.task.name for name in head.tensors)
        shared = self.checkpoint.tensors.keys() & merged.keys() - own
        weights = self.reader.read(self.checkpoint, sorted(own)) | {name: merged[name] for name in sorted(shared)}
        model = self._load(weights)
        return likeness(self._features(model), expert)

    def _expert_features(self) -> Tensor:
        """Those of the expert, which every trial needs: measured once, and kept by what they depend on."""
        objects, address = self.work.objects, artifacts.cached_features(self.work.workspace, self._digest())
        with failures():
            try:
                return load(objects.read_all(address, LIMIT_BYTES))[FEATURES]
            except ObjectMissing:
                pass
        weights = self.reader.read(self.checkpoint, self.checkpoint.tensors)
        model = self._load(weights)
        with naming(self.task.exemplars or ""):
            check_inputs(model, self.inputs)
        found = self._features(model)
        with failures():
            objects.put(address, save({FEATURES: found.contiguous()}), "application/octet-stream")
        return found

    def _load(self, weights: Mapping[str, Tensor]) -> nn.Module:
        self.work.watch.step(bytes_read=sum(tensor.nbytes for tensor in weights.values()))
        return load_model(self.checkpoint.config or {}, weights, self.work.device)

    def _features(self, model: nn.Module) -> Tensor:
        return pooled_features(model, self.inputs, BATCH_SIZE, "mean", normalize=False)

    def _digest(self) -> str:
        pinned = self.work.plan().inputs
        names = [f"task:{self.task.name}", f"exemplars:{self.task.name}"]
        names += ["base"] if self.checkpoint.adapter is not None else []
        files = [[file.size, file.etag, file.version_id] for name in names for file in pinned[name]]
        return canonical_sha256({"engine": ENGINE, "files": files, "config": self.checkpoint.config})
