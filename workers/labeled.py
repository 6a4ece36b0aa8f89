"""Reads a file of labeled samples: tensors as they are, text by way of the task's own tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from service.contract.checkpoint import Checkpoint, CheckpointFile
from service.contract.evaluation import TaskEvaluation, is_text
from service.contract.plan import Pinned
from service.stores.objects import Objects, failures
from workers.tensors import TensorReader, chunks
from workers.textfiles import Tokenized, load_tokenizer, read_text

TOKENIZER_LIMIT_BYTES = 256 << 20


def read_labeled(
    objects: Objects, reader: TensorReader, file: Pinned, row: TaskEvaluation, tokenizer: Any, checkpoint: Checkpoint
) -> Tokenized:
    """Model inputs ``[n, ...]`` by name and their labels, with what there is to warn of.

    Raises:
        BadInput: a row of text does not fit its kind.
        InputChanged, InputMissing, StorageFailure.
    """
    if is_text(file.address):
        data = b"".join(bytes(piece) for piece in chunks(objects, file))
        return read_text(data, file.address, row, tokenizer, checkpoint.config or {})
    opened = reader.open(file.address, [file])
    return Tokenized(reader.read(opened, opened.tensors))


def read_tokenizer(objects: Objects, files: Sequence[CheckpointFile]) -> Any:
    """The tokenizer that lies beside a checkpoint. Raises BadInput, InputMissing, StorageFailure."""
    with failures():
        return load_tokenizer({file.name: objects.read_all(file.address, TOKENIZER_LIMIT_BYTES) for file in files})
