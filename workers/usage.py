"""What the parts of a job took, by stage and in all: seconds, and the most memory that a process held."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self


@dataclass(frozen=True)
class Usage:
    """What a part took.

    ``peak_memory_bytes`` is the most that the process had resident, libraries and mapped files included;
    ``idle_memory_bytes`` what it had before the part began, where that can be known. Where the system can't forget an
    earlier part's peak and this part's was lower, ``peak_is_exact`` is false and the peak is the earlier one: a bound.
    ``device_peak_bytes`` is the most that torch had allocated on a CUDA device.
    """

    seconds: float
    peak_memory_bytes: int
    idle_memory_bytes: int | None
    peak_is_exact: bool
    device: str
    device_peak_bytes: int | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        return cls(**values)


def summed(usages: Mapping[str, Sequence[Usage]]) -> dict[str, Any]:
    """What a job took, by stage and in all: of memory its largest part, of seconds the sum of its parts'.

    Parts run side by side on several workers, so their seconds add up to more than the job's.
    """
    every = [usage for found in usages.values() for usage in found]
    return {
        **_largest(every),
        "stages": [
            {"stage": stage, "parts": len(found), "seconds": round(sum(u.seconds for u in found), 3), **_largest(found)}
            for stage, found in usages.items()
            if found
        ],
    }


def _largest(usages: Sequence[Usage]) -> dict[str, Any]:
    """The memory of the part that took the most; that of the device may be another part's."""
    largest = max(usages, key=lambda usage: usage.peak_memory_bytes, default=None)
    if largest is None:
        return {"peak_memory_bytes": None}
    return {
        "peak_memory_bytes": largest.peak_memory_bytes,
        "idle_memory_bytes": largest.idle_memory_bytes,
        "peak_is_exact": largest.peak_is_exact,
        "device": ", ".join(dict.fromkeys(usage.device for usage in usages)),
        "device_peak_bytes": _most(usage.device_peak_bytes for usage in usages),
    }


def _most(values: Iterable[int | None]) -> int | None:
    return max((value for value in values if value is not None), default=None)
