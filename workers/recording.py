"""Leaves in every part's output what the last stage has to tell of it: what it took, and what it warned of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import wraps

from service.contract.notices import as_rows
from service.contract.parts import Done
from workers.metering import Meter
from workers.work import Work

Run = Callable[[Work], Done]


def recorded(run: Run) -> Run:
    """The stage, with ``usage`` and ``notices`` in its output; while it runs it may ask what it took so far."""

    @wraps(run)
    def with_record(work: Work) -> Done:
        meter = Meter(work.device)
        done = run(replace(work, used=meter.usage))
        output = {**done.output, "usage": meter.usage().as_dict(), "notices": as_rows(done.warnings)}
        return replace(done, output=output)

    return with_record
