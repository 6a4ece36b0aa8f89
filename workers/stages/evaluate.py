"""Evaluates one task: how well the base, its expert and the merged model do on its labeled samples."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from service.contract import artifacts
from service.contract.checkpoint import Checkpoint
from service.contract.errors import BadInput
from service.contract.parts import Done
from service.contract.plan import Plan
from service.contract.recipe import FeatureHead, Task, TaskEvaluation, canonical_sha256
from service.contract.samples import LABELS
from service.stores.objects import failures
from workers.exemplars import naming
from workers.forward import check_inputs, class_scores, load_model, pooled_features
from workers.tensors import TensorReader
from workers.version import ENGINE
from workers.work import Work

SCORE_LIMIT_BYTES = 1 << 20


def run(work: Work) -> Done:
    """Leave the task's accuracies: correct answers over samples, of base, expert and merged, with the task's own head.

    Raises:
        BadInput: samples, labels or head do not fit the model.
        InputChanged, StorageFailure, UnsupportedArchitecture.
    """
    with TensorReader(work.objects) as reader:
        trial = _Trial.open(work, reader)
        expert = _cached(work, trial.digest("expert"), lambda: trial.accuracy(trial.expert()))
        base = _cached(work, trial.digest("base"), lambda: trial.accuracy(trial.base()))
        merged = trial.accuracy(trial.merged())
    score = {
        "task": trial.task.name,
        "samples": trial.samples,
        "base": base,
        "expert": expert,
        "merged": merged,
        "retention": merged / expert if expert else None,
    }
    return Done(output=score)


@dataclass(frozen=True)
class _Trial:
    """One task's labeled samples, and the models to try on them."""

    work: Work
    plan: Plan
    row: TaskEvaluation
    task: Task
    checkpoint: Checkpoint
    inputs: Mapping[str, Tensor]
    labels: Tensor
    head: Mapping[str, Tensor]
    reader: TensorReader

    @classmethod
    def open(cls, work: Work, reader: TensorReader) -> _Trial:
        plan = work.plan()
        row = _rows(work)[work.part]
        task = next(task for task in work.recipe.tasks if task.name == row.task)
        base = reader.open(work.recipe.base, plan.inputs["base"])
        checkpoint = reader.open(task.checkpoint, plan.inputs[f"task:{task.name}"], base)
        labeled = reader.open(row.labeled, plan.inputs[f"labeled:{task.name}"])
        samples = reader.read(labeled, labeled.tensors)
        head: Mapping[str, Tensor] = {}
        if row.head:
            opened = reader.open(row.head.weight, plan.inputs[f"head:{task.name}"])
            head = reader.read(opened, opened.tensors)
        labels = samples.pop(LABELS).long()
        return cls(work, plan, row, task, checkpoint, samples, labels, head, reader)

    @property
    def samples(self) -> int:
        return len(self.labels)

    def digest(self, model: str) -> str:
        """Of everything that the accuracy of the base or the expert depends on."""
        names = [f"task:{self.task.name}", f"labeled:{self.task.name}", f"head:{self.task.name}"]
        names += ["base"] if model == "base" or self.checkpoint.adapter is not None else []
        files = [file for name in names for file in self.plan.inputs.get(name, ())]
        return canonical_sha256(
            {
                "engine": ENGINE,
                "model": model,
                "files": [[file.size, file.etag, file.version_id] for file in files],
                "head": self.row.head.model_dump(exclude={"weight"}) if self.row.head else None,
            }
        )

    def expert(self) -> dict[str, Tensor]:
        """The task's own weights."""
        return self.reader.read(self.checkpoint, self.checkpoint.tensors)

    def base(self) -> dict[str, Tensor]:
        """The base's weights, with the task's head."""
        opened = self.reader.open(self.work.recipe.base, self.plan.inputs["base"])
        return {**self._head(), **self.reader.read(opened, [name for name in opened.tensors if name in self._shared()])}

    def merged(self) -> dict[str, Tensor]:
        """The merged weights, with the task's head."""
        weights = self._head()
        for shard in self.plan.shards:
            opened = self.reader.open(self.plan.prefix + shard.file, ())
            weights |= self.reader.read(opened, [name for name in opened.tensors if name in self._shared()])
        return weights

    def _head_names(self) -> frozenset[str]:
        return frozenset(name for head in self.plan.heads if head.task == self.task.name for name in head.tensors)

    def _head(self) -> dict[str, Tensor]:
        return self.reader.read(self.checkpoint, sorted(self._head_names()))

    def _shared(self) -> frozenset[str]:
        return frozenset(self.checkpoint.tensors) - self._head_names()

    def accuracy(self, weights: Mapping[str, Tensor]) -> float:
        """The share of samples whose class the model finds."""
        self.work.watch.step(bytes_read=sum(tensor.nbytes for tensor in weights.values()))
        model = load_model(self.checkpoint.config or {}, weights, self.work.device)
        with naming(self.row.labeled):
            check_inputs(model, self.inputs)
        batch_size = self.work.recipe.evaluation.batch_size if self.work.recipe.evaluation else 64
        if self.row.head is None:
            scores = class_scores(model, self.inputs, batch_size)
        else:
            scores = _head_scores(model, self.inputs, batch_size, self.row.head, self.head)
        self._refuse_labels(scores.shape[1])
        if not torch.isfinite(scores).all():
            raise BadInput(f"the model gives NaN or infinity on the labeled samples of task {self.task.name!r}")
        return float((scores.argmax(dim=1) == self.labels).double().mean())

    def _refuse_labels(self, classes: int) -> None:
        low, high = int(self.labels.min()), int(self.labels.max())
        if low < 0 or high >= classes:
            raise BadInput(
                f"{self.row.labeled}: labels reach from {low} to {high}, but the head of task {self.task.name!r} has "
                f"{classes} classes, 0 to {classes - 1}"
            )


def _rows(work: Work) -> tuple[TaskEvaluation, ...]:
    return work.recipe.evaluation.tasks if work.recipe.evaluation else ()


def _head_scores(
    model: torch.nn.Module,
    inputs: Mapping[str, Tensor],
    batch_size: int,
    row: FeatureHead,
    head: Mapping[str, Tensor],
) -> Tensor:
    """Pooled features [n, d] times the head's rows [classes, d]; a positive factor on all scores changes no answer."""
    features = pooled_features(model, inputs, batch_size, row.pooling, row.normalize)
    weight = head["weight"].float()
    if features.shape[1] != weight.shape[1]:
        raise BadInput(
            f"{row.weight}: 'weight' takes {weight.shape[1]} features, but the model has {features.shape[1]}"
        )
    return features @ weight.T


def _cached(work: Work, digest: str, measure: Callable[[], float]) -> float:
    """A score that was measured before on the same bytes, or measured now and kept."""
    address = artifacts.cached_score(work.workspace, digest)
    with failures():
        if work.objects.exists(address):
            kept: dict[str, Any] = json.loads(work.objects.read_all(address, SCORE_LIMIT_BYTES))
            return float(kept["accuracy"])
    accuracy = measure()
    with failures():
        work.objects.put(address, json.dumps({"accuracy": accuracy}).encode(), "application/json")
    return accuracy
