"""What one model is measured with on one task: labeled samples, tokenizer and head, opened and pinned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from service.contract.checkpoint import Checkpoint, CheckpointFile
from service.contract.evaluation import Evaluation, TaskEvaluation, is_text
from service.contract.metrics import Kind
from service.contract.plan import Pinned, Plan
from service.contract.recipe import canonical_sha256
from service.contract.textfiles import holds_tokenizer
from service.stores.checkpoints import MAX_CONFIG_BYTES, read_json
from service.stores.objects import failures
from workers.labeled import read_labeled, read_tokenizer
from workers.measuring import Samples, Setting
from workers.tensors import TensorReader
from workers.textfiles import Tokenized
from workers.version import ENGINE
from workers.work import Work

DECODING = (Kind.SEQUENCE_TO_SEQUENCE,)  # kinds whose answers a tokenizer turns into text
GENERATION_CONFIG = "generation_config.json"


@dataclass(frozen=True, eq=False)
class Bench:
    """One task's labeled samples, and the checkpoint whose configuration and tokenizer say how they are read.

    What does not lie beside the checkpoint is looked for beside ``base``, where there is one.
    """

    work: Work
    plan: Plan
    evaluation: Evaluation
    row: TaskEvaluation
    base: Checkpoint | None
    checkpoint: Checkpoint
    reader: TensorReader

    @cached_property
    def labeled(self) -> Tokenized:
        """The labeled samples, model inputs and labels, and what there is to warn of. Raises BadInput."""
        return self.read("labeled")

    @property
    def samples(self) -> Samples:
        return self.labeled.tensors

    @property
    def seed(self) -> int:
        """What draws of resamples depend on, beside the task."""
        return self.work.claim.recipe.seed

    @property
    def warnings(self) -> tuple[str, ...]:
        """What there is to warn of in the labeled samples, if they were read."""
        return self.labeled.warnings if "labeled" in self.__dict__ else ()

    def read(self, which: str) -> Tokenized:
        """The samples that are ``labeled``, or those for ``validation``."""
        (file,) = self.plan.inputs[f"{which}:{self.row.task}"]
        return read_labeled(self.work.objects, self.reader, file, self.row, self.tokenizer, self.checkpoint)

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer beside the checkpoint, or the base's where that has none; None where none is needed."""
        return read_tokenizer(self.work.objects, self._tokenizer_files) if self._has_words else None

    @property
    def _has_words(self) -> bool:
        files = (self.row.labeled, self.row.validation)
        return self.row.kind in DECODING or any(is_text(file) for file in files if file)

    @property
    def _places(self) -> list[tuple[CheckpointFile, ...]]:
        return [place.side_files for place in (self.checkpoint, self.base) if place is not None]

    @property
    def _tokenizer_files(self) -> tuple[CheckpointFile, ...]:
        return next((files for files in self._places if holds_tokenizer(file.name for file in files)), ())

    @property
    def _generation_file(self) -> CheckpointFile | None:
        """Where the model writes text: what its checkpoint says about beginning and end."""
        files = (file for place in self._places for file in place if file.name == GENERATION_CONFIG)
        return next(files, None) if self.row.kind in DECODING else None

    @cached_property
    def setting(self) -> Setting:
        """What gathering answers needs beside the model and the samples."""
        head: Mapping[str, Tensor] = {}
        if self.row.head:
            opened = self.reader.open(self.row.head.weight, self.plan.inputs[f"head:{self.row.task}"])
            head = self.reader.read(opened, opened.tensors)
        step = self.work.watch.step
        return Setting(self.row, self.evaluation.batch_size, head, self.tokenizer, step, self._generation())

    def _generation(self) -> dict[str, Any]:
        file = self._generation_file
        if file is None:
            return {}
        with failures():
            return read_json(self.work.objects, file.address, MAX_CONFIG_BYTES)

    def digest_of(self, model: str, names: Sequence[str]) -> str:
        """Of everything that a model's scores depend on; ``names`` are what the plan calls the model's files."""
        known = [*names, f"labeled:{self.row.task}", f"head:{self.row.task}"]
        files: list[Pinned | CheckpointFile] = [file for name in known for file in self.plan.inputs.get(name, ())]
        files += self._tokenizer_files if self._has_words else ()
        files += (self._generation_file,) if self._generation_file is not None else ()
        row = self.row.model_dump(mode="json", exclude={"labeled": True, "validation": True, "head": {"weight"}})
        return canonical_sha256(
            {
                "engine": ENGINE,
                "model": model,
                "files": [[file.size, file.etag, file.version_id] for file in files],
                "config": self.checkpoint.config,
                "row": {**row, "metrics": self.row.measured},
                "seed": self.seed,
                "resamples": self.evaluation.resamples,
            }
        )
