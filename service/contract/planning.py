"""Makes the plan: from a recipe, headers, and what each parameter is, to what happens to every tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

from service.contract import artifacts
from service.contract.checkpoint import DTYPE_BYTES, Checkpoint, CheckpointFile, TensorInfo, group_shards
from service.contract.fit import Fit
from service.contract.methods import AnyMethod
from service.contract.patterns import matches
from service.contract.plan import HeadPlan, Pinned, Plan, ShardPlan, TensorPlan
from service.contract.recipe import Recipe
from service.contract.roles import Parameter
from service.contract.treatments import Keep, Projection, Role, Treatment

COMPUTE_BYTES = 4  # float32
STREAM_BYTES = 256 << 20  # spans that are read ahead, pieces that are merged, shards' ends that wait to be written

ParameterOf = Callable[[TensorInfo], Parameter]


def make_plan(
    recipe: Recipe,
    prefix: str,
    base: Checkpoint,
    tasks: Sequence[Checkpoint],
    found: Fit,
    parameter_of: ParameterOf,
    warnings: Sequence[str] = (),
    samples: Mapping[str, CheckpointFile] | None = None,
) -> Plan:
    """The plan of a recipe whose checkpoints fit each other. Deterministic: the same inputs give the same plan.

    ``samples`` are the recipe's other inputs by what they are: ``exemplars:<task>``, ``labeled:<task>`` and so on.
    """
    parameters = {name: parameter_of(info) for name, info in base.tensors.items()}
    merged = frozenset(found.merged)
    tensors = [_tensor(recipe, info, parameters[name], name in merged) for name, info in base.tensors.items()]
    shards = _shards(recipe, tensors)
    heads = tuple(_head(name, task, found.heads[name]) for name, task in _named(recipe, tasks).items())
    pinned = {"base": _pinned(base), **{f"task:{name}": _pinned(task) for name, task in _named(recipe, tasks).items()}}
    pinned |= {name: (pin(file),) for name, file in (samples or {}).items()}
    return Plan(
        prefix=prefix,
        shards=shards,
        heads=tuple(head for head in heads if head.tensors),
        side_files=tuple(pin(file) for file in base.side_files),
        inputs=pinned,
        tied={name: parameter.tied_to for name, parameter in parameters.items() if parameter.tied_to},
        bytes_in=sum(shard.bytes_in for shard in shards) + sum(head.bytes for head in heads),
        bytes_out=sum(shard.bytes_out for shard in shards) + sum(head.bytes for head in heads),
        peak_memory_bytes=max(peak_memory(recipe, tensors, method) for method in methods_of(recipe)),
        warnings=(*found.warnings, *warnings),
    )


def replanned(plan: Plan, recipe: Recipe) -> Plan:
    """The plan of the same merge by another method: of the trial of a search, or of the recipe that it chose."""

    def again(tensor: TensorPlan) -> TensorPlan:
        changes = _by_method(recipe, tensor.name, tensor.role, tensor.source == "merged")
        return tensor.model_copy(update=changes)

    shards = tuple(
        shard.model_copy(update={"tensors": tuple(again(tensor) for tensor in shard.tensors)}) for shard in plan.shards
    )
    tensors = [tensor for shard in shards for tensor in shard.tensors]
    return plan.model_copy(update={"shards": shards, "peak_memory_bytes": peak_memory(recipe, tensors, recipe.method)})


def pin(file: CheckpointFile) -> Pinned:
    """A file as it is now, to be told from what it may become."""
    return Pinned(address=file.address, size=file.size, etag=file.etag, version_id=file.version_id)


def _named(recipe: Recipe, tasks: Sequence[Checkpoint]) -> dict[str, Checkpoint]:
    return dict(zip([task.name for task in recipe.tasks], tasks, strict=True))


def _pinned(checkpoint: Checkpoint) -> tuple[Pinned, ...]:
    return tuple(pin(file) for file in checkpoint.files)


def _tensor(recipe: Recipe, info: TensorInfo, parameter: Parameter, is_merged: bool) -> TensorPlan:
    return TensorPlan(
        name=info.name,
        dtype=info.dtype if recipe.output.dtype == "base" or not is_merged else recipe.output.dtype,
        base_dtype=info.dtype,
        shape=info.shape,
        role=parameter.role,
        guessed=parameter.guessed,
        transposed=parameter.transposed,
        blocks=parameter.blocks,
        source="merged" if is_merged else "base",
        **_by_method(recipe, info.name, parameter.role, is_merged),
    )


def _by_method(recipe: Recipe, name: str, role: Role, is_merged: bool) -> dict[str, Any]:
    """What of a tensor's plan the method decides. In a search, whatever a trial may observe is observed."""
    override = recipe.override(name) if is_merged else None
    method = override or recipe.method
    treatment = _treatment(recipe, method, name, role) if is_merged else Keep()
    observed = role in method.combining.observes or _may_be_observed(recipe, name, role)
    return {"treatment": treatment, "method": override, "observed": is_merged and observed}


