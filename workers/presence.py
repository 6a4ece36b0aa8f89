"""A worker process says that it is there: a row in the database that it keeps fresh."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from sqlalchemy.exc import DBAPIError

from service.contract.workers import InputCache, Worker
from service.stores.workers import WorkerStore

logger = logging.getLogger(__name__)


class Presence:
    """A thread that keeps a worker's row fresh, whether it does a part or waits for one.

    ``keeps`` tells what the worker's machine keeps of inputs.
    """

    def __init__(
        self,
        store: WorkerStore,
        worker: Worker,
        *,
        every_seconds: float,
        keeps: Callable[[], InputCache | None] = lambda: None,
    ) -> None:
        self._store = store
        self._worker = worker
        self._every_seconds = every_seconds
        self._keeps = keeps
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._run, name="presence", daemon=True)

    def enter(self) -> None:
        """Be there from now on, as soon as the database says so."""
        self._thread.start()

    def leave(self) -> None:
        """Be gone at once, so that nothing is kept for this worker."""
        self._left.set()
        self._thread.join(timeout=10)
        try:
            self._store.leave(self._worker.id)
        except DBAPIError as error:
            logger.warning("Could not say that this worker leaves (%s); it is missed soon enough", error)

    def _run(self) -> None:
        say = self._store.enter
        while True:
            try:
                say(self._worker, self._keeps())
                say = self._store.seen
            except DBAPIError as error:
                logger.warning("Could not say that this worker lives (%s); saying it again", error)
            if self._left.wait(self._every_seconds):
                return
