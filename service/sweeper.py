"""Repairs what messages can't promise: sends what is ready and unsent, and takes back what was left lying."""

from __future__ import annotations

from service.dispatch import Dispatcher
from service.stores.parts import PartStore
from service.stores.placing import Placement

BATCH = 1000


class Sweeper:
    """What must be done over and over, by one process at a time."""

    def __init__(
        self, parts: PartStore, placement: Placement, dispatcher: Dispatcher, resend_after_seconds: float
    ) -> None:
        self._parts = parts
        self._placement = placement
        self._dispatcher = dispatcher
        self._resend_after_seconds = resend_after_seconds

    def sweep(self) -> None:
        """Do everything that is due once."""
        self._parts.take_back_expired()
        self._parts.end_overdue()
        self._placement.sweep()
        self._send_due()

    def _send_due(self) -> None:
        due = self._parts.due(self._resend_after_seconds, BATCH)
        unsent = self._dispatcher.ring(due)
        if unsent:
            self._parts.mark_unsent(unsent)
