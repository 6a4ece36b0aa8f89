"""The search: which parameters of a merge to try, where, how often, and what makes one trial better than another."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, product
from typing import Annotated, Any, Final, Literal, Self

from pydantic import Discriminator, Field, Tag, ValidationError, model_validator

from service.contract.base import Frozen
from service.contract.evaluation import Evaluation
from service.contract.methods import METHODS, AnyMethod, Cat, Method
from service.contract.metrics import Kind
from service.contract.misfits import Misfit

METHOD = "method"
WEIGHT = "weights."  # before a task's name
THEN = "then."  # before a parameter of the method that follows
SCALING = "scaling"
AROUND_DEFAULT = (1.0, 0.75, 1.25, 0.5, 1.5)  # of a search that nobody asked for
MAX_TRIALS = 1000
TRIALS = 20  # where neither trials nor seconds are given
TRIALS_IN_TIME = 200  # at most, where only seconds are given
NEVER = ("name", "then", "features_at")  # what a method is, what has parameters of its own, what calibration depends on

Value = bool | int | float | str | None
Values = Annotated[tuple[Value, ...], Field(min_length=1, max_length=256)]
Parameters = Mapping[str, Value]
Sampler = Literal["tpe", "random", "grid"]
Figure = Literal["retention", "likeness", "prediction_likeness"]  # what a trial measures of every task
FEATURES: Final = "feature_likeness"
PREDICTIONS: Final = "prediction_likeness"
UNLABELED: Mapping[str, tuple[Figure, str]] = {  # objectives on exemplars: what they measure and compare
    FEATURES: ("likeness", "features"),
    PREDICTIONS: ("prediction_likeness", "predictions"),
}


class Range(Frozen):
    """Numbers from ``low`` to ``high``, both included; whole ones where the parameter is a whole number."""

    low: float
    high: float
    log: bool = Field(False, description="Spread trials evenly over the logarithm")

    @property
    def fault(self) -> str | None:
        """Why it is no range; None where it is one."""
        if self.low >= self.high:
            return f"the range from {self.low:g} to {self.high:g} is empty; low must be below high"
        return "a logarithmic range must begin above 0" if self.log and self.low <= 0 else None


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
    """Which parameters to search for, by trials that are compared on validation samples or on exemplars alone."""

    space: dict[str, Choice] = Field(
        min_length=1,
        max_length=64,
        description="By name of the method's parameter, of `method`, or `weights.<task>`: a range or a list of values",
    )
    objective: Literal["mean_retention", "worst_retention", "feature_likeness", "prediction_likeness"] | Objective = (
        Field(
            "mean_retention",
            description="What makes a trial better: shares of the experts' scores on validation samples; without "
            "labels, how like the experts' the merged model's features of exemplars are, or its predictions of classes",
        )
    )
    trials: int | None = Field(None, ge=1, le=MAX_TRIALS, description="At most; omitted, 20, or 200 within `seconds`")
    seconds: float | None = Field(None, gt=0, le=31_536_000, description="No trial begins later, from the first one on")
    sampler: Sampler = Field("tpe", description="Optuna's TPE, at random, or every combination of lists in order")

    @property
    def measures(self) -> Figure:
        """What a trial measures of every task."""
        return UNLABELED[self.objective][0] if isinstance(self.objective, str) and self.is_unlabeled else "retention"

    @property
    def is_unlabeled(self) -> bool:
        """Whether trials are compared on exemplars, which have no labels."""
        return self.objective in UNLABELED

    def value(self, figures: Sequence[float]) -> float:
        """The objective's value, from what was measured of each task; NaN where one of them is."""
        if isinstance(self.objective, Objective):
            return self.objective.of(figures)
        mean = Objective(mean_retention=1.0)
        return (Objective(worst_retention=1.0) if self.objective == "worst_retention" else mean).of(figures)

    def methods(self, asked: AnyMethod) -> tuple[AnyMethod, ...]:
        """Every method that a trial may merge by: as asked for, or with its defaults where it is another one."""
        choice = self.space.get(METHOD)
        names = choice if isinstance(choice, tuple) else (asked.name,)
        return tuple(method_named(str(name), asked) for name in dict.fromkeys(names))

    def applies(self, name: str, method: AnyMethod) -> bool:
        """Whether a name of the space says something about a merge by this method, and no name closer to it does."""
        if name == METHOD or name.startswith(WEIGHT):
            return True
        aim = Aim.of(name)
        is_closer = aim.method is None and f"{method.name}.{name}" in self.space
        return not is_closer and aim.target(method) is not None

    def names(self, method: AnyMethod) -> list[str]:
        """What of the space a trial by this method has a value for."""
        return [name for name in self.space if self.applies(name, method)]

    def cells(self, asked: AnyMethod) -> list[dict[str, Value]]:
        """Every combination of a grid, in order, method after method; as many as there may be trials."""
        return list(islice(self._cells(asked), MAX_TRIALS))

    def _cells(self, asked: AnyMethod) -> Iterator[dict[str, Value]]:
        for method in self.methods(asked):
            own = {METHOD: (method.name,)}
            lists = {name: own.get(name) or _listed(self.space[name]) for name in self.names(method)}
            for values in product(*lists.values()):
                yield dict(zip(lists, values, strict=True))

    def count(self, asked: AnyMethod) -> int:
        """How many trials there are at most."""
        trials = self.trials or (TRIALS if self.seconds is None else TRIALS_IN_TIME)
        return min(trials, len(self.cells(asked))) if self.sampler == "grid" else trials

    @property
    def seeks_scaling(self) -> bool:
        """Whether a scaling is among what is searched for."""
        return any(Aim.of(name).parameter == SCALING for name in self.space)

    def settings(self, asked: AnyMethod) -> float:
        """How many ways there are to choose everything but the scaling; infinite where one is a range of fractions."""
        return sum(self._settings(method) for method in self.methods(asked))

    def _settings(self, method: AnyMethod) -> float:
        names = [name for name in self.names(method) if name != METHOD and Aim.of(name).parameter != SCALING]
        return math.prod(_size(name, self.space[name], method) for name in names)


