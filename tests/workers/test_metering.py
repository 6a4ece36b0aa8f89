"""What a part of a job is said to have taken: measured on this very process."""

from pathlib import Path

import pytest

from workers import metering
from workers.metering import Meter
from workers.usage import Usage, summed

MEGABYTE = 1 << 20
HELD = 256 * MEGABYTE


def hold() -> None:
    """Hold memory, all of it touched, and let it go."""
    assert len(bytes(HELD).replace(b"\0", b"\1")) == HELD


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux can forget a peak")
def test_a_peak_that_is_over_is_told_of_the_part_that_had_it_and_of_no_other() -> None:
    first = Meter("cpu")
    hold()
    loud = first.usage()
    assert loud.idle_memory_bytes is not None
    assert loud.peak_memory_bytes - loud.idle_memory_bytes > HELD - 8 * MEGABYTE
    quiet = Meter("cpu").usage()
    assert quiet.peak_is_exact
    assert quiet.peak_memory_bytes < loud.peak_memory_bytes - HELD // 2
    assert (quiet.device, quiet.device_peak_bytes) == ("cpu", None)


def test_where_a_peak_cant_be_forgotten_a_quieter_part_has_a_bound(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As on macOS, which has no /proc."""
    monkeypatch.setattr(metering, "PROCESS", tmp_path / "none")
    hold()
    usage = Meter("cpu").usage()
    assert not usage.peak_is_exact
    assert usage.idle_memory_bytes is None
    assert usage.peak_memory_bytes > HELD


def test_a_job_took_as_much_memory_as_its_largest_part_and_the_seconds_of_all() -> None:
    small, large = (Usage(1.5, size, 10, True, "cuda", size // 2) for size in (100, 300))
    found = summed({"plan": [small], "calibrate": [], "merge": [large, small]})
    assert (found["peak_memory_bytes"], found["device_peak_bytes"], found["device"]) == (300, 150, "cuda")
    rows = [(row["stage"], row["parts"], row["seconds"], row["peak_memory_bytes"]) for row in found["stages"]]
    assert rows == [("plan", 1, 1.5, 100), ("merge", 2, 3.0, 300)]


def test_a_job_whose_parts_were_not_measured_has_no_peak() -> None:
    assert summed({"plan": []}) == {"peak_memory_bytes": None, "stages": []}
