"""One task's labeled samples, and the models to try on them: the base, the expert and whatever was merged."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from service.contract import artifacts
from service.contract.checkpoint import Checkpoint, CheckpointFile
from service.contract.evaluation import Evaluation, TaskEvaluation, is_text
from service.contract.metrics import Kind
from service.contract.plan import Pinned, Plan
from service.contract.recipe import Task, canonical_sha256
from service.contract.textfiles import holds_tokenizer
from workers.labeled import read_labeled, read_tokenizer
from workers.loading import load_model
from workers.measuring import Samples, Setting
from workers.tensors import TensorReader
from workers.textfiles import Tokenized
from workers.version import ENGINE
from workers.work import Work

MAIN_INPUTS = ("input_ids", "pixel_values", "input_features", "input_values", "inputs_embeds")
DECODING = (Kind.SEQUENCE_TO_SEQUENCE,)  # kinds whose answers a tokenizer turns into text


@dataclass(frozen=True, eq=False)
class Trial:
    """What one task's models are measured with, opened and pinned."""

    work: Work
    plan: Plan
    evaluation: Evaluation
    row: TaskEvaluation
    task: Task
    base: Checkpoint
    checkpoint: Checkpoint
    reader: TensorReader

    @classmethod
    def open(cls, work: Work, reader: TensorReader, evaluation: Evaluation, row: TaskEvaluation) -> Trial:
        """Raises InputChanged, InputMissing, StorageFailure."""
        plan = work.plan()
        task = next(task for task in work.recipe.tasks if task.name == row.task)
        base = reader.open(work.recipe.base, plan.inputs["base"])
        checkpoint = reader.open(task.checkpoint, plan.inputs[f"task:{task.name}"], base)
        return cls(work, plan, evaluation, row, task, base, checkpoint, reader)

    @cached_property
    def labeled(self) -> Tokenized:
        """The labeled samples, model inputs and labels, and what there is to warn of. Raises BadInput."""
        return self.read("labeled")

    @property
    def samples(self) -> Samples:
        return self.labeled.tensors

    @property
    def warnings(self) -> tuple[str, ...]:
        """What there is to warn of in the labeled samples, if they were read."""
        return self.labeled.warnings if "labeled" in self.__dict__ else ()

    def read(self, which: str) -> Tokenized:
        """The samples that are ``labeled``, or those for ``validation``."""
        (file,) = self.plan.inputs[f"{which}:{self.task.name}"]
        return read_labeled(self.work.objects, self.reader, file, self.row, self.tokenizer, self.checkpoint)

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer beside the task's checkpoint, or the base's where that has none; None where none is needed."""
        return read_tokenizer(self.work.objects, self._tokenizer_files) if self._has_words else None

    @property
    def _has_words(self) -> bool:
        files = (self.row.labeled, self.row.validation)
        return self.row.kind in DECODING or any(is_text(file) for file in files if file)

    @property
    def _tokenizer_files(self) -> tuple[CheckpointFile, ...]:
        places = [checkpoint.side_files for checkpoint in (self.checkpoint, self.base)]
        return next((files for files in places if holds_tokenizer(file.name for file in files)), ())

    @cached_property
    def setting(self) -> Setting:
        """What gathering answers needs beside the model and the samples."""
        head: Mapping[str, Tensor] = {}
        if self.row.head:
            opened = self.reader.open(self.row.head.weight, self.plan.inputs[f"head:{self.task.name}"])
            head = self.reader.read(opened, opened.tensors)
        return Setting(self.row, self.evaluation.batch_size, head, self.tokenizer, self.work.watch.step)

    def digest(self, model: str) -> str:
        """Of everything that the scores of the base or the expert depend on."""
        names = [f"task:{self.task.name}", f"labeled:{self.task.name}", f"head:{self.task.name}"]
        names += ["base"] if model == "base" or self.checkpoint.adapter is not None else []
        files: list[Pinned | CheckpointFile] = [file for name in names for file in self.plan.inputs.get(name, ())]
        files += self._tokenizer_files if self._has_words else ()
        row = self.row.model_dump(mode="json", exclude={"labeled": True, "validation": True, "head": {"weight"}})
        return canonical_sha256(
            {
                "engine": ENGINE,
                "model": model,
                "files": [[file.size, file.etag, file.version_id] for file in files],
                "config": self.checkpoint.config,
                "row": {**row, "metrics": self.row.measured},
                "seed": self.work.recipe.seed,
                "resamples": self.evaluation.resamples,
            }
        )

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
