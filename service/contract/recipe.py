"""The recipe: what a merge is asked to do, and nothing about where it runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, ValidationError, ValidationInfo, field_validator, model_validator

from service.contract.addresses import Address, Name, Prefix
from service.contract.base import Frozen
from service.contract.errors import BadInput
from service.contract.evaluation import Evaluation, Gate, baseline_method, gate_fault
from service.contract.methods import METHODS, AnyMethod, Cat, Method
from service.contract.misfits import Misfit, refuse
from service.contract.patterns import checked_pattern, matches
from service.contract.presets import PresetName, expanded
from service.contract.resources import MERGES, Resource
from service.contract.search import (
    METHOD,
    SCALING,
    WEIGHT,
    Parameters,
    Search,
    changed,
    default_search,
    method_named,
    search_faults,
)
from service.contract.treatments import TREATMENTS, Treatment, treatment_adapter

MAX_TASKS = 64
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


class Place(Frozen):
    """Where a result goes."""

    prefix: Prefix | None = Field(None, description="A folder; omitted, the service chooses one under its workspace")
    overwrite: bool = False
    language: Literal["en", "ja"] = Field("en", description="What the report's page opens in; it holds both")


class Output(Place):
    """Where a merge's result goes and how it is laid out."""

    dtype: Literal["base", "F32", "F16", "BF16"] = Field("base", description="Type of floating-point tensors")
    shard_bytes: int = Field(5_000_000_000, ge=1024, le=1_000_000_000_000)


class Digested(Frozen):
    """A recipe of any kind."""

    @property
    def sha256(self) -> str:
        """Digest of the recipe with its defaults filled in."""
        return canonical_sha256(self.model_dump(mode="json"))


Seed = Annotated[int, Field(ge=0, lt=2**63)]
Priority = Annotated[
    int,
    Field(ge=-100, le=100, description="Of your own jobs the highest goes first; it takes nothing from other callers"),
]
Deadline = Annotated[int | None, Field(ge=1, le=31_536_000)]


Metadata = Annotated[
    dict[Annotated[str, Field(min_length=1, max_length=64)], Annotated[str, Field(max_length=512)]],
    Field(max_length=16, description="Up to 16 labels of the caller's own"),
]


