"""What pydantic finds wrong with a recipe, in the request's own terms: JSON pointers, and what was meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, TypeVar, get_args

import pydantic
from pydantic import BaseModel

from service.contract.errors import Fault, ValidationError
from service.contract.evaluating import EvaluationRecipe
from service.contract.recipe import Recipe
from service.contract.treatments import TREATMENTS

MAX_FAULTS = 100
Step = int | str
Kind = TypeVar("Kind", bound=BaseModel)


def read_recipe(value: object) -> Recipe:
    """A parsed body as the recipe of a merge. Raises ValidationError, with a fault for everything that is wrong."""
    return _read(value, Recipe)


def read_evaluation(value: object) -> EvaluationRecipe:
    """A parsed body as the recipe of an evaluation. Raises ValidationError, as ``read_recipe`` does."""
    return _read(value, EvaluationRecipe)


def _read(value: object, kind: type[Kind]) -> Kind:
    try:
        return kind.model_validate(value)
    except pydantic.ValidationError as error:
        faults = tuple(islice(faults_of(error, kind, value), MAX_FAULTS))
        where = f"{faults[0].pointer}: " if faults[0].pointer else ""
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise ValidationError(f"{where}{faults[0].detail}{more}", faults) from None


def faults_of(error: pydantic.ValidationError, model: type[BaseModel], value: object) -> Iterator[Fault]:
    """The faults in a pydantic error about ``value``, which was to be a ``model``."""
    everything = error.errors(include_url=False, include_context=False, include_input=False)
    for details in everything:
        if details["type"] == "too_short" and any(_is_below(other["loc"], details["loc"]) for other in everything):
            continue  # pydantic counts the valid items only, and the others are named already
        path = _path(details["loc"], value, names_missing=details["type"] == "missing")
        if details["type"] == "extra_forbidden":
            detail = _unknown(str(path[-1]), _fields(model, details["loc"][:-1], value))
        else:
            detail = details["msg"].removeprefix("Value error, ")
        yield Fault(pointer_to(path), details["type"], detail)


def _is_below(loc: tuple[Step, ...], above: tuple[Step, ...]) -> bool:
    return len(loc) > len(above) and loc[: len(above)] == above


def pointer_to(path: Iterable[Step]) -> str:
    """A path as an RFC 6901 JSON pointer."""
    return "".join("/" + str(step).replace("~", "~0").replace("/", "~1") for step in path)


def _path(loc: tuple[Step, ...], value: Any, *, names_missing: bool) -> tuple[Step, ...]:
    """pydantic's location without what is not in the request: the tags of unions, the mark of a bad key.

    A field of the whole stays though the request leaves it out; with ``names_missing`` so does the last step.
    """
    path = list[Step]()
    for place, step in enumerate(loc):
        if _has(value, step):
            value = value[step]
        elif place and not (names_missing and place == len(loc) - 1):
            continue
        path.append(step)
    return tuple(path)


def _has(value: Any, step: Step) -> bool:
    if isinstance(value, list):
        return isinstance(step, int) and step < len(value)
    return isinstance(value, dict) and step in value


def _at(value: Any, path: tuple[Step, ...]) -> Any:
    for step in path:
        value = value[step]
    return value


def _unknown(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=3)
    if close:
        return f"There is no field {name!r} here; did you mean {' or '.join(map(repr, close))}?"
    return f"There is no field {name!r} here; there are: {', '.join(known)}."


def _fields(model: type[BaseModel], loc: tuple[Step, ...], value: object) -> list[str]:
    """The fields that a model has at pydantic's location."""
    if loc[-1:] == ("parameters",):  # of a treatment, which another field names
        return list(TREATMENTS[_at(value, (*loc[:-1], "use"))].model_fields)
    models = [model]
    for step in loc:
        if isinstance(step, int):
            continue
        below = [found for m in models if step in m.model_fields for found in _models(m.model_fields[step].annotation)]
        models = below or [m for m in models if m.model_fields["name"].default == step]  # the tag of a union
    return [name for m in models for name in m.model_fields]


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models(argument)
