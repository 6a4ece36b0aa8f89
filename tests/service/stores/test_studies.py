"""The trials of searches in both databases: asked for under a claim, told once, lost with their worker."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import func, select, update

from service.contract.errors import BadInput, Stopped
from service.contract.parts import Claim
from service.contract.stages import NewPart, Stage
from service.contract.trials import TrialRecord, best_so_far, best_trial
from service.stores.database import Database
from service.stores.jobs import JobStore
from service.stores.parts import PartStore
from service.stores.schema import trials as table
from service.stores.studies import JobStudy
from tests.service.jobs_by_hand import at_once, claim, plan, submit
from tests.service.stores.test_parts import later

COUNT = 8


@pytest.fixture
def parts(database: Database) -> PartStore:
    return PartStore(database, lease_seconds=60, part_attempts=3)


@pytest.fixture
def job_id(database: Database, parts: PartStore) -> str:
    """A job whose search waits to be done."""
    job = submit(JobStore(database))
    plan(parts, job.id, *[NewPart(Stage.SEARCH, part, f"trial/{part}", 1.0) for part in range(COUNT)])
    return job.id


def counted(known: Sequence[TrialRecord]) -> Mapping[str, Any]:
    return {"scaling": len(known) / 10}


def held(parts: PartStore, job_id: str, part: int) -> Claim:
    return claim(parts, job_id, Stage.SEARCH, part)


def asked(study: JobStudy) -> TrialRecord:
    trial = study.ask(counted, None)
    assert trial is not None
    return trial


def test_trials_are_numbered_as_they_begin_whoever_asks(database: Database, parts: PartStore, job_id: str) -> None:
    claims = [held(parts, job_id, part) for part in range(COUNT)]
    found = at_once(COUNT, lambda part: asked(JobStudy(database, claims[part])))
    assert sorted(trial.number for trial in found) == list(range(COUNT))
    assert all(trial.parameters == {"scaling": trial.number / 10} for trial in found)
    assert JobStudy(database, claims[0]).trials() == sorted(found, key=lambda trial: trial.number)


def test_what_is_told_is_kept(database: Database, parts: PartStore, job_id: str) -> None:
    study = JobStudy(database, held(parts, job_id, 0))
    done = replace(asked(study), state="complete", value=0.5, output={"surveys": ["s3://a/b.json"]})
    study.tell(done)
    assert study.trials() == [done]
    assert study.ask(counted, None) == done  # a part that ran again after it had told


def test_a_part_that_runs_again_loses_its_trial_and_asks_for_another(
    database: Database, parts: PartStore, job_id: str
) -> None:
    dead = JobStudy(database, held(parts, job_id, 0))
    stale = asked(dead)
    later(database)
    assert parts.take_back_expired() == 1
    assert [trial.state for trial in dead.trials()] == ["lost"]
    later(database)
    study = JobStudy(database, held(parts, job_id, 0))
    fresh = asked(study)
    assert (fresh.number, fresh.part) == (1, 0)
    with pytest.raises(Stopped):
        dead.tell(replace(stale, state="complete", value=1.0))
    study.tell(replace(fresh, state="complete", value=0.25))
    assert [(trial.state, trial.value) for trial in study.trials()] == [("lost", None), ("complete", 0.25)]


def test_no_trial_begins_after_the_time(database: Database, parts: PartStore, job_id: str) -> None:
    first, second = (JobStudy(database, held(parts, job_id, part)) for part in (0, 1))
    assert first.ask(counted, 60) is not None
    with database.write() as connection:
        connection.execute(update(table).values(started_at=table.c.started_at - 61))
    assert second.ask(counted, 60) is None
    assert second.ask(counted, 3600) is not None


def test_nothing_proposed_is_no_trial(database: Database, parts: PartStore, job_id: str) -> None:
    study = JobStudy(database, held(parts, job_id, 0))
    assert study.ask(lambda _known: None, None) is None
    assert study.trials() == []


def test_trials_go_with_their_parts(database: Database, parts: PartStore, job_id: str) -> None:
    asked(JobStudy(database, held(parts, job_id, 0)))
    jobs = JobStore(database)
    jobs.cancel("anonymous", job_id)
    jobs.delete("anonymous", job_id)
    with database.read() as connection:
        assert connection.execute(select(func.count()).select_from(table)).scalar_one() == 0


def test_the_best_is_the_first_of_the_highest() -> None:
    values = [None, 0.5, 0.75, 0.75, 0.25]
    known = [TrialRecord(i, i, "complete", {}, value) for i, value in enumerate(values)]
    assert best_trial(known).number == 2
    assert best_so_far(known) == [None, 0.5, 0.75, 0.75, 0.75]


def test_no_trial_with_a_value() -> None:
    failed = TrialRecord(0, 0, "failed", {}, detail="the density is too low")
    with pytest.raises(BadInput, match=r"none of the search's 1 trials .* the first one: the density is too low"):
        best_trial([failed])
