"""Finds all that is wrong with one value, each thing with its place in it, where pydantic would stop at the first."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pydantic import ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

CODE = "value_error"


@dataclass(frozen=True)
class Misfit:
    """One thing wrong: where in the value, as the steps of a path, and a sentence about it."""

    place: tuple[int | str, ...]
    sentence: str


def refuse(misfits: Iterable[Misfit], value: object) -> None:
    """Let a validator of pydantic's tell every misfit of ``value``; nothing happens where there is none.

    Raises:
        pydantic.ValidationError: with an error for each misfit, placed below the validated field.
    """
    found = [
        InitErrorDetails(
            type=PydanticCustomError(CODE, "{sentence}", {"sentence": misfit.sentence}),
            loc=misfit.place,
            input=value,
        )
        for misfit in misfits
    ]
    if found:
        raise ValidationError.from_exception_data(type(value).__name__, found)
