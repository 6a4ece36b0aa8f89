"""A search's merges at scaling 1: any other scaling of the same merge is W0 + scaling * update, without merging."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace

from torch import Tensor

from service.contract import artifacts
from service.contract.checkpoint import DTYPE_BYTES
from service.contract.methods import AnyMethod
from service.contract.parts import Done
from service.contract.plan import Plan, ShardPlan, TensorPlan
from service.contract.recipe import Recipe, canonical_sha256
from service.contract.search import SCALING, Search
from service.stores.objects import ObjectMissing, failures
from workers.chosen import as_tried
from workers.tensors import DTYPES, TensorReader, batches
from workers.work import Work
from workers.writing import write_artifact

BATCH_BYTES = 256 << 20
POINTER_LIMIT_BYTES = 1 << 20

MergeShard = Callable[[Work, Plan], Done]
SurveyTasks = Callable[[Work], list[str]]


@dataclass(frozen=True)
class Structure:
    """One choice of everything but the scaling, merged at scaling 1 in float32: the folder it lies in.

    ``surveys`` are the addresses of what the method asked to be surveyed first, one for each task; or none.
    """

    recipe: Recipe
    plan: Plan
    surveys: tuple[str, ...]

    def at_scaling(self, work: Work, reader: TensorReader, recipe: Recipe, plan: Plan) -> dict[str, Tensor]:
        """The merged tensors of a trial by name, rounded to the types that ``plan`` gives the result.

        Where the base is B and what lies here is M, a tensor is B + factor * (M - B), in float32.
        """
        base = reader.open(recipe.base, plan.inputs["base"])
        found: dict[str, Tensor] = {}
        for shard in plan.shards:
            by_name = {tensor.name: tensor for tensor in shard.tensors}
            merged = reader.open(self.plan.prefix + shard.file, ())
            for names in batches([(tensor.name, 2 * tensor.nbytes_in) for tensor in shard.tensors], BATCH_BYTES):
                before, after = reader.start(base, names), reader.start(merged, names)
                start, end = before.wait(), after.wait()
                for name in names:
                    factor = _factor(self.recipe, recipe, by_name[name])
                    found[name] = _between(start[name], end[name], factor).to(DTYPES[by_name[name].dtype])
                work.watch.step(bytes_read=sum(start[name].nbytes + end[name].nbytes for name in names))
        return found


def _between(base: Tensor, merged: Tensor, factor: float) -> Tensor:
    return merged if factor == 1 else base.to(merged.dtype).lerp(merged, factor)


def at_one(recipe: Recipe) -> Recipe:
    """The recipe with scaling 1, where an update is proportional to the scaling; every method's with one is."""
    method = recipe.method
    if SCALING not in type(method.combining).model_fields:
        return recipe
    combining = method.combining.model_copy(update={SCALING: 1.0})
    one = combining if method.combining is method else method.model_copy(update={"then": combining})
    return recipe.model_copy(update={"method": one})


def _factor(kept: Recipe, asked: Recipe, tensor: TensorPlan) -> float:
    """By what the update that is kept is to be multiplied. An override may hold a tensor at a scaling of its own."""
    if tensor.source == "base":
        return 1.0
    was, wanted = (_scaling(recipe.override(tensor.name) or recipe.method) for recipe in (kept, asked))
    return wanted / was if was else 1.0


def _scaling(method: AnyMethod) -> float:
    return float(getattr(method.combining, SCALING, 1.0))


def is_worth_keeping(search: Search, recipe: Recipe) -> bool:
    """Whether another trial is to be expected that differs by nothing but the scaling."""
    return search.seeks_scaling and search.settings(recipe.method) < search.count(recipe.method)


def structure_of(
    work: Work, recipe: Recipe, number: int, merge_shard: MergeShard, survey_tasks: SurveyTasks, *, is_kept: bool
) -> Structure:
    """The structure of a trial's recipe: one that an earlier trial merged, or merged now.

    Raises:
        BadInput, BadTensor, InputChanged, StorageFailure.
    """
    one = at_one(recipe)
    pointer = artifacts.structure(work.workspace, work.claim.job_id, _digest(one))
    known = _read(work, pointer) if is_kept else None
    folder, surveys = known or (artifacts.trial(work.workspace, work.claim.job_id, number), None)
    if surveys is None:
        surveys = _survey(work, one, number, survey_tasks)
    plan = _in_float32(as_tried(work, one, surveys).plan(), folder)
    if known is None:
        _merge(work, one, plan, surveys, merge_shard)
        if is_kept:  # last: whoever finds it finds all of the shards
            write_artifact(work.objects, "", pointer, json.dumps({"folder": folder, "surveys": surveys}).encode())
    return Structure(one, plan, tuple(surveys))


def forget(work: Work, number: int) -> None:
    """Delete what a trial merged."""
    with failures():
        for info in list(work.objects.list(artifacts.trial(work.workspace, work.claim.job_id, number))):
            work.objects.delete(info.address)


def _digest(recipe: Recipe) -> str:
    weights = [task.weight for task in recipe.tasks]
    return canonical_sha256({"method": recipe.method.model_dump(mode="json"), "weights": weights})


def _read(work: Work, pointer: str) -> tuple[str, list[str]] | None:
    with failures(), suppress(ObjectMissing):
        found = json.loads(work.objects.read_all(pointer, POINTER_LIMIT_BYTES))
        return found["folder"], found["surveys"]
    return None


def _survey(work: Work, recipe: Recipe, number: int, survey_tasks: SurveyTasks) -> list[str]:
    if not recipe.method.surveys:
        return []
    folder = artifacts.trial_surveys(work.workspace, work.claim.job_id, number)
    return survey_tasks(replace(as_tried(work, recipe, ()), workspace=folder))


def _in_float32(plan: Plan, folder: str) -> Plan:
    """The plan with every merged tensor in float32, or float64 where the base is; in a folder of its own."""

    def widened(tensor: TensorPlan) -> TensorPlan:
        dtype = "F64" if tensor.base_dtype == "F64" else "F32"
        return tensor if tensor.source == "base" else tensor.model_copy(update={"dtype": dtype})

    def shard(row: ShardPlan) -> ShardPlan:
        tensors = sorted(map(widened, row.tensors), key=lambda tensor: -DTYPE_BYTES[tensor.dtype])
        return row.model_copy(update={"tensors": tuple(tensors)})

    return plan.model_copy(update={"prefix": folder, "shards": tuple(map(shard, plan.shards))})


def _merge(work: Work, recipe: Recipe, plan: Plan, surveys: list[str], merge_shard: MergeShard) -> None:
    """Shard after shard, as merge parts of a job of its own, whose every file lies in the trial's folder.

    A trial that is lost is not done again, so that nobody would go on with what it has begun.
    """
    asked = replace(as_tried(work, recipe, surveys), planned=plan, workspace=plan.prefix, bookmarks=None)
    for index in range(len(plan.shards)):
        merge_shard(replace(asked, claim=replace(asked.claim, part=index, prefix=plan.prefix)), plan)
