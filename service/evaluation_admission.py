"""Can these checkpoints be measured on these samples? Headers only, and every disagreement in one answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from service.admission import (
    READERS,
    FileHead,
    collecting,
    file_faults,
    place_faults,
    read_head,
    refusal_of,
)
from service.contract.checkpoint import Checkpoint, Header
from service.contract.errors import ExemplarsDoNotFit, Fault, IncompatibleCheckpoints, MalformedCheckpoint
from service.contract.evaluating import EvaluatedModel, EvaluationRecipe
from service.contract.evaluation_plan import evaluation_plan, measured_tasks
from service.contract.heads import own_head_faults
from service.contract.labeled import model_faults
from service.contract.plan import Plan
from service.contract.samples import head_faults
from service.stores.checkpoints import read_checkpoint
from service.stores.heads import find_heads, lacking, read_whole, with_head
from service.stores.objects import Objects

Equipped = dict[tuple[str, str], Checkpoint]


@dataclass(frozen=True)
class Opened:
    """One model: its checkpoint by name, the same with each task's head, and what there is to warn of."""

    whole: Mapping[str, Checkpoint] = field(default_factory=dict)
    equipped: Equipped = field(default_factory=dict)
    warnings: Sequence[str] = ()


def admit_evaluation(recipe: EvaluationRecipe, objects: Objects) -> Plan:
    """Look at everything a recipe names, and return the plan.

    Raises:
        Refusal: with a fault for everything that does not fit, each with a pointer into the recipe.
    """
    files = evaluation_files(recipe)
    output, faults = recipe.output, list[Fault]()
    if output.prefix is not None:
        inputs = _checkpoint_addresses(recipe) | files
        faults += place_faults(output.prefix, inputs, objects, is_free=output.overwrite)
    base = _open_base(recipe, objects, faults)
    with ThreadPoolExecutor(READERS) as pool:
        heads = dict(zip(files, pool.map(lambda at: read_head(objects, at, files[at], faults), files), strict=True))
        opened = list(pool.map(lambda at: _open(recipe, at, base, objects, faults), range(len(recipe.models))))
    equipped = {key: checkpoint for found in opened for key, checkpoint in found.equipped.items()}
    wholes = {name: checkpoint for found in opened for name, checkpoint in found.whole.items()}
    warnings = [warning for found in opened for warning in found.warnings]
    faults += _model_faults(recipe, equipped)
    faults += _sample_faults(recipe, base, equipped, heads)
    if faults:
        raise refusal_of(faults)
    return evaluation_plan(output.prefix or "", base, wholes, equipped, {}, warnings)


def evaluation_files(recipe: EvaluationRecipe) -> dict[str, str]:
    """The files that a recipe names beside its checkpoints, by JSON pointer."""
    rows = list(enumerate(recipe.evaluation.tasks))
    heads = {f"/evaluation/tasks/{i}/head/weight": row.head.weight for i, row in rows if row.head}
    return {f"/evaluation/tasks/{i}/labeled": row.labeled for i, row in rows} | heads


def _checkpoint_addresses(recipe: EvaluationRecipe) -> dict[str, str]:
    found = {"/base": recipe.base} if recipe.base is not None else {}
    for j, model in enumerate(recipe.models):
        found[f"/models/{j}/checkpoint"] = model.checkpoint
        if model.heads is not None:
            found[f"/models/{j}/heads"] = model.heads
    return found


def _open_base(recipe: EvaluationRecipe, objects: Objects, faults: list[Fault]) -> Checkpoint | None:
    if recipe.base is None:
        return None
    with collecting(faults, "/base"):
        objects.check(recipe.base)
        base = read_checkpoint(objects, recipe.base)
        if base.adapter is None:
            return base
        detail = f"{base.address} is an adapter; the base must be a whole model, the one that the adapters are for"
        faults.append(Fault("/base", MalformedCheckpoint.code, detail))
    return None


def _open(
    recipe: EvaluationRecipe, place: int, base: Checkpoint | None, objects: Objects, faults: list[Fault]
) -> Opened:
    """A model as it is measured on each of its tasks; what can't be read becomes a fault."""
    model, pointer = recipe.models[place], f"/models/{place}"
    if base is None and recipe.base is not None:  # what is wrong with it is said there
        return Opened()
    with collecting(faults, f"{pointer}/checkpoint"):
        objects.check(model.checkpoint)
        whole = read_whole(objects, model, base)
        with collecting(faults, f"{pointer}/heads" if model.heads else f"{pointer}/checkpoint"):
            objects.check(model.heads or model.checkpoint)
            heads, tasks = find_heads(objects, model), measured_tasks(recipe, model)
            equipped = {(model.name, task): with_head(objects, whole, heads, task) for task in tasks}
            return Opened({model.name: whole}, equipped, lacking(model, heads, tasks))
    return Opened()


def _model_faults(recipe: EvaluationRecipe, equipped: Equipped) -> list[Fault]:
    """What models lack to be measured so, whatever the samples are."""
    faults: dict[Fault, None] = {}
    for row, model in recipe.parts:
        checkpoint = equipped.get((model.name, row.task))
        if checkpoint is None:
            continue
        pointer = f"/models/{recipe.models.index(model)}/checkpoint"
        for sentence in _lacks(checkpoint, model) or (
            *model_faults(checkpoint.config or {}, row),
            *own_head_faults(checkpoint, row),
        ):
            faults[Fault(pointer, IncompatibleCheckpoints.code, sentence)] = None
    return list(faults)


def _lacks(checkpoint: Checkpoint, model: EvaluatedModel) -> list[str]:
    if checkpoint.config is not None:
        return []
    return [f"an evaluation needs the model to run, but {model.checkpoint} has no config.json beside it"]


def _sample_faults(
    recipe: EvaluationRecipe,
    base: Checkpoint | None,
    equipped: Equipped,
    heads: Mapping[str, FileHead | None],
) -> list[Fault]:
    """What is wrong with labeled samples and head matrices: of a sentence about some models only, it says which."""
    faults = []
    for i, row in enumerate(recipe.evaluation.tasks):
        pointer, models = f"/evaluation/tasks/{i}/labeled", recipe.measured_on(row.task)
        found: dict[str, list[str]] = {}
        for name, checkpoint in _runnable(models, row.task, equipped):
            for sentence in file_faults(row, base, heads[pointer], checkpoint):
                found.setdefault(sentence, []).append(name)
        for sentence, names in found.items():
            of = "" if len(names) == len(models) else f" (model {', '.join(names)})"
            faults.append(Fault(pointer, ExemplarsDoNotFit.code, f"{row.labeled}: {sentence}{of}"))
        matrix = heads.get(f"/evaluation/tasks/{i}/head/weight")
        if row.head is not None and matrix is not None:
            pointer = f"/evaluation/tasks/{i}/head/weight"
            sentences = head_faults(matrix.tensors if isinstance(matrix, Header) else {})
            faults += [Fault(pointer, ExemplarsDoNotFit.code, f"{row.head.weight}: {text}") for text in sentences]
    return faults


def _runnable(models: Sequence[EvaluatedModel], task: str, equipped: Equipped) -> list[tuple[str, Checkpoint]]:
    found = [(model.name, equipped.get((model.name, task))) for model in models]
    return [(name, checkpoint) for name, checkpoint in found if checkpoint is not None and checkpoint.config]
