"""Does one part after another: claim it, keep its lease, run its stage, and move its job on."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from sqlalchemy.exc import DBAPIError

from service.contract.asked import AnyRecipe
from service.contract.errors import Failure, Stopped, WorkerError
from service.contract.parts import Claim, Done
from service.contract.recipe import Recipe
from service.contract.settings import Connections
from service.contract.stages import STAGES, PartMessage, Queue, Stage
from service.contract.workers import InputCache
from service.stores.begun import BegunObjects
from service.stores.cached import input_cache, open_blocks
from service.stores.database import Database, is_outage
from service.stores.objects import Bookmark, open_objects
from service.stores.parts import MAX_BYTES, PartStore
from service.stores.studies import JobStudy
from workers.cleanup import drop_begun, remove_outputs, remove_scratch
from workers.watch import Heartbeat, Watch
from workers.work import Work

logger = logging.getLogger(__name__)

Ring = Callable[[Sequence[PartMessage]], None]
StageRun = Callable[[Work], Done]
T = TypeVar("T")

OUTAGE_LEASES = 2  # how long a worker waits for a database that is away; nobody can take its part over meanwhile
OUTAGE_PAUSE_SECONDS = 0.5


class Runner:
    """A worker process's hands. ``leaving`` says whether the process is asked to stop."""

    def __init__(
        self,
        connections: Connections,
        stages: Mapping[Stage, StageRun],
        ring: Ring,
        leaving: Callable[[], bool],
        device: str,
        calibration_bytes: int | None = None,
        queues: Sequence[Queue] = tuple(Queue),
        usable_bytes: int = MAX_BYTES,
        owner: str | None = None,
    ) -> None:
        self._connections = connections
        self._stages = stages
        self._ring = ring
        self._leaving = leaving
        self._device = device
        self._calibration_bytes = calibration_bytes
        self._queues = queues
        self._usable_bytes = usable_bytes
        self._last: Queue | None = None
        self._blocks = open_blocks(connections)
        self._objects = open_objects(connections, self._blocks)
        self._database = Database(connections.database_url)
        self._parts = PartStore(
            self._database,
            lease_seconds=connections.lease_seconds,
            part_attempts=connections.part_attempts,
        )
        self._begun = BegunObjects(self._database)
        self._owner = owner or f"{socket.gethostname()}:{os.getpid()}"

    def __repr__(self) -> str:
        return f"Runner({self._owner}, device={self._device})"

    def run(self, message: PartMessage) -> None:
        """Do part after part while there are any: a message says no more than that there is work."""
        while not self._leaving():
            if not self.run_next():
                return
        self._ring([message])  # to whoever stays

    def run_next(self) -> bool:
        """Do the part whose turn it is; False where there is none.

        The queues take turns where both have parts, so that neither waits for the other to be empty.
        """
        queues = sorted(self._queues, key=lambda queue: queue is self._last)
        claim = self._parts.claim_next(queues, self._owner, self._usable_bytes, self._kept())
        if claim is None:
            return False
        self._last = STAGES[claim.stage].queue
        watch = Watch(
            lambda: self._insist(lambda: self._parts.commit_point(claim)),
            lambda: self._insist(lambda: self._parts.heartbeat(claim, watch.counters)),
        )
        with self._heartbeat(claim, watch):
            done = self._attempt(claim, watch)
        if done is not None:
            self._move_on(claim, done, watch)
        return True

    def _kept(self) -> dict[str, int]:
        """Bytes that this machine keeps, by the address of their file."""
        return {} if self._blocks is None else {kept.address: kept.nbytes for kept in self._blocks.kept()}

    def _bytes_found(self) -> int:
        return 0 if self._blocks is None else self._blocks.counted[0]

    def keeps(self) -> InputCache | None:
        """What this machine keeps of inputs, for others to know."""
        return None if self._blocks is None else input_cache(self._blocks)

    def _heartbeat(self, claim: Claim, watch: Watch) -> Heartbeat:
        return Heartbeat(
            watch,
            lambda counters: self._parts.heartbeat(claim, counters),
            self._leaving,
            is_held=lambda: self._parts.is_held(claim),
            give_up=lambda: self._give_up(claim),
            every_seconds=self._connections.heartbeat_seconds,
            lease_seconds=self._connections.lease_seconds,
        )

    def _give_up(self, claim: Claim) -> None:
        """Let the part go and end this process: its stage hangs, and whoever asked it to stop waits no longer."""
        logger.error("%s of %s comes to no end; this process leaves it", claim.name, claim.job_id)
        try:
            released = self._parts.release(claim)
            if released is not None:
                self._ring([released])
        finally:
            os._exit(1)

    def _attempt(self, claim: Claim, watch: Watch) -> Done | None:
        """Run the stage; None where there is nothing to record, because the part failed or is another's by now."""
        try:
            return self._stages[claim.stage](self._work(claim, watch))
        except Stopped as stopped:
            logger.info("Left %s of %s: %s", claim.name, claim.job_id, stopped)
            released = self._insist(lambda: self._parts.release(claim))
            if released is not None:
                self._ring([released])
            else:
                self._drop_begun(claim)
        except Failure as failure:
            self._fail(claim, failure, watch)
        except Exception as error:
            logger.exception("%s of %s failed", claim.name, claim.job_id)
            self._fail(claim, WorkerError(f"{claim.stage} of {claim.name!r}: {type(error).__name__}: {error}"), watch)
        return None

    def _work(self, claim: Claim, watch: Watch) -> Work:
        return Work(
            claim=claim,
            objects=self._objects,
            watch=watch,
            workspace=self._connections.workspace,
            device=self._device,
            outputs=lambda stage: self._insist(lambda: self._parts.outputs(claim.job_id, stage)),
            so_far=lambda: self._insist(lambda: self._parts.so_far(claim)),
            calibration_bytes=self._calibration_bytes,
            study=JobStudy(self._database, claim) if _is_search(claim.recipe) else None,
            bytes_found=self._bytes_found,
            bookmarks=lambda address: Bookmark(
                find=lambda: self._insist(lambda: self._begun.find(claim, address)),
                note=lambda handle: self._insist(lambda: self._begun.note(claim, address, handle)),
            ),
        )

    def _fail(self, claim: Claim, failure: Failure, watch: Watch) -> None:
        logger.warning("%s of %s: %s: %s", claim.stage, claim.job_id, failure.code, failure)
        if not failure.retryable and self._insist(lambda: self._parts.heartbeat(claim, watch.counters)):
            # Before it is told: whoever hears of it may retry at once, into the same folder.
            remove_outputs(self._objects, claim, self._connections.workspace)
        self._insist(lambda: self._parts.fail(claim, failure))
        if not failure.retryable:
            self._drop_begun(claim)

    def _drop_begun(self, claim: Claim) -> None:
        """What was begun of a part stays for whoever goes on with it; where its job has ended, nobody does."""
        drop_begun(self._objects, self._insist(lambda: self._begun.take_ended(claim)))

    def _move_on(self, claim: Claim, done: Done, watch: Watch) -> None:
        messages = self._insist(lambda: self._parts.complete(claim, done, watch.counters))
        if messages is None:
            logger.info("Too late with %s of %s: the part is another's by now", claim.name, claim.job_id)
        elif messages:
            self._ring(messages)
        elif done.status is not None:
            remove_scratch(self._objects, self._connections.workspace, claim.job_id)

    def _insist(self, ask: Callable[[], T]) -> T:
        """Ask the database again while it is away: work that is done is not thrown away over a restart of it.

        What was written without an answer is told by the claim: the second time it is no longer held, and counts once.
        """
        patience = time.monotonic() + OUTAGE_LEASES * self._connections.lease_seconds
        while True:
            try:
                return ask()
            except DBAPIError as error:
                if not is_outage(error) or self._leaving() or time.monotonic() > patience:
                    raise
                logger.warning("The database is away (%s); asking again", error.orig)
            time.sleep(OUTAGE_PAUSE_SECONDS)

    def mark_unsent(self, messages: Sequence[PartMessage]) -> None:
        """Leave messages that the broker did not take to the sweeper."""
        self._parts.mark_unsent(messages)


def _is_search(recipe: AnyRecipe) -> bool:
    return isinstance(recipe, Recipe) and recipe.search is not None
