"""Reads the checkpoint that an evaluation measures, with the heads that lie beside it, by their headers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from service.contract.adapter import on_base
from service.contract.artifacts import HEADS
from service.contract.checkpoint import Checkpoint, MalformedHeader
from service.contract.evaluating import EvaluatedModel
from service.contract.heads import Head, put_on
from service.contract.notices import Notice
from service.stores.checkpoints import MAX_CONFIG_BYTES, SUFFIX, as_file, read_checkpoint, read_header, read_json
from service.stores.objects import ObjectMissing, Objects

CONFIG_SUFFIX = ".json"


@dataclass(frozen=True)
class Heads:
    """The folder of a model's heads, and the names of the files in it; empty where there is no such folder."""

    folder: str
    names: frozenset[str]

    @property
    def tasks(self) -> list[str]:
        """The tasks that there are heads for."""
        return sorted(name.removesuffix(SUFFIX) for name in self.names if name.endswith(SUFFIX))


def read_whole(objects: Objects, model: EvaluatedModel, base: Checkpoint | None) -> Checkpoint:
    """A model's checkpoint; an adapter is put on ``base``.

    Raises:
        MalformedHeader: it is malformed, does not fit the base, or is an adapter and there is no base.
        ObjectMissing, PickleRefused, StoreError.
    """
    checkpoint = read_checkpoint(objects, model.checkpoint)
    if checkpoint.adapter is None:
        return checkpoint
    if base is None:
        raise MalformedHeader(checkpoint.address, "this is an adapter; name the whole model that it is of as base")
    return on_base(base, checkpoint)


def find_heads(objects: Objects, model: EvaluatedModel) -> Heads:
    """The heads beside a model's checkpoint, or in the folder that the recipe names for it.

    Raises:
        ObjectMissing: the folder that is named holds no head.
        StoreError.
    """
    folder = model.heads or _beside(model.checkpoint)
    if folder is None:
        return Heads("", frozenset())
    found = [info.address.removeprefix(folder) for info in objects.list(folder)]
    heads = Heads(folder, frozenset(name for name in found if "/" not in name))
    if model.heads is not None and not heads.tasks:
        raise ObjectMissing(f"{folder} holds no heads: files named <task>{SUFFIX}")
    return heads


def with_head(objects: Objects, checkpoint: Checkpoint, heads: Heads, task: str) -> Checkpoint:
    """The checkpoint as it is measured on a task: with that task's head, where there is one.

    Raises:
        MalformedHeader: the head is malformed.
        StoreError.
    """
    if task + SUFFIX not in heads.names:
        return checkpoint
    file, header = read_header(objects, heads.folder + task + SUFFIX)
    if task + CONFIG_SUFFIX not in heads.names:
        return put_on(checkpoint, Head((file,), header.tensors))
    address = heads.folder + task + CONFIG_SUFFIX
    pinned = as_file(objects.head(address))
    return put_on(checkpoint, Head((file, pinned), header.tensors, read_json(objects, address, MAX_CONFIG_BYTES)))


def lacking(model: EvaluatedModel, heads: Heads, tasks: Sequence[str]) -> list[Notice]:
    """What to warn of: tasks without a head among those that a model brings; it may be that one is misspelled."""
    missing = [task for task in tasks if heads.tasks and task not in heads.tasks]
    if not missing:
        return []
    told, lacked = ", ".join(heads.tasks), ", ".join(missing)
    return [Notice("no_head", folder=heads.folder, heads=told, tasks=lacked, model=model.name)]


def _beside(checkpoint: str) -> str | None:
    if checkpoint.endswith(SUFFIX):
        return None
    return (checkpoint if checkpoint.endswith("/") else f"{checkpoint}/") + HEADS
