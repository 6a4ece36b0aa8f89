"""The Python client: everything that the HTTP contract offers, as methods, on httpx alone."""

from __future__ import annotations

import json
import random
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self
from urllib.parse import quote

import httpx

from service.contract.asked import AnyRecipe
from service.contract.evaluating import EvaluationRecipe
from service.contract.job import Status
from service.contract.recipe import Recipe
from service.contract.resources import EVALUATIONS, MERGES, resource_named
from service.downloading import CatmergeError, Download, DownloadError, DownloadProgress

__all__ = [
    "CatmergeClient",
    "CatmergeError",
    "DownloadError",
    "DownloadProgress",
    "ProblemError",
    "ServiceUnreachable",
    "WaitTimeout",
]

JsonObject = dict[str, Any]

DEFAULT_URL = "http://127.0.0.1:8000"
LONG_POLL_SECONDS = 25
STREAM_SILENCE_SECONDS = 60.0  # a stream that says nothing for so long, not even a comment, is taken for dead
LONGEST_PAUSE_SECONDS = 30.0
BUSY = (429, 503)
GATEWAY_TROUBLE = (502, 504)


class ServiceUnreachable(CatmergeError, ConnectionError):
    """The service does not answer at its address."""


class WaitTimeout(CatmergeError, TimeoutError):
    """The job had not ended when the time to wait was over; it goes on."""


class ProblemError(CatmergeError):
    """The service said no, and why.

    ``problem`` is the RFC 9457 document, ``code`` its code for programs, ``status`` the HTTP status, and ``errors``
    the single faults, each with a ``pointer`` into the request, a ``code`` and a ``detail``.
    """

    def __init__(self, problem: JsonObject) -> None:
        super().__init__(_readable(problem))
        self.problem = problem
        self.code: str = problem["code"]
        self.status: int = problem["status"]
        self.errors: list[dict[str, str]] = problem["errors"]

    @classmethod
    def of(cls, response: httpx.Response) -> Self:
        """From an answer, which must have been read; one that is no problem document is made into one."""
        text = response.text[:500].strip()
        fallback = {
            "title": response.reason_phrase,
            "status": response.status_code,
            "detail": text or f"The server answered {response.status_code}.",
            "code": f"http_{response.status_code}",
            "retryable": response.status_code in (*BUSY, *GATEWAY_TROUBLE),
            "errors": [],
        }
        is_problem = response.headers.get("content-type", "").startswith("application/problem+json")
        return cls({**fallback, **_json_object(response)} if is_problem else fallback)


def _readable(problem: JsonObject) -> str:
    faults = [f"{fault['pointer'] or '(the whole)'}: {fault['detail']}" for fault in problem["errors"]]
    return "\n  ".join([f"{problem['title']}: {problem['detail']}", *faults])


def _json_object(response: httpx.Response) -> JsonObject:
    if "json" not in response.headers.get("content-type", ""):
        return {}
    try:
        value = response.json()
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


