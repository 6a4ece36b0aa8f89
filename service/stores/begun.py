"""What the parts of jobs have begun to write: who does a part again goes on with it, who ends a job drops it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, select, update

from service.contract.errors import Stopped
from service.contract.parts import Claim
from service.contract.stages import PartMessage
from service.stores.base import Unfinished
from service.stores.database import Database
from service.stores.parts import held_by
from service.stores.records import ACTIVE, lock_job
from service.stores.schema import parts
from service.stores.transitions import is_part

BEGUN = "begun"  # in the output of a part that is not done yet: a store's handle by address


class BegunObjects:
    """Notes about objects, each in the row of the part that writes it; each method is one transaction.

    Only the part's worker writes them, under its claim, and they are taken away before what they name is dropped: of
    two workers, one of which has been taken for dead, neither can drop what the other goes on with.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def find(self, claim: Claim, address: str) -> str | None:
        """The handle that was noted last. Raises Stopped where the claim was lost."""
        with self._database.read() as connection:
            return _begun(_held(connection, claim)).get(address)

    def note(self, claim: Claim, address: str, handle: str | None) -> None:
        """Keep a handle, or None for there is none any more. Raises Stopped where the claim was lost."""
        with self._database.write() as connection:
            lock_job(connection, claim.job_id)
            output = _held(connection, claim)
            begun = {**_begun(output), address: handle}
            kept = {name: value for name, value in begun.items() if value is not None}
            connection.execute(update(parts).where(*held_by(claim)).values(output={**output, BEGUN: kept}))

    def take_ended(self, claim: Claim) -> list[Unfinished]:
        """What a part had begun, where its job has ended: it may be dropped, for a retry will not find it."""
        this = is_part(PartMessage(claim.stage, claim.job_id, claim.part))
        with self._database.write() as connection:
            job = lock_job(connection, claim.job_id)
            if job is None or job.status in ACTIVE:
                return []
            output = connection.execute(select(parts.c.output).where(*this)).scalar_one_or_none() or {}
            kept = {name: value for name, value in output.items() if name != BEGUN}
            connection.execute(update(parts).where(*this).values(output=kept))
            return _unfinished([output])


def begun_by(connection: Connection, job_id: str) -> list[Unfinished]:
    """All that the parts of a job have begun and noted, whether or not it is still there."""
    undone = (parts.c.job_id == job_id, parts.c.state != "done")
    return _unfinished(connection.execute(select(parts.c.output).where(*undone)).scalars().all())


def _held(connection: Connection, claim: Claim) -> dict[str, Any]:
    row = connection.execute(select(parts.c.output).where(*held_by(claim))).one_or_none()
    if row is None:
        raise Stopped("the job was cancelled, or the part taken over")
    return dict(row.output or {})


def _begun(output: dict[str, Any]) -> dict[str, str]:
    return dict(output.get(BEGUN, {}))


def _unfinished(outputs: Sequence[dict[str, Any] | None]) -> list[Unfinished]:
    found = [_begun(output or {}) for output in outputs]
    return [Unfinished(address, handle, 0.0) for begun in found for address, handle in begun.items()]
