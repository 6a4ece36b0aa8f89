"""How much memory there is for parts: what the machine, its control group and the device have, by process."""

from __future__ import annotations

import os
from pathlib import Path

IDLE_BYTES = 512 << 20  # what a process with torch and transformers takes before it does anything
CGROUP = Path("/sys/fs/cgroup")
LIMITS = ("memory.max", "memory/memory.limit_in_bytes")  # version 2, version 1


def host_bytes(cgroup: Path = CGROUP) -> int:
    """The machine's memory, or less where this process's control group may use less."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([physical, *(limit for name in LIMITS if (limit := _limit(cgroup / name)) is not None)])


def _limit(file: Path) -> int | None:
    """The limit that a file holds; None where there is no such file, or it says that there is none."""
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def usable_bytes(host: int, device: int | None, processes: int) -> int:
    """What a part may need, by default: a process's share of the machine, less what it takes when idle, and no more
    than its share of the device, through whose machine everything goes."""
    share = host // processes
    on_host = max(share - IDLE_BYTES, share // 2)
    return on_host if device is None else min(on_host, device // processes)