def _may_be_observed(recipe: Recipe, name: str, role: Role) -> bool:
    methods = methods_of(recipe) if recipe.search else ()
    treatments = (_treatment(recipe, method, name, role) for method in methods)
    needs = any(type(treatment).statistic != "none" for treatment in treatments)
    return needs or any(role in method.combining.observes for method in methods)


def _treatment(recipe: Recipe, method: AnyMethod, name: str, role: Role) -> Treatment:
    """The first override whose pattern matches, else what the method gives the role."""
    if not method.trims:
        return Keep()
    override = next((row for row in recipe.treatments if matches(name, row.match)), None)
    return method.treatment(role) if override is None else override.treatment()


def _shards(recipe: Recipe, tensors: Sequence[TensorPlan]) -> tuple[ShardPlan, ...]:
    groups = group_shards(tensors, recipe.output.shard_bytes)
    return tuple(
        ShardPlan(
            file=artifacts.shard(index, len(groups)),
            # Wider types first, so that readers can view every tensor in place.
            tensors=tuple(sorted(group, key=lambda tensor: -DTYPE_BYTES[tensor.dtype])),
            bytes_in=sum(_bytes_in(tensor, len(recipe.tasks)) for tensor in group),
            bytes_out=sum(tensor.nbytes for tensor in group),
        )
        for index, group in enumerate(groups)
    )


def _bytes_in(tensor: TensorPlan, tasks: int) -> int:
    return tensor.nbytes_in * (tasks + 1 if tensor.source == "merged" else 1)


def _head(task: str, checkpoint: Checkpoint, names: Sequence[str]) -> HeadPlan:
    size = sum(checkpoint.tensors[name].nbytes for name in names)
    return HeadPlan(task=task, tensors=tuple(names), bytes=size)


def methods_of(recipe: Recipe) -> tuple[AnyMethod, ...]:
    """What may be merged by: the recipe's method, or those that a search may try."""
    return recipe.search.methods(recipe.method) if recipe.search else (recipe.method,)


def peak_memory(recipe: Recipe, tensors: Sequence[TensorPlan], method: AnyMethod) -> int:
    """What one worker holds at most while it merges: its largest tensor, and what is read ahead and written behind."""
    return largest_held(recipe, tensors, method) + STREAM_BYTES


def largest_held(recipe: Recipe, tensors: Sequence[TensorPlan], method: AnyMethod) -> int:
    """What is held of one of the tensors at most; smaller ones that hold no more together may be merged at once."""
    return max((held_bytes(recipe, tensor, method) for tensor in tensors), default=0)


def held_bytes(recipe: Recipe, tensor: TensorPlan, method: AnyMethod) -> int:
    """What is held of one tensor at once: nothing where entry after entry is merged and written.

    Else all checkpoints' tensors and the merged one as they are stored; and where the method or a treatment looks at
    the whole of it, task vectors, base and update in float32, with the answers of every task vector to all inputs
    (a projection) or copies in double precision (a method that factors matrices).
    """
    method = tensor.method or method
    tasks = len(recipe.tasks)
    if tensor.source == "base" or (method.entrywise and not method.trims):
        return 0
    stored = _bytes_in(tensor, tasks) + tensor.nbytes
    if method.pieces != "none" and not method.trims:
        return stored
    treatment = _treatment(recipe, method, tensor.name, tensor.role)
    copies = 2 * tasks if isinstance(treatment, Projection) or method.combining.by_matrix else 0
    return stored + prod(tensor.shape) * COMPUTE_BYTES * (tasks + 2 + copies)
