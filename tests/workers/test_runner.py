"""The runner on a real database: what it does with parts that succeed, fail, are taken over or are cancelled."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from service.contract import artifacts
from service.contract.errors import BadTensor, Stopped, StorageFailure
from service.contract.job import Job, Status
from service.contract.parts import Counters, Done
from service.contract.settings import Connections
from service.contract.stages import NewPart, PartMessage, Queue, Stage
from service.stores.database import Database
from service.stores.jobs import JobStore
from service.stores.objects import open_objects
from service.stores.parts import PartStore
from service.stores.schema import parts as parts_table
from tests.service.jobs_by_hand import submit
from workers.runner import Runner, StageRun
from workers.watch import Heartbeat, Watch
from workers.work import Work

MERGE = NewPart(Stage.MERGE, 0, "model.safetensors", weight=1.0, tensors_total=2)
FINALIZE = NewPart(Stage.FINALIZE, 0, "finalize", weight=1.0)


@dataclass
class Workshop:
    """A worker over SQLite and a folder; stages are what a test says, everything else is real."""

    connections: Connections
    database: Database
    stages: dict[Stage, StageRun]
    rung: list[PartMessage] = field(default_factory=list)
    leaving: bool = False

    def __post_init__(self) -> None:
        self.jobs = JobStore(self.database)
        self.parts = PartStore(self.database, lease_seconds=60, part_attempts=self.connections.part_attempts)
        self.runner = Runner(self.connections, self.stages, self._ring, lambda: self.leaving, "cpu")

    def _ring(self, messages: Sequence[PartMessage]) -> None:
        self.rung += messages

    @property
    def half_written(self) -> Path:
        return Path(self.connections.object_store.removeprefix("file://")).with_name("half-written")

    def submit(self) -> str:
        return submit(self.jobs).id

    def run_next(self) -> bool:
        return self.runner.run_next()

    def job(self, job_id: str) -> Job:
        return self.jobs.get("anonymous", job_id)

    def events(self, job_id: str) -> list[str]:
        return [event.type for event in self.jobs.events("anonymous", job_id, 0, 1000)[0]]

    def part(self, job_id: str, stage: Stage = Stage.PLAN) -> dict[str, object]:
        with self.database.read() as connection:
            query = parts_table.select().where(parts_table.c.job_id == job_id, parts_table.c.stage == stage.value)
            return dict(connection.execute(query).one()._mapping)

    def let_retry(self) -> None:
        """As if the wait before the next try were over."""
        with self.database.write() as connection:
            connection.execute(parts_table.update().values(not_before=0.0))

    def expire(self) -> None:
        """As if every lease had run out."""
        with self.database.write() as connection:
            connection.execute(parts_table.update().values(lease_until=0.0))


@pytest.fixture
def workshop(tmp_path: Path) -> Iterator[Workshop]:
    connections = Connections(
        database_url=f"sqlite:///{tmp_path / 'jobs.db'}",
        object_store=f"file://{tmp_path / 'objects'}",
        lease_seconds=60,
        heartbeat_seconds=1,
        part_attempts=2,
    )
    database = Database(connections.database_url)
    database.migrate()
    yield Workshop(connections, database, {Stage.PLAN: lambda _: Done(parts=(MERGE, FINALIZE))})
    database.close()


def fails(error: Exception) -> StageRun:
    def run(_: Work) -> Done:
        raise error

    return run


def waits_for_stop(work: Work) -> Done:
    """Works on and on, until it is stopped."""
    while True:
        work.watch.step()
        time.sleep(0.01)


def test_a_part_done_rings_for_the_next_and_the_last_ends_the_job(workshop: Workshop) -> None:
    job_id = workshop.submit()
    workshop.run_next()
    assert workshop.rung == [PartMessage(Stage.MERGE, job_id, 0)]

    def merge(work: Work) -> Done:
        work.watch.step(tensors=2, bytes_read=10, bytes_written=5)
        return Done(output={"files": []}, warnings=("careful",))

    workshop.stages[Stage.MERGE] = merge
    workshop.run_next()
    assert workshop.rung[-1] == PartMessage(Stage.FINALIZE, job_id, 0)
    workshop.stages[Stage.FINALIZE] = lambda work: Done(
        status=Status.SUCCEEDED, result={"outputs": work.outputs(Stage.MERGE), "read": work.so_far().bytes_read}
    )
    workshop.run_next()
    job = workshop.job(job_id)
    assert (job.status, job.result, job.warnings) == (
        Status.SUCCEEDED,
        {"outputs": [{"files": []}], "read": 10},
        ("careful",),
    )
    assert job.progress.tensors_done == 2


def test_a_message_makes_the_worker_do_all_there_is(workshop: Workshop) -> None:
    first, second = workshop.submit(), workshop.submit()
    workshop.stages[Stage.MERGE] = lambda _: Done()
    workshop.stages[Stage.FINALIZE] = lambda _: Done(status=Status.SUCCEEDED, result={})
    workshop.runner.run(PartMessage(Stage.PLAN, "mrg_00000000000000000000000000000000", 0))
    for job_id in (first, second):
        assert workshop.job(job_id).status is Status.SUCCEEDED
        assert workshop.events(job_id).count("part.done") == 3


def test_a_message_that_comes_twice_does_nothing_more(workshop: Workshop) -> None:
    job_id = workshop.submit()
    workshop.stages[Stage.PLAN] = lambda _: Done(status=Status.SUCCEEDED, result={})
    for _ in range(3):
        workshop.runner.run(PartMessage(Stage.PLAN, job_id, 0))
    assert workshop.events(job_id).count("part.done") == 1


def test_where_nothing_is_ready_nothing_is_done(workshop: Workshop) -> None:
    assert not workshop.run_next()
    workshop.submit()
    assert workshop.run_next()
    workshop.stages[Stage.MERGE] = lambda _: Done()
    assert workshop.run_next()


def test_the_queues_take_turns(workshop: Workshop) -> None:
    """Ten plans do not keep a merge waiting, nor ten shards a plan."""
    done: list[Stage] = []
    shards = tuple(NewPart(Stage.MERGE, index, f"shard {index}", weight=1.0) for index in range(10))

    def notes(work: Work) -> Done:
        done.append(work.claim.stage)
        return Done(parts=(*shards, FINALIZE) if work.claim.stage is Stage.PLAN else ())

    workshop.stages |= {Stage.PLAN: notes, Stage.MERGE: notes}
    for _ in range(10):
        workshop.submit()
    for _ in range(8):
        workshop.run_next()
    assert done == [Stage.PLAN, Stage.MERGE] * 4


def test_a_worker_takes_parts_of_its_own_queues_only(workshop: Workshop) -> None:
    light = Runner(
        workshop.connections, workshop.stages, workshop.rung.extend, lambda: False, "cpu", None, (Queue.LIGHT,)
    )
    job_id = workshop.submit()
    assert light.run_next()
    assert not light.run_next()
    assert workshop.part(job_id, Stage.MERGE)["state"] == "ready"


def test_what_may_pass_is_tried_again_and_fails_in_the_end(workshop: Workshop) -> None:
    workshop.stages[Stage.PLAN] = fails(StorageFailure("the store is away"))
    job_id = workshop.submit()
    workshop.run_next()
    assert workshop.job(job_id).status is Status.RUNNING
    assert workshop.events(job_id)[-1] == "part.retried"
    assert workshop.part(job_id)["state"] == "ready"
    workshop.let_retry()
    workshop.run_next()
    job = workshop.job(job_id)
    assert job.status is Status.FAILED
    assert job.error is not None
    assert (job.error.code, job.error.retryable, job.error.detail) == ("store_unavailable", True, "the store is away")


def test_what_may_pass_and_passes(workshop: Workshop) -> None:
    failing = fails(StorageFailure("the store is away"))
    succeeding = workshop.stages[Stage.PLAN]
    job_id = workshop.submit()
    workshop.stages[Stage.PLAN] = failing
    workshop.run_next()
    workshop.stages[Stage.PLAN] = succeeding
    workshop.let_retry()
    workshop.run_next()
    assert workshop.rung == [PartMessage(Stage.MERGE, job_id, 0)]


def test_what_can_not_pass_fails_at_once(workshop: Workshop) -> None:
    workshop.stages[Stage.PLAN] = fails(BadTensor("NaN in 'w'", tensor="w"))
    job_id = workshop.submit()
    workshop.run_next()
    job = workshop.job(job_id)
    assert job.status is Status.FAILED
    assert job.error is not None
    assert (job.error.code, job.error.blame, job.error.tensor) == ("non_finite_tensor", "user", "w")


def test_a_fault_of_ours_is_told_and_tried_again(workshop: Workshop) -> None:
    workshop.stages[Stage.PLAN] = fails(KeyError("oops"))
    job_id = workshop.submit()
    for _ in range(2):
        workshop.run_next()
        workshop.let_retry()
    job = workshop.job(job_id)
    assert job.error is not None
    assert (job.status, job.error.code, job.error.blame) == (Status.FAILED, "worker_error", "system")
    assert "KeyError" in job.error.detail


def test_a_worker_that_is_leaving_takes_nothing(workshop: Workshop) -> None:
    job_id = workshop.submit()
    workshop.leaving = True
    message = PartMessage(Stage.PLAN, job_id, 0)
    workshop.runner.run(message)
    assert workshop.job(job_id).status is Status.QUEUED
    assert workshop.rung == [message], "it is passed on to whoever stays"


def test_a_worker_that_is_asked_to_leave_gives_its_part_back(workshop: Workshop) -> None:
    def leaves(work: Work) -> Done:
        workshop.leaving = True
        return waits_for_stop(work)

    succeeding, workshop.stages[Stage.PLAN] = workshop.stages[Stage.PLAN], leaves
    job_id = workshop.submit()
    workshop.run_next()
    part = workshop.part(job_id)
    assert (part["state"], part["tries"], part["claim"]) == ("ready", 0, None)
    assert workshop.rung == [PartMessage(Stage.PLAN, job_id, 0)]
    workshop.leaving = False
    workshop.stages[Stage.PLAN] = succeeding
    workshop.run_next()
    assert workshop.rung[-1] == PartMessage(Stage.MERGE, job_id, 0)


def test_a_cancelled_part_is_left(workshop: Workshop) -> None:
    def cancelled(work: Work) -> Done:
        workshop.jobs.cancel("anonymous", work.claim.job_id)
        return waits_for_stop(work)

    workshop.stages[Stage.PLAN] = cancelled
    job_id = workshop.submit()
    workshop.run_next()
    assert workshop.job(job_id).status is Status.CANCELLED
    assert workshop.part(job_id)["state"] == "cancelled"
    assert workshop.rung == []


def test_a_part_that_ends_after_its_job_was_cancelled_counts_for_nothing(workshop: Workshop) -> None:
    def late(work: Work) -> Done:
        workshop.jobs.cancel("anonymous", work.claim.job_id)
        return Done(status=Status.SUCCEEDED, result={})

    workshop.stages[Stage.PLAN] = late
    job_id = workshop.submit()
    workshop.run_next()
    assert workshop.job(job_id).status is Status.CANCELLED
    assert workshop.job(job_id).result is None


def test_a_part_that_was_taken_over_meanwhile_counts_once(workshop: Workshop) -> None:
    def taken_over(work: Work) -> Done:
        workshop.expire()
        assert workshop.parts.take_back_expired() == 1
        workshop.let_retry()
        other = workshop.parts.claim(PartMessage(Stage.PLAN, work.claim.job_id, 0), "another")
        assert other is not None
        assert workshop.parts.complete(other, Done(parts=(MERGE, FINALIZE)), Counters()) is not None
        return Done(parts=(MERGE, FINALIZE))

    workshop.stages[Stage.PLAN] = taken_over
    job_id = workshop.submit()
    workshop.run_next()
    assert workshop.rung == []
    assert workshop.events(job_id).count("part.done") == 1


def test_a_failure_after_being_taken_over_fails_nothing(workshop: Workshop) -> None:
    def taken_over(work: Work) -> Done:
        workshop.expire()
        workshop.parts.take_back_expired()
        raise BadTensor("NaN in 'w'", tensor="w")

    workshop.stages[Stage.PLAN] = taken_over
    job_id = workshop.submit()
    workshop.run_next()
    assert workshop.job(job_id).status is Status.RUNNING


def commits(workshop: Workshop, before: Callable[[str], None], after: Callable[[str], None]) -> str:
    """A job whose only part announces its commit, with something happening before and after."""

    def run(work: Work) -> Done:
        before(work.claim.job_id)
        work.watch.announce_commit()
        after(work.claim.job_id)
        return Done(status=Status.SUCCEEDED, result={"made": True})

    workshop.stages[Stage.PLAN] = run
    job_id = workshop.submit()
    workshop.run_next()
    return job_id


def test_cancelled_before_the_commit_nothing_becomes_visible(workshop: Workshop) -> None:
    visible: list[str] = []
    job_id = commits(workshop, lambda job_id: _cancel(workshop, job_id), visible.append)
    assert visible == []
    assert workshop.job(job_id).status is Status.CANCELLED


def test_cancelled_after_the_commit_the_job_finishes(workshop: Workshop) -> None:
    job_id = commits(workshop, lambda _: None, lambda job_id: _cancel(workshop, job_id))
    assert workshop.job(job_id).status is Status.SUCCEEDED
    assert workshop.job(job_id).result == {"made": True}


def test_of_a_cancel_and_a_commit_one_wins(workshop: Workshop) -> None:
    """Whichever it is: cancelled and nothing visible, or succeeded and all of it."""
    for _ in range(15):
        visible: list[str] = []
        threads: list[threading.Thread] = []

        def cancel_at_once(job_id: str, threads: list[threading.Thread] = threads) -> None:
            threads.append(threading.Thread(target=_cancel, args=(workshop, job_id)))
            threads[-1].start()

        job_id = commits(workshop, cancel_at_once, visible.append)
        threads[0].join()
        status = workshop.job(job_id).status
        assert (status, bool(visible)) in {(Status.CANCELLED, False), (Status.SUCCEEDED, True)}


def _cancel(workshop: Workshop, job_id: str) -> None:
    workshop.jobs.cancel("anonymous", job_id)


def test_what_a_failed_job_wrote_is_taken_away(workshop: Workshop) -> None:
    objects = open_objects(workshop.connections)

    def fails_late(work: Work) -> Done:
        address = artifacts.trim_log_part(workshop.connections.workspace, work.claim.job_id, 0)
        work.objects.put(address, b"", "application/x-ndjson")
        raise BadTensor("NaN in 'w'", tensor="w")

    workshop.stages[Stage.PLAN] = fails_late
    job_id = workshop.submit()
    workshop.run_next()
    assert workshop.job(job_id).status is Status.FAILED
    assert list(objects.list(artifacts.scratch(workshop.connections.workspace, job_id))) == []


def test_scratch_goes_once_the_database_knows_of_the_end(workshop: Workshop) -> None:
    objects = open_objects(workshop.connections)
    scratch = f"{workshop.connections.workspace}scratch/"
    seen: list[int] = []

    def ends(work: Work) -> Done:
        address = artifacts.trim_log_part(workshop.connections.workspace, work.claim.job_id, 0)
        work.objects.put(address, b"", "application/x-ndjson")
        seen.append(len(list(objects.list(scratch))))
        return Done(status=Status.SUCCEEDED, result={})

    def killed(work: Work) -> Done:
        ends(work)
        workshop.expire()
        assert workshop.parts.take_back_expired() == 1
        return Done(status=Status.SUCCEEDED, result={})

    workshop.submit()
    workshop.stages[Stage.PLAN] = killed
    workshop.run_next()
    assert len(list(objects.list(scratch))) == 1, "whoever takes over needs it"
    workshop.let_retry()
    workshop.stages[Stage.PLAN] = ends
    workshop.run_next()
    assert (seen, list(objects.list(scratch))) == ([1, 1], [])


def begins(workshop: Workshop, then: Callable[[Work], None], seen: list[str | None]) -> StageRun:
    """Begins to write an object as a server would keep it, unless an earlier try did; then something happens."""
    half = workshop.half_written

    def run(work: Work) -> Done:
        bookmark = work.bookmark("s3://merged/model.safetensors")
        assert bookmark is not None
        seen.append(bookmark.find())
        if seen[-1] is None:
            half.write_bytes(b"half")
            bookmark.note(str(half))
        then(work)
        return waits_for_stop(work)

    return run


def test_what_a_part_has_begun_stays_for_its_next_try(workshop: Workshop) -> None:
    """After the lease was lost, the worker asked to leave, and a failure that may pass, which ends the job here."""
    seen: list[str | None] = []

    def is_late(_: Work) -> None:
        workshop.expire()
        assert workshop.parts.take_back_expired() == 1

    def leaves(_: Work) -> None:
        workshop.leaving = True

    def fails_twice(_: Work) -> None:
        raise StorageFailure("the store is away")

    job_id = workshop.submit()
    for then in (is_late, leaves, fails_twice, fails_twice):
        if workshop.job(job_id).status is Status.FAILED:
            workshop.jobs.retry("anonymous", job_id)
        workshop.stages[Stage.PLAN] = begins(workshop, then, seen)
        workshop.let_retry()
        workshop.run_next()
        workshop.leaving = False
        assert workshop.half_written.exists()
    assert seen == [None, *[str(workshop.half_written)] * 3]
    assert workshop.events(job_id).count("job.retried") == 1


def test_what_a_part_of_a_cancelled_job_has_begun_is_dropped(workshop: Workshop) -> None:
    def cancels(work: Work) -> None:
        workshop.jobs.cancel("anonymous", work.claim.job_id)

    workshop.stages[Stage.PLAN] = begins(workshop, cancels, [])
    workshop.submit()
    workshop.run_next()
    assert not workshop.half_written.exists()


def test_what_a_part_that_fails_for_good_has_begun_is_dropped(workshop: Workshop) -> None:
    def fails_for_good(_: Work) -> None:
        raise BadTensor("NaN in 'w'", tensor="w")

    workshop.stages[Stage.PLAN] = begins(workshop, fails_for_good, [])
    workshop.submit()
    workshop.run_next()
    assert not workshop.half_written.exists()


# The heartbeat


def beating(beat: Callable[[Counters], bool], watch: Watch, *, lease_seconds: float = 60.0) -> Heartbeat:
    return Heartbeat(watch, beat, lambda: False, every_seconds=0.01, lease_seconds=lease_seconds)


def stops(watch: Watch) -> bool:
    for _ in range(2000):
        if watch.is_stopped:
            return True
        time.sleep(0.01)
    return False


def test_a_heartbeat_tells_how_far_the_part_is() -> None:
    told: list[Counters] = []
    enough = threading.Event()

    def beat(counters: Counters) -> bool:
        told.append(counters)
        if counters.tensors_done == 3:
            enough.set()
        return True

    watch = Watch(lambda: True)
    with beating(beat, watch):
        watch.step(tensors=3)
        assert enough.wait(20)
    assert not watch.is_stopped


def test_a_lost_lease_stops_the_stage() -> None:
    watch = Watch(lambda: True)
    with beating(lambda _: False, watch):
        assert stops(watch)


def test_who_stood_still_longer_than_its_lease_does_nothing_more() -> None:
    """As after SIGSTOP: the first step is refused, whether or not the heartbeat has been heard from yet."""
    watch = Watch(lambda: True)
    watch.extend(time.monotonic() + 60)
    watch.step()
    watch.extend(time.monotonic() - 0.001)
    with pytest.raises(Stopped, match="stood still"):
        watch.step()


def test_a_database_that_is_away_stops_the_stage_only_when_the_lease_is_over(
    caplog: pytest.LogCaptureFixture,
) -> None:
    beats: list[int] = []

    def away(_: Counters) -> bool:
        beats.append(1)
        raise ConnectionError("away")

    watch = Watch(lambda: True)
    with beating(away, watch, lease_seconds=0.1):
        assert stops(watch)
    assert len(beats) > 1
    assert "A heartbeat failed" in caplog.text
