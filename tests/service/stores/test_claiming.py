"""Whose turn it is, on both databases."""

from __future__ import annotations

import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import event, insert, select, text

from service.contract.errors import StorageFailure
from service.contract.job import Status
from service.contract.parts import Claim, Counters, Done
from service.contract.stages import NewPart, Queue, Stage
from service.stores.claiming import LOOKED_AT, QUANTUM
from service.stores.database import Database
from service.stores.jobs import JobStore, Listing
from service.stores.parts import PartStore
from service.stores.schema import jobs as job_table
from service.stores.schema import parts as table
from tests.service.jobs_by_hand import at_once, claim, merges, plan, submit


@pytest.fixture
def jobs(database: Database) -> JobStore:
    return JobStore(database)


@pytest.fixture
def parts(database: Database) -> PartStore:
    return PartStore(database, lease_seconds=60, part_attempts=3)


def planned(jobs: JobStore, parts: PartStore, shards: int, *, caller: str = "anonymous", priority: int = 0) -> str:
    """A job that is to be merged in so many parts."""
    job_id = submit(jobs, caller=caller, priority=priority).id
    plan(parts, job_id, *merges(shards), NewPart(Stage.FINALIZE, 0, "finalize", 1.0))
    return job_id


def take(parts: PartStore, queue: Queue = Queue.HEAVY) -> Claim:
    found = parts.claim_next([queue], "worker")
    assert found is not None
    return found


def one_worker(parts: PartStore, count: int, queue: Queue = Queue.HEAVY) -> list[str]:
    """The jobs of the parts that one worker does one after another."""
    done = []
    for _ in range(count):
        held = take(parts, queue)
        parts.complete(held, Done(), Counters())
        done.append(held.job_id)
    return done


def test_where_nothing_is_ready_nothing_is_claimed(jobs: JobStore, parts: PartStore) -> None:
    assert parts.claim_next(list(Queue), "worker") is None
    held = claim(parts, submit(jobs).id)
    assert parts.claim_next(list(Queue), "worker") is None
    assert not parts.fail(held, StorageFailure("a blip"))
    assert parts.claim_next(list(Queue), "worker") is None, "not before the pause is over"


def test_the_first_of_the_queues_that_has_a_part_is_served(jobs: JobStore, parts: PartStore) -> None:
    heavy, light = planned(jobs, parts, 2), submit(jobs).id
    assert take(parts).job_id == heavy
    assert parts.claim_next([Queue.LIGHT], "worker").job_id == light  # type: ignore[union-attr]
    assert parts.claim_next([Queue.LIGHT, Queue.HEAVY], "worker").job_id == heavy  # type: ignore[union-attr]


def test_small_jobs_are_finished_in_the_order_they_came_in(jobs: JobStore, parts: PartStore) -> None:
    first, second = (planned(jobs, parts, QUANTUM - 1) for _ in range(2))
    assert one_worker(parts, 2 * (QUANTUM - 1)) == [first] * (QUANTUM - 1) + [second] * (QUANTUM - 1)


def test_one_worker_gives_a_large_job_one_part_at_a_time_once_it_had_its_share(
    jobs: JobStore, parts: PartStore
) -> None:
    large = planned(jobs, parts, 1000)
    one_worker(parts, 20)
    small = [planned(jobs, parts, 1) for _ in range(3)]
    other = planned(jobs, parts, 1000)
    assert one_worker(parts, 1) == [large], "it has waited since its last part, and they came later"
    assert one_worker(parts, 3) == small
    assert one_worker(parts, QUANTUM - 1) == [other] * (QUANTUM - 1)
    assert one_worker(parts, 6) == [large, other] * 3


def test_many_workers_are_spread_over_the_jobs(jobs: JobStore, parts: PartStore) -> None:
    large = planned(jobs, parts, 100)
    held = [take(parts).job_id for _ in range(10)]
    small = planned(jobs, parts, 2)
    middle = planned(jobs, parts, 20)
    held += [take(parts).job_id for _ in range(12)]
    assert Counter(held) == {large: 10, small: 2, middle: 10}
    assert take(parts).job_id in (large, middle)


def test_callers_are_served_alike_however_many_jobs_they_have(jobs: JobStore, parts: PartStore) -> None:
    for _ in range(10):
        planned(jobs, parts, 10, caller="many", priority=100)
    one = planned(jobs, parts, 10, caller="one")
    assert Counter(take(parts).job_id == one for _ in range(12)) == {True: 6, False: 6}


