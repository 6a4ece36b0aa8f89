"""The trials of a search: what was proposed, what came of it, and which of them is the best."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from service.contract.errors import BadInput
from service.contract.search import Value

TrialState = Literal["running", "complete", "failed", "lost"]


@dataclass(frozen=True)
class TrialRecord:
    """One trial: numbers count from 0 in the order in which trials began.

    A ``lost`` one is one whose worker died; a ``failed`` one says why in ``detail``. ``output`` is what the trial left
    for the stages after it.
    """

    number: int
    part: int
    state: TrialState
    parameters: Mapping[str, Value]
    value: float | None = None
    detail: str | None = None
    output: Mapping[str, Any] = field(default_factory=dict)


Propose = Callable[[Sequence[TrialRecord]], Mapping[str, Value] | None]


class Study(Protocol):
    """A job's trials, as the part that is at work sees them."""

    def ask(self, propose: Propose, seconds: float | None) -> TrialRecord | None:
        """This part's trial: a new one with what ``propose`` makes of those before, or the one it has ended already.

        None where ``seconds`` have passed since the first trial began, or nothing is proposed. Raises Stopped.
        """
        ...

    def tell(self, trial: TrialRecord) -> None:
        """Keep what came of this part's trial. Raises Stopped where the part is not this worker's any more."""
        ...

    def trials(self) -> list[TrialRecord]:
        """All trials by number."""
        ...


def best_trial(trials: Sequence[TrialRecord]) -> TrialRecord:
    """The trial of the highest value, the first of several. Raises BadInput where none has a value."""
    valued = [trial for trial in trials if trial.value is not None]
    if not valued:
        reasons = [trial.detail for trial in trials if trial.detail]
        because = f"; the first one: {reasons[0]}" if reasons else ""
        raise BadInput(f"none of the search's {len(trials)} trials could be merged and measured{because}")
    return max(valued, key=lambda trial: (trial.value or 0.0, -trial.number))


def best_so_far(trials: Sequence[TrialRecord]) -> list[float | None]:
    """For each trial the highest value up to it; None before there is one."""
    best: float | None = None
    found = []
    for trial in trials:
        if trial.value is not None and (best is None or trial.value > best):
            best = trial.value
        found.append(best)
    return found
