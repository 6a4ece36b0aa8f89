"""The recipe of an evaluation by itself: checkpoints to measure on labeled samples, and the rules they must hold to."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator

from service.contract.addresses import Address, Name, Prefix
from service.contract.base import Frozen
from service.contract.evaluation import ABOUT_ONE_TASK, RETENTIONS, Evaluation, Gate, TaskEvaluation, task_gate_fault
from service.contract.misfits import Misfit, refuse
from service.contract.recipe import Deadline, Digested, Metadata, Place, Priority, Seed
from service.contract.resources import EVALUATIONS, Resource

MAX_MODELS = 32
NEEDS_REFERENCE = (*RETENTIONS, "task_drop")


class EvaluatedModel(Frozen):
    """One checkpoint to measure, and on which tasks."""

    name: Name
    checkpoint: Address = Field(description="A whole model, or an adapter of the recipe's base")
    heads: Prefix | None = Field(
        None,
        description="A folder with <task>.safetensors files; omitted, heads/ beside the checkpoint, if it is there",
    )
    tasks: tuple[Name, ...] | None = Field(None, min_length=1, max_length=64, description="Omitted, all tasks")
    reference: bool = Field(False, description="On its tasks, the other models are held against this one's score")

    def is_measured_on(self, task: str) -> bool:
        return self.tasks is None or task in self.tasks


class EvaluationRecipe(Digested):
    """Which checkpoints to measure on what. Models and tasks keep their order."""

    resource: ClassVar[Resource] = EVALUATIONS

    mode: Literal["evaluation"] = "evaluation"
    base: Address | None = Field(None, description="The whole model that adapters among the checkpoints are of")
    evaluation: Evaluation
    models: tuple[EvaluatedModel, ...] = Field(min_length=1, max_length=MAX_MODELS)
    speed: bool = Field(False, description="Also time one batch of the first task through every model")
    gates: tuple[Gate, ...] = Field(
        (), max_length=100, description="Every model that is no reference must hold to each of them"
    )
    output: Place = Field(default_factory=Place)
    seed: Seed = 0
    priority: Priority = 0
    allow_tf32: bool = Field(False, description="On NVIDIA GPUs, multiply in TF32: faster, but rougher")
    metadata: Metadata = Field(default_factory=dict)
    deadline_seconds: Deadline = None

    @field_validator("evaluation")
    @classmethod
    def _is_of_checkpoints(cls, evaluation: Evaluation) -> Evaluation:
        if evaluation.baselines:
            raise ValueError("baselines are other merges, and nothing is merged here; leave them out")
        if any(row.validation for row in evaluation.tasks):
            raise ValueError("validation samples are for a search, and nothing is searched for here; leave them out")
        names = [row.task for row in evaluation.tasks]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"the task {twice!r} is named twice")
        return evaluation

    @field_validator("models")
    @classmethod
    def _models_cover_tasks(
        cls, models: tuple[EvaluatedModel, ...], info: ValidationInfo
    ) -> tuple[EvaluatedModel, ...]:
        folded = [model.name.casefold() for model in models]
        twice = next((model.name for model in models if folded.count(model.name.casefold()) > 1), None)
        if twice is not None:
            raise ValueError(f"models must have different names (letter case aside): {twice} appears twice")
        if all(model.reference for model in models):
            raise ValueError("all models are references; at least one must be measured for its own sake")
        if "evaluation" not in info.data:  # what is wrong with it is said there
            return models
        tasks = [row.task for row in info.data["evaluation"].tasks]
        for model in models:
            unknown = sorted(set(model.tasks or ()) - set(tasks))
            if unknown:
                raise ValueError(
                    f"{model.name} names the tasks {', '.join(unknown)}, which evaluation does not measure"
                )
        for task in tasks:
            cls._refuse_unclear(task, [model for model in models if model.is_measured_on(task)])
        return models

    @staticmethod
    def _refuse_unclear(task: str, measured: list[EvaluatedModel]) -> None:
        """On each task there must be a model to measure, and one reference at most."""
        references = [model.name for model in measured if model.reference]
        if len(references) > 1:
            raise ValueError(
                f"the task {task!r} has more than one reference: {', '.join(references)}; give them tasks, each its own"
            )
        if len(measured) == len(references):
            raise ValueError(f"no model but a reference is measured on the task {task!r}")

    @field_validator("gates")
    @classmethod
    def _gates_are_measured(cls, gates: tuple[Gate, ...], info: ValidationInfo) -> tuple[Gate, ...]:
        if "evaluation" not in info.data or "models" not in info.data:
            return gates  # what is wrong there is said there
        known = info.data["evaluation"], info.data["models"]
        is_timed = info.data.get("speed", True)  # where that is no truth value, it is said there
        faults = [_speed_fault(gate, known[1], is_timed) or _gate_fault(gate, *known) for gate in gates]
        refuse((Misfit((place,), fault) for place, fault in enumerate(faults) if fault is not None), gates)
        return gates

    @property
    def parts(self) -> tuple[tuple[TaskEvaluation, EvaluatedModel], ...]:
        """What is measured on what, in the order of the evaluation's parts."""
        return tuple((row, model) for row in self.evaluation.tasks for model in self.measured_on(row.task))

    @property
    def judged(self) -> tuple[EvaluatedModel, ...]:
        """The models that gates are about: all but the references."""
        return tuple(model for model in self.models if not model.reference)

    def measured_on(self, task: str) -> tuple[EvaluatedModel, ...]:
        """The models that are measured on a task."""
        return tuple(model for model in self.models if model.is_measured_on(task))

    def reference_on(self, task: str) -> EvaluatedModel | None:
        """The model that the others are held against on a task, where there is one."""
        return _reference(self.models, task)


def _reference(models: tuple[EvaluatedModel, ...], task: str) -> EvaluatedModel | None:
    return next((model for model in models if model.reference and model.is_measured_on(task)), None)


def _speed_fault(gate: Gate, models: tuple[EvaluatedModel, ...], is_timed: bool) -> str | None:
    """Why a gate on latency can't be computed; None where it can, or is about something else."""
    if gate.metric != "latency_ratio":
        return None
    if not is_timed:
        return 'the gate latency_ratio needs the models to be timed; ask for it with "speed": true'
    if not any(model.reference for model in models):
        return 'latency_ratio holds models against references, and there is none; mark a model with "reference": true'
    return None


def _gate_fault(gate: Gate, evaluation: Evaluation, models: tuple[EvaluatedModel, ...]) -> str | None:
    """Why a gate on scores can't be computed for these models; None where it can."""
    if gate.task is not None:
        fault = task_gate_fault(gate, evaluation.row(gate.task))
        if fault is not None:
            return fault
    if gate.metric not in NEEDS_REFERENCE:
        return None
    tasks = [gate.task] if gate.metric in ABOUT_ONE_TASK else [row.task for row in evaluation.tasks]
    lacking = [task for task in tasks if task is not None and _reference(models, task) is None]
    if lacking:
        return (
            f"{gate.metric} holds models against a reference, and there is none on {', '.join(lacking)}; mark a model "
            'with "reference": true'
        )
    return None
