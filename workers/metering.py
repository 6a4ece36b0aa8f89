"""Measures what a part of a job takes: seconds, and the most memory that the process held meanwhile."""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path

import torch

from workers.usage import Usage

PROCESS = Path("/proc/self")
FORGET_PEAK = "5"  # proc(5), clear_refs: set the peak to what is resident now
KIBIBYTE = 1024


class Meter:
    """Runs from its making on. One process does one part at a time, so what the process takes is the part's."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._start = time.monotonic()
        self._is_reset = _forget_peak()
        self._peak_before = _peak_bytes()
        self._idle = _status_bytes("VmRSS")
        if self._is_cuda:
            torch.cuda.reset_peak_memory_stats(device)

    def usage(self) -> Usage:
        """What was taken until now."""
        peak = _peak_bytes()
        return Usage(
            seconds=round(time.monotonic() - self._start, 3),
            peak_memory_bytes=peak,
            idle_memory_bytes=self._idle,
            peak_is_exact=self._is_reset or peak > self._peak_before,
            device=self._device,
            device_peak_bytes=torch.cuda.max_memory_allocated(self._device) if self._is_cuda else None,
        )

    @property
    def _is_cuda(self) -> bool:
        return torch.device(self._device).type == "cuda"


def _forget_peak() -> bool:
    """Whether the system let the process start a new peak; only Linux does, and not in every container."""
    try:
        (PROCESS / "clear_refs").write_text(FORGET_PEAK)
    except OSError:
        return False
    return True


def _peak_bytes() -> int:
    """The most that was resident since the peak was last forgotten, or in the process's whole life."""
    peak = _status_bytes("VmHWM")
    if peak is not None:
        return peak
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * KIBIBYTE  # macOS tells bytes, others kibibytes


def _status_bytes(name: str) -> int | None:
    """A figure of /proc/self/status, which macOS does not have."""
    try:
        lines = (PROCESS / "status").read_text().splitlines()
    except OSError:
        return None
    found = (line.split() for line in lines if line.startswith(f"{name}:"))
    return next((int(words[1]) * KIBIBYTE for words in found), None)
