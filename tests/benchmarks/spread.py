"""What more workers gain: two real ones on this machine, and up to 64 that only pretend to merge.

The real ones take the shards of one job that is all arithmetic, one thread each, on a machine of few cores.

The pretended ones show what the planning and the database let through, without processors to run out of. The plan is
the real one, of eight experts of 7 billion parameters; so are the database and every claim, lease, completion and
fence. A part, though, is a sleep as long as its reads and writes take at a store that gives each worker 1.25 GB/s and
answers a request after 20 ms, eight requests at a time; a plan and a finalize are a tenth of a second. Messages go
through a queue in memory. Time runs twice as fast, so what the database costs counts twice; and all the workers are
threads of one Python process, which makes it count for more still where there are many.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from service.admission import admit
from service.contract.checkpoint import tensor_bytes, write_header
from service.contract.job import Status
from service.contract.parts import Claim, Counters, Done
from service.contract.plan import Plan, ShardPlan
from service.contract.recipe import Recipe
from service.contract.settings import Connections
from service.contract.stages import NewPart, PartMessage, Stage
from service.stores.database import Database
from service.stores.jobs import JobStore
from service.stores.objects import open_objects
from service.stores.parts import PartStore
from tests.benchmarks.scaling import llama
from tests.benchmarks.tables import heading, row
from tests.end_to_end.stack import Stack, open_stack, until
from tests.servers import postgres_server, redis_server
from tests.service.jobs_by_hand import submit

BANDWIDTH = 1.25e9  # bytes a second
LATENCY_SECONDS = 0.02
SPAN_BYTES, AT_ONCE = 16 << 20, 8
PLAN_SECONDS = FINALIZE_SECONDS = 0.1
FASTER = 2.0
EXPERTS, PARAMETERS, SHARD_BYTES = 8, 7 * 10**9, 128 << 20
SHARDS, WIDTH, MATRICES = 16, 768, 2  # of the job that two real workers share
READY = "Ready: Runner"


def measure(folder: Path, workers: Sequence[int]) -> None:
    measure_real(folder)
    print()
    measure_simulated(folder, workers)


def complete(parts: PartStore, claim: Claim, *, ends: bool = False, new: Sequence[NewPart] = ()) -> list[PartMessage]:
    """Say that a part is done; ``ends`` says so of its job."""
    done = Done(parts=tuple(new), status=Status.SUCCEEDED if ends else None, result={} if ends else None)
    messages = parts.complete(claim, done, Counters())
    if messages is None:
        raise RuntimeError(f"{claim.name} is another's by now")
    return messages


def seconds_of(timestamp: str) -> float:
    """Seconds since the epoch of a time as the API writes it."""
    return datetime.fromisoformat(timestamp).timestamp()


# --- real workers ---------------------------------------------------------------------------------------------------


def measure_real(folder: Path) -> None:
    with postgres_server(durable=True) as postgres, redis_server() as broker:
        connections = Connections(
            database_url=postgres.url, broker_url=broker.url, object_store=f"file://{folder / 'objects'}"
        )
        with open_stack(folder, connections) as stack:
            put_matrices(stack)
            until(lambda: READY in stack.worker.log(), "the worker is ready", stack.logs)
            merge_seconds(stack)  # to warm it
            alone = min(merge_seconds(stack) for _ in range(2))
            second = stack.worker.twin()
            second.start()
            try:
                until(lambda: READY in second.log(), "the second worker is ready", second.log)
                merge_seconds(stack)
                together = min(merge_seconds(stack) for _ in range(2))
            finally:
                second.stop()
    heading(f"{SHARDS} shards of arithmetic, the better of two", "one worker", "two workers", "gain")
    row("merge stage", f"{alone:.2f} s", f"{together:.2f} s", f"{alone / together:.2f}")


def put_matrices(stack: Stack) -> None:
    """A base and two tasks of random matrices."""
    draws = np.random.default_rng(0)
    names = [f"layers.{i}.linear.weight" for i in range(SHARDS * MATRICES)]
    header = write_header([(name, "F32", (WIDTH, WIDTH)) for name in names])
    for name in ("base", "cars", "pets"):
        values = draws.standard_normal(len(names) * WIDTH * WIDTH, dtype=np.float32)
        stack.objects.put(f"s3://models/{name}.safetensors", header + values.tobytes(), "x/y")


def merge_seconds(stack: Stack) -> float:
    """How long the merge stage of a job takes, from the moment that the first part is claimed to the last one done."""
    tasks = [{"name": name, "checkpoint": f"s3://models/{name}.safetensors"} for name in ("cars", "pets")]
    job = stack.run(
        {
            "base": "s3://models/base.safetensors",
            "tasks": tasks,
            "method": {"name": "tsv_m"},
            "output": {"shard_bytes": MATRICES * tensor_bytes("F32", (WIDTH, WIDTH))},
        }
    )
    merging = [each for each in stack.events(job["id"]) if each["data"].get("stage") == "merge"]
    if len(merging) != SHARDS + 1:
        raise RuntimeError(f"{SHARDS} shards were expected, and there are {len(merging) - 1}")
    return seconds_of(merging[-1]["created_at"]) - seconds_of(merging[0]["created_at"])


# --- pretended workers ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Simulation:
    """A job's shards, and where its rows are."""

    plan: Plan
    parts: PartStore
    jobs: JobStore

    def run(self, workers: int) -> float:
        """Seconds, by a clock of their own, from the submit to the job's end."""
        job = submit(self.jobs, prefix=f"s3://merged/{workers}/")
        bell: queue.Queue[PartMessage | None] = queue.Queue()
        threads = [threading.Thread(target=self._work, args=(f"worker {n}", bell, workers)) for n in range(workers)]
        for thread in threads:
            thread.start()
        start = time.perf_counter()
        bell.put(PartMessage(Stage.PLAN, job.id, 0))
        for thread in threads:
            thread.join()
        return (time.perf_counter() - start) * FASTER

    def _work(self, name: str, bell: queue.Queue[PartMessage | None], workers: int) -> None:
        while (message := bell.get()) is not None:
            claim = self.parts.claim(message, name)
            if claim is None:
                raise RuntimeError(f"{message} could not be claimed")
            time.sleep(self.seconds(claim) / FASTER)
            ends = claim.stage is Stage.FINALIZE
            new = self._shards() if claim.stage is Stage.PLAN else ()
            for following in complete(self.parts, claim, ends=ends, new=new):
                bell.put(following)
            for _ in range(workers if ends else 0):
                bell.put(None)

    def _shards(self) -> list[NewPart]:
        merging = [NewPart(Stage.MERGE, n, shard.file, 1.0) for n, shard in enumerate(self.plan.shards)]
        return [*merging, NewPart(Stage.FINALIZE, 0, "finalize", 1.0)]

    def seconds(self, claim: Claim) -> float:
        """How long a part takes at the store."""
        if claim.stage is Stage.MERGE:
            return shard_seconds(self.plan.shards[claim.part])
        return PLAN_SECONDS if claim.stage is Stage.PLAN else FINALIZE_SECONDS


