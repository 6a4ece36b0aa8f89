"""Random faults over hundreds of tiny jobs: ``python -m tests.benchmarks.chaos MINUTES [--workers 3] [--seed 0]``.

Real processes: an API, workers, PostgreSQL, Valkey and an S3 server, the last three behind proxies. Jobs are submitted
all along, with idempotency keys that are used twice; every few seconds something is killed, frozen, cut, slowed or
emptied. In the end all is let recover, every job that was accepted must have succeeded with the bytes of an undisturbed
one, and what was done to the service is told with what became of it.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import torch
from safetensors.torch import save_file
from sqlalchemy import select

from service.contract.job import Status
from service.stores.schema import events, jobs
from tests import faulty
from tests.end_to_end.arena import BUCKET, Arena, open_arena
from tests.end_to_end.stack import Program
from tests.servers import s3_server

EVERY_SECONDS = (1.0, 4.0)  # between two faults
JOBS_AT_ONCE = 6
RECOVER_SECONDS = 300.0
SHARDS = 1200  # bytes, for a few parts a job


@dataclass
class Chaos:
    """What is done to an arena, and what was seen."""

    arena: Arena
    random: random.Random
    accepted: dict[str, str] = field(default_factory=dict)  # job by idempotency key
    faults: Counter[str] = field(default_factory=Counter)
    mistakes: list[str] = field(default_factory=list)

    def submit(self) -> None:
        """One more job; its request is sent again until it is answered, and once more after that."""
        key = f"chaos-{len(self.accepted)}"
        for _ in range(2):
            job_id = self._accepted(key)
            if job_id is None:
                return
            if self.accepted.setdefault(key, job_id) != job_id:
                self.mistakes.append(f"{key} is {self.accepted[key]} and {job_id}")

    def _accepted(self, key: str) -> str | None:
        with suppress(httpx.TransportError):
            headers = {"Idempotency-Key": key}
            answer = self.arena.stack.client.post("/v1/merges", json=recipe(), headers=headers, timeout=10)
            if answer.status_code == 202:
                return str(answer.json()["id"])
            if answer.status_code < 500 and answer.status_code != 409:
                self.mistakes.append(f"{key}: {answer.status_code} {answer.text}")
        return None

    def open_jobs(self) -> int:
        with self.arena.database.read() as connection:
            active = select(jobs.c.id).where(jobs.c.status.in_([Status.QUEUED.value, Status.RUNNING.value]))
            return len(connection.execute(active).all())

    def do_harm(self) -> None:
        name = self.random.choice(list(HARM))
        HARM[name](self)
        self.faults[name] += 1

    def worker(self) -> Program:
        return self.random.choice(self.arena.workers)

    def keep_up(self) -> None:
        """What was killed is started again, as an orchestrator would."""
        for worker in self.arena.workers:
            if not worker.is_running:
                worker.start()
        if not self.arena.stack.api.is_running:
            self.arena.stack.api.start()


def recipe() -> dict[str, Any]:
    place = f"s3://{BUCKET}/chaos/"
    tasks = [{"name": name, "checkpoint": f"{place}{name}.safetensors"} for name in ("cars", "pets")]
    return {
        "base": f"{place}base.safetensors",
        "tasks": tasks,
        "method": {"name": "cat", "rank": 2},
        "output": {"shard_bytes": SHARDS},
    }


# --- harm -------------------------------------------------------------------------------------------------------------


def _kill_worker(chaos: Chaos) -> None:
    chaos.worker().kill()


def _kill_all_workers(chaos: Chaos) -> None:
    for worker in chaos.arena.workers:
        worker.kill()


def _freeze_worker(chaos: Chaos) -> None:
    """For longer than its lease."""
    worker = chaos.worker()
    worker.signal(signal.SIGSTOP)
    time.sleep(6)
    worker.signal(signal.SIGCONT)


def _stop_worker(chaos: Chaos) -> None:
    chaos.worker().stop()


def _kill_api(chaos: Chaos) -> None:
    chaos.arena.stack.api.kill()


def _freeze_api(chaos: Chaos) -> None:
    chaos.arena.stack.api.signal(signal.SIGSTOP)
    time.sleep(3)
    chaos.arena.stack.api.signal(signal.SIGCONT)


def _empty_broker(chaos: Chaos) -> None:
    with chaos.arena.redis() as client:
        client.flushall()


def _restart_broker(chaos: Chaos) -> None:
    chaos.arena.broker.stop()
    time.sleep(1)
    chaos.arena.broker.start()


def _cut_broker(chaos: Chaos) -> None:
    chaos.arena.broker.proxy.cut()


def _restart_database(chaos: Chaos) -> None:
    chaos.arena.postgres.stop()
    time.sleep(1)
    chaos.arena.postgres.start()


def _terminate_backends(chaos: Chaos) -> None:
    chaos.arena.terminate_backends()


def _cut_database(chaos: Chaos) -> None:
    chaos.arena.postgres.proxy.cut()


def _slow(chaos: Chaos) -> None:
    chaos.arena.postgres.proxy.delay_seconds = 0.005
    chaos.arena.broker.proxy.delay_seconds = 0.02
    time.sleep(3)
    chaos.arena.postgres.proxy.heal()
    chaos.arena.broker.proxy.heal()


def _store(*harms: faulty.Harm) -> Callable[[Chaos], None]:
    def harm(chaos: Chaos) -> None:
        for each in harms:
            chaos.arena.store.harm("GET|PUT|POST|HEAD", each, times=chaos.random.randint(1, 4))

    return harm


HARM: dict[str, Callable[[Chaos], None]] = {
    "worker killed": _kill_worker,
    "all workers killed": _kill_all_workers,
    "worker frozen past its lease": _freeze_worker,
    "worker asked to stop": _stop_worker,
    "API killed": _kill_api,
    "API frozen": _freeze_api,
    "broker emptied": _empty_broker,
    "broker restarted empty": _restart_broker,
    "broker's connections cut": _cut_broker,
    "database restarted": _restart_database,
    "database's backends terminated": _terminate_backends,
    "database's connections cut": _cut_database,
    "database and broker slow": _slow,
    "store answers 500 or 503": _store(faulty.failing(500), faulty.failing(503)),
    "store hangs up": _store(faulty.refused, faulty.unanswered),
    "store breaks off or sends too little": _store(faulty.cut_after(10), faulty.truncated),
    "store does things twice": _store(faulty.doubled),
}


# --- what became of it ------------------------------------------------------------------------------------------------


def worst_recovery(chaos: Chaos) -> float:
    """The longest that a job stood still: seconds between two of its events."""
    with chaos.arena.database.read() as connection:
        rows = connection.execute(select(events.c.job_id, events.c.created_at).order_by(events.c.job_id, events.c.seq))
        told = rows.all()
    gaps = [after.created_at - before.created_at for before, after in pairwise(told) if before.job_id == after.job_id]
    return max(gaps, default=0.0)


def retried(chaos: Chaos) -> Counter[str]:
    """Parts that were tried again, by what was in the way."""
    with chaos.arena.database.read() as connection:
        found = connection.execute(select(events.c.data).where(events.c.type == "part.retried")).scalars()
        return Counter(data["code"] for data in found)


def fenced(folder: Path) -> int:
    """How often a worker came too late, and was told so."""
    logs = "".join(path.read_text(errors="replace") for path in folder.glob("worker*.log"))
    return logs.count("Too late with") + logs.count("or the part taken over")


def lost(chaos: Chaos, undisturbed: dict[str, str]) -> list[str]:
    """Jobs that were accepted and have not become what an undisturbed one is, each with what is wrong with it."""
    found = list(chaos.mistakes)
    for job_id in chaos.accepted.values():
        try:
            chaos.arena.check(job_id, undisturbed)
        except Exception as error:
            found.append(f"{job_id}: {type(error).__name__}: {str(error)[:300]}")
    try:
        chaos.arena.check_nothing_left()
    except Exception as error:
        found.append(f"something is left: {type(error).__name__}: {str(error)[:300]}")
    return found


def run(minutes: float, workers: int, seed: int) -> int:
    """Do it and tell; the exit status is 1 where anything was lost."""
    with tempfile.TemporaryDirectory(prefix="catmerge-chaos-") as name, s3_server("rclone", buckets=(BUCKET,)) as s3:
        folder = Path(name)
        with open_arena(folder, s3, workers=workers, part_attempts=50) as arena:
            chaos = Chaos(arena, random.Random(seed))
            write_models(arena, folder)
            arena.ready()
            first = arena.stack.submit(recipe())["id"]
            arena.check(first)
            undisturbed = arena.digests(first)
            rage(chaos, minutes * 60)
            arena.ready()
            calm = time.monotonic()
            while chaos.open_jobs() and time.monotonic() < calm + RECOVER_SECONDS:
                time.sleep(0.2)
            recovered = time.monotonic() - calm
            losses = lost(chaos, undisturbed)
            print(f"{len(chaos.accepted)} jobs in {minutes:g} minutes over {workers} workers, seed {seed}")
            for fault, times in chaos.faults.most_common():
                print(f"  {times:4d}  {fault}")
            print(f"  {sum(chaos.faults.values()):4d}  faults in all")
            print(f"parts tried again: {dict(retried(chaos))}")
            print(f"late workers refused by the fence: {fenced(folder)}")
            print(f"longest standstill of a job: {worst_recovery(chaos):.1f} s")
            print(f"everything done after the last fault: {recovered:.1f} s")
            print(f"losses: {len(losses)}", *losses, sep="\n  ")
    return 1 if losses else 0


def rage(chaos: Chaos, seconds: float) -> None:
    """Submit and do harm for that long."""
    end = time.monotonic() + seconds
    due = time.monotonic()
    while time.monotonic() < end:
        with suppress(Exception):  # the database may be away just now
            if chaos.open_jobs() < JOBS_AT_ONCE:
                chaos.submit()
        if time.monotonic() > due:
            chaos.do_harm()
            chaos.keep_up()
            due = time.monotonic() + chaos.random.uniform(*EVERY_SECONDS)
        time.sleep(0.05)


def write_models(arena: Arena, folder: Path) -> None:
    models = folder / "models"
    models.mkdir()
    for seed, name in enumerate(("base", "cars", "pets")):
        generator = torch.Generator().manual_seed(seed)
        tensors = {f"layer.{i}.weight": torch.randn(16, 16, generator=generator) for i in range(4)}
        save_file(tensors, models / f"{name}.safetensors")
    arena.stack.upload(models, f"s3://{BUCKET}/chaos/")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("minutes", type=float)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    return run(options.minutes, options.workers, options.seed)


if __name__ == "__main__":
    sys.exit(main())
