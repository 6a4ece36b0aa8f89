"""Plans a job: pins its inputs, asks the model what each parameter is, and says what happens to every tensor."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from service.contract import artifacts, peaks
from service.contract.adapter import on_base
from service.contract.checkpoint import Checkpoint, CheckpointFile
from service.contract.errors import BadInput, OutputTaken
from service.contract.evaluation import SPEED, Evaluation, is_text
from service.contract.fit import Fit, fit
from service.contract.parts import Done
from service.contract.plan import Plan, ShardPlan
from service.contract.planning import make_plan
from service.contract.recipe import Recipe
from service.contract.stages import NewPart, Stage
from service.stores.checkpoints import read_checkpoint, read_header
from service.stores.objects import ObjectMissing, Objects, failures
from workers.skeleton import read_skeleton
from workers.tensors import TensorReader
from workers.work import Work, plan_address
from workers.writing import write_artifact

MANIFEST_LIMIT_BYTES = 256 << 20
READ_BY = {"base": "base", "expert": "task:{}"}  # the inputs of those models that are evaluated as they came
CALIBRATE_WEIGHT, EVALUATE_WEIGHT, FINALIZE_WEIGHT = 2.0, 0.7, 1.0


def run(work: Work) -> Done:
    """Write the recipe and the plan, and ask for the parts of the later stages.

    Raises:
        BadInput: the checkpoints do not fit each other (any more), or whole-number tensors differ.
        InputMissing, StorageFailure.
    """
    recipe, objects = work.recipe, work.objects
    with failures():
        base = read_checkpoint(objects, recipe.base)
        tasks = [on_base(base, read_checkpoint(objects, task.checkpoint)) for task in recipe.tasks]
        samples = _read_samples(objects, recipe)
    found = fit(recipe, base, tasks)
    if found.faults:
        more = f" (and {len(found.faults) - 1} more)" if len(found.faults) > 1 else ""
        raise BadInput(f"{found.faults[0].detail}{more}")
    _refuse_unequal(work, base, tasks, found)
    skeleton = read_skeleton(base.config or {}, {name: info.shape for name, info in base.tensors.items()})
    plan = make_plan(
        recipe,
        work.claim.prefix,
        base,
        tasks,
        found,
        lambda info: skeleton.parameters[info.name],
        warnings=skeleton.warnings,
        samples=samples,
    )
    clear(work)
    write(work, artifacts.RECIPE, recipe.model_dump_json(indent=2))
    written = write_artifact(
        work.objects, "", plan_address(work.claim, work.workspace), plan.model_dump_json().encode()
    )
    work.watch.step(bytes_written=written.size)
    parts = tuple(_parts(recipe, plan, [base, *tasks]))
    return Done(warnings=(*found.warnings, *skeleton.warnings), parts=parts)


def _read_samples(objects: Objects, recipe: Recipe) -> dict[str, CheckpointFile]:
    """The recipe's files beside its checkpoints, as they are now."""
    addresses = {f"exemplars:{task.name}": task.exemplars for task in recipe.tasks if task.exemplars}
    addresses |= {f"statistics:{task.name}": task.statistics for task in recipe.tasks if task.statistics}
    for row in recipe.evaluation.tasks if recipe.evaluation else ():
        addresses[f"labeled:{row.task}"] = row.labeled
        if row.validation:
            addresses[f"validation:{row.task}"] = row.validation
        if row.head:
            addresses[f"head:{row.task}"] = row.head.weight
    return {name: read_file(objects, address) for name, address in addresses.items()}


def read_file(objects: Objects, address: str) -> CheckpointFile:
    """A file beside the checkpoints, as it is now."""
    if not is_text(address):
        return read_header(objects, address)[0]
    info = objects.head(address)
    return CheckpointFile(info.address, info.size, info.etag, info.version_id)


def _refuse_unequal(work: Work, base: Checkpoint, tasks: Sequence[Checkpoint], found: Fit) -> None:
    """Whole numbers can't be merged: where a task has others than the base, there is no right answer."""
    if not found.equal:
        return
    with TensorReader(work.objects) as reader:
        expected = reader.read(base, found.equal)
        for task, checkpoint in zip(work.recipe.tasks, tasks, strict=True):
            for name, tensor in reader.read(checkpoint, found.equal).items():
                if not tensor.equal(expected[name]):
                    raise BadInput(
                        f"{name!r} holds whole numbers that differ between the base and task {task.name!r}; "
                        "they can't be merged. Name it in the recipe's heads, and the base's are used",
                        tensor=name,
                    )
            work.watch.step()


