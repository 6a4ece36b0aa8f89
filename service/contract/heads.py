"""A task's head put on a checkpoint, and whether a model has the head that it says it has; told from headers alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from service.contract.checkpoint import Checkpoint, CheckpointFile, TensorInfo
from service.contract.evaluation import TaskEvaluation
from service.contract.metrics import Kind
from service.contract.roles import guess_role
from service.contract.treatments import Role

CLASSIFIERS = ("ForSequenceClassification", "ForImageClassification", "ForTokenClassification")
SCORED_BY_HEAD = (Kind.CLASSIFICATION, Kind.REGRESSION, Kind.TOKEN_CLASSIFICATION)


@dataclass(frozen=True)
class Head:
    """A task's own tensors in a file beside a checkpoint.

    ``config`` is that of the model which they make of the checkpoint; None where no file says it.
    """

    files: tuple[CheckpointFile, ...]
    tensors: dict[str, TensorInfo]
    config: dict[str, Any] | None = None


def put_on(checkpoint: Checkpoint, head: Head) -> Checkpoint:
    """The checkpoint with the head's tensors beside or instead of its own, without a tensor being read."""
    return replace(
        checkpoint,
        files=(*checkpoint.files, *head.files),
        tensors={**checkpoint.tensors, **head.tensors},
        changes={name: change for name, change in checkpoint.changes.items() if name not in head.tensors},
        config=head.config or _with_classes(checkpoint, head),
    )


def _with_classes(checkpoint: Checkpoint, head: Head) -> dict[str, Any] | None:
    """The checkpoint's configuration, with as many classes as the head has rows where it replaces one of other size."""
    rows = {
        info.shape[0]
        for name, info in head.tensors.items()
        if len(info.shape) == 2 and name in checkpoint.tensors and checkpoint.tensors[name].shape != info.shape
    }
    if checkpoint.config is None or len(rows) != 1:
        return checkpoint.config
    names = {str(number): f"LABEL_{number}" for number in range(next(iter(rows)))}
    return {**checkpoint.config, "id2label": names, "label2id": {name: int(number) for number, name in names.items()}}


def own_head_faults(checkpoint: Checkpoint, row: TaskEvaluation) -> list[str]:
    """Why a model that says it scores classes can't: no tensor has a row for each of them."""
    config = checkpoint.config or {}
    named, classes = config.get("architectures"), _classes(config)
    architecture = str(named[0]) if isinstance(named, list) and named else ""
    if row.head or row.kind not in SCORED_BY_HEAD or not architecture.endswith(CLASSIFIERS):
        return []
    fitting = (
        info
        for name, info in checkpoint.tensors.items()
        if len(info.shape) >= 2 and info.shape[0] == classes and guess_role(name, info.shape) is not Role.EMBEDDING
    )
    if next(fitting, None) is not None:
        return []
    return [
        f"{architecture} of {classes} classes needs a head with {classes} rows, and no tensor of {checkpoint.address} "
        f"has so many: its head for task {row.task!r} is missing, or of another shape"
    ]


def _classes(config: Mapping[str, Any]) -> int:
    """How many classes a ``config.json`` names; transformers takes 2 where it names none."""
    table, stated = config.get("id2label"), config.get("num_labels")
    if isinstance(table, Mapping) and table:
        return len(table)
    return stated if isinstance(stated, int) else 2
