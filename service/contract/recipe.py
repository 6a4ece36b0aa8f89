"""The recipe: what a merge is asked to do, and nothing about where it runs."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal, Self
from urllib.parse import unquote

from pydantic import AfterValidator, Field, ValidationError, ValidationInfo, field_validator, model_validator

from service.contract.base import Frozen
from service.contract.methods import AnyMethod, Cat, Method
from service.contract.patterns import checked_pattern, matches
from service.contract.treatments import TREATMENTS, Treatment, treatment_adapter

MAX_TASKS = 64
SCHEMES = ("s3://", "file:///")


def _checked_address(address: str) -> str:
    if not address.startswith(SCHEMES):
        raise ValueError(f"must start with {' or '.join(SCHEMES)}")
    if any(ord(character) < 32 or ord(character) == 127 for character in address):
        raise ValueError("must not contain control characters")
    path = unquote(address.split("://", 1)[1])
    if ".." in path.replace("\\", "/").split("/"):
        raise ValueError("must not contain '..', encoded or not")
    if address.startswith("s3://") and not address[5:].partition("/")[0]:
        raise ValueError("must name a bucket: s3://bucket/key")
    return address


Address = Annotated[
    str,
    Field(min_length=6, max_length=2048, description="s3://bucket/key, or file:///path under a configured root"),
    AfterValidator(_checked_address),
]
Prefix = Annotated[Address, AfterValidator(lambda prefix: prefix if prefix.endswith("/") else prefix + "/")]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", description="Letters, digits, . _ -")]
Pattern = Annotated[
    str,
    Field(
        min_length=1,
        max_length=512,
        description="Shell-style pattern over parameter names; {a..b} is a number from a to b",
    ),
    AfterValidator(checked_pattern),
]


class Task(Frozen):
    """One fine-tuned checkpoint, and what stands for its data."""

    name: Name
    checkpoint: Address
    exemplars: Address | None = Field(None, description="Unlabeled samples: a .safetensors file of model inputs")
    statistics: Address | None = Field(None, description="A statistics file in place of exemplars")
    weight: float = Field(1.0, ge=0, le=1000, description="Factor on this task's vector")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.exemplars and self.statistics:
            raise ValueError("give exemplars or statistics, not both")
        return self


class TreatmentOverride(Frozen):
    """Gives the parameters whose names match another treatment than their role would."""

    match: Pattern
    use: Literal["projection", "scale_mask", "shift_mask", "keep"]
    parameters: dict[str, Any] = Field(default_factory=dict, description="Parameters of that treatment")

    @field_validator("parameters")
    @classmethod
    def _parameters_known(cls, parameters: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        if "use" in info.data:  # else that is the fault to fix first
            TREATMENTS[info.data["use"]](**parameters)
        return parameters

    def treatment(self) -> Treatment:
        """The treatment with its parameters filled in."""
        return treatment_adapter.validate_python({"name": self.use, **self.parameters})


class MethodOverride(Frozen):
    """Gives the parameters whose names match other parameters of the recipe's method."""

    match: Pattern
    parameters: dict[str, Any] = Field(min_length=1, description="Parameters of the recipe's method")


class FeatureHead(Frozen):
    """A head matrix applied to pooled features, as CLIP's zero-shot heads are."""

    weight: Address = Field(description="A .safetensors file with `weight` [classes, d] and optional `logit_scale`")
    pooling: Literal["cls", "mean"] = "mean"
    normalize: bool = Field(True, description="Scale features to unit length before the product")


class TaskEvaluation(Frozen):
    """Labeled samples of one task."""

    task: Name
    labeled: Address = Field(description="A .safetensors file of model inputs and `labels` [n] int64")
    head: FeatureHead | None = Field(None, description="Omit to use the checkpoint's own classification head")


class Evaluation(Frozen):
    """What to measure on the merged model, on the base and on every expert."""

    tasks: tuple[TaskEvaluation, ...] = Field(min_length=1, max_length=MAX_TASKS)
    batch_size: int = Field(64, ge=1, le=65536)


class Gate(Frozen):
    """A rule agreed beforehand: the job is rejected where the merged model falls short of it."""

    metric: Literal["worst_task_retention", "mean_retention", "task_retention"]
    at_least: float = Field(ge=0, le=10, description="Share of the expert's score")
    task: Name | None = Field(None, description="For task_retention: which task")

    @model_validator(mode="after")
    def _task_named(self) -> Self:
        if (self.metric == "task_retention") != (self.task is not None):
            raise ValueError("task_retention names a task, the other metrics do not")
        return self


class Output(Frozen):
    """Where the result goes and how it is laid out."""

    prefix: Prefix | None = Field(None, description="A folder; omitted, the service chooses one under its workspace")
    dtype: Literal["base", "F32", "F16", "BF16"] = Field("base", description="Type of floating-point tensors")
    shard_bytes: int = Field(5_000_000_000, ge=1024, le=1_000_000_000_000)
    overwrite: bool = False


Metadata = Annotated[
    dict[Annotated[str, Field(min_length=1, max_length=64)], Annotated[str, Field(max_length=512)]],
    Field(max_length=16, description="Up to 16 labels of the caller's own"),
]


