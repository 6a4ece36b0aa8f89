"""What a worker says of itself, and what is known of it."""

from __future__ import annotations

from dataclasses import dataclass

from service.contract.stages import Queue, Stage


@dataclass(frozen=True)
class Worker:
    """One process that does parts, one at a time.

    ``memory_bytes`` is what its device and its machine have, ``usable_bytes`` what a part may need to be given to it;
    ``processes`` is how many there are like it in the same worker, ``engine`` the version of what they compute with.
    """

    id: str
    host: str
    pid: int
    device: str
    memory_bytes: int
    usable_bytes: int
    processes: int
    queues: tuple[Queue, ...]
    version: str
    engine: str


@dataclass(frozen=True)
class InputCache:
    """What a worker's machine keeps of inputs, for all the processes that share it.

    Of what this process read since it started ``found_bytes`` were there, ``missed_bytes`` came from the store.
    ``checkpoints`` are those with the most bytes there: address and bytes.
    """

    limit_bytes: int
    used_bytes: int
    found_bytes: int
    missed_bytes: int
    checkpoints: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class AtWork:
    """The part that a worker is doing."""

    job_id: str
    caller: str
    stage: Stage
    part: int
    name: str


@dataclass(frozen=True)
class LivingWorker:
    """A worker that was heard from lately; times in seconds since the epoch, by the database's clock."""

    worker: Worker
    started_at: float
    seen_at: float
    at_work: AtWork | None
    input_cache: InputCache | None = None


def gigabytes(count: int) -> str:
    """Bytes as people say them: ``1.50 GB``."""
    return f"{count / 1e9:.2f} GB"
