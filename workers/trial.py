"""One task's labeled samples, and the models to try on them: the base, the expert and whatever was merged."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from service.contract import artifacts
from service.contract.checkpoint import Checkpoint
from service.contract.evaluation import Evaluation, TaskEvaluation
from service.contract.recipe import Task
from workers.bench import Bench
from workers.loading import load_model
from workers.measuring import Samples
from workers.tensors import TensorReader
from workers.work import Work

MAIN_INPUTS = ("input_ids", "pixel_values", "input_features", "input_values", "inputs_embeds")


@dataclass(frozen=True, eq=False)
class Trial(Bench):
    """What one task's models are measured with: its expert's checkpoint, the base and whatever was merged."""

    base: Checkpoint
    task: Task

    @classmethod
    def open(cls, work: Work, reader: TensorReader, evaluation: Evaluation, row: TaskEvaluation) -> Trial:
        """Raises InputChanged, InputMissing, StorageFailure."""
        plan = work.plan()
        task = next(task for task in work.recipe.tasks if task.name == row.task)
        base = reader.open(work.recipe.base, plan.inputs["base"])
        checkpoint = reader.open(task.checkpoint, plan.inputs[f"task:{task.name}"], base)
        return cls(work, plan, evaluation, row, base, checkpoint, reader, task)

    def digest(self, model: str) -> str:
        """Of everything that the scores of the base or the expert depend on."""
        needs_base = model == "base" or self.checkpoint.adapter is not None
        return self.digest_of(model, [f"task:{self.task.name}", *(["base"] if needs_base else [])])

    def load(self, model: str) -> nn.Module:
        """The base, the expert, the merged model or a baseline, with the task's head. Raises BadInput."""
        weights = self._weights(model)
        self.work.watch.step(bytes_read=sum(tensor.nbytes for tensor in weights.values()))
        return load_model(self.checkpoint.config or {}, weights, self.work.device)

    def load_merged(self, merged: Mapping[str, Tensor]) -> nn.Module:
        """A merged model whose tensors are at hand, with the task's head. Raises BadInput."""
        head = self.reader.read(self.checkpoint, sorted(self._head_names))
        shared = {name: tensor for name, tensor in merged.items() if name in self._shared}
        return load_model(self.checkpoint.config or {}, head | shared, self.work.device)

    def _weights(self, model: str) -> dict[str, Tensor]:
        if model == "expert":
            return self.reader.read(self.checkpoint, self.checkpoint.tensors)
        head = self.reader.read(self.checkpoint, sorted(self._head_names))
        if model == "base":
            return head | self.reader.read(self.base, [name for name in self.base.tensors if name in self._shared])
        prefix = self.plan.prefix
        if model != "merged":
            prefix = artifacts.baseline(self.work.workspace, self.work.claim.job_id, model)
        return head | self._merged(prefix)

    def _merged(self, prefix: str) -> dict[str, Tensor]:
        weights: dict[str, Tensor] = {}
        for shard in self.plan.shards:
            opened = self.reader.open(prefix + shard.file, ())
            weights |= self.reader.read(opened, [name for name in opened.tensors if name in self._shared])
        return weights

    @property
    def _head_names(self) -> frozenset[str]:
        return frozenset(name for head in self.plan.heads if head.task == self.task.name for name in head.tensors)

    @property
    def _shared(self) -> frozenset[str]:
        return frozenset(self.checkpoint.tensors) - self._head_names


def row_digests(samples: Samples) -> set[bytes]:
    """A digest of each sample's main input ``[n, ...]``, without its padding; none where there is no such input."""
    main = next((name for name in samples if name.rpartition(".")[2] in MAIN_INPUTS), None)
    if main is None:
        return set()
    side, dot, _ = main.rpartition(".")
    masks = samples.get(f"{side}{dot}attention_mask")
    rows = samples[main]
    kept = rows if masks is None or masks.shape != rows.shape else map(_attended, rows, masks)
    return {hashlib.sha256(row.contiguous().numpy().tobytes()).digest() for row in kept}


def _attended(row: Tensor, mask: Tensor) -> Tensor:
    return row[mask.bool()].long()
