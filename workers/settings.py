"""What a worker needs beyond the connections: how many processes, how many threads, and which device."""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

from service.contract.settings import SettingsError
from service.contract.stages import Queue


def _new_name() -> str:
    return f"{socket.gethostname()}:{secrets.token_hex(3)}"


@dataclass(frozen=True)
class WorkerSettings:
    """``threads`` is what each process may use; ``device`` is torch's name, or ``auto``.

    ``calibration_bytes`` is what the weights of a model that is being calibrated may take in the device's memory; None
    is whatever the model needs. A model that needs more is read block by block. ``queues`` are those whose parts the
    worker takes. ``memory_bytes`` is what a part may need to be given to one of the processes; None is what there is.
    ``name`` tells this worker from every other one, and from what ran on the same machine before.
    """

    processes: int
    threads: int
    device: str
    stop_file: str | None
    calibration_bytes: int | None = None
    queues: tuple[Queue, ...] = tuple(Queue)
    memory_bytes: int | None = None
    name: str = field(default_factory=_new_name)

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> Self:
        """Reads CATMERGE_WORKER_PROCESSES, _WORKER_THREADS, _WORKER_QUEUES, _WORKER_MEMORY_BYTES, _DEVICE and
        _CALIBRATION_BYTES; and what a worker's parent tells its children, _STOP_FILE and _WORKER_NAME.

        Raises:
            SettingsError: a variable can't be used.
        """
        processes = _positive(environ, "CATMERGE_WORKER_PROCESSES", 1)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        threads = _positive(environ, "CATMERGE_WORKER_THREADS", max(1, cores // processes))
        device = environ.get("CATMERGE_DEVICE") or "auto"
        given = environ.get("CATMERGE_CALIBRATION_BYTES")
        calibration_bytes = _positive(environ, "CATMERGE_CALIBRATION_BYTES", 1) if given else None
        memory = environ.get("CATMERGE_WORKER_MEMORY_BYTES")
        return cls(
            processes,
            threads,
            device,
            environ.get("CATMERGE_STOP_FILE"),
            calibration_bytes,
            _queues(environ, "CATMERGE_WORKER_QUEUES"),
            _positive(environ, "CATMERGE_WORKER_MEMORY_BYTES", 1) if memory else None,
            environ.get("CATMERGE_WORKER_NAME") or _new_name(),
        )

    def owner(self, pid: int) -> str:
        """By which name a child claims parts."""
        return f"{self.name}:{pid}"


def _positive(environ: Mapping[str, str], name: str, default: int) -> int:
    text = environ.get(name) or str(default)
    if not text.isdecimal() or int(text) < 1:
        raise SettingsError(f"{name} is {text!r}: write a whole number of at least 1")
    return int(text)


def _queues(environ: Mapping[str, str], name: str) -> tuple[Queue, ...]:
    known = {str(queue.word): queue for queue in Queue}
    given = [word.strip() for word in (environ.get(name) or ",".join(known)).split(",")]
    if not known.keys() >= set(given):
        raise SettingsError(f"{name} is {environ[name]!r}: write {' or '.join(known)}, or both with a comma")
    return tuple(queue for word, queue in known.items() if word in given)
