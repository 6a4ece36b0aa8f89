"""Leaves in every part's output what the last stage tells of it, and gathers it there: what it took and warned of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import Any

from service.contract.notices import as_rows
from service.contract.parts import Done
from service.contract.stages import ORDER, Stage
from workers.metering import Meter
from workers.usage import Usage, summed
from workers.work import Work

Run = Callable[[Work], Done]
BEFORE = [stage for stage in ORDER if stage is not Stage.FINALIZE]


def recorded(run: Run) -> Run:
    """The stage, with ``usage``, ``bytes_found`` and ``notices`` in its output."""

    @wraps(run)
    def with_record(work: Work) -> Done:
        meter, found = Meter(work.device), work.bytes_found()
        done = run(work)
        record = {
            "usage": meter.usage().as_dict(),
            "bytes_found": work.bytes_found() - found,
            "notices": as_rows(done.warnings),
        }
        return replace(done, output={**done.output, **record})

    return with_record


def notices(work: Work) -> list[dict[str, Any]]:
    """What the parts of all stages warned of."""
    return [row for stage in BEFORE for output in work.outputs(stage) for row in output.get("notices", ())]


def usage(work: Work) -> dict[str, Any]:
    """What the parts of all stages took that are done.

    Not this one: a report must be the same, byte for byte, whoever makes it again.
    """
    outputs = {stage.value: work.outputs(stage) for stage in BEFORE}
    usages = {
        stage: [Usage.from_dict(output["usage"]) for output in of_stage if "usage" in output]
        for stage, of_stage in outputs.items()
    }
    found = sum(output.get("bytes_found", 0) for of_stage in outputs.values() for output in of_stage)
    return {"bytes_found": found, **summed(usages)}
