"""Do these checkpoints fit each other? Told from headers alone, every disagreement in one answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from service.contract.checkpoint import Checkpoint, TensorInfo
from service.contract.errors import Fault
from service.contract.notices import Notice
from service.contract.patterns import matches
from service.contract.recipe import Recipe
from service.contract.roles import guess_role
from service.contract.treatments import Role

CODE = "incompatible_checkpoints"
FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
NAMED = 100  # disagreements, or tensors of the base alone, named one by one; a count says how many more there are


@dataclass(frozen=True)
class Fit:
    """What can be done with each tensor, and what stands in the way.

    ``merged`` are the names that base and all tasks have alike; ``copied`` come from the base as they are; ``equal``
    are those among them that must be byte for byte the same in every task; ``heads`` belong to one task alone.
    """

    faults: tuple[Fault, ...]
    merged: tuple[str, ...]
    copied: tuple[str, ...]
    equal: tuple[str, ...]
    heads: dict[str, tuple[str, ...]]
    warnings: tuple[str, ...]


def fit(recipe: Recipe, base: Checkpoint, tasks: Sequence[Checkpoint]) -> Fit:
    """Compare the tasks' checkpoints, in recipe order, with the base's."""
    named = dict(zip([task.name for task in recipe.tasks], tasks, strict=True))
    head_names = _heads(recipe, base, tasks)
    merged: list[str] = []
    copied: list[str] = []
    equal: list[str] = []
    alone: list[str] = []
    faults = _architecture_faults(base, tasks)
    for name, info in base.tensors.items():
        holders = [task for task in tasks if name in task.tensors]
        if name in head_names:
            copied.append(name)
        elif not holders:
            copied.append(name)
            alone.append(name)
        else:
            faults += _tensor_faults(info, tasks)
            (merged if info.dtype in FLOATS else copied).append(name)
            if info.dtype not in FLOATS:
                equal.append(name)
    heads = {
        task: tuple(name for name in checkpoint.tensors if name in head_names or name not in base.tensors)
        for task, checkpoint in named.items()
    }
    warnings = _alone_warnings(alone) + _head_warnings(heads)
    if not merged and not faults:
        faults.append(Fault("/base", CODE, f"{base.address}: nothing to merge; no floating-point tensor is shared"))
    return Fit(_capped(faults), tuple(merged), tuple(copied), tuple(equal), heads, tuple(warnings))


def _heads(recipe: Recipe, base: Checkpoint, tasks: Sequence[Checkpoint]) -> frozenset[str]:
    """Names that are a task's own: declared so, or of another first dimension somewhere (a classifier)."""
    declared = {
        name
        for checkpoint in (base, *tasks)
        for name in checkpoint.tensors
        if any(matches(name, pattern) for pattern in recipe.heads)
    }
    resized = {name for name, info in base.tensors.items() if len(info.shape) > 1 and _is_resized(info, tasks)}
    owners = {name.rpartition(".")[0] for name in resized}
    # A bias goes with its weight: alone, another length of a vector is a disagreement and no classifier.
    biases = {
        name
        for name, info in base.tensors.items()
        if len(info.shape) == 1 and name.rpartition(".")[0] in owners and _is_resized(info, tasks)
    }
    return frozenset(declared | resized | biases)


def _is_resized(info: TensorInfo, tasks: Sequence[Checkpoint]) -> bool:
    """Whether all differ from the base at most in the first dimension, and some do. A resized vocabulary is no head."""
    shapes = [task.tensors[info.name].shape for task in tasks if info.name in task.tensors]
    alike = all(len(shape) == len(info.shape) and shape[1:] == info.shape[1:] for shape in shapes)
    return alike and any(shape != info.shape for shape in shapes) and not _is_table(info)


def _is_table(info: TensorInfo) -> bool:
    return guess_role(info.name, info.shape) is Role.EMBEDDING


def _architecture_faults(base: Checkpoint, tasks: Sequence[Checkpoint]) -> list[Fault]:
    expected = (base.config or {}).get("model_type")
    faults = []
    for position, task in enumerate(tasks):
        found = (task.config or {}).get("model_type")
        if expected and found and found != expected:
            detail = f"{task.address}config.json: model_type is {found!r}, but the base's is {expected!r}"
            faults.append(Fault(f"/tasks/{position}/checkpoint", CODE, detail))
    return faults


def _tensor_faults(info: TensorInfo, tasks: Sequence[Checkpoint]) -> list[Fault]:
    faults = []
    for position, task in enumerate(tasks):
        sentence = _disagreement(info, task)
        if sentence is not None:
            faults.append(Fault(f"/tasks/{position}/checkpoint", CODE, sentence))
    return faults


def _disagreement(info: TensorInfo, task: Checkpoint) -> str | None:
    found = task.tensors.get(info.name)
    if found is None:
        return f"{task.address}: tensor {info.name!r} is missing; the base has it in {info.file}"
    if found.shape != info.shape:
        advice = "; the vocabulary was resized, so the rows no longer mean the same tokens" if _is_table(info) else ""
        return (
            f"{found.file}: tensor {info.name!r} has shape {list(found.shape)}, "
            f"but the base's has {list(info.shape)}{advice}"
        )
    if found.dtype != info.dtype:
        return (
            f"{found.file}: tensor {info.name!r} is {found.dtype}, but the base's is {info.dtype}; convert one of them"
        )
    if info.dtype.startswith("F8"):
        return f"{found.file}: tensor {info.name!r} is {info.dtype}; 8-bit floats are not merged, convert to BF16 first"
    return None


def _alone_warnings(names: Sequence[str]) -> list[Notice]:
    named = [Notice("tensor_of_no_task", tensor=name) for name in names[:NAMED]]
    more = len(names) - len(named)
    return [*named, Notice("more_tensors_of_no_task", count=more)] if more else named


def _head_warnings(heads: Mapping[str, tuple[str, ...]]) -> list[Notice]:
    return [
        Notice("head", task=task, tensors=", ".join(names[:8]) + (" ..." if len(names) > 8 else ""))
        for task, names in heads.items()
        if names
    ]


def _capped(faults: list[Fault]) -> tuple[Fault, ...]:
    if len(faults) <= NAMED:
        return tuple(faults)
    more = Fault("/tasks", CODE, f"and {len(faults) - NAMED} more disagreements of this kind")
    return (*faults[:NAMED], more)