def clear(work: Work) -> None:
    """Take away an earlier result that the recipe allows to overwrite: its manifest first, so it never looks whole."""
    objects, prefix = work.objects, work.claim.prefix
    with failures():
        try:
            manifest = _read_manifest(prefix, objects.read_all(prefix + artifacts.MANIFEST, MANIFEST_LIMIT_BYTES))
        except ObjectMissing:
            return
        if not work.claim.recipe.output.overwrite and manifest.get("job") != work.claim.job_id:
            raise OutputTaken(
                f"{prefix} was free when the job was submitted, and holds the result of {manifest.get('job')} by now; "
                "submit with another prefix, or with output.overwrite"
            )
        work.watch.confirm()  # a worker that is late would take away the result of the one that took over
        objects.delete(prefix + artifacts.MANIFEST)
        for file in manifest["files"]:
            work.watch.step()
            objects.delete(prefix + file["name"])


def _read_manifest(prefix: str, data: bytes) -> dict[str, Any]:
    """A manifest that lies in the way. Raises BadInput where it is none of ours: it can't say what to take away."""
    try:
        manifest = json.loads(data)
        names = [file["name"] for file in manifest["files"]]
    except (ValueError, LookupError, TypeError):
        names = [None]
    if not all(isinstance(name, str) for name in names):
        raise BadInput(f"{prefix}{artifacts.MANIFEST} is no manifest of a merge; remove it, or choose another prefix")
    return dict(manifest)


def write(work: Work, name: str, text: str) -> None:
    """Write an artifact of the job."""
    artifact = write_artifact(work.objects, work.claim.prefix, name, text.encode())
    work.watch.step(bytes_written=artifact.size)


def _parts(recipe: Recipe, plan: Plan, checkpoints: Sequence[Checkpoint]) -> Iterator[NewPart]:
    surveys = recipe.method.surveys and recipe.search is None  # else trials look for themselves
    if (recipe.has_features and plan.wanted()) or surveys:
        for index, task in enumerate(recipe.tasks):
            own = _addresses(plan, f"task:{task.name}")
            yield NewPart(Stage.CALIBRATE, index, task.name, CALIBRATE_WEIGHT, inputs=own)
    merge_weight = 2.0 * len(recipe.tasks) / max(plan.bytes_in, 1)
    if recipe.search is not None:
        weight = merge_weight * plan.bytes_in + EVALUATE_WEIGHT * len(recipe.tasks)
        for index in range(recipe.search.count(recipe.method)):
            yield NewPart(Stage.SEARCH, index, f"trial/{index + 1}", weight, peak_bytes=peaks.of_trial(plan))
    stage = Stage.ANALYZE if recipe.mode == "analysis" else Stage.MERGE
    for index, shard in enumerate(plan.shards):
        peak = peaks.of_shard(recipe, shard)
        weight, files = merge_weight * shard.bytes_in, _files(shard, checkpoints)
        yield NewPart(stage, index, shard.file, weight, len(shard.tensors), peak, files)
    if recipe.evaluation is not None:
        yield from _baseline_parts(recipe, recipe.evaluation, plan, merge_weight, checkpoints)
        yield from _evaluation_parts(recipe.evaluation, plan)
    yield NewPart(Stage.FINALIZE, 0, "finalize", FINALIZE_WEIGHT)


def _addresses(plan: Plan, role: str) -> tuple[str, ...]:
    return tuple(file.address for file in plan.inputs.get(role, ()))


def _files(shard: ShardPlan, checkpoints: Sequence[Checkpoint]) -> tuple[str, ...]:
    """The files in which a shard's tensors lie, where a checkpoint has several: every shard reads of a single one."""
    names = [tensor.name for tensor in shard.tensors]
    sharded = [checkpoint.tensors for checkpoint in checkpoints if len(checkpoint.files) > 1]
    return tuple(sorted({tensors[name].file for tensors in sharded for name in names if name in tensors}))


def _baseline_parts(
    recipe: Recipe, evaluation: Evaluation, plan: Plan, merge_weight: float, checkpoints: Sequence[Checkpoint]
) -> Iterator[NewPart]:
    """Every shard once more for each baseline, after those of the result."""
    every = [(name, shard) for name in evaluation.baselines for shard in plan.shards]
    for index, (name, shard) in enumerate(every, len(plan.shards)):
        weight, peak = merge_weight * shard.bytes_in, peaks.of_baseline(recipe, shard, name)
        files = _files(shard, checkpoints)
        yield NewPart(Stage.MERGE, index, f"{name}/{shard.file}", weight, len(shard.tensors), peak, files)


def _evaluation_parts(evaluation: Evaluation, plan: Plan) -> Iterator[NewPart]:
    """One for each model on each task, and one that looks at speed."""
    peak = peaks.of_model(plan)
    for index, (row, model) in enumerate(evaluation.parts):
        own = _addresses(plan, READ_BY.get(model, "").format(row.task))
        yield NewPart(Stage.EVALUATE, index, f"{row.task}/{model}", EVALUATE_WEIGHT, peak_bytes=peak, inputs=own)
    yield NewPart(Stage.EVALUATE, len(evaluation.parts), SPEED, EVALUATE_WEIGHT, peak_bytes=peaks.of_speed(plan))
