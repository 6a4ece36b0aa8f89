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
CANCEL_SECONDS = 3.0  # how often a worker looks whether its job was cancelled, where it says more rarely that it lives
GIVE_UP_SECONDS = 15.0  # what a stage has to come to its next step once its worker is asked to stop


class Watch:
    """Counts a part's progress; between tensors ``step`` raises Stopped where the part was cancelled or taken over."""

    def __init__(self, commit_point: Callable[[], bool], is_held: Callable[[], bool] = lambda: True) -> None:
        self._commit_point = commit_point
        self._is_held = is_held
        self._until: float | None = None
        self._lock = threading.Lock()
        self._counters = Counters()
        self._reason: str | None = None

    @property
    def counters(self) -> Counters:
        with self._lock:
            return self._counters

    @property
    def is_stopped(self) -> bool:
        if self._until is not None and time.monotonic() > self._until:
            self.stop("the lease ran out while this process stood still, or the database was away")
        return self._reason is not None

    def step(self, *, tensors: int = 0, bytes_read: int = 0, bytes_written: int = 0) -> None:
        """Count what was done since the last step. Raises Stopped."""
        with self._lock:
            was = self._counters
            self._counters = Counters(
                was.tensors_done + tensors, was.bytes_read + bytes_read, was.bytes_written + bytes_written
            )
        self._refuse_stopped()

    def _refuse_stopped(self) -> None:
        if self.is_stopped:
            raise Stopped(self._reason)

    def extend(self, until: float) -> None:
        """Let steps pass until then, by the monotonic clock: who stood still longer finds out before it does more."""
        self._until = until

    def confirm(self) -> None:
        """Call just before anything is taken away. Raises Stopped where the part is not this worker's any more."""
        self._refuse_stopped()
        if not self._is_held():
            raise Stopped("the job was cancelled, or the part taken over")

    def stop(self, reason: str) -> None:
        """Let the next step raise Stopped."""
        self._reason = self._reason or reason

    def announce_commit(self) -> None:
        """Call just before the result becomes visible. Raises Stopped where the part is not this worker's any more."""
        self.step()
        if not self._commit_point():
            raise Stopped("the job was cancelled, or the part taken over, before its result was made visible")


class Heartbeat:
    """A thread that extends the lease of a part while a stage runs, and stops the stage where the lease is lost.

    Args:
        watch: what the stage looks at between tensors.
        beat: extends the lease; whether it was still held.
        leaving: whether the process is asked to stop.
        is_held: whether the part is still this worker's; asked between two beats, so that a cancel is soon noticed.
        give_up: called where the stage comes to no step though the process has been asked to stop for long.
    """

    def __init__(
        self,
        watch: Watch,
        beat: Callable[[Counters], bool],
        leaving: Callable[[], bool],
        *,
        is_held: Callable[[], bool] = lambda: True,
        give_up: Callable[[], None] = lambda: None,
        every_seconds: float,
        lease_seconds: float,
    ) -> None:
        self._watch = watch
        self._beat = beat
        self._leaving = leaving
        self._is_held = is_held
        self._give_up = give_up
        self._asked_to_leave: float | None = None
        self._every_seconds = every_seconds
        self._lease_seconds = lease_seconds
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def __enter__(self) -> Self:
        self._watch.extend(time.monotonic() + self._lease_seconds)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        due = time.monotonic() + self._every_seconds
        look = time.monotonic() + CANCEL_SECONDS
        while not self._ended.wait(min(LOOK_SECONDS, self._every_seconds)):
            self._leave()
            if time.monotonic() >= due:
                due = time.monotonic() + self._every_seconds
                look = time.monotonic() + CANCEL_SECONDS
                self._extend()
            elif time.monotonic() >= look:
                look = time.monotonic() + CANCEL_SECONDS
                self._look()

    def _leave(self) -> None:
        if not self._leaving():
            return
        self._watch.stop("the worker is shutting down")
        self._asked_to_leave = self._asked_to_leave or time.monotonic()
        if time.monotonic() > self._asked_to_leave + GIVE_UP_SECONDS:
            self._give_up()

    def _look(self) -> None:
        try:
            held = self._is_held()
        except Exception:  # the next beat tells what is to be thought of it
            logger.exception("Could not look whether the part is still held")
            return
        if not held:
            self._watch.stop("the job was cancelled, or the part taken over")

    def _extend(self) -> None:
        asked = time.monotonic()
        try:
            held = self._beat(self._watch.counters)
        except Exception:  # a beat that fails is tried again until the lease runs out
            logger.exception("A heartbeat failed")
            return
        if held:
            self._watch.extend(asked + self._lease_seconds)
        else:
            self._watch.stop("the job was cancelled, or the part taken over")
