"""The trim log: what was done to each parameter of each task, row by row."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from itertools import islice
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import JSONResponse

from service.api.artifacts import chunks, found, named
from service.api.deps import Caller, Doors
from service.api.merges import JobId
from service.api.ranges import Span
from service.api.views import TrimLogPage, next_link, page_json
from service.contract import artifacts

router = APIRouter(prefix="/v1", tags=["artifacts"])


class TrimLogQuery(BaseModel):
    """Which rows to show."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    task: str | None = None
    role: str | None = None
    name: str | None = Field(None, max_length=512, description="A shell-style pattern over parameter names")
    after: int = Field(0, ge=0, description="The last_id of the page before")
    limit: int = Field(100, ge=1, le=1000)

    def wants(self, row: dict[str, Any]) -> bool:
        """Whether a row is among those asked for."""
        return (
            (self.task is None or row.get("task") == self.task)
            and (self.role is None or row.get("role") == self.role)
            and (self.name is None or fnmatchcase(row.get("parameter", ""), self.name))
        )


@router.get("/merges/{job_id}/trim-log", responses={200: {"model": TrimLogPage}})
def get_trim_log(
    request: Request, job_id: JobId, query: Annotated[TrimLogQuery, Query()], doors: Doors, caller: Caller
) -> Response:
    """Read what was trimmed, filtered by task, role and parameter name."""
    job = doors.jobs.get(caller, job_id)
    info = found(job, named(job, artifacts.TRIM_LOG), doors.objects)
    rows = _wanted(_lines(chunks(info, Span(0, info.size), doors.objects)), query)
    data = list(islice(rows, query.limit + 1))
    page = page_json(data[: query.limit], "row", has_more=len(data) > query.limit)
    return JSONResponse(page, headers=next_link(request, doors.base_url, page))


def _wanted(lines: Iterable[bytes], query: TrimLogQuery) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, start=1):
        if number > query.after:
            row = json.loads(line)
            if query.wants(row):
                yield {"row": number, **row}


def _lines(pieces: Iterable[memoryview]) -> Iterator[bytes]:
    """Lines without their ends, however the bytes were cut into pieces."""
    rest = b""
    for piece in pieces:
        *whole, rest = (rest + bytes(piece)).split(b"\n")
        yield from whole
    if rest:
        yield rest
