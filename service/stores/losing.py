"""What is said of a worker that was lost while it did a part."""

from __future__ import annotations

import signal
from typing import Any

from sqlalchemy import Row

from service.contract.errors import WorkerLost
from service.contract.workers import gigabytes

LETHAL = 3  # a part that cost so many workers is not given to another


def was_silent(seconds: float) -> str:
    return f"was not heard from for {seconds:g} s"


def has_exited(status: int) -> str:
    """How a process ended: an exit status, or the negative number of a signal."""
    if status >= 0:
        return f"ended with exit status {status}"
    known = {number.value: number.name for number in signal.Signals}
    return f"was ended by signal {-status} ({known.get(-status, 'unknown')})"


def lost(row: Row[Any], how: str) -> WorkerLost:
    """The Failure of a part whose worker was lost."""
    times = f" It is the {row.deaths + 1}. worker that this part has cost." if row.deaths else ""
    return WorkerLost(
        f"The worker {row.owner} {how} while it did {row.name!r} ({row.stage}).{times} If the machine killed it, it "
        f"likely ran out of memory: {_predicted(row.peak_bytes)}. Give workers more memory or fewer processes, or set "
        "CATMERGE_WORKER_MEMORY_BYTES to what each process really has, so that large parts go to large workers."
    )


def _predicted(peak_bytes: int) -> str:
    if not peak_bytes:
        return "the plan predicted no peak for this part"
    return f"the plan predicted a peak of {gigabytes(peak_bytes)} beside what an idle worker takes"