@dataclass(frozen=True)
class Aim:
    """What a name in a space is about: ``scaling``, ``then.scaling`` of what follows, ``ties.scaling`` of TIES only."""

    method: str | None
    follows: bool
    parameter: str

    @classmethod
    def of(cls, name: str) -> Aim:
        first, dot, rest = name.partition(".")
        method = first if dot and first in METHODS else None
        own = rest if method else name
        return cls(method, own.startswith(THEN), own.removeprefix(THEN))

    def target(self, method: AnyMethod) -> Method | None:
        """Whose parameter that is in a merge by ``method``: its own or that of what follows; None where of neither."""
        if self.method not in (None, method.name):
            return None
        followed = method.then if isinstance(method, Cat) else None
        found = followed if self.follows else method
        return found if found is not None and self.parameter in type(found).model_fields else None

    def kind(self, method: AnyMethod) -> Any:
        """What type the parameter is of in ``method``; None where that has none."""
        target = self.target(method)
        return None if target is None else type(target).model_fields[self.parameter].annotation

    def value(self, method: AnyMethod) -> Value:
        """What the parameter is in ``method``; None where that has none."""
        target = self.target(method)
        return None if target is None else target.model_dump()[self.parameter]


def method_named(name: str, asked: AnyMethod) -> AnyMethod:
    """The method asked for where that is its name, else the one of that name with its defaults."""
    return asked if name == asked.name else METHODS[name]()


def is_whole(name: str, method: AnyMethod) -> bool:
    """Whether what a name is about in a merge by this method is a whole number."""
    return Aim.of(name).kind(method) is int


def default_search(asked: AnyMethod, tasks: Mapping[str, bool], evaluation: Evaluation | None) -> Search | None:
    """A few scalings around the method's default, where none was given and ``tasks`` have something to compare by.

    ``tasks`` are told with whether they bring exemplars. The default comes first: of equal trials the first is chosen.
    """
    combining = asked.combining
    is_given = SCALING in combining.model_fields_set or SCALING not in type(combining).model_fields
    is_bound = isinstance(asked, Cat) and asked.features_at == "scaled"  # calibration depends on it
    objective = _usual_objective(tasks, evaluation)
    if is_given or is_bound or objective is None:
        return None
    name = SCALING if combining is asked else THEN + SCALING
    usual = combining.model_dump()[SCALING]
    scalings = tuple(round(usual * factor, 6) for factor in AROUND_DEFAULT)
    return Search(space={name: scalings}, sampler="grid", objective=objective)


