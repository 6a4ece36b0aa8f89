"""A service under attack: every server behind a proxy that does harm, two workers, and what must hold afterwards."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3
import psycopg
import redis
from sqlalchemy import func, select
from sqlalchemy.engine import Row

from service.contract.settings import Connections
from service.stores.database import Database
from service.stores.schema import events, jobs, parts
from tests.end_to_end.stack import Program, Stack, open_stack, until
from tests.faulty import Rule, StoreProxy, TcpProxy, store_proxy, tcp_proxy
from tests.servers import PostgresServer, S3Server, postgres_server, redis_server, s3_server

BUCKET = "attack"
WORKSPACE = f"s3://{BUCKET}/"
MADE_WHEN = ("merge/report.json", "merge/report.html", "merge/manifest.json", "README.md")  # these tell the time
CLOCK = """
import time
_off, _time, _time_ns = {off}, time.time, time.time_ns
time.time = lambda: _time() + _off
time.time_ns = lambda: _time_ns() + _off * 10**9
"""


class Server:
    """A Redis or PostgreSQL server that is stopped and started again at the same port, behind a proxy."""

    def __init__(self, open_server: Any) -> None:
        self._open = open_server
        self._stack = ExitStack()
        self.server = self._stack.enter_context(open_server(None))
        self._proxy = tcp_proxy(self.server.port)
        self.proxy: TcpProxy = self._proxy.__enter__()

    def stop(self) -> None:
        self._stack.close()

    def start(self) -> None:
        self.server = self._stack.enter_context(self._open(self.server.port))

    def close(self) -> None:
        self._proxy.__exit__(None, None, None)
        self._stack.close()


@dataclass
class Arena:
    """``workers`` are two programs; the second one's clock is an hour fast. The store's proxy is theirs alone."""

    stack: Stack
    database: Database
    broker: Server
    postgres: Server
    store: StoreProxy
    s3: S3Server
    workers: list[Program] = field(default_factory=list)

    # --- doing harm

    def ready(self) -> None:
        """All healed, and everything that a test may have stopped is running."""
        self.store.heal()
        self.broker.proxy.heal()
        self.postgres.proxy.heal()
        for worker in self.workers:
            worker.signal(signal.SIGCONT)
            if not worker.is_running:
                worker.start()
        self.stack.api.signal(signal.SIGCONT)
        if not self.stack.api.is_running:
            self.stack.start_api()

    def caught(self, rule: Rule) -> None:
        """Until somebody has run into a rule."""
        until(rule.hit.is_set, f"a request matches {rule.pattern.pattern}", self.logs)

    def holder(self, job_id: str, stage: str, name: str = "") -> tuple[Program, int]:
        """The worker that holds the first part of a stage that is held, or the one of that name, and its process."""
        with self.database.read() as connection:
            claimed = (parts.c.job_id == job_id, parts.c.stage == stage, parts.c.state == "claimed")
            named = parts.c.name.startswith(name, autoescape=True)
            holding = select(parts.c.owner).where(*claimed, named).order_by(parts.c.part)
            owner = connection.execute(holding).scalars().first()
        assert owner is not None, f"nobody holds a part of {stage}\n{self.logs()}"
        pid = int(owner.rpartition(":")[2])
        group = os.getpgid(pid)
        return next(worker for worker in self.workers if worker.group == group), pid

    def redis(self) -> redis.Redis:
        return redis.Redis.from_url(self.broker.server.url)

    def terminate_backends(self) -> int:
        """Cut every connection to the database, whatever transaction it is in; returns how many."""
        with psycopg.connect(self.postgres.server.dsn, autocommit=True) as connection:
            cut = connection.execute(
                "select count(pg_terminate_backend(pid)) from pg_stat_activity "
                "where datname = 'attack' and pid <> pg_backend_pid()"
            ).fetchone()
        return int(cut[0]) if cut else 0

    def forget_cache(self) -> None:
        for info in list(self.stack.objects.list(f"{WORKSPACE}cache/")):
            self.stack.objects.delete(info.address)

    # --- looking

    def row(self, job_id: str) -> Row[Any] | None:
        with self.database.read() as connection:
            return connection.execute(select(jobs).where(jobs.c.id == job_id)).one_or_none()

    def jobs_named(self, name: str) -> list[str]:
        """The jobs with this name in their metadata, straight from the database."""
        with self.database.read() as connection:
            found = connection.execute(select(jobs.c.id).where(jobs.c.metadata["name"].as_string() == name))
            return list(found.scalars())

    def states(self, job_id: str, stage: str) -> dict[str, int]:
        with self.database.read() as connection:
            query = select(parts.c.state, func.count()).where(parts.c.job_id == job_id, parts.c.stage == stage)
            return dict(connection.execute(query.group_by(parts.c.state)).all())

    def uploads(self) -> list[str]:
        """Multipart uploads that nobody has completed or aborted."""
        place = f"s3://{BUCKET}/"
        return [found.address.removeprefix(place) for found in self.stack.objects.unfinished(place)]

    def s3_client(self) -> Any:
        return boto3.client(
            "s3",
            endpoint_url=self.s3.url,
            region_name=self.s3.region,
            aws_access_key_id=self.s3.access_key,
            aws_secret_access_key=self.s3.secret_key,
        )

    def logs(self) -> str:
        written = "".join(f"--- worker {i} ---\n{worker.log()}\n" for i, worker in enumerate(self.workers))
        return f"--- API ---\n{self.stack.api.log()}\n{written}"

    # --- what must hold

    def digests(self, job_id: str) -> dict[str, str]:
        """SHA-256 of every file of a result that does not tell when it was made, as it lies in the store."""
        prefix = self.stack.job(job_id)["result"]["prefix"]
        names = [name for name in self.stack.artifacts(job_id) if name not in MADE_WHEN and name != "merge/recipe.json"]
        names.remove("merge/plan.json")  # it names its folder
        return {name: self._sha256(prefix + name) for name in names}

    def _sha256(self, address: str) -> str:
        return hashlib.sha256(self.stack.objects.read_all(address, 1 << 30)).hexdigest()

    def check(self, job_id: str, undisturbed: Mapping[str, str] | None = None) -> dict[str, Any]:
        """Everything that must hold of a job that was accepted, once it has ended; its job."""
        job = self.stack.succeeded(job_id)
        self._check_history(job_id)
        self._check_manifest(job)
        if undisturbed is not None:
            assert self.digests(job_id) == undisturbed
        with self.database.read() as connection:
            open_parts = select(parts.c.stage, parts.c.part).where(parts.c.job_id == job_id, parts.c.state != "done")
            assert connection.execute(open_parts).all() == []
            leases = (parts.c.job_id == job_id, parts.c.lease_until.is_not(None))
            assert connection.execute(select(parts.c.part).where(*leases)).all() == []
        scratch = f"{WORKSPACE}scratch/{job_id}/"
        until(lambda: not self.stack.listed(scratch), "scratch is empty", self.logs)
        return job

    def _check_history(self, job_id: str) -> None:
        """Event numbers without gaps, times in order, and every part done at most once."""
        with self.database.read() as connection:
            rows = connection.execute(select(events).where(events.c.job_id == job_id).order_by(events.c.seq)).all()
            last = connection.execute(select(jobs.c.last_seq).where(jobs.c.id == job_id)).scalar_one()
        assert [row.seq for row in rows] == list(range(1, last + 1))
        assert [row.created_at for row in rows] == sorted(row.created_at for row in rows)
        done = [(row.data["stage"], row.data["part"]) for row in rows if row.type == "part.done"]
        assert len(done) == len(set(done)), done
        assert [row.type for row in rows].count("job.succeeded") == 1

    def _check_manifest(self, job: Mapping[str, Any]) -> None:
        """One manifest, and in its folder just what it lists, as it lists it."""
        prefix = job["result"]["prefix"]
        listed = sorted(self.stack.listed(prefix))
        assert [name for name in listed if name.endswith("manifest.json")] == ["merge/manifest.json"]
        manifest = json.loads(self.stack.objects.read_all(f"{prefix}merge/manifest.json", 1 << 24))
        assert manifest["job"] == job["id"]
        assert listed == sorted([row["name"] for row in manifest["files"]] + ["merge/manifest.json"])
        told = {row["name"]: row["sha256"] for row in job["result"]["artifacts"]}
        assert {
            **{row["name"]: row["sha256"] for row in manifest["files"]},
            "merge/manifest.json": told.pop("merge/manifest.json"),
        } == {**told, "merge/manifest.json": self._sha256(f"{prefix}merge/manifest.json")}
        for row in manifest["files"]:
            assert self._sha256(prefix + row["name"]) == row["sha256"], row["name"]

    def check_nothing_left(self) -> None:
        """No lease, no lock, no transaction left open, no upload that nobody ends."""
        until(lambda: not self.uploads(), "unfinished uploads are swept", self.logs)
        with psycopg.connect(self.postgres.server.dsn.rpartition("/")[0] + "/attack") as connection:
            waiting = connection.execute("select count(*) from pg_locks where not granted").fetchone()
            idle = connection.execute(
                "select count(*) from pg_stat_activity where datname = 'attack' "
                "and state like 'idle in transaction%' and state_change < now() - interval '10 s'"
            ).fetchone()
        assert (waiting, idle) == ((0,), (0,))
        with self.database.read() as connection:
            assert connection.execute(select(parts.c.job_id).where(parts.c.state == "claimed")).all() == []


@contextmanager
def open_arena(folder: Path, s3: S3Server, *, workers: int = 2, **values: Any) -> Iterator[Arena]:
    """Everything started but the workers, whose number is given; leases are short."""
    settings = {"lease_seconds": 4, "heartbeat_seconds": 1, "part_attempts": 8, "workspace": WORKSPACE, **values}
    with (
        tempfile.TemporaryDirectory(prefix="catmerge-arena-", ignore_cleanup_errors=True) as data,
        ExitStack() as stack,
    ):
        broker = Server(lambda port: redis_server(port=port))
        stack.callback(broker.close)
        postgres = Server(lambda port: postgres_server(port=port, folder=Path(data)))
        stack.callback(postgres.close)
        store = stack.enter_context(store_proxy(s3.url))
        connections = _connections(s3, postgres, broker).model_copy(update=settings)
        extra = {"CATMERGE_RESEND_AFTER_SECONDS": "2", "CATMERGE_HOUSEKEEPING_SECONDS": "1"}
        worker_extra = {"CATMERGE_S3_ENDPOINT": store.url}
        opened = stack.enter_context(open_stack(folder, connections, extra, worker=False, worker_extra=worker_extra))
        database = Database(postgres.server.url.rpartition("/")[0] + "/attack")
        stack.callback(database.close)
        arena = Arena(opened, database, broker, postgres, store, s3)
        arena.workers = [_worker(arena, folder, index) for index in range(workers)]
        for worker in arena.workers:
            stack.callback(worker.kill)
        yield arena
        _check_no_orphans(opened, arena.workers)


def _worker(arena: Arena, folder: Path, index: int) -> Program:
    if index == 0:
        return arena.stack.worker
    clock = folder / f"clock-{index}"
    clock.mkdir()
    (clock / "sitecustomize.py").write_text(CLOCK.format(off=3600 if index == 1 else 0))
    path = os.pathsep.join([str(clock), str(Path(__file__).parents[2])])
    return arena.stack.worker.twin(f"twin-{index}", PYTHONPATH=path)


def _connections(s3: S3Server, postgres: Server, broker: Server) -> Connections:
    server: PostgresServer = postgres.server
    with psycopg.connect(server.dsn, autocommit=True) as connection:
        connection.execute("create database attack")
    address = server.url.replace(f":{server.port}/postgres", f":{postgres.proxy.port}/attack")
    environment = {
        **s3.environment(),
        "CATMERGE_DATABASE_URL": address,
        "CATMERGE_BROKER_URL": f"redis://127.0.0.1:{broker.proxy.port}/0",
    }
    return Connections.from_environment(environment)


def _check_no_orphans(stack: Stack, workers: list[Program]) -> None:
    """Once all programs are asked to stop, no process of theirs is left, whatever was done to them."""
    mark = f"CATMERGE_PORT={stack.url.rpartition(':')[2]}".encode()
    for program in (*workers, stack.api):
        program.stop()
    until(lambda: not _with_variable(mark), "no process is left", stack.logs, seconds=40)


def _with_variable(mark: bytes) -> list[int]:
    found = []
    for folder in Path("/proc").iterdir():
        with suppress(OSError):
            if folder.name.isdecimal() and mark in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


__all__ = ["BUCKET", "WORKSPACE", "Arena", "open_arena", "s3_server"]
