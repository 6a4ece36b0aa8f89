"""Clears up behind jobs that have ended: what was left half written, what has expired, what the cache can't hold."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from service.contract import artifacts
from service.contract.errors import OutputExists
from service.contract.job import Job
from service.stores.ended import Ended, EndedJobs
from service.stores.jobs import JobStore
from service.stores.objects import AccessDenied, ObjectInfo, Objects, StoreError
from service.stores.parts import PartStore
from service.stores.workers import WorkerStore
from service.wiping import owner, wipe, wipe_scratch, wipe_unfinished

logger = logging.getLogger(__name__)

BATCH = 100
OWN_FOLDERS = (
    "cache/",
    "scratch/",
    "merges/",
    "evaluations/",
)  # of the workspace, where nobody else writes
STALE_SECONDS = 7 * 86400.0  # what has not been finished for so long is nobody's, even where no job remembers it
CLOCK_SECONDS = 60.0  # by which a store's clock may run differently between two looks


@dataclass(frozen=True)
class Keeping:
    """What to keep, and for how long.

    ``quiet_seconds`` is how long a job must have ended: whoever still worked for it has noticed by then.
    ``in_use_seconds`` is how long ago the last use of cached statistics must lie before they may go.
    """

    quiet_seconds: float = 120.0
    keep_keys_seconds: float = 7 * 86400.0
    expire_artifacts: bool = False
    cache_bytes: int | None = None
    in_use_seconds: float = 3600.0


class Housekeeper:
    """What must be cleared away, by one process at a time; stores can be slow, so not by the one that sweeps."""

    def __init__(
        self,
        jobs: JobStore,
        parts: PartStore,
        workers: WorkerStore,
        ended: EndedJobs,
        objects: Objects,
        workspace: str,
        keeping: Keeping,
    ) -> None:
        self._jobs = jobs
        self._parts = parts
        self._workers = workers
        self._ended = ended
        self._objects = objects
        self._workspace = workspace
        self._keeping = keeping

    def clear_up(self, is_stopping: Callable[[], bool] = lambda: False) -> None:
        """Do everything that is due once, or what there is time for."""
        self._parts.forget_keys(self._keeping.keep_keys_seconds)
        self._workers.forget_gone()
        for ended in self._ended.untidied(self._keeping.quiet_seconds, BATCH):
            self._unless(is_stopping, ended.id, partial(self._tidy, ended))
        for job in self._ended.expired(BATCH):
            self._unless(is_stopping, job.id, partial(self._expire, job))
        self._unless(is_stopping, "the workspace", self._drop_stale)
        if self._keeping.cache_bytes is not None:
            self._unless(is_stopping, "the cache", self._shrink_cache)

    def _unless(self, is_stopping: Callable[[], bool], what: str, clear: Callable[[], None]) -> None:
        """One thing that can't be cleared away does not keep the others from it."""
        if is_stopping():
            return
        try:
            clear()
        except StoreError as error:
            logger.warning("Could not clear up behind %s (%s); it is tried again", what, error)

    def _tidy(self, ended: Ended) -> None:
        """Clear away what a job's workers left half done, unless another job is at work in its folder."""
        if self._ended.is_at_work(ended.prefix):
            return
        self._drop_noted(ended)
        scratch = artifacts.scratch(self._workspace, ended.id)
        dropped = self._drop(ended.prefix, ended, artifacts.may_be_ours) + self._drop(scratch, ended, lambda _: True)
        if dropped:
            logger.info("Dropped %d unfinished uploads of %s", dropped, ended.id)
        if ended.status.has_result:
            wipe_scratch(ended.id, self._objects, self._workspace)
        else:
            self._take_back_manifest(ended)
        self._ended.mark_tidied(ended.id)

    def _drop_noted(self, ended: Ended) -> None:
        """What its parts noted that they had begun: not every store lists it."""
        for found in self._ended.begun(ended.id):
            try:
                self._objects.abandon(found)
            except AccessDenied as error:
                logger.warning("An unfinished upload of %s stays: %s", ended.id, error)

    def _drop(self, place: str, ended: Ended, name: Callable[[str], bool]) -> int:
        """What others write into a job's folder is theirs: it has another name, or is too old or too young."""
        try:
            return wipe_unfinished(
                place,
                self._objects,
                at_least_seconds=self._keeping.quiet_seconds,
                at_most_seconds=ended.submitted_seconds_ago + CLOCK_SECONDS,
                name=name,
            )
        except AccessDenied as error:  # the rest can be cleared away all the same
            logger.warning("Unfinished uploads of %s stay: %s", ended.id, error)
            return 0

    def _take_back_manifest(self, ended: Ended) -> None:
        """A worker wrote it and died before it could say so, and the job ended another way: it is no result."""
        manifest = ended.prefix + artifacts.MANIFEST
        if self._objects.exists(manifest) and owner(ended.prefix, self._objects, ended.id) is None:
            logger.info("Removed %s: %s is %s", manifest, ended.id, ended.status.value)
            self._objects.delete(manifest)

    def _expire(self, job: Job) -> None:
        """Forget a job; what it kept for a retry goes with it, and its result where that was asked for."""
        if self._keeping.expire_artifacts:
            try:
                wipe(job, self._jobs, self._parts, self._objects, self._workspace)
            except OutputExists as refusal:
                logger.info("The artifacts of %s stay: %s", job.id, refusal)
        wipe_scratch(job.id, self._objects, self._workspace)
        self._ended.forget([job.id])

    def _drop_stale(self) -> None:
        """In folders that are the service's alone age says enough."""
        for folder in OWN_FOLDERS:
            for found in list(self._objects.unfinished(self._workspace + folder)):
                if found.age_seconds > STALE_SECONDS:
                    self._objects.abandon(found)

    def _shrink_cache(self) -> None:
        """Delete from the caches, what was of use longest ago first, until they are within their limit."""
        kept = list(self._objects.list(f"{self._workspace}cache/"))
        excess = sum(info.size for info in kept) - (self._keeping.cache_bytes or 0)
        if excess <= 0:
            return
        for info in self._least_used(kept):
            if excess <= 0 or self._ended.is_calibrating():  # else a worker may have found it a moment ago
                return
            self._objects.delete(info.address)
            excess -= info.size
            logger.info("Deleted %s: the cache is over its limit", info.address)

    def _least_used(self, kept: Sequence[ObjectInfo]) -> list[ObjectInfo]:
        """What may go, longest unused first; what no job remembers has been unused for as long as it is there."""
        used, clock = self._ended.statistics_used(), self._ended.clock()
        idle = {info.address: used.get(info.address, clock - info.modified) for info in kept}
        may_go = [info for info in kept if idle[info.address] >= self._keeping.in_use_seconds]
        return sorted(may_go, key=lambda info: -idle[info.address])
