"""Measures the service under load: real API and workers, real PostgreSQL and Valkey, all on this machine.

    python -m tests.benchmarks.load                       # everything, six minutes on an idle machine
    python -m tests.benchmarks.load jobs --jobs 0 10000   # some of it: jobs, streams, broker, overhead, spread

**jobs**: submits a second by eight callers, and what one caller waits for submits, looks and lists while so many jobs
are stored: nine tenths have ended, one tenth waits in the queue. **streams**: a thousand event streams open at once
against one API. **broker**: submits while the broker is away (stopped) or hangs (frozen). **overhead**: what a job and
a part cost that have next to nothing to do. **spread**: what more workers gain, see spread.py.

PostgreSQL waits for the disk as it does in production. The callers take their share of the same processors.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import itertools
import json
import os
import resource
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg

from service.contract.checkpoint import write_header
from service.contract.settings import Connections
from service.contract.stages import Stage
from service.stores.database import Database
from service.stores.parts import PartStore
from tests.benchmarks import spread
from tests.benchmarks.tables import heading, milliseconds, row
from tests.end_to_end.stack import Stack, open_stack
from tests.servers import PostgresServer, postgres_server, redis_server
from tests.service.jobs_by_hand import claim, merges, plan

CALLERS = 8
TASKS = ("cars", "pets")
DIGITS = 32  # of a job's id


@dataclass(frozen=True)
class Servers:
    """Connections to servers that run, and the process of the broker."""

    connections: Connections
    postgres: PostgresServer
    broker_pid: int


@contextmanager
def servers(folder: Path) -> Iterator[Servers]:
    with postgres_server(durable=True) as postgres, redis_server() as broker:
        connections = Connections(
            database_url=postgres.url, broker_url=broker.url, object_store=f"file://{folder / 'objects'}"
        )
        yield Servers(connections, postgres, broker.pid)


class Caller:
    """One caller, who keeps a connection open."""

    def __init__(self, url: str) -> None:
        self._connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=120)

    def ask(self, method: str, path: str, value: object = None) -> Any:
        body = None if value is None else json.dumps(value)
        self._connection.request(method, path, body, {"Content-Type": "application/json"} if body else {})
        answer = self._connection.getresponse()
        text = answer.read()
        if answer.status >= 300:
            raise RuntimeError(f"{method} {path}: {answer.status} {text[:500]!r}")
        return text if path == "/metrics" else json.loads(text)

    def seconds(self, count: int, method: str, path: str, value: Callable[[], object] = lambda: None) -> list[float]:
        """How long each of so many requests takes."""
        took = []
        for _ in range(count):
            body = value()
            start = time.perf_counter()
            self.ask(method, path, body)
            took.append(time.perf_counter() - start)
        return took


def put_models(stack: Stack, tensors: int = 2, numbers: int = 64) -> None:
    """A base and two tasks of so many small tensors, without a config: next to nothing to merge."""
    shape = (numbers,)
    header = write_header([(f"layer.{i}.weight", "F32", shape) for i in range(tensors)])
    for name in ("base", *TASKS):
        stack.objects.put(f"s3://models/{tensors}/{name}.safetensors", header + bytes(4 * numbers * tensors), "x/y")


def recipe(tensors: int = 2, **changes: Any) -> dict[str, Any]:
    place = f"s3://models/{tensors}"
    tasks = [{"name": name, "checkpoint": f"{place}/{name}.safetensors"} for name in TASKS]
    return {"base": f"{place}/base.safetensors", "tasks": tasks, "method": {"name": "task_arithmetic"}, **changes}


def submits(url: str, count: int, callers: int = CALLERS) -> tuple[float, list[float]]:
    """Submits a second by so many callers at once, and how long each takes."""
    with ThreadPoolExecutor(callers) as pool:
        start = time.perf_counter()
        asking = [
            pool.submit(Caller(url).seconds, count // callers, "POST", "/v1/merges", recipe) for _ in range(callers)
        ]
        took = [each.result() for each in asking]
        return count / (time.perf_counter() - start), [seconds for each in took for seconds in each]


# --- jobs -----------------------------------------------------------------------------------------------------------


def measure_jobs(folder: Path, counts: Sequence[int]) -> None:
    with servers(folder) as running, open_stack(folder, running.connections, worker=False) as stack:
        put_models(stack)
        templates = make_templates(stack, running)
        stored = 0
        results: dict[str, list[str]] = {}
        for count in sorted(counts):
            fill(running.postgres, templates, stored, count)
            stored = count
            for name, figures in look_around(stack, running.postgres).items():
                results.setdefault(name, []).append(figures)
        heading("", *(f"{count:,} jobs" for count in sorted(counts)))
        for name, cells in results.items():
            row(name, *cells)


def make_templates(stack: Stack, running: Servers) -> dict[str, str]:
    """A real job in each state, to be copied."""
    database = Database(running.connections.database_url)
    parts = PartStore(database, lease_seconds=60, part_attempts=3)
    ids = {name: stack.submit(recipe(metadata={"team": name, "run": "1"}))["id"] for name in ("queued", "succeeded")}
    plan(parts, ids["succeeded"], *merges(4))
    for part in range(3):
        spread.complete(parts, claim(parts, ids["succeeded"], Stage.MERGE, part))
    finish_last(parts, ids["succeeded"])
    database.close()
    return ids


def finish_last(parts: PartStore, job_id: str) -> None:
    spread.complete(parts, claim(parts, job_id, Stage.MERGE, 3), ends=True)


def fill(postgres: PostgresServer, templates: Mapping[str, str], start: int, end: int) -> None:
    """Copy the templates with their parts and events until there are so many.

    One in ten is queued, one in a hundred failed, one in 20,000 is of the team "rare"; they are a second apart.
    """
    if end == start:
        return
    with psycopg.connect(postgres.dsn) as connection:
        connection.execute(COPIES, {"start": start, "end": end})
        for name, job_id in templates.items():
            wanted = {"template": job_id, "state": name}
            connection.execute(COPY_JOBS, wanted)
            for table in ("parts", "events"):
                connection.execute(COPY_ROWS.replace("rows", table), wanted)
        connection.execute("drop table copies")
    with psycopg.connect(postgres.dsn, autocommit=True) as connection:
        connection.execute("vacuum analyze")


COPIES = """
create table copies as
select n, case when n %% 10 = 0 then 'queued' else 'succeeded' end as template,
       'mrg_' || lpad(to_hex(ms), 12, '0') || '70008' || lpad(to_hex(n), 15, '0') as id, ms / 1000.0 as at