def _usual_objective(
    tasks: Mapping[str, bool], evaluation: Evaluation | None
) -> Literal["mean_retention", "prediction_likeness"] | None:
    """What to compare trials by that nobody asked for: validation samples, or else what classes exemplars are given.

    Only of tasks that are evaluated by classes: then there are heads that predict them, and a worker holds whole models
    in memory anyway, which a merge alone never does.
    """
    if not _without_validation(list(tasks), evaluation):
        return "mean_retention"
    rows = {row.task: row for row in evaluation.tasks} if evaluation else {}
    are_classed = all(name in rows and rows[name].kind is Kind.CLASSIFICATION for name in tasks)
    return PREDICTIONS if are_classed and all(tasks.values()) else None


def _without_validation(tasks: Sequence[str], evaluation: Evaluation | None) -> list[str]:
    rows = {row.task: row for row in evaluation.tasks} if evaluation else {}
    return [task for task in tasks if task not in rows or rows[task].validation is None]


def _listed(choice: Choice) -> tuple[Value, ...]:
    """The different values of a list; true is another one than 1. A range has none."""
    return () if isinstance(choice, Range) else tuple({repr(value): value for value in choice}.values())


def _size(name: str, choice: Choice, method: AnyMethod) -> float:
    if not isinstance(choice, Range):
        return len(choice)
    return choice.high - choice.low + 1 if is_whole(name, method) else math.inf


def search_faults(
    search: Search,
    asked: AnyMethod,
    tasks: Mapping[str, bool],
    evaluation: Evaluation | None,
    *,
    is_overridden: bool,
) -> Iterator[Misfit]:
    """Why a merge of ``tasks``, which bring exemplars or don't, can't be searched for so, and where that is said.

    ``is_overridden`` says that the recipe gives some parameters other parameters of the method.
    """
    names = list(tasks)
    yield from _objective_faults(search, tasks, evaluation)
    if is_overridden and METHOD in search.space:
        sentence = "overrides hold for one method alone; leave them out, or method out of the search's space"
        yield Misfit(_in_space(METHOD), sentence)
    for name, choice in search.space.items():
        yield from _range_faults(search, name, choice)
        if name.startswith(WEIGHT):
            yield from _weight_faults(name, choice, names)
    misnamed = [*_method_faults(search)]
    yield from misnamed
    methods = () if misnamed else search.methods(asked)  # what parameters there are depends on them
    for name in search.space if methods else ():
        if name != METHOD and not name.startswith(WEIGHT):
            yield from _parameter_faults(search, name, methods)


def _in_space(name: str, *within: int | str) -> tuple[int | str, ...]:
    """Where in a search a name of its space is, or something about it."""
    return ("space", name, *within)


def _objective_faults(search: Search, tasks: Mapping[str, bool], evaluation: Evaluation | None) -> Iterator[Misfit]:
    without = [name for name, has_exemplars in tasks.items() if not has_exemplars]
    if isinstance(search.objective, str) and search.is_unlabeled and without:
        compared = f"{search.objective} compares {UNLABELED[search.objective][1]} of exemplars of every task"
        yield Misfit(("objective",), f"{compared}; there are none for {', '.join(without)}")
    missing = _without_validation(list(tasks), evaluation)
    if search.measures == "retention" and missing:
        sentence = (
            "a search compares trials on validation samples of every task; the evaluation has none for "
            f"{', '.join(missing)}. Without labels, exemplars are enough for {' and '.join(UNLABELED)}"
        )
        yield Misfit(("objective",), sentence)


def _range_faults(search: Search, name: str, choice: Choice) -> Iterator[Misfit]:
    if not isinstance(choice, Range):
        return
    if choice.fault is not None:
        yield Misfit(_in_space(name), choice.fault)
    if search.sampler == "grid":
        yield Misfit(_in_space(name), f"a grid goes through lists of values; {name} is a range")


def _method_faults(search: Search) -> Iterator[Misfit]:
    choice = search.space.get(METHOD, ())
    known = f"method is searched for in a list of names; those are {', '.join(METHODS)}"
    if isinstance(choice, Range):
        yield Misfit(_in_space(METHOD), known)
        return
    for place, name in enumerate(choice):
        if name not in METHODS:
            yield Misfit(_in_space(METHOD, place), f"{name!r} is no method; {known}")