class Recipe(Frozen):
    """What a merge is asked to do. Tasks keep their order."""

    base: Address
    tasks: tuple[Task, ...] = Field(min_length=1, max_length=MAX_TASKS)
    method: AnyMethod = Field(default_factory=Cat, validate_default=True)
    overrides: tuple[MethodOverride, ...] = Field(
        (), max_length=1000, description="Other parameters of the method by parameter name; the first match wins"
    )
    treatments: tuple[TreatmentOverride, ...] = Field((), max_length=1000, description="The first match wins")
    heads: tuple[Pattern, ...] = Field(
        (), max_length=1000, description="Parameters that belong to their task alone though all shapes agree"
    )
    evaluation: Evaluation | None = None
    gates: tuple[Gate, ...] = Field((), max_length=100)
    output: Output = Field(default_factory=Output)
    seed: int = Field(0, ge=0, lt=2**63)
    metadata: Metadata = Field(default_factory=dict)
    deadline_seconds: int | None = Field(None, ge=1, le=31_536_000)

    @field_validator("method")
    @classmethod
    def _fill_balance(cls, method: AnyMethod, info: ValidationInfo) -> AnyMethod:
        """A proxy is on another scale than features, so the default balance depends on which it is."""
        if isinstance(method, Cat) and method.balance is None:
            has_features = _bring_features(info.data.get("tasks", ()))
            return method.model_copy(update={"balance": 5.0 if has_features else 0.5})
        return method

    @field_validator("method")
    @classmethod
    def _method_fits_tasks(cls, method: AnyMethod, info: ValidationInfo) -> AnyMethod:
        tasks = info.data.get("tasks")
        if tasks is None:  # what is wrong with them is said there
            return method
        combining = method.combining
        if combining.task_limit is not None and len(tasks) > combining.task_limit:
            raise ValueError(
                f"{_named(combining)} takes at most {combining.task_limit} tasks, not {len(tasks)}; "
                "karcher takes any number"
            )
        if method.needs_statistics and not _bring_features(tasks):
            raise ValueError(f"{_named(combining)} needs exemplars or statistics of every task")
        return method

    @field_validator("overrides")
    @classmethod
    def _overrides_fit(cls, overrides: tuple[MethodOverride, ...], info: ValidationInfo) -> tuple[MethodOverride, ...]:
        if "method" not in info.data:  # what is wrong with it is said there
            return overrides
        method: AnyMethod = info.data["method"]
        for row in overrides:
            try:
                method.changed(row.parameters)
            except ValidationError as error:
                faults = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
                raise ValueError(f"{row.match}: {method.name} does not take these parameters: {faults}") from None
            except ValueError as error:
                raise ValueError(f"{row.match}: {error}") from None
        return overrides

    @field_validator("tasks")
    @classmethod
    def _tasks_agree(cls, tasks: tuple[Task, ...]) -> tuple[Task, ...]:
        names = [task.name for task in tasks]
        folded = [name.casefold() for name in names]  # heads/<task> must not collide on any file system
        twice = sorted({name for name, low in zip(names, folded, strict=True) if folded.count(low) > 1})
        if twice:
            raise ValueError(f"tasks must have different names (letter case aside): {', '.join(twice)} appears twice")
        if not any(task.weight for task in tasks):
            raise ValueError("at least one task needs a weight above 0")
        without = [task.name for task in tasks if not (task.exemplars or task.statistics)]
        if without and len(without) < len(tasks):
            raise ValueError(
                "either every task brings exemplars or statistics, or none does; "
                f"these bring neither: {', '.join(without)}"
            )
        return tasks

    @field_validator("evaluation")
    @classmethod
    def _evaluated_are_tasks(cls, evaluation: Evaluation | None, info: ValidationInfo) -> Evaluation | None:
        names = {task.name for task in info.data.get("tasks", ())}
        evaluated = _evaluated(evaluation)
        for name in evaluated if names else ():
            if name not in names or evaluated.count(name) > 1:
                raise ValueError(f"evaluation names the task {name!r}, which is no task or is named twice")
        return evaluation

    @field_validator("gates")
    @classmethod
    def _gates_are_measured(cls, gates: tuple[Gate, ...], info: ValidationInfo) -> tuple[Gate, ...]:
        if "tasks" not in info.data or "evaluation" not in info.data:
            return gates  # what is wrong there is said there
        evaluated = _evaluated(info.data["evaluation"])
        for gate in gates:
            if gate.task is not None and gate.task not in evaluated:
                raise ValueError(f"a gate needs the score of task {gate.task!r}, which evaluation does not measure")
        missing = sorted({task.name for task in info.data["tasks"]} - set(evaluated))
        if missing and any(gate.task is None for gate in gates):
            raise ValueError(f"a gate over all tasks needs labels for every task; missing: {', '.join(missing)}")
        return gates

    def override(self, name: str) -> AnyMethod | None:
        """The method as the first override that matches a parameter's name changes it; None where none does."""
        row = next((row for row in self.overrides if matches(name, row.match)), None)
        return None if row is None else self.method.changed(row.parameters)

    @property
    def has_features(self) -> bool:
        """Whether the tasks bring exemplars or statistics."""
        return _bring_features(self.tasks)

    @property
    def sha256(self) -> str:
        """Digest of the recipe with its defaults filled in."""
        return canonical_sha256(self.model_dump(mode="json"))


def _named(method: Method) -> str:
    return str(method.model_dump()["name"])


def _bring_features(tasks: tuple[Task, ...]) -> bool:
    return all(task.exemplars or task.statistics for task in tasks)


def _evaluated(evaluation: Evaluation | None) -> list[str]:
    return [row.task for row in evaluation.tasks] if evaluation else []


def canonical_sha256(value: object) -> str:
    """SHA-256, in hex, of a JSON value in one canonical spelling: sorted keys, no spaces, UTF-8."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()
