"""One byte range out of a Range header, as RFC 9110 has it."""

from __future__ import annotations

import re
from dataclasses import dataclass

RANGE = re.compile(r"bytes\s*=\s*(\d{0,19})\s*-\s*(\d{0,19})", re.IGNORECASE)


@dataclass(frozen=True)
class Span:
    """Bytes ``start`` up to, and without, ``end``."""

    start: int
    end: int

    def __len__(self) -> int:
        return self.end - self.start


def requested(header: str | None, size: int) -> Span | None:
    """What a Range header asks of ``size`` bytes; an empty span can't be had.

    None where there is no range, or one that may be ignored: malformed, several at once, in other units.
    """
    found = RANGE.fullmatch(header.strip()) if header else None
    if found is None or found.groups() == ("", ""):
        return None
    first, last = found.groups()
    if not first:
        return Span(max(size - int(last), 0), size)
    if last and int(last) < int(first):
        return None
    start = min(int(first), size)
    return Span(start, max(start, min(int(last) + 1, size)) if last else size)
