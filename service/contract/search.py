"""The search: which parameters of a merge to try, where, how often, and what makes one trial better than another."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, ValidationError, model_validator

from service.contract.base import Frozen
from service.contract.evaluation import Evaluation
from service.contract.methods import METHODS, AnyMethod, Cat

METHOD = "method"
WEIGHT = "weights."  # before a task's name
SCALING = "scaling"
MAX_TRIALS = 1000
TRIALS = 20  # where neither trials nor seconds are given
TRIALS_IN_TIME = 200  # at most, where only seconds are given
NEVER = ("name", "then", "features_at")  # what a method is, what has parameters of its own, what calibration depends on

Value = bool | int | float | str | None
Values = Annotated[tuple[Value, ...], Field(min_length=1, max_length=256)]
Parameters = Mapping[str, Value]
Sampler = Literal["tpe", "random", "grid"]


class Range(Frozen):
    """Numbers from ``low`` to ``high``, both included; whole ones where the parameter is a whole number."""

    low: float
    high: float
    log: bool = Field(False, description="Spread trials evenly over the logarithm")

    @model_validator(mode="after")
    def _is_a_range(self) -> Self:
        if self.low >= self.high:
            raise ValueError(f"the range from {self.low:g} to {self.high:g} is empty; low must be below high")
        if self.log and self.low <= 0:
            raise ValueError("a logarithmic range must begin above 0")
        return self


def _which(choice: object) -> str:
    return "range" if isinstance(choice, dict | Range) else "list"


Choice = Annotated[Annotated[Range, Tag("range")] | Annotated[Values, Tag("list")], Discriminator(_which)]


class Objective(Frozen):
    """A weighted sum of the mean and the worst retention over all tasks; more is better."""

    mean_retention: float = Field(0.0, ge=0, le=1000)
    worst_retention: float = Field(0.0, ge=0, le=1000)

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if not self.mean_retention + self.worst_retention:
            raise ValueError("an objective needs a weight above 0")
        return self

    def of(self, retentions: Sequence[float]) -> float:
        """The objective's value, from each task's retention; NaN where one of them is."""
        if not all(map(math.isfinite, retentions)):
            return math.nan
        return self.mean_retention * sum(retentions) / len(retentions) + self.worst_retention * min(retentions)


class Search(Frozen):
    """Which parameters to search for, by trials that are compared on validation samples alone."""

    space: dict[str, Choice] = Field(
        min_length=1,
        max_length=64,
        description="By name of the method's parameter, of `method`, or `weights.<task>`: a range or a list of values",
    )
    objective: Literal["mean_retention", "worst_retention"] | Objective = "mean_retention"
    trials: int | None = Field(None, ge=1, le=MAX_TRIALS, description="At most; omitted, 20, or 200 within `seconds`")
    seconds: float | None = Field(None, gt=0, le=31_536_000, description="No trial begins later, from the first one on")
    sampler: Sampler = Field("tpe", description="Optuna's TPE, at random, or every combination of lists in order")

    @model_validator(mode="after")
    def _grid_is_of_lists(self) -> Self:
        ranges = [name for name, choice in self.space.items() if isinstance(choice, Range)]
        if self.sampler == "grid" and ranges:
            raise ValueError(f"a grid goes through lists of values; {', '.join(ranges)} is a range")
        return self

    @model_validator(mode="after")
    def _methods_are_methods(self) -> Self:
        choice = self.space.get(METHOD, ())
        if isinstance(choice, Range) or any(name not in METHODS for name in choice):
            raise ValueError(f"method is searched for in a list of names; those are {', '.join(METHODS)}")
        return self

    @property
    def weights(self) -> Objective:
        """The objective as the weighted sum that it is."""
        if isinstance(self.objective, Objective):
            return self.objective
        return Objective.model_validate({self.objective: 1.0})

    def methods(self, asked: AnyMethod) -> tuple[AnyMethod, ...]:
        """Every method that a trial may merge by: as asked for, or with its defaults where it is another one."""
        choice = self.space.get(METHOD)
        names = choice if isinstance(choice, tuple) else (asked.name,)
        return tuple(asked if name == asked.name else METHODS[str(name)]() for name in names)

    def cells(self, asked: AnyMethod) -> list[dict[str, Value]]:
        """Every combination of a grid, in order; a parameter that a combination's method lacks is left out of it."""
        lists = {name: choice for name, choice in self.space.items() if not isinstance(choice, Range)}
        found: dict[str, dict[str, Value]] = {}
        for values in product(*lists.values()):
            cell = dict(zip(lists, values, strict=True))
            method = str(cell.get(METHOD, asked.name))
            kept = {name: value for name, value in cell.items() if applies(name, method)}
            found.setdefault(repr(kept), kept)
        return list(found.values())

    def count(self, asked: AnyMethod) -> int:
        """How many trials there are at most."""
        trials = self.trials or (TRIALS if self.seconds is None else TRIALS_IN_TIME)
        return min(trials, len(self.cells(asked))) if self.sampler == "grid" else trials

    @property
    def settings(self) -> float:
        """How many ways there are to choose everything but the scaling; infinite where one is a range of fractions."""
        sizes = [_size(name, choice) for name, choice in self.space.items() if name != SCALING]
        return math.prod(sizes)