from generate_series(%(start)s + 1, %(end)s) n,
     lateral (select floor(extract(epoch from now()) * 1000)::bigint - 1000 * (200000 - n) as ms) moment
"""
COPY_JOBS = """
insert into jobs select (jsonb_populate_record(sample, jsonb_build_object(
    'id', copies.id, 'prefix', 's3://merged/' || copies.id || '/', 'created_at', copies.at, 'queued_at', copies.at,
    'status', case when copies.n %% 100 = 1 then 'failed' else sample.status end,
    'metadata', jsonb_build_object('team', case copies.n %% 20000 when 7 then 'rare' else 'team ' || copies.n %% 10 end)
))).*
from copies, jobs sample where sample.id = %(template)s and copies.template = %(state)s
"""
COPY_ROWS = """
insert into rows select (jsonb_populate_record(sample, jsonb_build_object('job_id', copies.id))).*
from copies, rows sample where sample.job_id = %(template)s and copies.template = %(state)s
"""


def look_around(stack: Stack, postgres: PostgresServer) -> dict[str, str]:
    """What each kind of request takes; submits last, since they add jobs."""
    caller = Caller(stack.url)
    with psycopg.connect(postgres.dsn) as connection:
        (middle,) = connection.execute(MIDDLE).fetchone() or ("",)
        (oldest,) = connection.execute("select min(id) from jobs").fetchone() or ("",)
        (newest_at,) = connection.execute("select max(created_at) - 10 from jobs").fetchone() or (0,)
        ended, queued = (connection.execute(OF_STATUS, [status]).fetchone() for status in ("succeeded", "queued"))
    assert ended is not None
    assert queued is not None
    gets = {
        "get, ended": f"/v1/merges/{ended[0]}",
        "get, queued (its position)": f"/v1/merges/{queued[0]}",
        "list": "/v1/merges",
        "list from the middle": f"/v1/merges?after={middle}",
        "list, oldest first": f"/v1/merges?order=asc&after={oldest}",
        "list, status=queued": "/v1/merges?status=queued",
        "list, status=failed": "/v1/merges?status=failed",
        "list, a common label": "/v1/merges?metadata[team]=team+3",
        "list, a rare label": "/v1/merges?metadata[team]=rare",
        "list, a label nobody has": "/v1/merges?metadata[team]=nobody",
        "list, a label and a status": "/v1/merges?metadata[team]=rare&status=succeeded",
        "list, created_after, oldest first": f"/v1/merges?order=asc&created_after={newest_at}",
        "/metrics": "/metrics",
    }
    figures = {name: milliseconds(caller.seconds(60, "GET", path)) for name, path in gets.items()}
    figures["submit, one caller"] = milliseconds(caller.seconds(100, "POST", "/v1/merges", recipe))
    rate, took = submits(stack.url, 400)
    return {**figures, f"submit, {CALLERS} callers": f"{rate:.0f}/s; {milliseconds(took)}"}


MIDDLE = "select id from jobs order by id offset (select count(*) / 2 from jobs) limit 1"
OF_STATUS = "select id from jobs where status = %s order by id desc limit 1"


# --- streams --------------------------------------------------------------------------------------------------------


def measure_streams(folder: Path, count: int) -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # the API inherits it
    with servers(folder) as running, open_stack(folder, running.connections, worker=False) as stack:
        put_models(stack)
        jobs = [stack.submit(recipe())["id"] for _ in range(10)]
        asyncio.run(follow_all(stack, jobs, count))


async def follow_all(stack: Stack, jobs: Sequence[str], count: int) -> None:
    """Open the streams, look how the API is while they are open, and end the jobs."""
    place = urlsplit(stack.url)
    start = time.perf_counter()
    gate = asyncio.Semaphore(50)
    streams = await asyncio.gather(*(opened(place.port or 0, jobs[i % len(jobs)], gate) for i in range(count)))
    heading("", f"{count:,} streams")
    row("all have had their first event after", f"{time.perf_counter() - start:.1f} s")
    used, since = processor_seconds(stack.api.group), time.perf_counter()
    await asyncio.sleep(5)
    share = (processor_seconds(stack.api.group) - used) / (time.perf_counter() - since)
    row("processor that the API takes while nothing happens", f"{100 * share:.0f} %")
    caller = Caller(stack.url)
    row("get meanwhile", milliseconds(await asyncio.to_thread(caller.seconds, 60, "GET", f"/v1/merges/{jobs[0]}")))
    row("submit meanwhile", milliseconds(await asyncio.to_thread(caller.seconds, 60, "POST", "/v1/merges", recipe)))
    ends = [asyncio.create_task(told(reader)) for reader, _ in streams]
    cancelled = time.perf_counter()
    for job_id in jobs:
        await asyncio.to_thread(caller.ask, "POST", f"/v1/merges/{job_id}/cancel")
    late = [moment - cancelled for moment in await asyncio.gather(*ends)]
    row("from ten cancels to the event at each reader", milliseconds(late))
    for _, writer in streams:
        writer.close()


async def opened(port: int, job_id: str, gate: asyncio.Semaphore) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    async with gate:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        head = f"GET /v1/merges/{job_id}/events HTTP/1.1\r\nHost: x\r\nAccept: text/event-stream\r\n\r\n"
        writer.write(head.encode())
        await reader.readuntil(b"event: job.queued")
        return reader, writer


async def told(reader: asyncio.StreamReader) -> float:
    """When the reader of a stream hears that its job was cancelled."""
    await reader.readuntil(b"event: job.cancelled")
    return time.perf_counter()


def processor_seconds(pid: int | None) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# --- the broker -----------------------------------------------------------------------------------------------------


def measure_broker(folder: Path) -> None:
    heading("the broker", "submits")
    with servers(folder) as running, open_stack(folder, running.connections, worker=False) as stack:
        put_models(stack)
        for name, number in (("answers", None), ("hangs", signal.SIGSTOP), ("is gone", signal.SIGKILL)):
            if number is not None:
                os.kill(running.broker_pid, number)
            rate, took = submits(stack.url, 160)
            row(name, f"{rate:.0f}/s; {milliseconds(took)}")


# --- overhead -------------------------------------------------------------------------------------------------------


def measure_overhead(folder: Path, jobs: int, parts: int) -> None:
    with servers(folder) as running, open_stack(folder, running.connections, {"CATMERGE_SWEEP_SECONDS": "1"}) as stack:
        put_models(stack)
        put_models(stack, parts, numbers=256)
        stack.run(recipe())  # the worker is warm
        whole, inside, by_stage = [], [], []
        for _ in range(jobs):
            start = time.perf_counter()
            job = stack.run(recipe())
            whole.append(time.perf_counter() - start)
            rows = stack.events(job["id"])
            inside.append(moment(rows[-1]) - moment(rows[0]))
            by_stage.append(stages_of(rows))
        heading("a job of two tensors", "p50 / p99, ms")
        row("submitted to told that it succeeded, over HTTP", milliseconds(whole))
        row("first to last event", milliseconds(inside))
        for name in by_stage[0]:
            row(f"... {name}", milliseconds([each[name] for each in by_stage]))
        print()
        job = stack.run(recipe(parts, output={"shard_bytes": 1024}))
        done = [moment(each) for each in stack.events(job["id"]) if is_merged(each)]
        heading(f"a job of {len(done)} shards of one tensor, one worker", "")
        row("from one part done to the next", milliseconds([b - a for a, b in itertools.pairwise(done)]))


def moment(event: Mapping[str, Any]) -> float:
    return spread.seconds_of(event["created_at"])


def is_merged(event: Mapping[str, Any]) -> bool:
    return bool(event["type"] == "part.done" and event["data"]["stage"] == "merge")


def stages_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds from the part before, or the submit, until a stage is begun, and until it is done."""
    found: dict[str, float] = {}
    last = moment(rows[0])
    for each in rows:
        if each["type"] in ("stage.started", "part.done"):
            name = f"{each['data']['stage']} {'waits' if each['type'] == 'stage.started' else 'works'}"
            found[name] = found.get(name, 0.0) + moment(each) - last
            last = moment(each)
    found["finalize works"] = moment(rows[-1]) - last + found.get("finalize works", 0.0)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sections = ("jobs", "streams", "broker", "overhead", "spread")
    parser.add_argument("sections", nargs="*", choices=[*sections, []], default=[], metavar="section")
    parser.add_argument("--jobs", type=int, nargs="*", default=[0, 10_000, 100_000], help="stored, when measuring jobs")
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2, 4, 8, 16, 32, 64], help="simulated ones")
    options = parser.parse_args()
    measures: dict[str, Callable[[Path], None]] = {
        "jobs": lambda folder: measure_jobs(folder, options.jobs),
        "streams": lambda folder: measure_streams(folder, options.streams),
        "broker": measure_broker,
        "overhead": lambda folder: measure_overhead(folder, jobs=20, parts=100),
        "spread": lambda folder: spread.measure(folder, options.workers),
    }
    for section in options.sections or sections:
        print(f"\n**{section}** (load average {os.getloadavg()[0]:.1f})\n", flush=True)
        with tempfile.TemporaryDirectory(prefix="catmerge-load-", ignore_cleanup_errors=True) as folder:
            measures[section](Path(folder).resolve())


if __name__ == "__main__":
    main()
