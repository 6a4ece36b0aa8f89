"""Repairs what messages can't promise: sends what is ready and unsent, and takes back what was left lying."""

from __future__ import annotations

import logging
import os
import socket
import threading
import uuid
from dataclasses import dataclass

from sqlalchemy.exc import DBAPIError

from service.dispatch import Dispatcher
from service.stores.parts import PartStore
from service.stores.placing import Placement

logger = logging.getLogger(__name__)

DUTY = "sweep"
BATCH = 1000


@dataclass(frozen=True)
class Rhythm:
    """How often to sweep, and when to send again."""

    sweep_seconds: float = 1.0
    resend_after_seconds: float = 5.0


class Sweeper:
    """A thread in every API process; the one that holds the duty in the database sweeps, the others stand by."""

    def __init__(self, parts: PartStore, placement: Placement, dispatcher: Dispatcher, rhythm: Rhythm) -> None:
        self._parts = parts
        self._placement = placement
        self._dispatcher = dispatcher
        self._rhythm = rhythm
        self._owner = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sweeper", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Stop within one sweep, and leave the duty to another."""
        self._stop.set()
        self._thread.join(timeout=30)
        try:
            self._parts.resign(DUTY, self._owner)
        except DBAPIError as error:
            logger.warning("Could not resign from sweeping (%s); another takes over when the duty runs out", error)

    def _run(self) -> None:
        while not self._stop.wait(self._rhythm.sweep_seconds):
            try:
                if self._parts.elect(DUTY, self._owner, seconds=5 * self._rhythm.sweep_seconds + 5):
                    self.sweep()
            except Exception:  # the sweeper outlives every fault: without it, lost messages stay lost
                logger.exception("A sweep failed; the next one tries again")

    def sweep(self) -> None:
        """Do everything that is due once."""
        self._parts.take_back_expired()
        self._parts.end_overdue()
        self._placement.sweep()
        self._send_due()

    def _send_due(self) -> None:
        due = self._parts.due(self._rhythm.resend_after_seconds, BATCH)
        unsent = self._dispatcher.ring(due)
        if unsent:
            self._parts.mark_unsent(unsent)