def shard_seconds(shard: ShardPlan) -> float:
    moved = shard.bytes_in + shard.bytes_out
    return moved / BANDWIDTH + LATENCY_SECONDS * -(-moved // (SPAN_BYTES * AT_ONCE))


def measure_simulated(folder: Path, workers: Sequence[int]) -> None:
    with postgres_server(durable=True) as postgres:
        database = Database(postgres.url)
        database.migrate()
        parts = PartStore(database, lease_seconds=60, part_attempts=3)
        simulation = Simulation(real_plan(folder), parts, JobStore(database))
        shards = [shard_seconds(shard) for shard in simulation.plan.shards]
        alone = 0.0
        title = f"{len(shards)} shards, {min(shards):.2f} to {max(shards):.2f} s each"
        heading(title, "seconds", "gain", "of what is possible")
        for count in workers:
            took = simulation.run(count)
            alone = alone or took * count  # the first row's workers, were they one
            row(f"{count} workers", f"{took:.1f}", f"{alone / took:.1f}", f"{100 * best(shards, count) / took:.0f} %")
        database.close()


def best(shards: Sequence[float], workers: int) -> float:
    """What the same parts in the same order take if nothing but they took time."""
    free = [0.0] * workers
    for seconds in shards:
        first = free.index(min(free))
        free[first] += seconds
    return max(free) + PLAN_SECONDS + FINALIZE_SECONDS


def real_plan(folder: Path) -> Plan:
    """What admission plans for checkpoints that are nothing but headers and holes."""
    place = folder / "objects/models"
    place.mkdir(parents=True, exist_ok=True)
    tensors = list(llama(PARAMETERS))
    header = write_header([(name, "BF16", shape) for name, shape in tensors])
    size = len(header) + sum(tensor_bytes("BF16", shape) for _, shape in tensors)
    names = ["base", *(f"t{n}" for n in range(EXPERTS))]
    for name in names:
        with (place / f"{name}.safetensors").open("wb") as file:
            file.write(header)
            file.truncate(size)
    recipe: Mapping[str, Any] = {
        "base": "s3://models/base.safetensors",
        "tasks": [{"name": name, "checkpoint": f"s3://models/{name}.safetensors"} for name in names[1:]],
        "method": {"name": "task_arithmetic"},
        "output": {"shard_bytes": SHARD_BYTES},
    }
    objects = open_objects(Connections(object_store=f"file://{folder / 'objects'}"))
    return admit(Recipe.model_validate(recipe), objects)
