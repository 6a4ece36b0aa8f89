"""The stages of a job in order: their messages, their queues, and what their parts are."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal


class Stage(StrEnum):
    """One durable step of a job, done in parts."""

    PLAN = "plan"
    CALIBRATE = "calibrate"
    SEARCH = "search"
    ANALYZE = "analyze"
    MERGE = "merge"
    EVALUATE = "evaluate"
    FINALIZE = "finalize"


class Queue(StrEnum):
    """Where a stage's messages wait: what is quick never waits behind what is not."""

    LIGHT = "catmerge.light"
    HEAVY = "catmerge.heavy"

    @property
    def word(self) -> Literal["light", "heavy"]:
        """As settings and answers say it."""
        return "light" if self is Queue.LIGHT else "heavy"


@dataclass(frozen=True)
class StageRow:
    """What the house knows about a stage."""

    message: str
    queue: Queue
    parts_are: str


STAGES: dict[Stage, StageRow] = {
    Stage.PLAN: StageRow("catmerge.plan", Queue.LIGHT, "one"),
    Stage.CALIBRATE: StageRow("catmerge.calibrate", Queue.HEAVY, "one per task"),
    Stage.SEARCH: StageRow("catmerge.search", Queue.HEAVY, "one per trial"),
    Stage.ANALYZE: StageRow("catmerge.analyze", Queue.HEAVY, "one per shard that a merge would write; no weights"),
    Stage.MERGE: StageRow("catmerge.merge", Queue.HEAVY, "one per output shard, of the result and of every baseline"),
    Stage.EVALUATE: StageRow("catmerge.evaluate", Queue.HEAVY, "one per model and evaluated task, and one for speed"),
    Stage.FINALIZE: StageRow("catmerge.finalize", Queue.LIGHT, "one"),
}
ORDER: tuple[Stage, ...] = tuple(STAGES)


@dataclass(frozen=True)
class PartMessage:
    """What travels over the broker: which part to look at, never data."""

    stage: Stage
    job_id: str
    part: int


@dataclass(frozen=True)
class NewPart:
    """A part that a plan asks for: ``weight`` is its share of the job's work in arbitrary units.

    ``peak_bytes`` is the memory that it is predicted to need; 0 where it makes do with what there is. ``inputs`` are
    addresses of files that it reads, and other parts of its stage do not.
    """

    stage: Stage
    part: int
    name: str
    weight: float
    tensors_total: int = 0
    peak_bytes: int = 0
    inputs: tuple[str, ...] = ()