class CatmergeClient:
    """A catmerge service at ``base_url``.

    Jobs, events and artifacts are the JSON objects of the HTTP contract. Requests that may be repeated safely are,
    at most ``attempts`` times, when the service can't be reached, is busy, or says that it is away. Keep one client
    for many calls, and close it, or use it as a context manager.

    Args:
        base_url: where the service answers, without ``/v1``.
        timeout_seconds: how long one answer may take.
        attempts: how often a request is sent at most.
        headers: sent with every request to the service (a gateway's key), and never to a store it links to.

    Raises (all methods):
        ServiceUnreachable: nothing answers.
        ProblemError: the service refuses.
    """

    def __init__(
        self,
        base_url: str = DEFAULT_URL,
        *,
        timeout_seconds: float = 30.0,
        attempts: int = 5,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.base_url = base_url.rstrip("/")
        self._timeout_seconds = timeout_seconds
        self._attempts = attempts
        self._http = httpx.Client(base_url=self.base_url, timeout=timeout_seconds, headers=headers)
        self._stores = httpx.Client(timeout=timeout_seconds)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()
        self._stores.close()

    # Asking for merges

    def submit(self, recipe: Recipe | Mapping[str, Any], *, idempotency_key: str | None = None) -> JsonObject:
        """Submit a merge; returns the job.

        A key is made up where none is given, so that a repeated request never makes a second job; give your own to
        make that hold across processes.
        """
        return self._submit("/v1/merges", recipe, idempotency_key)

    def analyze(self, recipe: Recipe | Mapping[str, Any], *, idempotency_key: str | None = None) -> JsonObject:
        """Submit a merge to be analyzed only, without weights to write; returns the job. Keys are as for ``submit``."""
        return self._submit("/v1/merges:analyze", recipe, idempotency_key)

    def evaluate(
        self, recipe: EvaluationRecipe | Mapping[str, Any], *, idempotency_key: str | None = None
    ) -> JsonObject:
        """Submit checkpoints to be measured; returns the job, an evaluation. Keys are as for ``submit``.

        Every other method takes its id as it takes a merge's.
        """
        return self._submit("/v1/evaluations", recipe, idempotency_key)

    def _submit(self, path: str, recipe: AnyRecipe | Mapping[str, Any], key: str | None) -> JsonObject:
        headers = {"Idempotency-Key": key or str(uuid.uuid4())}
        return self._json("POST", path, json=_body(recipe), headers=headers)

    def plan(self, recipe: AnyRecipe | Mapping[str, Any]) -> JsonObject:
        """What a merge, or an evaluation, would do and need; nothing is stored. Recipes with models are evaluations."""
        body = _body(recipe)
        resource = EVALUATIONS if "models" in body else MERGES
        return self._json("POST", f"/v1/{resource.plural}:plan", json=body)

    def cancel(self, job_id: str) -> JsonObject:
        """Ask for the end of a job; one that has ended is returned as it is."""
        return self._json("POST", f"{_path(job_id)}/cancel")

    def retry(self, job_id: str) -> JsonObject:
        """Let a failed or cancelled job go on from the parts that are done."""
        return self._json("POST", f"{_path(job_id)}/retry", repeatable=False)

    def delete(self, job_id: str, *, artifacts: bool = False) -> None:
        """Forget a job that has ended; with ``artifacts`` remove what it wrote too."""
        self._call("DELETE", _path(job_id), params={"artifacts": "true"} if artifacts else {}, repeatable=False)

    # Looking

    def get(self, job_id: str) -> JsonObject:
        """The job as it is now."""
        return self._json("GET", _path(job_id))

    def list(
        self,
        *,
        status: str | None = None,
        created_after: float | None = None,
        metadata: Mapping[str, str] | None = None,
        order: str | None = None,
        page_size: int | None = None,
        kind: Literal["merge", "evaluation"] = "merge",
    ) -> Iterator[JsonObject]:
        """Jobs of one kind, newest first, page by page as they are consumed.

        Args:
            status: only those that stand there.
            created_after: only those created after this time, in seconds since the epoch.
            metadata: only those with these labels.
            order: ``asc`` or ``desc``.
            page_size: how many to ask for at a time.
            kind: merges (and analyses), or evaluations.
        """
        labels = {f"metadata[{name}]": value for name, value in (metadata or {}).items()}
        wanted = {"status": status, "created_after": created_after, "order": order, "limit": page_size, **labels}
        return self._pages(f"/v1/{(EVALUATIONS if kind == EVALUATIONS.name else MERGES).plural}", wanted)

    def wait(
        self,
        job_id: str,
        *,
        timeout_seconds: float | None = None,
        on_change: Callable[[JsonObject], None] | None = None,
        every_seconds: float = LONG_POLL_SECONDS,
    ) -> JsonObject:
        """The job once it has ended, however it did; ``on_change`` sees each state on the way.

        The service holds an answer back for ``every_seconds`` at most while nothing changes.

        Raises:
            WaitTimeout: it had not ended after ``timeout_seconds``.
        """
        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        while True:
            left = every_seconds if deadline is None else min(every_seconds, deadline - time.monotonic())
            asked = time.monotonic()
            job = self._long_poll(job_id, max(left, 0.0))
            if on_change is not None:
                on_change(job)
            if Status(job["status"]).is_terminal:
                return job
            if deadline is not None and time.monotonic() >= deadline:
                raise WaitTimeout(f"{job_id} is still {job['status']} after {timeout_seconds} s; it goes on")
            time.sleep(max(0.0, min(0.2, every_seconds) - (time.monotonic() - asked)))

    def _long_poll(self, job_id: str, seconds: float) -> JsonObject:
        whole = int(seconds)
        headers = {"Prefer": f"wait={whole}"} if whole else {}
        return self._json("GET", _path(job_id), headers=headers, timeout=self._timeout_seconds + whole)

    def events(self, job_id: str, *, after: int = 0, follow: bool = False) -> Iterator[JsonObject]:
        """What happened to a job, from event ``after`` on; with ``follow`` until it ends.

        A stream that breaks is taken up where it broke: no event is skipped, none comes twice.
        """
        if not follow:
            yield from self._pages(f"{_path(job_id)}/events", {"after": after or None})
            return
        failures = 0
        while True:
            before = after
            try:
                for event in self._stream(job_id, after):
                    after = event["seq"]
                    yield event
            except httpx.TransportError as error:
                failures = 1 if after > before else failures + 1
                if failures >= self._attempts:
                    raise self._unreachable(error) from error
                time.sleep(_pause(failures, None))
                continue
            if Status(self.get(job_id)["status"]).is_terminal:  # its last events may have come as the stream closed
                yield from self._pages(f"{_path(job_id)}/events", {"after": after or None})
                return
            time.sleep(0.2)

    def _stream(self, job_id: str, after: int) -> Iterator[JsonObject]:
        headers = {"Accept": "text/event-stream", "Last-Event-ID": str(after)}
        timeout = httpx.Timeout(self._timeout_seconds, read=STREAM_SILENCE_SECONDS)
        request = self._http.build_request("GET", f"{_path(job_id)}/events", headers=headers, timeout=timeout)
        with closing(self._send(request, stream=True)) as response:
            for data in _event_data(response.iter_text()):
                event = json.loads(data)
                if event.get("seq", 0) > after:
                    yield event

    # What a job leaves

    def artifacts(self, job_id: str) -> Sequence[JsonObject]:
        """The files of a result: name, role, media_type, size in bytes, sha256."""
        return tuple(self._pages(f"{_path(job_id)}/artifacts", {}))

    def trim_log(
        self, job_id: str, *, task: str | None = None, role: str | None = None, name: str | None = None
    ) -> Iterator[JsonObject]:
        """What was trimmed from each tensor of each task, row by row."""
        return self._pages(f"{_path(job_id)}/trim-log", {"task": task, "role": role, "name": name})

    def download(
        self,
        job_id: str,
        out: Path | str,
        *,
        progress: Callable[[DownloadProgress], None] | None = None,
        match: Sequence[str] = (),
        overwrite: bool = False,
    ) -> Sequence[Path]:
        """Bring a result's files into the folder ``out``; returns their paths.

        Each is written beside its place, checked for size and SHA-256, and only then given its name; an interrupted
        download goes on where it stopped, and files already there with the right content are left alone.

        Args:
            job_id: the job.
            out: the folder, which is made.
            progress: called as bytes arrive.
            match: shell-style patterns of names; none means all.
            overwrite: replace files that are there with other content.

        Raises:
            DownloadError: a file does not match its digest, would land outside ``out``, or can't be written.
        """
        wanted = [a for a in self.artifacts(job_id) if not match or any(fnmatchcase(a["name"], m) for m in match)]
        if match and not wanted:
            raise DownloadError(f"{job_id} has no file that matches {', '.join(match)}")
        return Download(
            lambda name, start: self._open_artifact(job_id, name, start),
            Path(out),
            progress=progress,
            overwrite=overwrite,
            attempts=self._attempts,
        ).run(wanted)

    @contextmanager
    def _open_artifact(self, job_id: str, name: str, start: int) -> Iterator[httpx.Response]:
        """The bytes of an artifact from ``start`` on, from the service or from the store it links to."""
        headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={start}-"} if start else {})}
        request = self._http.build_request("GET", f"{_path(job_id)}/artifacts/{quote(name)}", headers=headers)
        with closing(self._send(request, stream=True)) as response:
            if response.next_request is None:
                yield response
                return
            link = response.next_request.url
        with closing(
            self._stores.send(self._stores.build_request("GET", link, headers=headers), stream=True)
        ) as stored:
            yield stored

    # The service itself

    def methods(self) -> Sequence[JsonObject]:
        """Every merge method: its name, its paper, the JSON Schema of its parameters."""
        return tuple(self._pages("/v1/methods", {}))

    def presets(self) -> Sequence[JsonObject]:
        """Every preset: the name that a recipe may give as its method, what it stands for, and why."""
        return tuple(self._json("GET", "/v1/methods")["presets"])

    def treatments(self) -> Sequence[JsonObject]:
        """Every parameter treatment: its name, its paper, its roles, the JSON Schema of its parameters."""
        return tuple(self._pages("/v1/treatments", {}))

    def ready(self) -> JsonObject:
        """Whether the service can work: ``status`` is ready or not_ready, ``checks`` says why. Asked once."""
        request = self._http.build_request("GET", "/readyz")
        try:
            response = self._http.send(request)
        except httpx.TransportError as error:
            raise self._unreachable(error) from error
        readiness = _json_object(response)
        if readiness.get("status") not in ("ready", "not_ready"):
            raise ProblemError.of(response)
        return readiness

    # How requests are sent

    def _pages(self, path: str, params: Mapping[str, Any]) -> Iterator[JsonObject]:
        asked = {name: value for name, value in params.items() if value is not None}
        while True:
            page = self._json("GET", path, params=asked)
            yield from page["data"]
            if not page.get("has_more"):
                return
            asked["after"] = page["last_id"]

    def _json(self, method: str, path: str, **options: Any) -> JsonObject:
        answer: JsonObject = self._call(method, path, **options).json()
        return answer

    def _call(self, method: str, path: str, *, repeatable: bool = True, **options: Any) -> httpx.Response:
        return self._send(self._http.build_request(method, path, **options), repeatable=repeatable)

    def _send(self, request: httpx.Request, *, repeatable: bool = True, stream: bool = False) -> httpx.Response:
        for attempt in range(1, self._attempts + 1):
            is_last = attempt == self._attempts
            try:
                response = self._http.send(request, stream=stream)
            except httpx.TransportError as error:
                # What never reached the service may be sent again, whatever it is.
                if is_last or not (repeatable or isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)):
                    raise self._unreachable(error) from error
                time.sleep(_pause(attempt, None))
                continue
            if not response.is_error:
                return response
            response.read()
            response.close()
            if is_last or not _may_pass_later(response, repeatable):
                raise ProblemError.of(response)
            time.sleep(_pause(attempt, response.headers.get("retry-after")))
        raise ServiceUnreachable(f"{self.base_url} was not asked: a client needs at least one attempt")

    def _unreachable(self, error: httpx.TransportError) -> ServiceUnreachable:
        why = str(error) or type(error).__name__
        return ServiceUnreachable(f"No answer from {self.base_url} ({why}). Is the service running there?")


