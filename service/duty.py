"""Something that one process has to do over and over, whichever of those that could."""

from __future__ import annotations

import logging
import os
import socket
import threading
import uuid
from collections.abc import Callable

from sqlalchemy.exc import DBAPIError

from service.stores.duties import DutyStore

logger = logging.getLogger(__name__)

SLACK_SECONDS = 5.0
ROUNDS = 5  # that a process may miss before another takes over


class Duty:
    """A thread in every API process; the one that holds the duty in the database works, the others stand by.

    ``work`` is told how to find out that it should end early.
    """

    def __init__(
        self,
        name: str,
        store: DutyStore,
        work: Callable[[Callable[[], bool]], None],
        *,
        every_seconds: float,
        patience_seconds: float,
    ) -> None:
        self._name = name
        self._store = store
        self._work = work
        self._every_seconds = every_seconds
        self._patience_seconds = patience_seconds
        self._owner = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Stop, after what is being done if that is soon enough, and leave the duty to another."""
        self._stop.set()
        self._thread.join(timeout=self._patience_seconds)
        try:
            self._store.resign(self._name, self._owner)
        except DBAPIError as error:
            logger.warning("Could not resign from %s (%s); another takes over when it runs out", self._name, error)

    def _run(self) -> None:
        held_seconds = ROUNDS * self._every_seconds + SLACK_SECONDS
        while not self._stop.wait(self._every_seconds):
            try:
                if self._store.elect(self._name, self._owner, held_seconds):
                    self._work(self._stop.is_set)
            except Exception:  # a duty outlives every fault: what is in the way now may be gone the next time
                logger.exception("The %s failed; the next one tries again", self._name)