def applies(name: str, method: str) -> bool:
    """Whether a name in a space says something about a merge by this method."""
    return name == METHOD or name.startswith(WEIGHT) or name in METHODS[method].model_fields


def is_whole(name: str, method: str) -> bool:
    """Whether a method's parameter is a whole number."""
    return name in METHODS[method].model_fields and METHODS[method].model_fields[name].annotation is int


def _size(name: str, choice: Choice) -> float:
    if not isinstance(choice, Range):
        return len(choice)
    whole = any(is_whole(name, method) for method in METHODS)
    return choice.high - choice.low + 1 if whole else math.inf


def search_faults(
    search: Search, asked: AnyMethod, tasks: Sequence[str], evaluation: Evaluation | None, *, is_overridden: bool
) -> Iterator[str]:
    """Why a merge of ``tasks`` can't be searched for so; a sentence each.

    ``is_overridden`` says that the recipe gives some parameters other parameters of the method.
    """
    rows = {row.task: row for row in evaluation.tasks} if evaluation else {}
    missing = [task for task in tasks if task not in rows or rows[task].validation is None]
    if missing:
        yield (
            "a search compares trials on validation samples of every task; the evaluation has none for "
            f"{', '.join(missing)}"
        )
    if is_overridden and METHOD in search.space:
        yield "overrides hold for one method alone; leave them out, or method out of the search's space"
    methods = search.methods(asked)
    for name, choice in search.space.items():
        if name.startswith(WEIGHT):
            yield from _weight_faults(name, choice, tasks)
        elif name != METHOD:
            yield from _parameter_faults(name, choice, methods)


def _weight_faults(name: str, choice: Choice, tasks: Sequence[str]) -> Iterator[str]:
    if name.removeprefix(WEIGHT) not in tasks:
        yield f"{name} is the weight of no task; tasks are {', '.join(tasks)}"
    for value in _ends(choice):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1000:
            yield f"{name}: {value!r} is no weight; weights are numbers from 0 to 1000"


def _parameter_faults(name: str, choice: Choice, methods: Sequence[AnyMethod]) -> Iterator[str]:
    knowing = [method for method in methods if name in type(method).model_fields and name not in NEVER]
    if not knowing:
        known = sorted({key for method in methods for key in type(method).model_fields} - set(NEVER))
        yield (
            f"{' and '.join(method.name for method in methods)} can't be searched for {name!r}; "
            f"parameters are {', '.join([METHOD, 'weights.<task>', *known])}"
        )
    for method in knowing:
        if name == SCALING and isinstance(method, Cat) and method.then is not None:
            yield f"scaling has no effect where {method.then.name} combines the trimmed task vectors"
        if name == SCALING and isinstance(method, Cat) and method.features_at == "scaled":
            yield "features are taken at one scaling for all trials: a search of scaling needs features_at: task"
        if isinstance(choice, Range) and type(method).model_fields[name].annotation is bool:
            yield f"{name} is true or false; give a list of values"
        for value in _ends(choice):
            yield from _value_faults(name, value, method)


def _value_faults(name: str, value: Value, method: AnyMethod) -> Iterator[str]:
    """What is wrong with the value by itself: how it goes with others is seen in the trial."""
    try:
        type(method).model_validate({**method.model_dump(), name: value})
    except ValidationError as error:
        for fault in error.errors():
            if fault["loc"][:1] == (name,):
                yield f"{method.name} does not take {name} = {value!r}: {fault['msg']}"


def _ends(choice: Choice) -> tuple[Value, ...]:
    return (choice.low, choice.high) if isinstance(choice, Range) else choice


def changed(asked: AnyMethod, parameters: Parameters) -> dict[str, Any]:
    """The method of a trial as a recipe has it: what was asked for, with the trial's parameters filled in."""
    name = str(parameters.get(METHOD, asked.name))
    start = asked.model_dump(mode="json") if name == asked.name else {"name": name}
    own = {key: value for key, value in parameters.items() if key != METHOD and not key.startswith(WEIGHT)}
    return {**start, **own}