def test_one_worker_serves_callers_in_turn(jobs: JobStore, parts: PartStore) -> None:
    a, b = planned(jobs, parts, 10, caller="a"), planned(jobs, parts, 10, caller="b")
    c = planned(jobs, parts, 2, caller="c")
    for _ in range(3):
        assert set(one_worker(parts, 2)) <= {a, b, c}
    done = one_worker(parts, 12)
    assert Counter(done)[a] == Counter(done)[b]


def test_priority_orders_the_jobs_of_one_caller(jobs: JobStore, parts: PartStore) -> None:
    low, usual, high = (planned(jobs, parts, 2, priority=priority) for priority in (-1, 0, 5))
    assert [take(parts).job_id for _ in range(6)] == [high, high, usual, usual, low, low]


def test_a_part_that_waits_for_its_next_try_keeps_nobody_waiting(jobs: JobStore, parts: PartStore) -> None:
    broken, other = planned(jobs, parts, 1), planned(jobs, parts, 1)
    held = take(parts)
    assert held.job_id == broken
    parts.fail(held, StorageFailure("a blip"))
    assert take(parts).job_id == other


def test_a_job_that_has_ended_is_not_served(jobs: JobStore, parts: PartStore) -> None:
    cancelled, failed, ended = (planned(jobs, parts, 2) for _ in range(3))
    jobs.cancel("anonymous", cancelled)
    parts.fail(claim(parts, failed, Stage.MERGE), Final("no"))
    parts.complete(claim(parts, ended, Stage.MERGE), Done(status=Status.SUCCEEDED, result={}), Counters())
    assert parts.claim_next(list(Queue), "worker") is None
    jobs.retry("anonymous", failed)
    assert take(parts).job_id == failed


class Final(StorageFailure):
    retryable = False


def test_workers_that_claim_at_once_get_different_parts_and_miss_none(jobs: JobStore, parts: PartStore) -> None:
    """Whoever is told that there is nothing goes to sleep, so it must not be told so while there is."""
    for _ in range(4):
        small = [planned(jobs, parts, 1) for _ in range(4)]
        large = planned(jobs, parts, 8)
        held = at_once(12, lambda i: parts.claim_next([Queue.HEAVY], f"worker {i}"))
        found = [(claim.job_id, claim.part) for claim in held if claim is not None]
        assert sorted(found) == sorted([*((job_id, 0) for job_id in small), *((large, part) for part in range(8))])


def test_a_job_that_is_locked_is_waited_for_where_there_is_nothing_else(
    jobs: JobStore, parts: PartStore, database: Database
) -> None:
    if database.is_sqlite:
        pytest.skip("SQLite lets in one writer at a time")
    first, second = planned(jobs, parts, 1), planned(jobs, parts, 1)
    with ThreadPoolExecutor(1) as pool:
        with database.write() as connection:
            connection.execute(select(job_table).where(job_table.c.id == first).with_for_update())
            assert take(parts).job_id == second, "the locked one is passed over"
            waiting = pool.submit(take, parts)
            while not is_waited(database):
                assert not waiting.done()
        assert waiting.result().job_id == first


def is_waited(database: Database) -> bool:
    with database.read() as connection:
        return bool(connection.execute(text("select count(*) from pg_locks where not granted")).scalar_one())


def test_queued_jobs_know_their_places(jobs: JobStore, parts: PartStore) -> None:
    """The places are the order in which jobs are begun."""
    asked = [("a", 0), ("a", 0), ("b", 0), ("a", 9), ("c", 0), ("b", 1), ("a", -9), ("b", 0), ("a", 0)]
    for _ in range(2):
        claim(parts, submit(jobs, caller="b").id)
    claim(parts, submit(jobs, caller="c").id)
    queued = [submit(jobs, caller=caller, priority=priority) for caller, priority in asked]
    places = {job.id: jobs.get(job.caller, job.id).queue_position for job in queued}
    listed = [job for caller in "abc" for job in jobs.page(Listing(caller, status=Status.QUEUED))[0]]
    assert {job.id: job.queue_position for job in listed} == places
    begun = [take(parts, Queue.LIGHT).job_id for _ in queued]
    assert sorted(places, key=lambda job_id: places[job_id] or 0) == begun
    assert sorted(places.values()) == list(range(1, len(queued) + 1))  # type: ignore[type-var]


def test_what_a_claim_costs_does_not_grow_with_what_waits_and_what_has_ended(
    jobs: JobStore, parts: PartStore, database: Database
) -> None:
    crowd(database, planned(jobs, parts, 1), 3000)
    take(parts)  # a job with a part at work is looked at apart
    if database.is_sqlite:
        assert steps(database, parts) < 5000, "of SQLite's machine; every row that is looked at takes some"
    else:
        rows = [int(found) for line in explained(database, parts) for found in re.findall(r"actual.*rows=(\d+)", line)]
        assert len(rows) > 10
        assert max(rows) < 10


