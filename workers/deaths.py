"""A worker's parent tells the database of children that die, so that nobody waits for their leases.

The parent never imports torch, and its event loop is not kept waiting by the database.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

from service.stores.losing import has_exited
from service.stores.parts import PartStore
from service.stores.workers import WorkerStore

logger = logging.getLogger(__name__)


class Deaths:
    """Hears from the pool of children that have ended. ``owner_of`` says by which name a child claims parts."""

    def __init__(self, parts: PartStore, workers: WorkerStore, owner_of: Callable[[int], str]) -> None:
        self._parts = parts
        self._workers = workers
        self._owner_of = owner_of

    def watch(self, pool: Any) -> None:
        """Be told by a billiard pool before it tells whom it told until now."""
        tell = pool.on_process_down

        def on_process_down(process: Any) -> None:
            if process.exitcode:
                threading.Thread(target=self.report, args=(process.pid, process.exitcode), daemon=True).start()
            tell(process)

        pool.on_process_down = on_process_down

    def report(self, pid: int, status: int) -> None:
        """A child has ended by itself: by an exit status, or the negative number of a signal."""
        owner, how = self._owner_of(pid), has_exited(status)
        logger.error("The child %s %s", owner, how)
        try:
            self._workers.leave(owner)
            self._parts.report_lost(owner, how)
        except Exception:  # the lease runs out, and says the same later
            logger.exception("Could not report it; its lease runs out")
