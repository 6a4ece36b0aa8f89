"""What a running stage holds on to: it counts, and it learns when the part is no longer its to do."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from service.contract.errors import Stopped
from service.contract.parts import Counters

logger = logging.getLogger(__name__)

LOOK_SECONDS = 0.5


class Watch:
    """Counts a part's progress; between tensors ``step`` raises Stopped where the part was cancelled or taken over."""

    def __init__(self, commit_point: Callable[[], bool]) -> None:
        self._commit_point = commit_point
        self._lock = threading.Lock()
        self._counters = Counters()
        self._reason: str | None = None

    @property
    def counters(self) -> Counters:
        with self._lock:
            return self._counters

    @property
    def is_stopped(self) -> bool:
        return self._reason is not None

    def step(self, *, tensors: int = 0, bytes_read: int = 0, bytes_written: int = 0) -> None:
        """Count what was done since the last step. Raises Stopped."""
        with self._lock:
            was = self._counters
            self._counters = Counters(
                was.tensors_done + tensors, was.bytes_read + bytes_read, was.bytes_written + bytes_written
            )
        if self._reason is not None:
            raise Stopped(self._reason)

    def stop(self, reason: str) -> None:
        """Let the next step raise Stopped."""
        self._reason = self._reason or reason

    def announce_commit(self) -> None:
        """Call just before the result becomes visible. Raises Stopped where the part is not this worker's any more."""
        self.step()
        if not self._commit_point():
            raise Stopped("the job was cancelled, or the part taken over, before its result was made visible")


class Heartbeat:
    """A thread that extends the lease of a part while a stage runs, and stops the stage where the lease is lost."""

    def __init__(
        self,
        watch: Watch,
        beat: Callable[[Counters], bool],
        leaving: Callable[[], bool],
        *,
        every_seconds: float,
        lease_seconds: float,
    ) -> None:
        self._watch = watch
        self._beat = beat
        self._leaving = leaving
        self._every_seconds = every_seconds
        self._lease_seconds = lease_seconds
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        extended = time.monotonic()
        due = extended + self._every_seconds
        while not self._ended.wait(min(LOOK_SECONDS, self._every_seconds)):
            if self._leaving():
                self._watch.stop("the worker is shutting down")
            if time.monotonic() < due:
                continue
            due = time.monotonic() + self._every_seconds
            if self._extend():
                extended = time.monotonic()
            elif time.monotonic() - extended > self._lease_seconds:
                self._watch.stop("the lease ran out while the database was away")

    def _extend(self) -> bool:
        try:
            held = self._beat(self._watch.counters)
        except Exception:  # a beat that fails is tried again until the lease runs out
            logger.exception("A heartbeat failed")
            return False
        if not held:
            self._watch.stop("the job was cancelled, or the part taken over")
        return held