def crowd(database: Database, job_id: str, count: int) -> None:
    """As many ended jobs, and as many that wait for a plan."""
    with database.write() as connection:
        row = dict(connection.execute(select(job_table).where(job_table.c.id == job_id)).one()._mapping)
        ended = [{**row, "id": f"mrg_e{i:06}", "status": "succeeded", "queue": None} for i in range(count)]
        queued = [{**row, "id": f"mrg_q{i:06}", "status": "queued", "queue": Queue.LIGHT.value} for i in range(count)]
        connection.execute(insert(job_table), ended + queued)
        part = dict(connection.execute(select(table).where(table.c.stage == "plan")).first()._mapping)  # type: ignore[union-attr]
        ready = {"state": "ready", "claim": None, "owner": None, "output": None}
        connection.execute(insert(table), [{**part, **ready, "job_id": row["id"]} for row in queued])
    with database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("analyze")


def steps(database: Database, parts: PartStore) -> int:
    taken: list[int] = []

    def note(connection: Any, *_: Any) -> None:
        connection.set_progress_handler(lambda: taken.append(100), 100)

    event.listen(database.engine, "checkout", note)
    try:
        assert take(parts, Queue.LIGHT).job_id == "mrg_q000000"
    finally:
        event.remove(database.engine, "checkout", note)
    return sum(taken)


def explained(database: Database, parts: PartStore) -> list[str]:
    """What PostgreSQL does for everything that is read for a claim."""
    asked: list[tuple[str, Any]] = []

    def note(_conn: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        asked.append((statement, parameters))

    event.listen(database.engine, "before_cursor_execute", note)
    try:
        assert take(parts, Queue.LIGHT).job_id == "mrg_q000000"
    finally:
        event.remove(database.engine, "before_cursor_execute", note)
    with database.write() as connection:
        reads = [(statement, values) for statement, values in asked if statement.startswith(("SELECT", "WITH"))]
        plans = [connection.exec_driver_sql(f"explain (analyze) {statement}", values) for statement, values in reads]
        return [str(row[-1]) for plan in plans for row in plan]


def of_files(jobs: JobStore, parts: PartStore, *files: tuple[str, ...], priority: int = 0, peak_bytes: int = 0) -> str:
    """A job to be merged in parts that read these files."""
    job_id = submit(jobs, priority=priority).id
    shards = [
        NewPart(Stage.MERGE, index, f"shard {index}", 1.0, peak_bytes=peak_bytes * (index == 1), inputs=inputs)
        for index, inputs in enumerate(files)
    ]
    plan(parts, job_id, *shards, NewPart(Stage.FINALIZE, 0, "finalize", 1.0))
    return job_id


def taken(parts: PartStore, kept: dict[str, int], usable_bytes: int = 100) -> list[tuple[str, int]]:
    """The parts that a worker does one after another, whose machine keeps so many bytes of files."""
    done = []
    while (held := parts.claim_next([Queue.HEAVY], "worker", usable_bytes, kept)) is not None:
        done.append((held.job_id, held.part))
    return done


def test_of_a_jobs_parts_the_one_whose_files_are_kept_goes_first(jobs: JobStore, parts: PartStore) -> None:
    job_id = of_files(jobs, parts, ("a",), ("b",), (), ("b", "c"), ("c",))
    assert taken(parts, {"b": 5, "c": 3, "x": 9}) == [(job_id, part) for part in (3, 1, 4, 0, 2)]


def test_files_that_are_kept_change_nothing_of_whose_turn_it_is(jobs: JobStore, parts: PartStore) -> None:
    first = of_files(jobs, parts, ("a",), ("b",))
    second = of_files(jobs, parts, ("b",), ("a",))
    urgent = of_files(jobs, parts, ("a",), priority=1)
    assert taken(parts, {"b": 5}) == [(urgent, 0), (first, 1), (second, 0), (first, 0), (second, 1)]


def test_a_part_whose_files_are_kept_goes_only_where_it_fits(jobs: JobStore, parts: PartStore) -> None:
    job_id = of_files(jobs, parts, ("a",), ("b",), peak_bytes=101)
    assert taken(parts, {"b": 5}) == [(job_id, 0)]


def test_of_very_many_parts_the_first_are_looked_at(jobs: JobStore, parts: PartStore) -> None:
    files = [(f"file {index}",) for index in range(LOOKED_AT + 1)]
    of_files(jobs, parts, *files)
    claimed = [parts.claim_next([Queue.HEAVY], "worker", kept={f"file {LOOKED_AT}": 1}) for _ in range(2)]
    assert [held.part for held in claimed if held] == [0, LOOKED_AT]
