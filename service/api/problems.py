"""Errors as RFC 9457 problem documents: one table says what an error means, one handler writes it."""

from __future__ import annotations

import logging
from typing import Any
from urllib.parse import quote

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from service.api.faults import pointer_to
from service.contract import errors
from service.contract.errors import Fault, Refusal
from service.stores import objects
from service.stores.database import is_outage

logger = logging.getLogger(__name__)

MEDIA_TYPE = "application/problem+json"
RETRY_SECONDS = 2
OUTAGE_RETRY_SECONDS = 5
HANDLED = (Refusal, HTTPException, RequestValidationError, DBAPIError, PoolTimeout, objects.StoreError)


class ProblemFault(BaseModel):
    """One thing wrong with the request."""

    pointer: str = Field(
        description="RFC 6901 pointer into the request body; a query parameter is /query/<name>", examples=["/tasks/0"]
    )
    code: str
    detail: str


class Problem(BaseModel):
    """Why a request was refused, as RFC 9457 has it."""

    type: str = Field(description="urn:catmerge:problem:<code>")
    title: str
    status: int
    detail: str
    instance: str = Field(description="The path that was asked for")
    code: str = Field(description="For programs; never reworded")
    request_id: str = Field(description="Names this request in the service's log")
    retryable: bool = Field(description="Whether the same request may succeed later")
    errors: list[ProblemFault] = Field(description="Every single fault, where there are several")


def problem(request: Request, refusal: Refusal) -> dict[str, Any]:
    """The problem document of a refusal."""
    return Problem(
        type=f"urn:catmerge:problem:{refusal.code}",
        title=refusal.title,
        status=refusal.status,
        detail=refusal.detail,
        instance=path_of(request),
        code=refusal.code,
        request_id=request.state.request_id,
        retryable=refusal.retryable,
        errors=[ProblemFault(pointer=f.pointer, code=f.code, detail=f.detail) for f in refusal.faults],
    ).model_dump(mode="json")


def path_of(request: Request) -> str:
    """The path as it may stand in a log or an answer, without line breaks and the like."""
    return quote(request.scope["path"], safe="/:@~")


async def respond(request: Request, error: Exception) -> Response:
    """The one handler: any error as a problem document."""
    refusal = refusal_of(error)
    if refusal.status >= 500:
        _log(request, refusal, error)
    headers = dict(error.headers or {}) if isinstance(error, HTTPException) else {}
    if refusal.retryable and refusal.status != 500:
        headers["Retry-After"] = str(refusal.retry_after_seconds or RETRY_SECONDS)
    return answer(problem(request, refusal), headers)


def answer(document: dict[str, Any], headers: dict[str, str] | None = None) -> Response:
    """A problem document as a response."""
    return JSONResponse(document, document["status"], headers, MEDIA_TYPE)


def refusal_of(error: Exception) -> Refusal:
    """The table: what each kind of error is to a caller."""
    match error:
        case Refusal():
            return error
        case RequestValidationError():
            return _invalid_parameters(error)
        case HTTPException():
            return _http(error)
        case PoolTimeout():
            return _away("The database is overloaded.")
        case DBAPIError() if is_outage(error):
            return _away("The database does not answer.")
        case objects.BucketDenied():
            return errors.BucketNotAllowed(str(error))
        case objects.AccessDenied():
            return errors.Forbidden(str(error))
        case objects.ObjectMissing() | objects.ObjectChanged():
            return errors.NotFound(f"{error}: it is no longer what the job wrote.")
        case objects.StoreError():
            return _away(str(error))
        case _:
            return errors.ServiceError("The service failed; its log has the cause under this request_id.")


def _away(detail: str) -> Refusal:
    return errors.StoreUnavailable(detail, retry_after_seconds=OUTAGE_RETRY_SECONDS)


def _invalid_parameters(error: RequestValidationError) -> Refusal:
    faults = tuple(
        Fault(pointer_to(fault["loc"]), fault["type"], _sentence(fault["type"], fault["msg"]))
        for fault in error.errors()
    )
    named = "; ".join(f"{fault.pointer.rpartition('/')[2]}: {fault.detail}" for fault in faults)
    return errors.InvalidParameter(named, faults)


def _sentence(kind: str, message: str) -> str:
    return "There is no such parameter." if kind == "extra_forbidden" else message.removeprefix("Value error, ")


def _http(error: HTTPException) -> Refusal:
    if error.status_code == 404:
        return errors.NotFound("There is nothing at this address; /docs shows what there is.")
    if error.status_code == 405:
        return errors.MethodNotAllowed("See the Allow header for the methods that this address answers.")
    return errors.InvalidParameter(str(error.detail))


def _log(request: Request, refusal: Refusal, error: Exception) -> None:
    where = f"{request.method} {path_of(request)} ({request.state.request_id})"
    if refusal.status == 500:
        logger.error("%s failed", where, exc_info=error)
    else:
        logger.warning("%s: %s: %s", where, refusal.detail, error)
