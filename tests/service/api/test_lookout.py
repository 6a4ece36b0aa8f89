from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Collection, Mapping

import pytest
from sqlalchemy.exc import OperationalError

from service.api import lookout as lookout_module
from service.api.lookout import Lookout
from service.contract.job import Mark

LONG = 60.0


class Jobs:
    """Marks by id, and what was asked for."""

    def __init__(self) -> None:
        self.marks: dict[str, Mark] = {}
        self.asked: list[set[str]] = []
        self.is_away = False
        self.closing = threading.Event()

    def look(self, ids: Collection[str]) -> Mapping[str, Mark]:
        self.asked.append(set(ids))
        if self.is_away:
            raise OperationalError("select", {}, Exception("away"))
        return {job_id: self.marks[job_id] for job_id in ids if job_id in self.marks}

    def seen(self, job_id: str, last_seq: int, *, has_ended: bool = False) -> None:
        self.marks[job_id] = Mark(last_seq=last_seq, has_ended=has_ended)

    async def looks(self, count: int) -> None:
        """Until there were so many further looks."""
        before = len(self.asked)
        while len(self.asked) < before + count:
            await asyncio.sleep(0.001)


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> Jobs:
    monkeypatch.setattr(lookout_module, "LOOK_SECONDS", 0.005)
    return Jobs()


def watched(jobs: Jobs, act: Callable[[Lookout], Awaitable[None]]) -> None:
    async def run() -> None:
        lookout = Lookout(jobs.look, jobs.closing)
        watching = asyncio.create_task(lookout.watch())
        await act(lookout)
        jobs.closing.set()
        await watching

    asyncio.run(run())


def test_a_thousand_followers_are_one_question(jobs: Jobs) -> None:
    async def act(lookout: Lookout) -> None:
        jobs.seen("a", 1)
        jobs.seen("b", 1)
        contexts = [lookout.follow("ab"[i % 2]) for i in range(1000)]
        followers = [context.__enter__() for context in contexts]
        assert await asyncio.gather(*(follower.news(LONG) for follower in followers)) == [True] * 1000
        waiting = [asyncio.create_task(follower.news(LONG)) for follower in followers]
        jobs.seen("a", 2)
        await asyncio.gather(*waiting[::2])
        assert not any(each.done() for each in waiting[1::2]), "only those of the job that changed are woken"
        jobs.seen("b", 1, has_ended=True)
        await asyncio.gather(*waiting[1::2])
        assert all(asked == {"a", "b"} for asked in jobs.asked)

    watched(jobs, act)


def test_nobody_is_asked_where_nobody_follows(jobs: Jobs) -> None:
    async def act(lookout: Lookout) -> None:
        with lookout.follow("a"):
            await jobs.looks(1)
        await asyncio.sleep(0.02)  # a look may be underway
        asked = len(jobs.asked)
        await asyncio.sleep(0.05)
        assert len(jobs.asked) == asked

    watched(jobs, act)


def test_one_that_is_gone_is_news(jobs: Jobs) -> None:
    async def act(lookout: Lookout) -> None:
        with lookout.follow("gone from the start") as follower:
            assert await follower.news(LONG)
            assert follower.mark is None
        jobs.seen("a", 1)
        with lookout.follow("a") as follower:
            assert await follower.news(LONG)
            del jobs.marks["a"]
            assert await follower.news(LONG)
            assert follower.mark is None

    watched(jobs, act)


def test_followers_are_woken_where_the_database_is_away_and_at_the_end(jobs: Jobs) -> None:
    async def act(lookout: Lookout) -> None:
        jobs.is_away = True
        with lookout.follow("a") as follower:
            assert await follower.news(LONG)
            jobs.is_away = False
            assert await follower.news(LONG), "it looks again"
            jobs.closing.set()
            assert await follower.news(LONG)

    watched(jobs, act)
