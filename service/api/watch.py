"""Stands before all doors: gives each request its id, catches what nobody else did, and notes how it went."""

from __future__ import annotations

import logging
import re
import time
import uuid

from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.metrics import Metrics
from service.api.problems import path_of, respond

logger = logging.getLogger("service.api.access")

REQUEST_ID = re.compile(r"[A-Za-z0-9._:+/=-]{1,128}")
METHODS = ("GET", "HEAD", "POST", "DELETE", "OPTIONS", "PUT", "PATCH")
CLIENT_GONE = 499  # nobody reads it, but the log does


class Watch:
    """ASGI middleware around the whole application."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope)
        request.state.request_id = _request_id(request)
        started = time.monotonic()
        answered = Answered(send, request.state.request_id)
        try:
            await self._app(scope, receive, answered)
        except ClientDisconnect:
            answered.status = CLIENT_GONE
        except Exception as error:  # whatever no handler knew: a fault of ours
            if answered.has_begun:  # too late to say so; the server cuts the connection
                raise
            await (await respond(request, error))(scope, receive, answered)
        finally:
            self._note(request, answered.status, time.monotonic() - started)

    def _note(self, request: Request, status: int, seconds: float) -> None:
        route = getattr(request.scope.get("route"), "path", "unmatched")
        method = request.method if request.method in METHODS else "other"
        self._metrics.count(method, route, status, seconds)
        logger.info("%s %s %d %.1f ms %s", method, path_of(request), status, seconds * 1000, request.state.request_id)


class Answered:
    """Passes an answer on, and remembers its status."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send = send
        self._request_id = request_id.encode()
        self.status = CLIENT_GONE
        self.has_begun = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status, self.has_begun = message["status"], True
            headers = [*message.get("headers", []), (b"x-request-id", self._request_id)]
            message = {**message, "headers": headers}
        await self._send(message)


def _request_id(request: Request) -> str:
    given = request.headers.get("x-request-id", "")
    return given if REQUEST_ID.fullmatch(given) else f"req_{uuid.uuid4().hex}"
