"""What is taken out of task vectors before they are combined: one file per kind of parameter, one row per file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from service.contract.treatments import Treatment
from workers.statistics import Statistic, observe_rows, observe_squares
from workers.treatments import keep, projection, scale_mask, shift_mask
from workers.treatments.outcome import Effect, Removed, Trimmed

__all__ = ["TREATMENTS", "Effect", "Removed", "TreatmentFunctions", "Trimmed", "apply_removed", "trim"]


@dataclass(frozen=True)
class TreatmentFunctions:
    """What a treatment's file does. ``observe`` adds rows of inputs to a statistic, where the treatment needs one.

    One-hot inputs (embeddings) have no rows: their counts go through ``workers.statistics.observe_indices``.
    """

    trim: Callable[[Sequence[Tensor], Sequence[Statistic | None], Any], Trimmed]
    apply_removed: Callable[[Sequence[Tensor], Sequence[Removed], Any], list[Tensor]]
    observe: Callable[[Tensor, Statistic | None], Statistic] | None = None


TREATMENTS: dict[str, TreatmentFunctions] = {
    "projection": TreatmentFunctions(projection.trim, projection.apply_removed, observe_rows),
    "scale_mask": TreatmentFunctions(scale_mask.trim, scale_mask.apply_removed, observe_squares),
    "shift_mask": TreatmentFunctions(shift_mask.trim, shift_mask.apply_removed),
    "keep": TreatmentFunctions(keep.trim, keep.apply_removed),
}


def trim(task_vectors: Sequence[Tensor], statistics: Sequence[Statistic | None], params: Treatment) -> Trimmed:
    """Trim one parameter's task vectors, float32 or float64 and all of one shape, by the treatment ``params`` names.

    Inputs are left as they are; a task vector that loses nothing may come back itself.

    Raises:
        BadInput: task vectors differ in shape or type, or a needed statistic is missing, empty or does not fit.
        BadTensor: a task vector or a statistic holds NaN or infinity.
    """
    return TREATMENTS[params.name].trim(task_vectors, statistics, params)


def apply_removed(task_vectors: Sequence[Tensor], removed: Sequence[Removed], params: Treatment) -> list[Tensor]:
    """The trimmed task vectors again, from the untrimmed ones and what was recorded as removed: equal to ``trim``'s.

    Raises:
        BadInput: task vectors differ in shape or type, or the record is of another treatment.
    """
    return TREATMENTS[params.name].apply_removed(task_vectors, removed, params)
