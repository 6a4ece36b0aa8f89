"""A real HTTP server that misbehaves on cue: each request is answered by the next line of its script."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import MappingProxyType
from typing import Any

Line = Callable[[BaseHTTPRequestHandler], None]


@dataclass
class Scripted:
    """Where it answers, and what it was asked: method, path and headers of each request."""

    url: str
    asked: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)

    @property
    def paths(self) -> list[str]:
        return [path for _, path, _ in self.asked]


def answer(value: object, status: int = 200, headers: Mapping[str, str] = MappingProxyType({})) -> Line:
    """JSON, or bytes as they are."""
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    kind = "application/octet-stream" if isinstance(value, bytes) else "application/json"

    def say(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, text in {"Content-Type": kind, "Content-Length": str(len(body)), **headers}.items():
            handler.send_header(name, text)
        handler.end_headers()
        handler.wfile.write(body)

    return say


def cut_short(body: bytes, promised: int, status: int = 200, headers: Mapping[str, str] = MappingProxyType({})) -> Line:
    """Part of a body, and then the line goes dead."""

    def say(handler: BaseHTTPRequestHandler) -> None:
        answer(body, status, {"Content-Length": str(promised), **headers})(handler)
        handler.close_connection = True

    return say


def hang_up(handler: BaseHTTPRequestHandler) -> None:
    """No answer at all."""
    handler.close_connection = True


@contextmanager
def scripted(lines: Sequence[Line] | Mapping[str, Sequence[Line]]) -> Iterator[Scripted]:
    """A server that answers by ``lines``, one after another, for all paths together or for each by itself."""
    script: dict[str, list[Line]] = (
        {path: list(own) for path, own in lines.items()} if isinstance(lines, Mapping) else {"": list(lines)}
    )

    class Handler(BaseHTTPRequestHandler):
        def _play(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", "0")))
            server.asked.append((self.command, self.path, {name.lower(): text for name, text in self.headers.items()}))
            own = script.get(self.path.partition("?")[0], script.get("", []))
            (own.pop(0) if own else answer({"unexpected": self.path}, 418))(self)

        do_GET = do_POST = do_DELETE = _play  # noqa: N815 (the names that the standard library looks for)

        def log_message(self, format: str, *args: Any) -> None:
            """Tests are quiet."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listener:
        server = Scripted(f"http://127.0.0.1:{listener.server_address[1]}")
        thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            listener.shutdown()
            thread.join()
