"""Who does what next: of all parts that are ready and fit a worker, the one whose turn it is.

Turns are taken in this order:

1. The caller with the fewest parts at work, then the one that was served the longest ago.
2. Among a caller's jobs the highest ``priority``: it takes nothing from other callers.
3. The job with the fewest parts at work, so that a job of many parts leaves room for the others.
4. The job that waits for its turn the longest. It has waited since it was queued until it was given ``QUANTUM`` parts,
   so that small jobs are finished in the order they came in; from then on it goes to the end of the line with every
   part, so that it waits for all jobs that were queued before, and they for no more than one of its parts.
5. The part of which the worker's machine keeps most of the inputs, among the first ``LOOKED_AT`` of the job: which of
   its parts is done first makes no difference to anybody.
6. The part's number.

Everything is read by index: what a claim costs does not depend on how many jobs wait or have ended.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, Select, and_, func, or_, select, tuple_, update
from sqlalchemy import case as sql_case

from service.contract.job import Status
from service.contract.stages import Queue
from service.stores.database import now
from service.stores.schema import jobs, parts

LOOKED_AT = 64
QUANTUM = 8  # parts that a job is given before it lets others go first; most jobs have no more


@dataclass(frozen=True)
class Caller:
    """Someone whose jobs wait in a queue, with the parts of theirs that are at work."""

    name: str
    at_work: int
    served_at: float | None


def next_job(connection: Connection, queue: Queue, usable_bytes: int, *, patient: bool) -> Row[Any] | None:
    """The job of a queue whose turn it is, locked; None where no part of any may be claimed with so much memory.

    Jobs that another transaction has locked are passed over, unless ``patient``: then they are waited for, and what
    comes back may have been served meanwhile.
    """
    busy = _at_work(connection)
    for caller in _in_turn(connection, queue, busy):
        job = _next_of(connection, queue, caller.name, usable_bytes, busy, patient=patient)
        if job is not None:
            return job
    return None


def _at_work(connection: Connection) -> Sequence[Row[Any, Any, Any]]:
    """The jobs with parts at work, ``(id, caller, claimed)``: no more than there are workers."""
    counted = select(parts.c.job_id, func.count().label("claimed")).where(parts.c.state == "claimed")
    by_job = counted.group_by(parts.c.job_id).subquery()
    joined = select(jobs.c.id, jobs.c.caller, by_job.c.claimed).join(by_job, by_job.c.job_id == jobs.c.id)
    rows: Sequence[Row[Any, Any, Any]] = connection.execute(joined).all()
    return rows


def _in_turn(connection: Connection, queue: Queue, busy: Sequence[Row[Any, Any, Any]]) -> list[Caller]:
    """Those with jobs in a queue, whether parts of them are ready or not; whose turn it is comes first."""
    at_work: Counter[str] = Counter()
    for row in busy:
        at_work[row.caller] += row.claimed
    rows = connection.execute(_callers(queue)).all()
    callers = [Caller(row.caller, at_work[row.caller], row.served_at) for row in rows]
    return sorted(callers, key=lambda caller: (caller.at_work, caller.served_at or 0.0, caller.name))


def _callers(queue: Queue) -> Select[Any]:
    """The callers of a queue's jobs, from one to the next through the index."""
    first = select(func.min(jobs.c.caller).label("caller")).where(jobs.c.queue == queue.value)
    found = first.cte("callers", recursive=True)
    following = select(func.min(jobs.c.caller)).where(jobs.c.queue == queue.value, jobs.c.caller > found.c.caller)
    found = found.union_all(select(following.scalar_subquery()).where(found.c.caller.is_not(None)))
    served = select(func.max(jobs.c.served_at)).where(jobs.c.caller == found.c.caller).scalar_subquery()
    return select(found.c.caller, served.label("served_at")).where(found.c.caller.is_not(None))


def _next_of(
    connection: Connection,
    queue: Queue,
    caller: str,
    usable_bytes: int,
    busy: Sequence[Row[Any, Any, Any]],
    *,
    patient: bool,
) -> Row[Any] | None:
    """Of one caller: the best of the jobs with parts at work, of which there are few, or of all the others."""
    waiting = (jobs.c.queue == queue.value, jobs.c.caller == caller, _has("ready", *_claimable(usable_bytes)))
    best = _best_of(connection, {row.id: row.claimed for row in busy if row.caller == caller}, waiting)
    as_urgent = () if best is None else (jobs.c.priority >= best.priority,)
    found = _first(connection, (*waiting, *as_urgent, ~_has("claimed")), patient)
    if found is None and best is not None:
        found = _first(connection, (jobs.c.id == best.id,), patient)
    if found is not None or not patient:
        return found
    # A job of which another worker took a part just now was neither of the few nor of the others.
    return _first(connection, waiting, patient)


def _first(connection: Connection, conditions: tuple[ColumnElement[bool], ...], patient: bool) -> Row[Any] | None:
    query = select(jobs).where(*conditions).order_by(jobs.c.priority.desc(), jobs.c.turn_at, jobs.c.id).limit(1)
    row: Row[Any] | None = connection.execute(query.with_for_update(skip_locked=not patient)).one_or_none()
    return row


