"""A whole service of real processes for tests: API and worker over a real broker, database and object store."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from service.contract import artifacts
from service.contract.settings import Connections
from service.stores.objects import Objects, open_objects
from tests.servers import LAUNCH, free_port

START_SECONDS = 120.0  # generous: a worker imports torch, and the machine may be busy
STOP_SECONDS = 30.0
WAIT_SECONDS = 150.0
LOG_CHARACTERS = 6000


class StackError(Exception):
    """A process of the stack ended or stayed silent, or a job did not end; the message carries the logs."""


class Program:
    """A process in a group of its own, that can be stopped, killed, frozen and started again; it logs to one file."""

    def __init__(self, command: list[str], environment: Mapping[str, str], log: Path) -> None:
        self._command = command
        self._environment = dict(environment)
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def group(self) -> int:
        """The id of its process and of the group of all that it starts; 0 where it does not run."""
        return 0 if self._process is None else self._process.pid

    def start(self) -> None:
        """Start, with the promise that it does not outlive this process."""
        guard = [sys.executable, "-I", "-S", "-c", LAUNCH, str(os.getpid()), str(int(signal.SIGKILL)), "-1", "-1"]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [*guard, *self._command],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self._log.parent,
                start_new_session=True,
            )

    def twin(self, name: str = "twin", **changes: str) -> Program:
        """Another process of the same kind, to be started, with changed variables."""
        return Program(self._command, {**self._environment, **changes}, self._log.with_suffix(f".{name}.log"))

    def stop(self) -> int | None:
        """Ask it to stop, and kill what is left of its group; its exit status is 0 where it went in order."""
        if self._process is None:
            return None
        self._process.terminate()
        try:
            status = self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            status = None
            self._note(f"it did not stop within {STOP_SECONDS:g} s of SIGTERM")
        self.kill()
        return status

    def kill(self) -> None:
        """SIGKILL for the whole group at once, as when a machine goes down."""
        if self._process is None:
            return
        self.signal(signal.SIGKILL)
        self._process.wait()
        self._process = None

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the whole group."""
        if self._process is not None:
            try:
                os.killpg(self._process.pid, number)
            except ProcessLookupError:  # all of it has ended
                return

    def log(self) -> str:
        """The end of what it wrote."""
        return self._log.read_text(errors="replace")[-LOG_CHARACTERS:] if self._log.exists() else ""

    def _note(self, sentence: str) -> None:
        with self._log.open("a") as log:
            print(f"[tests] {sentence}", file=log)


