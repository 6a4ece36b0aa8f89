"""One look at the database for all who wait for news of a job, however many they are."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager

from sqlalchemy.exc import SQLAlchemyError
from starlette.concurrency import run_in_threadpool

from service.contract.job import Mark

logger = logging.getLogger(__name__)

LOOK_SECONDS = 0.2


class Follower:
    """Someone who waits for news of one job. ``mark`` is the job as it was last seen; None: it is gone."""

    def __init__(self, job_id: str) -> None:
        self.job_id = job_id
        self.mark: Mark | None = None
        self._has_seen = False
        self._news = asyncio.Event()

    def tell(self, mark: Mark | None) -> None:
        """Wake whoever waits, if there is news; the first look always is."""
        if mark != self.mark or not self._has_seen:
            self.mark, self._has_seen = mark, True
            self.wake()

    def wake(self) -> None:
        self._news.set()

    async def news(self, seconds: float) -> bool:
        """Wait until the job may have changed since the last call; False where it did not for so long."""
        try:
            await asyncio.wait_for(self._news.wait(), seconds)
        except TimeoutError:
            return False
        self._news.clear()
        return True


class Lookout:
    """Looks at all jobs that are followed again and again, and wakes those that follow one that has changed.

    Args:
        look: how the jobs of these ids are now; those that are gone are left out.
        closing: set when nobody should wait any longer.
    """

    def __init__(self, look: Callable[[Collection[str]], Mapping[str, Mark]], closing: threading.Event) -> None:
        self._look = look
        self._closing = closing
        self._followers: set[Follower] = set()

    @contextmanager
    def follow(self, job_id: str) -> Iterator[Follower]:
        """To be entered before one looks at the job oneself: what happens afterwards is told."""
        follower = Follower(job_id)
        self._followers.add(follower)
        try:
            yield follower
        finally:
            self._followers.discard(follower)

    async def watch(self) -> None:
        """Until the service closes."""
        while not self._closing.is_set():
            await asyncio.sleep(LOOK_SECONDS)
            if self._followers and not self._closing.is_set():
                await self._look_once()
        self._wake_all()

    async def _look_once(self) -> None:
        followers = tuple(self._followers)
        try:
            marks = await run_in_threadpool(self._look, {follower.job_id for follower in followers})
        except SQLAlchemyError as error:
            logger.info("The database does not say how jobs are (%s): those who follow one ask it themselves", error)
            self._wake_all()
            return
        for follower in followers:
            follower.tell(marks.get(follower.job_id))

    def _wake_all(self) -> None:
        for follower in self._followers:
            follower.wake()