def _best_of(
    connection: Connection, at_work: Mapping[str, int], waiting: tuple[ColumnElement[bool], ...]
) -> Row[Any, Any, Any] | None:
    known = connection.execute(
        select(jobs.c.id, jobs.c.priority, jobs.c.turn_at).where(jobs.c.id.in_(list(at_work)), *waiting)
    ).all()
    return min(known, key=lambda row: (-row.priority, at_work[row.id], row.turn_at, row.id), default=None)


def _has(state: str, *conditions: ColumnElement[bool]) -> ColumnElement[bool]:
    return select(parts.c.part).where(parts.c.job_id == jobs.c.id, parts.c.state == state, *conditions).exists()


def _claimable(usable_bytes: int) -> tuple[ColumnElement[bool], ...]:
    """Of a part that is ready: whether its pause is over, and a worker with so much memory may have it."""
    return parts.c.not_before <= now(), parts.c.peak_bytes <= usable_bytes


def next_part(
    connection: Connection, job_id: str, usable_bytes: int, kept: Mapping[str, int]
) -> Row[Any, Any, Any] | None:
    """The part of a locked job that is to be claimed next; ``kept`` are bytes of files that a worker's machine has."""
    rows = connection.execute(
        select(parts.c.stage, parts.c.part, parts.c.inputs)
        .where(parts.c.job_id == job_id, parts.c.state == "ready", *_claimable(usable_bytes))
        .order_by(parts.c.part, parts.c.stage)
        .limit(LOOKED_AT if kept else 1)
    ).all()
    return max(rows, key=lambda row: sum(kept.get(address, 0) for address in row.inputs or ()), default=None)


def note_turn(connection: Connection, job_id: str) -> None:
    """Note that a job was given a part; one that had its quantum goes to the end of the line."""
    turn_at = sql_case((jobs.c.given < QUANTUM - 1, jobs.c.turn_at), else_=now())
    connection.execute(
        update(jobs).where(jobs.c.id == job_id).values(given=jobs.c.given + 1, turn_at=turn_at, served_at=now())
    )


def queue_positions(connection: Connection, rows: Sequence[Row[Any]]) -> dict[str, int]:
    """The place of each queued job among ``rows``: 1 is begun next, as far as one can tell before parts have ended."""
    queued = [row for row in rows if row.status == Status.QUEUED]
    if not queued:
        return {}
    places = _places(connection, queued)
    positions = {}
    for queue in {row.queue for row in queued}:
        order = _in_turn(connection, Queue(queue), _at_work(connection))
        totals = _totals(connection, queue)
        for row in queued:
            if row.queue == queue:
                positions[row.id] = places[row.id] + _ahead(order, totals, row.caller, places[row.id] - 1)
    return positions


def _places(connection: Connection, queued: Sequence[Row[Any]]) -> dict[str, int]:
    """Each job's place among its caller's own: of one job by those before it, of many by counting all lines once."""
    if len(queued) == 1:
        ahead = select(func.count()).where(*_own_line(queued), _is_before(queued[0]))
        return {queued[0].id: connection.execute(ahead).scalar_one() + 1}
    in_line = [jobs.c.priority.desc(), jobs.c.turn_at, jobs.c.id]
    place = func.row_number().over(partition_by=[jobs.c.queue, jobs.c.caller], order_by=in_line)
    lines = select(jobs.c.id, place.label("place")).where(*_own_line(queued)).subquery()
    return dict(connection.execute(select(lines).where(lines.c.id.in_([row.id for row in queued]))).all())


def _own_line(queued: Sequence[Row[Any]]) -> tuple[ColumnElement[bool], ...]:
    """The queued jobs of the same callers in the same queues."""
    lines = sorted({(row.queue, row.caller) for row in queued})
    return jobs.c.status == Status.QUEUED.value, tuple_(jobs.c.queue, jobs.c.caller).in_(lines)


def _is_before(row: Row[Any]) -> ColumnElement[bool]:
    is_older = tuple_(jobs.c.turn_at, jobs.c.id) < tuple_(row.turn_at, row.id)
    return or_(jobs.c.priority > row.priority, and_(jobs.c.priority == row.priority, is_older))


def _totals(connection: Connection, queue: str) -> dict[str, int]:
    counted = select(jobs.c.caller, func.count()).where(jobs.c.status == Status.QUEUED.value, jobs.c.queue == queue)
    return dict(connection.execute(counted.group_by(jobs.c.caller)).all())


def _ahead(callers: Sequence[Caller], totals: dict[str, int], name: str, own_ahead: int) -> int:
    """How many jobs of other callers are begun before one that has ``own_ahead`` of its caller's own before it.

    Every caller is given one job after another, always the one with the fewest at work. Of those with as many, whoever
    had them from the start was served before whoever came to have them.
    """

    def at_one_level(caller: Caller) -> tuple[int, float, str]:
        return -caller.at_work, caller.served_at or 0.0, caller.name

    own = next(caller for caller in callers if caller.name == name)
    level = own.at_work + own_ahead
    ahead = 0
    for other in callers:
        if other is not own:
            goes_first = at_one_level(other) < at_one_level(own)
            ahead += min(max(level - other.at_work + goes_first, 0), totals.get(other.name, 0))
    return ahead
