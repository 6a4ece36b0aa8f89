"""The trials of searches: asked for and told under a part's claim, so that a worker that is late changes nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sqlalchemy import Connection, Row, func, select, update

from service.contract.errors import Stopped
from service.contract.parts import Claim
from service.contract.trials import Propose, TrialRecord
from service.stores.database import Database, now
from service.stores.parts import held_by
from service.stores.records import lock_job
from service.stores.schema import parts, trials


class JobStudy:
    """The trials of one job, as the part that ``claim`` is about sees them; each method is one transaction."""

    def __init__(self, database: Database, claim: Claim) -> None:
        self._database = database
        self._claim = claim

    def ask(self, propose: Propose, seconds: float | None) -> TrialRecord | None:
        """As the contract's ``Study`` has it. Proposals of one job are made one after another."""
        claim = self._claim
        with self._database.write() as connection:
            self._refuse_lost(connection)
            connection.execute(update(trials).where(*self._own, trials.c.state == "running").values(state="lost"))
            known = self._all(connection)
            ended = next((trial for trial in known if trial.part == claim.part and trial.state != "lost"), None)
            if ended is not None:
                return ended
            parameters = None if self._is_over(connection, seconds) else propose(known)
            if parameters is None:
                return None
            row = {"number": len(known), "part": claim.part, "state": "running", "parameters": dict(parameters)}
            connection.execute(
                trials.insert().values(job_id=claim.job_id, stage=claim.stage.value, started_at=now(), output={}, **row)
            )
            return TrialRecord(len(known), claim.part, "running", dict(parameters))

    def tell(self, trial: TrialRecord) -> None:
        """As the contract's ``Study`` has it."""
        values = {"state": trial.state, "value": trial.value, "detail": trial.detail, "output": dict(trial.output)}
        with self._database.write() as connection:
            self._refuse_lost(connection)
            connection.execute(
                update(trials).where(*self._own, trials.c.number == trial.number).values(finished_at=now(), **values)
            )

    def trials(self) -> list[TrialRecord]:
        """All trials by number; one whose part is not at work any more is lost."""
        with self._database.read() as connection:
            known = self._all(connection)
            claimed = (parts.c.job_id == self._claim.job_id, parts.c.state == "claimed")
            at_work = set(connection.execute(select(parts.c.part).where(*claimed, parts.c.stage == "search")).scalars())
        return [
            replace(trial, state="lost") if trial.state == "running" and trial.part not in at_work else trial
            for trial in known
        ]

    @property
    def _own(self) -> tuple[Any, ...]:
        return (trials.c.job_id == self._claim.job_id, trials.c.part == self._claim.part)

    def _refuse_lost(self, connection: Connection) -> None:
        lock_job(connection, self._claim.job_id)
        if connection.execute(select(parts.c.part).where(*held_by(self._claim))).first() is None:
            raise Stopped("the job was cancelled, or the part taken over")

    def _is_over(self, connection: Connection, seconds: float | None) -> bool:
        if seconds is None:
            return False
        begun = select(func.min(trials.c.started_at)).where(trials.c.job_id == self._claim.job_id)
        first = connection.execute(begun).scalar_one()
        return first is not None and connection.execute(select(now())).scalar_one() > first + seconds

    def _all(self, connection: Connection) -> list[TrialRecord]:
        rows = connection.execute(select(trials).where(trials.c.job_id == self._claim.job_id).order_by(trials.c.number))
        return [_record(row) for row in rows]


def _record(row: Row[Any]) -> TrialRecord:
    return TrialRecord(row.number, row.part, row.state, row.parameters, row.value, row.detail, row.output)
