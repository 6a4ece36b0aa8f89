"""Makes the plan of an evaluation: which files it reads, and what that takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from service.contract.checkpoint import Checkpoint, CheckpointFile
from service.contract.evaluating import EvaluatedModel, EvaluationRecipe
from service.contract.plan import Pinned, Plan
from service.contract.planning import pin

COMPUTE_BYTES = 4  # float32
Equipped = Mapping[tuple[str, str], Checkpoint]  # by model and task


def evaluation_plan(
    prefix: str,
    base: Checkpoint | None,
    wholes: Mapping[str, Checkpoint],
    equipped: Equipped,
    samples: Mapping[str, CheckpointFile],
    warnings: Sequence[str] = (),
) -> Plan:
    """The plan of an evaluation whose checkpoints fit their samples; nothing is merged, so it has no shards.

    ``wholes`` are the checkpoints of the models by name, ``equipped`` the same as they are measured, each with its
    task's head. ``samples`` are the recipe's other inputs by what they are: ``labeled:<task>``, ``head:<task>``.
    """
    pinned: dict[str, tuple[Pinned, ...]] = {"base": _pins(base.files)} if base is not None else {}
    pinned |= {f"model:{name}": _pins(checkpoint.files) for name, checkpoint in wholes.items()}
    for (model, task), checkpoint in equipped.items():
        added = checkpoint.files[len(wholes[model].files) :]
        pinned |= {f"head:{model}:{task}": _pins(added)} if added else {}
    pinned |= {name: (pin(file),) for name, file in samples.items()}
    return Plan(
        prefix=prefix,
        shards=(),
        heads=(),
        side_files=(),
        inputs=pinned,
        tied={},
        bytes_in=sum(checkpoint.nbytes for checkpoint in equipped.values()),
        bytes_out=0,
        peak_memory_bytes=max((_held_bytes(checkpoint) for checkpoint in equipped.values()), default=0),
        warnings=tuple(warnings),
    )


def inputs_of(model: str, task: str) -> tuple[str, str]:
    """What the plan calls the files of a model as it is measured on a task: its own, and the head's if there is one."""
    return f"model:{model}", f"head:{model}:{task}"


def bytes_of_model(plan: Plan, recipe: EvaluationRecipe, model: str) -> int:
    """The bytes of a model's weights and of the heads that it is measured with."""
    names = dict.fromkeys(name for row in recipe.evaluation.tasks for name in inputs_of(model, row.task))
    files = (file for name in names for file in plan.inputs.get(name, ()))
    return sum(file.size for file in files if file.address.endswith(".safetensors"))


def evaluation_samples(recipe: EvaluationRecipe) -> dict[str, str]:
    """The addresses of an evaluation's files beside its checkpoints, by what they are."""
    rows = recipe.evaluation.tasks
    heads = {f"head:{row.task}": row.head.weight for row in rows if row.head}
    return {f"labeled:{row.task}": row.labeled for row in rows} | heads


def measured_tasks(recipe: EvaluationRecipe, model: EvaluatedModel) -> list[str]:
    """The tasks that a model is measured on, in the recipe's order."""
    return [row.task for row in recipe.evaluation.tasks if model.is_measured_on(row.task)]


def _pins(files: Sequence[CheckpointFile]) -> tuple[Pinned, ...]:
    return tuple(pin(file) for file in files)


def _held_bytes(checkpoint: Checkpoint) -> int:
    """The tensors as they are stored, and once more in float32, in which the model computes."""
    return checkpoint.nbytes + COMPUTE_BYTES * sum(tensor.numel for tensor in checkpoint.tensors.values())
