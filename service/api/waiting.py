"""Waiting without holding a thread: the database is asked again and again until a job has ended."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from service.contract.job import Job

POLL_SECONDS = 0.2


async def until_ended(look: Callable[[], Job], seconds: float, request: Request, closing: threading.Event) -> Job:
    """The job once it has ended, or as it is when the time is up, the caller is gone, or the service closes."""
    deadline = time.monotonic() + seconds
    job = await run_in_threadpool(look)
    while not job.status.is_terminal and time.monotonic() < deadline:
        if closing.is_set() or await request.is_disconnected():
            break
        await asyncio.sleep(min(POLL_SECONDS, max(deadline - time.monotonic(), 0)))
        job = await run_in_threadpool(look)
    return job
