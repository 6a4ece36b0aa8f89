"""A real API on a free port: SQLite, a folder for a store, and a broker that is not there."""

from __future__ import annotations

import hashlib
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import httpx

from service.api.deps import House
from service.api.serving import server
from service.contract import artifacts
from service.contract.job import Status
from service.contract.parts import Counters, Done
from service.contract.settings import Connections
from service.contract.stages import PartMessage, Stage
from service.settings import Settings

DEAD_BROKER = "redis://127.0.0.1:1/0"
START_SECONDS = 30.0
ME = "anonymous"


@dataclass(frozen=True)
class Front:
    """The API from outside (``http``), from inside (``house``), and the folder that is its object store."""

    http: httpx.Client
    house: House
    objects: Path

    def put(self, address: str, data: bytes) -> str:
        self.house.objects.put(address, data, "application/octet-stream")
        return address

    def has(self, address: str) -> bool:
        return self.house.objects.exists(address)

    def submit(self, **changes: Any) -> dict[str, Any]:
        response = self.http.post("/v1/merges", json=recipe(**changes))
        assert response.status_code == 202, response.text
        job: dict[str, Any] = response.json()
        return job

    def finish(
        self, job: Mapping[str, Any], files: Mapping[str, bytes] | None = None, status: Status = Status.SUCCEEDED
    ) -> None:
        """Bring a queued job to its end as a worker would, with these files as its artifacts."""
        prefix = job["recipe"]["output"]["prefix"]
        rows = [artifact(name, data) for name, data in (files or {}).items()]
        for name, data in (files or {}).items():
            self.put(prefix + name, data)
        claim = self.house.parts.claim(PartMessage(Stage.PLAN, job["id"], 0), "worker")
        assert claim is not None
        done = Done(status=status, result={"prefix": prefix, "artifacts": rows})
        assert self.house.parts.complete(claim, done, Counters()) == []

    def count(self) -> int:
        return sum(self.house.jobs.counts().values())


def artifact(name: str, data: bytes) -> dict[str, Any]:
    return {
        "name": name,
        "role": artifacts.role(name),
        "media_type": artifacts.media_type(name),
        "size": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }


def recipe(**changes: Any) -> dict[str, Any]:
    task = {"name": "cars", "checkpoint": "s3://models/cars.safetensors"}
    return {"base": "s3://models/base.safetensors", "tasks": [task], **changes}


def checkpoint(**tensors: tuple[int, ...]) -> bytes:
    """A safetensors file of float32 zeros."""
    header, end = {}, 0
    for name, shape in tensors.items():
        start, end = end, end + 4 * prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(end)


def with_checkpoints(front: Front) -> Front:
    """The same, with what ``recipe`` names in its store."""
    for name in ("base", "cars"):
        front.put(f"s3://models/{name}.safetensors", checkpoint(weight=(2, 3), bias=(2,)))
    return front


@contextmanager
def open_front(folder: Path, connections: Connections | None = None, **settings: Any) -> Iterator[Front]:
    """An API that runs until the block ends. It does not sweep, unless told how often."""
    objects = folder / "objects"
    connections = connections or connections_to(folder)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        running = server(connections, Settings(**{"sweep_seconds": 3600.0, **settings}))
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            _await(lambda: running.started or not thread.is_alive())
            with httpx.Client(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=60) as http:
                yield Front(http, running.config.app.state.house, objects)  # type: ignore[union-attr]
        finally:
            running.handle_exit(15, None)
            thread.join()


def connections_to(folder: Path, **changes: Any) -> Connections:
    values: dict[str, Any] = {
        "database_url": f"sqlite:///{folder / 'catmerge.db'}",
        "broker_url": DEAD_BROKER,
        "object_store": f"file://{folder / 'objects'}",
        "workspace": "s3://workspace/",
        **changes,
    }
    return Connections(**values)


def _await(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
