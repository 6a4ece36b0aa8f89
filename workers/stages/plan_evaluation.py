"""Plans an evaluation by itself: pins its inputs, and asks for a part per model and task, and one for speed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from service.contract import artifacts
from service.contract.checkpoint import Checkpoint
from service.contract.errors import BadInput
from service.contract.evaluating import EvaluatedModel, EvaluationRecipe
from service.contract.evaluation import SPEED, TaskEvaluation
from service.contract.evaluation_plan import evaluation_plan, evaluation_samples, measured_tasks
from service.contract.heads import own_head_faults
from service.contract.labeled import model_faults
from service.contract.parts import Done
from service.contract.plan import Plan
from service.contract.stages import NewPart, Stage
from service.stores.heads import find_heads, lacking, read_whole, with_head
from service.stores.objects import failures
from workers.candidate import read_base
from workers.stages.plan import EVALUATE_WEIGHT, FINALIZE_WEIGHT, clear, read_file, write
from workers.work import Work


def run(work: Work) -> Done:
    """Write ``merge/recipe.json`` and ``merge/plan.json``, and ask for the parts of the later stages.

    Raises:
        BadInput: a checkpoint can't be measured so (any more).
        InputMissing, StorageFailure.
    """
    recipe, objects = work.evaluation_recipe, work.objects
    wholes, equipped = dict[str, Checkpoint](), dict[tuple[str, str], Checkpoint]()
    warnings: list[str] = []
    with failures():
        base = read_base(objects, recipe)
        for model in recipe.models:
            whole = wholes[model.name] = read_whole(objects, model, base)
            heads, tasks = find_heads(objects, model), measured_tasks(recipe, model)
            equipped |= {(model.name, task): with_head(objects, whole, heads, task) for task in tasks}
            warnings += lacking(model, heads, tasks)
        samples = {name: read_file(objects, address) for name, address in evaluation_samples(recipe).items()}
    for row, model in recipe.parts:
        checkpoint = equipped[model.name, row.task]
        for fault in (*model_faults(checkpoint.config or {}, row), *own_head_faults(checkpoint, row)):
            raise BadInput(fault)
    plan = evaluation_plan(work.claim.prefix, base, wholes, equipped, samples, warnings)
    clear(work)
    write(work, artifacts.RECIPE, recipe.model_dump_json(indent=2))
    write(work, artifacts.PLAN, plan.model_dump_json())
    return Done(warnings=plan.warnings, parts=tuple(_parts(recipe, plan, wholes)))


def _parts(recipe: EvaluationRecipe, plan: Plan, wholes: Mapping[str, Checkpoint]) -> Iterator[NewPart]:
    peak = plan.peak_memory_bytes
    for index, (row, model) in enumerate(recipe.parts):
        files = tuple(file.address for file in wholes[model.name].files)
        yield NewPart(Stage.EVALUATE, index, _named(row, model), EVALUATE_WEIGHT, peak_bytes=peak, inputs=files)
    if recipe.speed:
        yield NewPart(Stage.EVALUATE, len(recipe.parts), SPEED, EVALUATE_WEIGHT, peak_bytes=peak)
    yield NewPart(Stage.FINALIZE, 0, "finalize", FINALIZE_WEIGHT)


def _named(row: TaskEvaluation, model: EvaluatedModel) -> str:
    return f"{row.task}/{model.name}"
