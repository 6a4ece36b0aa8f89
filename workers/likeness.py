"""How like its expert a merged model is on a task's exemplars: figures to search by where there are no labels."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from service.contract import artifacts
from service.contract.checkpoint import Checkpoint
from service.contract.errors import BadInput
from service.contract.evaluation import FeatureHead
from service.contract.recipe import Task, canonical_sha256
from service.contract.search import Figure
from service.stores.objects import ObjectMissing, failures
from workers.exemplars import naming
from workers.forward import check_inputs, class_scores, pooled_features
from workers.loading import load_model
from workers.metrics.classification import head_scores
from workers.tensors import TensorReader
from workers.version import ENGINE
from workers.work import Work

BATCH_SIZE = 16
LIMIT_BYTES = 1 << 30
SEEN = "seen"


def feature_likeness(merged: Tensor, expert: Tensor) -> float:
    """1 - sum |Z - Z_k| / sum |Z_k| of features ``[n, d]``: 1 for the expert itself; NaN where there is no figure.

    The L1 distance is the representation bias of Yang et al., Representation Surgery for Multi-Task Model Merging,
    ICML 2024, arXiv:2402.02705; the share makes tasks comparable.
    """
    size, distance = float(expert.abs().sum()), float((merged - expert).abs().sum())
    return 1 - distance / size if size and math.isfinite(distance) else math.nan


def prediction_likeness(merged: Tensor, expert: Tensor) -> float:
    """The mean over samples of sum_c min(p, p_k), of scores ``[n, classes]``: 1 for the expert itself; NaN as above.

    A merged model beside its experts as a student beside teachers, Hinton et al., Distilling the Knowledge in a Neural
    Network, 2015, arXiv:1503.02531; nobody is trained here. By total variation in place of their divergence, which one
    sample that the merged model is sure about, and wrong, or a head of the wrong temperature blows up.
    """
    theirs, ours = expert.double().softmax(-1), merged.double().softmax(-1)
    return float(torch.minimum(theirs, ours).sum(-1).mean())


def likenesses(work: Work, reader: TensorReader, merged: Mapping[str, Tensor], figure: Figure) -> dict[str, float]:
    """The likeness of a merged model, whose tensors are at hand, to every task's expert.

    Raises:
        BadInput: exemplars, or a head of features, do not fit the model.
        InputChanged, StorageFailure, UnsupportedArchitecture.
    """
    aspect = ASPECTS[figure]
    return {task.name: _Exemplified.open(work, reader, task, aspect).likeness(merged) for task in work.recipe.tasks}


@dataclass(frozen=True)
class Aspect:
    """What is looked at of a model that was given exemplars, ``[n, ...]``, and how like the expert's another's is."""

    name: str
    look: Callable[[_Exemplified, nn.Module], Tensor]
    like: Callable[[Tensor, Tensor], float]


@dataclass(frozen=True, eq=False)
class _Exemplified:
    """One task's expert and exemplars, opened and pinned, and what is looked at."""

    work: Work
    task: Task
    reader: TensorReader
    base: Checkpoint
    checkpoint: Checkpoint
    inputs: Mapping[str, Tensor]
    aspect: Aspect

    @classmethod
    def open(cls, work: Work, reader: TensorReader, task: Task, aspect: Aspect) -> _Exemplified:
        pinned = work.plan().inputs
        base = reader.open(work.recipe.base, pinned["base"])
        checkpoint = reader.open(task.checkpoint, pinned[f"task:{task.name}"], base)
        exemplars = reader.open(task.exemplars or "", pinned[f"exemplars:{task.name}"])
        return cls(work, task, reader, base, checkpoint, reader.read(exemplars, exemplars.tensors), aspect)

    @property
    def head(self) -> FeatureHead | None:
        """The head of features that an evaluation names for the task; without one, its checkpoint's own counts."""
        row = self.work.recipe.evaluation.row(self.task.name) if self.work.recipe.evaluation else None
        return row.head if row is not None else None

    def likeness(self, merged: Mapping[str, Tensor]) -> float:
        expert = self._seen_of_expert()
        heads = self.work.plan().heads
        own = frozenset(name for head in heads if head.task == self.task.name for name in head.tensors)
        shared = self.checkpoint.tensors.keys() & merged.keys() - own
        weights = self.reader.read(self.checkpoint, sorted(own)) | {name: merged[name] for name in sorted(shared)}
        model = self._load(weights)
        return self.aspect.like(self.aspect.look(self, model), expert)

    def _seen_of_expert(self) -> Tensor:
        """What is seen of the expert, which every trial needs: looked at once, and kept by what it depends on."""
        objects, address = self.work.objects, artifacts.cached_features(self.work.workspace, self._digest())
        with failures():
            try:
                return load(objects.read_all(address, LIMIT_BYTES))[SEEN]
            except ObjectMissing:
                pass
        weights = self.reader.read(self.checkpoint, self.checkpoint.tensors)
        model = self._load(weights)
        with naming(self.task.exemplars or ""):
            check_inputs(model, self.inputs)
        found = self.aspect.look(self, model)
        with failures():
            objects.put(address, save({SEEN: found.contiguous()}), "application/octet-stream")
        return found

    def _load(self, weights: Mapping[str, Tensor]) -> nn.Module:
        self.work.watch.step(bytes_read=sum(tensor.nbytes for tensor in weights.values()))
        return load_model(self.checkpoint.config or {}, weights, self.work.device)

    def features(self, model: nn.Module) -> Tensor:
        """The model's pooled features ``[n, d]``."""
        return pooled_features(model, self.inputs, BATCH_SIZE, "mean", normalize=False)

    def scores(self, model: nn.Module) -> Tensor:
        """The logits ``[n, classes]``, by the task's head. Raises BadInput where there is but one."""
        if self.head is None:
            scores = class_scores(model, self.inputs, BATCH_SIZE)
        else:
            opened = self.reader.open(self.head.weight, self.work.plan().inputs[f"head:{self.task.name}"])
            tensors = self.reader.read(opened, opened.tensors)
            scores = head_scores(model, self.inputs, BATCH_SIZE, self.head, tensors)
        if scores.shape[1] < 2:
            raise BadInput(f"the head of task {self.task.name!r} gives one number, and predicts no classes to compare")
        return scores

    def _digest(self) -> str:
        pinned = self.work.plan().inputs
        names = [f"task:{self.task.name}", f"exemplars:{self.task.name}", f"head:{self.task.name}"]
        names += ["base"] if self.checkpoint.adapter is not None else []
        files = [[file.size, file.etag, file.version_id] for name in names for file in pinned.get(name, ())]
        head = self.head.model_dump(exclude={"weight"}) if self.head is not None else None
        config = self.checkpoint.config
        return canonical_sha256(
            {"engine": ENGINE, "seen": self.aspect.name, "files": files, "config": config, "head": head}
        )


ASPECTS: Mapping[Figure, Aspect] = {
    "likeness": Aspect("features", _Exemplified.features, feature_likeness),
    "prediction_likeness": Aspect("scores", _Exemplified.scores, prediction_likeness),
}