@dataclass
class Stack:
    """A running service. ``api`` and ``worker`` may be stopped and started by a test, which leaves them running."""

    connections: Connections
    url: str
    api: Program
    worker: Program
    objects: Objects
    client: httpx.Client = field(repr=False)

    def start_api(self) -> None:
        self.api.start()
        until(lambda: self._answers(), f"the API answers at {self.url}", self.logs, START_SECONDS)

    def _answers(self) -> bool:
        if not self.api.is_running:
            raise StackError(f"the API ended\n{self.api.log()}")
        try:
            return self.client.get("/healthz").status_code == 200
        except httpx.TransportError:
            return False

    def submit(self, recipe: Mapping[str, Any], to: str = "/v1/merges", **headers: str) -> dict[str, Any]:
        """Submit a job that is taken in."""
        answer = self.client.post(to, json=recipe, headers=headers)
        assert answer.status_code == 202, answer.text
        job: dict[str, Any] = answer.json()
        return job

    def job(self, job_id: str) -> dict[str, Any]:
        """A job as it is now."""
        answer = self.client.get(door(job_id))
        assert answer.status_code == 200, answer.text
        job: dict[str, Any] = answer.json()
        return job

    def ended(self, job_id: str) -> dict[str, Any]:
        """A job when it has ended, however it did."""
        deadline = time.monotonic() + WAIT_SECONDS
        while time.monotonic() < deadline:
            answer = self.client.get(door(job_id), headers={"Prefer": "wait=20"})
            assert answer.status_code == 200, answer.text
            job: dict[str, Any] = answer.json()
            if job["finished_at"] is not None:
                return job
        raise StackError(f"{job_id} did not end\n{self.job(job_id)}\n{self.logs()}")

    def succeeded(self, job_id: str) -> dict[str, Any]:
        """A job when it has ended well."""
        job = self.ended(job_id)
        assert job["status"] == "succeeded", f"{job['status']}: {job['error']}\n{self.logs()}"
        return job

    def run(self, recipe: Mapping[str, Any]) -> dict[str, Any]:
        """Submit a merge and see it succeed."""
        return self.succeeded(self.submit(recipe)["id"])

    def events(self, job_id: str) -> list[dict[str, Any]]:
        """A job's history."""
        rows: list[dict[str, Any]] = self.client.get(f"{door(job_id)}/events", params={"limit": 1000}).json()["data"]
        return rows

    def upload(self, source: Path, address: str) -> None:
        """Put a file, or a folder's files, at an address."""
        for path in sorted(source.rglob("*")) if source.is_dir() else [source]:
            if path.is_file():
                name = str(path.relative_to(source)) if source.is_dir() else ""
                self.objects.put(address + name, path.read_bytes(), artifacts.media_type(path.name))

    def listed(self, address: str) -> list[str]:
        """Names of the objects under an address."""
        return [info.address.removeprefix(address) for info in self.objects.list(address)]

    def artifacts(self, job_id: str) -> dict[str, dict[str, Any]]:
        """The files of a result by name."""
        answer = self.client.get(f"{door(job_id)}/artifacts")
        assert answer.status_code == 200, answer.text
        return {row["name"]: row for row in answer.json()["data"]}

    def download(self, job_id: str, folder: Path) -> Path:
        """A result's files, each fetched as any caller would: by its link where the store has links."""
        for name in self.artifacts(job_id):
            answer = self.client.get(f"{door(job_id)}/artifacts/{name}", follow_redirects=True)
            assert answer.status_code == 200, answer.text
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(answer.content)
        return folder

    def logs(self) -> str:
        """The ends of the processes' logs."""
        return f"--- API ---\n{self.api.log()}\n--- worker ---\n{self.worker.log()}"


def door(job_id: str) -> str:
    """Where the API tells of a job."""
    return f"/v1/{'evaluations' if job_id.startswith('evl_') else 'merges'}/{job_id}"


def until(
    is_so: Callable[[], bool], what: str, logs: Callable[[], str], seconds: float = WAIT_SECONDS, every: float = 0.05
) -> None:
    """Look again and again until it is so; raises StackError where it never is."""
    deadline = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > deadline:
            raise StackError(f"waited in vain until {what}\n{logs()}")
        time.sleep(every)


@contextmanager
def open_stack(
    folder: Path,
    connections: Connections,
    extra: Mapping[str, str] | None = None,
    *,
    worker: bool = True,
    worker_extra: Mapping[str, str] | None = None,
) -> Iterator[Stack]:
    """A stack over servers that run already; ``extra`` and ``worker_extra`` are more variables of its environment."""
    port = free_port()
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("CATMERGE_")},
        **connections.to_environment(),
        "CATMERGE_PORT": str(port),
        "CATMERGE_WORKER_PROCESSES": "1",
        "CATMERGE_WORKER_THREADS": "1",
        "CATMERGE_DEVICE": "cpu",
        "CATMERGE_SWEEP_SECONDS": "0.2",
        **(extra or {}),
    }
    url = f"http://127.0.0.1:{port}"
    with httpx.Client(base_url=url, timeout=60) as client:
        stack = Stack(
            connections=connections,
            url=url,
            api=Program([sys.executable, "-m", "service.api"], environment, folder / "api.log"),
            worker=Program(
                [sys.executable, "-m", "workers"], {**environment, **(worker_extra or {})}, folder / "worker.log"
            ),
            objects=open_objects(connections),
            client=client,
        )
        try:
            if worker:
                stack.worker.start()
            stack.start_api()
            yield stack
        finally:
            stack.worker.stop()
            stack.api.stop()
