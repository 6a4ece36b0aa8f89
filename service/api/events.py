"""A merge's history: as a list, or as a stream that ends when the merge does."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.exc import SQLAlchemyError
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, StreamingResponse

from service.api.deps import Caller, Doors, House
from service.api.merges import JobId
from service.api.views import EventList, event_json, next_link, page_json
from service.contract.errors import InvalidParameter, NotFound
from service.contract.job import Event

router = APIRouter(prefix="/v1", tags=["events"])
logger = logging.getLogger(__name__)

STREAM = "text/event-stream"
HEARTBEAT_SECONDS = 15.0
BATCH = 200
MAX_SEQ = 2**31 - 1


class EventQuery(BaseModel):
    """Which events to show."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    after: int = Field(0, ge=0, le=MAX_SEQ, description="Only events with a higher seq")
    limit: int = Field(100, ge=1, le=1000, description="Of a list; a stream has no limit")


@router.get(
    "/merges/{job_id}/events",
    responses={
        200: {"model": EventList, "content": {STREAM: {"schema": {"type": "string"}}}},
        204: {"description": "A stream was asked for, and there is nothing left to come"},
    },
)
async def list_events(
    request: Request, job_id: JobId, query: Annotated[EventQuery, Query()], doors: Doors, caller: Caller
) -> Response:
    """List events, or with `Accept: text/event-stream` follow them; `Last-Event-ID` goes on where a stream broke."""
    if STREAM in request.headers.get("accept", ""):
        return await _open(request, job_id, query, doors, caller)
    events, more, _ = await run_in_threadpool(doors.jobs.events, caller, job_id, query.after, query.limit)
    page = page_json([event_json(event) for event in events], "seq", more)
    return JSONResponse(page, headers=next_link(request, doors.base_url, page))


async def _open(request: Request, job_id: str, query: EventQuery, doors: House, caller: str) -> Response:
    after = _last_seen(request, query)
    events, _, has_ended = await run_in_threadpool(doors.jobs.events, caller, job_id, after, 1)
    if has_ended and not events:
        return Response(status_code=204)  # tells a browser's EventSource not to come back
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(_stream(job_id, after, doors, caller), headers=headers, media_type=STREAM)


async def _stream(job_id: str, after: int, doors: House, caller: str) -> AsyncIterator[str]:
    """Events as they come. Nothing is held between two; the end comes with the job's or the service's."""
    yield ": follow\n\n"
    with doors.lookout.follow(job_id) as follower:
        while True:
            try:
                events, more, has_ended = await run_in_threadpool(doors.jobs.events, caller, job_id, after, BATCH)
            except (NotFound, SQLAlchemyError) as error:  # deleted, or the database is away: the reader comes again
                logger.info("The event stream of %s ends: %s", job_id, error)
                return
            for event in events:
                yield _message(event)
                after = event.seq
            if has_ended or doors.closing.is_set():
                return
            while not more and not await follower.news(HEARTBEAT_SECONDS):
                yield ": still here\n\n"


def _message(event: Event) -> str:
    return f"id: {event.seq}\nevent: {event.type}\ndata: {json.dumps(event_json(event))}\n\n"


def _last_seen(request: Request, query: EventQuery) -> int:
    text = request.headers.get("last-event-id", "")
    if not text:
        return query.after
    if not (text.isascii() and text.isdecimal()) or int(text) > MAX_SEQ:
        raise InvalidParameter(f"The header Last-Event-ID is {text[:40]!r}; it must be the id of an event.")
    return int(text)
