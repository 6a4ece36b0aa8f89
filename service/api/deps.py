"""What every door needs: the stores, the caller, and the requests underway."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, Request

from service.api.lookout import Lookout
from service.api.metrics import Metrics
from service.contract.errors import IdempotencyInProgress, InvalidParameter
from service.contract.settings import Connections
from service.dispatch import Dispatcher
from service.settings import Settings
from service.stores.database import Database
from service.stores.jobs import IdempotencyKey, JobStore
from service.stores.objects import Objects
from service.stores.parts import PartStore
from service.stores.workers import WorkerStore
from service.submit import Rooms


class InFlight:
    """The idempotency keys whose first request this process is handling right now."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._keys: set[tuple[str, str]] = set()

    @contextmanager
    def hold(self, key: IdempotencyKey | None) -> Iterator[None]:
        """Keep a key to one request at a time. Raises IdempotencyInProgress."""
        if key is None:
            yield
            return
        name = (key.scope, key.key)
        with self._lock:
            if name in self._keys:
                raise IdempotencyInProgress(
                    f"A request with the idempotency key {key.key!r} is underway; ask again.", retry_after_seconds=1
                )
            self._keys.add(name)
        try:
            yield
        finally:
            with self._lock:
                self._keys.discard(name)


@dataclass(frozen=True)
class House:
    """Everything behind the doors. ``closing`` is set when open streams have to end."""

    connections: Connections
    settings: Settings
    database: Database
    objects: Objects
    jobs: JobStore
    parts: PartStore
    workers: WorkerStore
    dispatcher: Dispatcher
    metrics: Metrics
    closing: threading.Event
    lookout: Lookout
    in_flight: InFlight = field(default_factory=InFlight)

    @property
    def rooms(self) -> Rooms:
        """What a submit passes through."""
        return Rooms(
            objects=self.objects,
            jobs=self.jobs,
            parts=self.parts,
            dispatcher=self.dispatcher,
            workspace=self.connections.workspace,
            job_retention_seconds=self.settings.job_retention_seconds,
        )

    @property
    def base_url(self) -> str:
        """What links begin with; empty where they are paths."""
        return self.settings.public_url or ""


def house(request: Request) -> House:
    """The house that this application is the front of."""
    found: House = request.app.state.house
    return found


def caller() -> str:
    """Who is asking. There are no keys yet: everybody is the same caller, and sees the same jobs."""
    return "anonymous"


def plain_parameters(request: Request) -> None:
    """Refuse a query in which a parameter appears twice, or text that no database can keep."""
    seen: set[str] = set()
    for name, text in request.query_params.multi_items():
        if name in seen:
            raise InvalidParameter(f"The query parameter {name!r} appears more than once.")
        seen.add(name)
        if "\x00" in name + text:
            raise InvalidParameter(f"The query parameter {name!r} contains the character U+0000.")


Doors = Annotated[House, Depends(house)]
Caller = Annotated[str, Depends(caller)]
