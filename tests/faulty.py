"""Proxies that do harm on purpose: a plain one before Redis and PostgreSQL, one that knows HTTP before an S3 server.

The S3 proxy hands the Host header on as it came: signatures cover it, and S3 servers check them against what they are
sent, so what was signed for the proxy's address verifies behind it.
"""

from __future__ import annotations

import http.client
import re
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

CHUNK_BYTES = 64 << 10
HOLD_SECONDS = 240.0
HOP_BY_HOP = ("connection", "expect", "keep-alive", "transfer-encoding")


class TcpProxy:
    """Hands bytes on in both directions: slowly, not at all, or until it is told to cut.

    ``delay_seconds`` is how long every piece waits, ``refuses`` whether new connections are closed at once, and
    ``hangs`` whether nothing is handed on, while connections stay open.
    """

    def __init__(self, port: int) -> None:
        self._upstream = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.delay_seconds = 0.0
        self.refuses = False
        self.hangs = False
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._is_closed = False
        self._start(self._accept)

    def cut(self) -> int:
        """Close every connection, whatever is underway on it; returns how many there were."""
        with self._lock:
            found = list(self._open)
        for connection in found:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        return len(found) // 2

    def heal(self) -> None:
        """Be an ordinary proxy again."""
        self.delay_seconds, self.refuses, self.hangs = 0.0, False, False

    def close(self) -> None:
        self._is_closed = True
        self.heal()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()
        for thread in self._threads:
            thread.join(timeout=20)

    def _start(self, run: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=run, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self.refuses or self._is_closed:
                client.close()
            else:
                self._start(self._serve, client)

    def _serve(self, client: socket.socket) -> None:
        try:
            server = socket.create_connection(("127.0.0.1", self._upstream), timeout=20)
        except OSError:
            client.close()
            return
        server.settimeout(None)
        with self._lock:
            self._open |= {client, server}
        try:
            self._pump(client, server)
        except OSError:
            pass
        finally:
            with self._lock:
                self._open -= {client, server}
            client.close()
            server.close()

    def _pump(self, client: socket.socket, server: socket.socket) -> None:
        other = {client: server, server: client}
        with selectors.DefaultSelector() as selector:
            for end in other:
                selector.register(end, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    source = key.fileobj
                    assert isinstance(source, socket.socket)
                    piece = source.recv(CHUNK_BYTES)
                    if not piece:
                        return
                    time.sleep(self.delay_seconds)
                    while self.hangs:
                        time.sleep(0.01)
                    other[source].sendall(piece)


@contextmanager
def tcp_proxy(port: int) -> Iterator[TcpProxy]:
    """A proxy before whatever listens on ``port`` of this machine."""
    proxy = TcpProxy(port)
    try:
        yield proxy
    finally:
        proxy.close()


@dataclass(frozen=True)
class Request:
    """What a client of the store asked for."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes

    @property
    def says(self) -> str:
        """One line that rules are matched with: ``PUT /bucket/key?query``."""
        return f"{self.method} {self.target}"


@dataclass(frozen=True)
class Answer:
    """What the store says to it. ``announced`` is the Content-Length to send where that is not the body's."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes
    announced: int | None = None

    def header(self, name: str) -> str | None:
        return next((value for found, value in self.headers if found.lower() == name.lower()), None)

    def put(self, name: str, value: str | None) -> Answer:
        """The answer with another header, or without it."""
        kept = [row for row in self.headers if row[0].lower() != name.lower()]
        return Answer(self.status, kept + ([(name, value)] if value is not None else []), self.body, self.announced)


Forward = Callable[[Request], Answer]
Harm = Callable[[Request, Forward], Answer | None]  # None: hang up without an answer


@dataclass
class Rule:
    """Harm done to the requests that match, ``times`` of them; ``hits`` counts these."""

    pattern: re.Pattern[str]
    harm: Harm
    times: int
    hits: int = 0
    hit: threading.Event = field(default_factory=threading.Event)
    gate: threading.Event = field(default_factory=threading.Event)

    def release(self) -> None:
        """Let go on what is held."""
        self.gate.set()


class StoreProxy:
    """An S3 server behind which another one does the work."""

    def __init__(self, url: str) -> None:
        self._upstream = urlsplit(url).netloc
        self._lock = threading.Lock()
        self._rules: list[Rule] = []
        self.seen: list[str] = []
        self._server = _server(self)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def harm(self, pattern: str, harm: Harm, *, times: int = 1) -> Rule:
        """Do harm to requests whose line (``PUT /bucket/key?query``) matches a pattern somewhere."""
        rule = Rule(re.compile(pattern), harm, times)
        with self._lock:
            self._rules.append(rule)
        return rule

    def hold(self, pattern: str, *, times: int = 1) -> Rule:
        """Keep requests waiting until the rule is released; they go through then."""
        rule = self.harm(pattern, lambda request, forward: _held(rule, request, forward), times=times)
        return rule

    def heal(self) -> None:
        """Do no more harm, and let go what is held."""
        with self._lock:
            rules, self._rules = self._rules, []
        for rule in rules:
            rule.release()

    def parts_sent(self, since: int = 0) -> list[int]:
        """Numbers of the parts of uploads that were sent after so many requests, in order of numbers."""
        found = (re.match(r"PUT .*[?&]partNumber=(\d+)", says) for says in self.seen[since:])
        return sorted(int(each[1]) for each in found if each)

    def close(self) -> None:
        self.heal()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=20)

    def handle(self, request: Request) -> Answer | None:
        """The answer to a request, with the harm that is due to it."""
        with self._lock:
            self.seen.append(request.says)
            rule = next((r for r in self._rules if r.hits < r.times and r.pattern.search(request.says)), None)
            if rule is not None:
                rule.hits += 1
        if rule is None:
            return self._forward(request)
        rule.hit.set()
        return rule.harm(request, self._forward)

    def _forward(self, request: Request) -> Answer:
        connection = http.client.HTTPConnection(self._upstream, timeout=60)
        try:
            connection.putrequest(request.method, request.target, skip_host=True, skip_accept_encoding=True)
            for name, value in request.headers.items():
                connection.putheader(name, value)
            connection.endheaders(request.body)
            answer = connection.getresponse()
            headers = [row for row in answer.getheaders() if row[0].lower() not in HOP_BY_HOP]
            return Answer(answer.status, headers, answer.read())
        finally:
            connection.close()


@contextmanager
def store_proxy(url: str) -> Iterator[StoreProxy]:
    """A proxy before the S3 server at ``url``."""
    proxy = StoreProxy(url)
    try:
        yield proxy
    finally:
        proxy.close()


def _server(proxy: StoreProxy) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            headers = {name: value for name, value in self.headers.items() if name.lower() not in HOP_BY_HOP}
            try:
                answer = proxy.handle(Request(self.command, self.path, headers, body))
                self._send(answer)
            except (OSError, http.client.HTTPException):  # either side is gone
                self.close_connection = True

        def _send(self, answer: Answer | None) -> None:
            self.close_connection = answer is None or answer.announced is not None
            if answer is None:
                return
            self.send_response_only(answer.status)
            for name, value in answer.headers:
                if name.lower() != "content-length":
                    self.send_header(name, value)
            if self.command == "HEAD":
                self.send_header("Content-Length", answer.header("Content-Length") or "0")
            elif answer.status not in (204, 304):
                self.send_header(
                    "Content-Length", str(len(answer.body) if answer.announced is None else answer.announced)
                )
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(answer.body)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _answer  # noqa: N815 (http.server's names)

        def log_message(self, format: str, *args: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        block_on_close = False
        request_queue_size = 64

        def handle_error(self, request: object, client_address: object) -> None:
            """Clients that are killed leave broken connections: that is what this is for."""

    return Server(("127.0.0.1", 0), Handler)


# --- harm -------------------------------------------------------------------------------------------------------------


def _held(rule: Rule, request: Request, forward: Forward) -> Answer:
    rule.gate.wait(HOLD_SECONDS)
    return forward(request)


def slow(seconds: float) -> Harm:
    """The answer takes its time."""

    def harm(request: Request, forward: Forward) -> Answer:
        time.sleep(seconds)
        return forward(request)

    return harm


def failing(status: int) -> Harm:
    """The server fails, and says so; nothing is done."""
    code = {500: "InternalError", 503: "SlowDown"}[status]
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>on purpose</Message></Error>".encode()
    return lambda *_: Answer(status, [("Content-Type", "application/xml")], body)


def refused(request: Request, forward: Forward) -> None:
    """The server hangs up; nothing is done."""


def unanswered(request: Request, forward: Forward) -> None:
    """The server does it, and hangs up without saying so."""
    forward(request)


def cut_after(count: int) -> Harm:
    """The connection breaks after so many bytes of the body."""

    def harm(request: Request, forward: Forward) -> Answer:
        answer = forward(request)
        return Answer(answer.status, answer.headers, answer.body[:count], announced=len(answer.body))

    return harm


def truncated(request: Request, forward: Forward) -> Answer:
    """Half of the body, announced as if it were all."""
    answer = forward(request)
    return Answer(answer.status, answer.headers, answer.body[: len(answer.body) // 2])


def another_etag(request: Request, forward: Forward) -> Answer:
    """The right bytes under another ETag, as if the object had been replaced between two reads."""
    return forward(request).put("ETag", '"somebody-elses"')


def whole_for_a_range(request: Request, forward: Forward) -> Answer:
    """All of the object with status 200 where a range was asked for."""
    headers = {name: value for name, value in request.headers.items() if name.lower() not in ("range", "if-match")}
    answer = forward(Request(request.method, request.target, headers, request.body))
    return answer.put("Content-Range", None)


def without_conditions(request: Request, forward: Forward) -> Answer:
    """A server that has never heard of If-Match and If-None-Match."""
    headers = {name: value for name, value in request.headers.items() if not name.lower().startswith("if-")}
    return forward(Request(request.method, request.target, headers, request.body))


def doubled(request: Request, forward: Forward) -> Answer:
    """The same request arrives twice, and the second answer is the one that is heard."""
    forward(request)
    return forward(request)
