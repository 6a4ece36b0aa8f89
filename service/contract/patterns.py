"""Shell-style patterns over parameter names, with ranges of numbers: ``model.layers.{0..7}.*``."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase, translate

_RANGE = re.compile(r"\{(\d{1,9})\.\.(\d{1,9})\}")
_NUMBER = r"(?<!\d)(\d{1,9})(?!\d)"


def checked_pattern(pattern: str) -> str:
    """The pattern itself. Raises ValueError where a range in it counts down, and so matches nothing."""
    for low, high in _RANGE.findall(pattern):
        if int(low) > int(high):
            raise ValueError(f"the range {{{low}..{high}}} is empty; write {{{high}..{low}}}")
    return pattern


def matches(name: str, pattern: str) -> bool:
    """Whether a whole name matches: ``*``, ``?``, ``[ab]``, and ``{a..b}`` for a whole number from a to b."""
    ranges = [(int(low), int(high)) for low, high in _RANGE.findall(pattern)]
    if not ranges:
        return fnmatchcase(name, pattern)
    pieces = _RANGE.sub("\0", pattern).split("\0")
    found = re.fullmatch(_NUMBER.join(_expression(piece) for piece in pieces), name)
    return found is not None and all(
        low <= int(number) <= high for number, (low, high) in zip(found.groups(), ranges, strict=True)
    )


def _expression(piece: str) -> str:
    """A piece of a pattern as a regular expression, without the end of the text that ``translate`` puts behind it."""
    return translate(piece).rpartition(")")[0] + ")"