class Recipe(Digested):
    """What a merge is asked to do. Tasks keep their order."""

    resource: ClassVar[Resource] = MERGES

    mode: Literal["merge", "analysis"] = Field(
        "merge", description="analysis measures how much the tasks disturb each other, and writes no weights"
    )
    base: Address
    tasks: tuple[Task, ...] = Field(min_length=1, max_length=MAX_TASKS)
    method: AnyMethod = Field(
        default_factory=Cat, validate_default=True, description="A method with its parameters, or the name of a preset"
    )
    overrides: tuple[MethodOverride, ...] = Field(
        (), max_length=1000, description="Other parameters of the method by parameter name; the first match wins"
    )
    treatments: tuple[TreatmentOverride, ...] = Field((), max_length=1000, description="The first match wins")
    heads: tuple[Pattern, ...] = Field(
        (), max_length=1000, description="Parameters that belong to their task alone though all shapes agree"
    )
    evaluation: Evaluation | None = None
    gates: tuple[Gate, ...] = Field((), max_length=100)
    search: Search | None = Field(
        None,
        description="Parameters to search for, in place of those that are given; null for none. Omitted, and no "
        "scaling given, but validation samples of every task, or exemplars of tasks that are evaluated by classes: "
        "a few scalings around the method's default",
    )
    output: Output = Field(default_factory=Output)
    seed: Seed = 0
    allow_tf32: bool = Field(
        False, description="On NVIDIA GPUs, multiply in TF32: faster, but with 10 bits of what float32 has 23 of"
    )
    priority: Priority = 0
    metadata: Metadata = Field(default_factory=dict)
    deadline_seconds: Deadline = None

    @field_validator("method", mode="before", json_schema_input_type=AnyMethod | PresetName)
    @classmethod
    def _expand_preset(cls, method: object, info: ValidationInfo) -> object:
        return expanded(method, with_data=_bring_features(info.data.get("tasks", ())))

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
        fault = _method_fault(method, info.data)
        if fault is not None:
            raise ValueError(fault)
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
    def _tasks_agree(cls, tasks: tuple[Task, ...], info: ValidationInfo) -> tuple[Task, ...]:
        if info.data.get("mode") == "analysis" and len(tasks) < 2:
            raise ValueError("an analysis holds tasks against each other; give at least two")
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
        if info.data.get("mode") == "analysis" and evaluation is not None:
            raise ValueError("an analysis makes no model that could be evaluated; leave evaluation out, or merge")
        names = {task.name for task in info.data.get("tasks", ())}
        evaluated = _evaluated(evaluation)
        for name in evaluated if names else ():
            if name not in names or evaluated.count(name) > 1:
                raise ValueError(f"evaluation names the task {name!r}, which is no task or is named twice")
        for baseline in evaluation.baselines if evaluation else ():
            limit = baseline_method(baseline).task_limit
            if limit is not None and len(names) > limit:
                raise ValueError(f"the baseline {baseline} takes at most {limit} tasks, not {len(names)}")
        return evaluation

    @field_validator("gates")
    @classmethod
    def _gates_are_measured(cls, gates: tuple[Gate, ...], info: ValidationInfo) -> tuple[Gate, ...]:
        if info.data.get("mode") == "analysis" and gates:
            raise ValueError("an analysis makes no model that a gate could judge; leave gates out, or merge")
        if "tasks" not in info.data or "evaluation" not in info.data:
            return gates  # what is wrong there is said there
        tasks = tuple(task.name for task in info.data["tasks"])
        faults = [gate_fault(gate, info.data["evaluation"], tasks) for gate in gates]
        refuse((Misfit((place,), fault) for place, fault in enumerate(faults) if fault is not None), gates)
        return gates

    @field_validator("search")
    @classmethod
    def _search_fits(cls, search: Search | None, info: ValidationInfo) -> Search | None:
        known = info.data
        if search is None or not {"tasks", "method", "overrides", "evaluation"} <= known.keys():
            return search  # what is wrong there is said there
        tasks = {task.name: task.exemplars is not None for task in known["tasks"]}
        evaluation, method = known["evaluation"], known["method"]
        misfits = [*search_faults(search, method, tasks, evaluation, is_overridden=bool(known["overrides"]))]
        choice = search.space.get(METHOD)
        for place, name in enumerate(choice if isinstance(choice, tuple) else ()):
            fault = _method_fault(method_named(str(name), method), known) if name in METHODS else None
            misfits += [Misfit(("space", METHOD, place), fault)] if fault is not None else []
        refuse(misfits, search)
        return search

    @model_validator(mode="after")
    def _fill_search(self) -> Self:
        """A recipe that says nothing about a search may get one; null says no, and so does one that was stored."""
        if "search" in self.model_fields_set:
            return self
        return self.model_copy(update={"search": self._usual_search()})

    def _usual_search(self) -> Search | None:
        """The search that nobody asked for; None where there is nothing to compare by, or to look for."""
        is_given = any({SCALING, "then"} & row.parameters.keys() for row in self.overrides)
        if self.mode == "analysis" or is_given:
            return None
        return default_search(
            self.method, {task.name: task.exemplars is not None for task in self.tasks}, self.evaluation
        )

    def tried(self, parameters: Parameters) -> Recipe:
        """The recipe of a trial. Raises BadInput where the parameters do not go together."""
        asked = {**self.model_dump(mode="json"), "search": None}
        asked["method"] = changed(self.method, parameters)
        for task in asked["tasks"]:
            task["weight"] = parameters.get(WEIGHT + task["name"], task["weight"])
        try:
            return Recipe.model_validate(asked)
        except ValidationError as error:
            raise BadInput(_reason(error)) from None

    def override(self, name: str) -> AnyMethod | None:
        """The method as the first override that matches a parameter's name changes it; None where none does."""
        row = next((row for row in self.overrides if matches(name, row.match)), None)
        return None if row is None else self.method.changed(row.parameters)

    @property
    def has_features(self) -> bool:
        """Whether the tasks bring exemplars or statistics."""
        return _bring_features(self.tasks)


def _method_fault(method: AnyMethod, known: Mapping[str, Any]) -> str | None:
    """Why a method can't merge the tasks of a recipe, as far as that is ``known``; None where it can."""
    tasks, combining = known.get("tasks"), method.combining
    if tasks is None:  # what is wrong with them is said there
        return None
    if known.get("mode") == "analysis" and not method.trims:
        return f"an analysis measures what cat would remove, not {_named(method)}; leave method out, or give cat"
    if combining.task_limit is not None and len(tasks) > combining.task_limit:
        limit = f"at most {combining.task_limit} tasks, not {len(tasks)}"
        return f"{_named(combining)} takes {limit}; karcher takes any number"
    if method.needs_statistics and not _bring_features(tasks):
        return f"{_named(combining)} needs exemplars or statistics of every task"
    return None


def _reason(error: ValidationError) -> str:
    """What pydantic found wrong; a sentence of ours as it is, with its code."""
    raised = [(fault["msg"], fault.get("ctx", {}).get("error")) for fault in error.errors()]
    sentences = [own.args[0] if isinstance(own, ValueError) else message for message, own in raised]
    return sentences[0] if len(sentences) == 1 else "; ".join(sentences)


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
