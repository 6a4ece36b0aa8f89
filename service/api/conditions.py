"""Headers by which a caller says when to answer: ETags (RFC 9110), Prefer: wait (RFC 7240), idempotency keys."""

from __future__ import annotations

import re

from starlette.requests import Request

from service.contract.errors import InvalidParameter, PreconditionFailed
from service.contract.job import Job
from service.stores.jobs import IdempotencyKey

MAX_WAIT_SECONDS = 60
KEY = re.compile(r"[\x20-\x7e]{1,255}")
ENTITY_TAG = re.compile(r'(?:W/)?"[\x21\x23-\x7e\x80-\xff]*"')
WAIT = re.compile(r'wait\s*=\s*"?(\d{1,9})"?')


def etag_of(job: Job) -> str:
    """A tag that changes whenever the job does; a queued job's place in the queue changes without its version."""
    place = "" if job.queue_position is None else f"-q{job.queue_position}"
    return f'"{job.id}-v{job.version}{place}"'


def is_unchanged(request: Request, etag: str) -> bool:
    """Whether the caller already has what ``etag`` stands for (If-None-Match, compared weakly)."""
    given = _header(request, "if-none-match")
    if given is None:
        return False
    return given.strip() == "*" or etag in [tag.removeprefix("W/") for tag in ENTITY_TAG.findall(given)]


def expect_match(request: Request, job: Job) -> None:
    """Raises PreconditionFailed unless the job is as the caller thinks (If-Match, compared strongly)."""
    given = _header(request, "if-match")
    if given is None or given.strip() == "*":
        return
    if etag_of(job) not in ENTITY_TAG.findall(given):
        raise PreconditionFailed(f"The job's ETag is {etag_of(job)}, which If-Match does not name: it has changed.")


def wait_seconds(request: Request) -> int | None:
    """For how long the caller prefers to wait for the end; None for not at all. What is unclear is ignored."""
    for preference in (_header(request, "prefer") or "").split(","):
        found = WAIT.fullmatch(preference.partition(";")[0].strip().lower())
        if found:
            return min(int(found[1]), MAX_WAIT_SECONDS)
    return None


def idempotency_key(request: Request, caller: str, sha256: str) -> IdempotencyKey | None:
    """The caller's key for this request and this body. Raises InvalidParameter."""
    given = request.headers.getlist("idempotency-key")
    if not given:
        return None
    if len(given) > 1 or not KEY.fullmatch(given[0]):
        raise InvalidParameter("The header Idempotency-Key must be one string of 1 to 255 printable ASCII characters.")
    return IdempotencyKey(f"{caller} {request.method} {request.scope['path']}", given[0], sha256)


def _header(request: Request, name: str) -> str | None:
    """A header that is a list may come in several lines."""
    lines = request.headers.getlist(name)
    return ", ".join(lines) if lines else None
