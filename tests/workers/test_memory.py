"""The memory that a worker counts on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from workers.memory import IDLE_BYTES, host_bytes, usable_bytes

GB = 1 << 30
PHYSICAL = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_without_a_limit_it_is_the_machines(tmp_path: Path) -> None:
    assert host_bytes(tmp_path) == PHYSICAL
    (tmp_path / "memory.max").write_text("max\n")
    assert host_bytes(tmp_path) == PHYSICAL


@pytest.mark.parametrize("name", ["memory.max", "memory/memory.limit_in_bytes"])
def test_a_container_has_what_it_may_use(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("1000000\n")
    assert host_bytes(tmp_path) == 1000000
    (tmp_path / name).write_text("9223372036854771712\n")  # version 1's way to say that there is none
    assert host_bytes(tmp_path) == PHYSICAL


def test_processes_share_and_an_idle_one_takes_its_own() -> None:
    assert usable_bytes(16 * GB, None, 1) == 16 * GB - IDLE_BYTES
    assert usable_bytes(16 * GB, None, 4) == 4 * GB - IDLE_BYTES
    assert usable_bytes(GB // 2, None, 1) == GB // 4, "a small machine can do small parts"


def test_what_goes_to_a_device_goes_through_its_machine() -> None:
    assert usable_bytes(64 * GB, 24 * GB, 2) == 12 * GB
    assert usable_bytes(16 * GB, 80 * GB, 1) == 16 * GB - IDLE_BYTES
