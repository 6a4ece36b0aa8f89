"""A worker that can't work does not stay."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.servers import redis_server


def run_worker(folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    place = {
        "CATMERGE_DATABASE_URL": f"sqlite:///{folder / 'catmerge.db'}",
        "CATMERGE_OBJECT_STORE": f"file://{folder / 'objects'}",
    }
    environment = {name: text for name, text in os.environ.items() if not name.startswith("CATMERGE_")}
    command = [sys.executable, "-m", "workers"]
    return subprocess.run(
        command, env={**environment, **place, **variables}, capture_output=True, text=True, timeout=120, check=False
    )


def test_a_child_that_cannot_start_ends_the_worker(tmp_path: Path) -> None:
    with redis_server() as redis:
        ended = run_worker(tmp_path, CATMERGE_BROKER_URL=redis.url, CATMERGE_DEVICE="nonsense")
    assert ended.returncode == 1
    assert "CATMERGE_DEVICE is 'nonsense'" in ended.stderr


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("CATMERGE_WORKER_PROCESSES", "none"),
        ("CATMERGE_WORKER_QUEUES", "light,dark"),
        ("CATMERGE_WORKER_MEMORY_BYTES", "much"),
        ("CATMERGE_LEASE_SECONDS", "soon"),
    ],
)
def test_a_setting_that_cannot_be_read_is_named(tmp_path: Path, name: str, text: str) -> None:
    ended = run_worker(tmp_path, **{name: text})
    assert ended.returncode == 2
    assert name in ended.stderr
    assert "Traceback" not in ended.stderr