def _path(job_id: str) -> str:
    return f"/v1/{resource_named(job_id).plural}/{quote(job_id, safe='')}"


def _body(recipe: AnyRecipe | Mapping[str, Any]) -> JsonObject:
    return dict(recipe) if isinstance(recipe, Mapping) else recipe.model_dump(mode="json", exclude_unset=True)


def _may_pass_later(response: httpx.Response, repeatable: bool) -> bool:
    if response.status_code in BUSY:
        return True
    if response.status_code == 409:
        return _json_object(response).get("code") == "idempotency_in_progress"
    return repeatable and response.status_code in GATEWAY_TROUBLE


def _pause(attempt: int, retry_after: str | None) -> float:
    """Seconds to wait after the ``attempt``-th time: what the service asks for, else longer each time."""
    if retry_after is not None and retry_after.isdecimal():
        return min(float(retry_after), LONGEST_PAUSE_SECONDS)
    return min(0.2 * 2.0 ** (attempt - 1), LONGEST_PAUSE_SECONDS) * random.uniform(0.5, 1.0)  # noqa: S311 (no secret)


def _event_data(chunks: Iterable[str]) -> Iterator[str]:
    """The data of each event in a ``text/event-stream``; comments, names and ids are left out."""
    data: list[str] = []
    for line in _lines(chunks):
        field, _, value = line.partition(":")
        if field == "data":
            data.append(value.removeprefix(" "))
        elif not line and data:
            yield "\n".join(data)
            data = []


def _lines(chunks: Iterable[str]) -> Iterator[str]:
    """Lines as event streams have them; ``str.splitlines`` also cuts at characters that may stand inside JSON."""
    rest = ""
    for chunk in chunks:
        *whole, rest = (rest + chunk).split("\n")
        yield from (line.removesuffix("\r") for line in whole)
