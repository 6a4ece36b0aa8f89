"""Waiting for a job's end without holding a thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from service.api.lookout import Lookout
from service.contract.job import Job, Mark

PRESENCE_SECONDS = 1.0  # how often one looks whether the caller is still there


async def until_ended(
    job_id: str, look: Callable[[], Job], seconds: float, request: Request, lookout: Lookout, closing: threading.Event
) -> Job:
    """The job once it has ended, or as it is when the time is up, the caller is gone, or the service closes."""
    deadline = time.monotonic() + seconds
    with lookout.follow(job_id) as follower:
        job = await run_in_threadpool(look)
        while not job.status.is_terminal and (left := deadline - time.monotonic()) > 0:
            if closing.is_set() or await request.is_disconnected():
                break
            if await follower.news(min(left, PRESENCE_SECONDS)) and _has_ended(follower.mark):
                job = await run_in_threadpool(look)
        return job if job.status.is_terminal else await run_in_threadpool(look)


def _has_ended(mark: Mark | None) -> bool:
    return mark is None or mark.has_ended