def _weight_faults(name: str, choice: Choice, tasks: Sequence[str]) -> Iterator[Misfit]:
    if name.removeprefix(WEIGHT) not in tasks:
        yield Misfit(_in_space(name), f"{name} is the weight of no task; tasks are {', '.join(tasks)}")
    for place, value in _ends(choice):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1000:
            sentence = f"{name}: {value!r} is no weight; weights are numbers from 0 to 1000"
            yield Misfit(_in_space(name, place), sentence)


def _parameter_faults(search: Search, name: str, methods: Sequence[AnyMethod]) -> Iterator[Misfit]:
    aim, choice = Aim.of(name), search.space[name]
    knowing = [method for method in methods if aim.parameter not in NEVER and aim.target(method) is not None]
    for sentence in _name_faults(search, name, methods, knowing):
        yield Misfit(_in_space(name), sentence)
    for method in knowing:
        for place, value in _ends(choice):
            for sentence in _value_faults(name, aim, value, method):
                yield Misfit(_in_space(name, place), sentence)


def _name_faults(
    search: Search, name: str, methods: Sequence[AnyMethod], knowing: Sequence[AnyMethod]
) -> Iterator[str]:
    """What is wrong with a name among ``methods``, of which some are ``knowing`` it, whatever values it has."""
    aim, choice = Aim.of(name), search.space[name]
    if not knowing:
        yield _unknown(name, aim, methods)
    elif not any(search.applies(name, method) for method in knowing):
        yield f"{name} has no effect where every method that has it is given one of its own"
    for method in knowing:
        if aim.parameter == SCALING and not aim.follows and isinstance(method, Cat):
            yield from _scaling_faults(name, method)
        if isinstance(choice, Range) and aim.kind(method) is bool:
            yield f"{name} is true or false; give a list of values"


def _unknown(name: str, aim: Aim, methods: Sequence[AnyMethod]) -> str:
    named = " and ".join(method.name for method in methods)
    if aim.method is not None and aim.method not in [method.name for method in methods]:
        return f"{name} is about {aim.method}, but trials merge by {named}; name it in the space's method too"
    known = {key for method in methods for key in type(method).model_fields}
    after = {THEN + key for cat in methods if isinstance(cat, Cat) and cat.then for key in type(cat.then).model_fields}
    choices = [METHOD, "weights.<task>", *sorted(key for key in known | after if key.removeprefix(THEN) not in NEVER)]
    return f"{named} can't be searched for {name!r}; parameters are {', '.join(choices)}"


def _scaling_faults(name: str, method: Cat) -> Iterator[str]:
    if method.then is not None:
        yield (
            f"{name} has no effect where {method.then.name} combines the trimmed task vectors; "
            f"search for {name.removesuffix(SCALING)}{THEN}{SCALING}"
        )
    if method.features_at == "scaled":
        yield "features are taken at one scaling for all trials: a search of scaling needs features_at: task"


def _value_faults(name: str, aim: Aim, value: Value, method: AnyMethod) -> Iterator[str]:
    """What is wrong with the value by itself: how it goes with others is seen in the trial."""
    try:
        type(method).model_validate(changed(method, {name: value}))
    except ValidationError as error:
        for fault in error.errors():
            at = fault["loc"]
            if at[-1:] == (aim.parameter,) or at == ("then",):
                yield f"{method.name} does not take {name} = {value!r}: {fault['msg']}"


def _ends(choice: Choice) -> list[tuple[int | str, Value]]:
    """The values of a list, or both ends of a range, and what each is found under."""
    return [("low", choice.low), ("high", choice.high)] if isinstance(choice, Range) else [*enumerate(choice)]


def changed(asked: AnyMethod, parameters: Parameters) -> dict[str, Any]:
    """The method of a trial as a recipe has it: what was asked for, with the trial's parameters filled in."""
    name = str(parameters.get(METHOD, asked.name))
    found: dict[str, Any] = asked.model_dump(mode="json") if name == asked.name else {"name": name}
    for key, value in parameters.items():
        if key != METHOD and not key.startswith(WEIGHT):
            aim = Aim.of(key)
            place = found["then"] if aim.follows else found
            place[aim.parameter] = value
    return found
