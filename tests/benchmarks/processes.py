"""Runs a program and says what it took: seconds, processor seconds and the most memory it held."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workers.__main__ import ENVIRONMENT
from workers.settings import WorkerSettings

ONE_MERGE = Path(__file__).with_name("one_merge.py")


@dataclass(frozen=True)
class Stages:
    """What each stage took by its name: seconds, and processor seconds of all threads together."""

    seconds: dict[str, float]
    processor: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


@dataclass(frozen=True)
class Measured:
    """One run of a program: seconds from start to end, processor seconds, peak resident bytes, what it printed."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    output: str


def measure(command: Sequence[str | Path], environment: Mapping[str, str]) -> Measured:
    """Run a program to its end. This process must be small: a child's peak is at least what its parent held.

    Raises:
        RuntimeError: it ended with an error; with what it printed.
    """
    with tempfile.TemporaryFile() as printed:
        start = time.perf_counter()
        child = subprocess.Popen(
            [str(word) for word in command],
            stdout=printed,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
        )
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - start
        child.returncode = os.waitstatus_to_exitcode(status)
        printed.seek(0)
        output = printed.read().decode(errors="replace")
    if child.returncode:
        raise RuntimeError(f"{command[0]} ended with {child.returncode}: {output[-2000:]}")
    return Measured(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, output)


def environment() -> dict[str, str]:
    """What ``python -m workers`` starts its processes with."""
    return {**ENVIRONMENT, "OMP_NUM_THREADS": str(WorkerSettings.from_environment(os.environ).threads)}


def become_a_worker(module: str) -> None:
    """Run ``python -m module`` anew where this process was not started as a worker is, which can't be made up for."""
    if any(os.environ.get(name) != value for name, value in environment().items()):
        command = [sys.executable, "-m", module, *sys.argv[1:]]
        sys.exit(subprocess.run(command, env={**os.environ, **environment()}, check=False).returncode)


def merge_folders(
    base: Path,
    tasks: Sequence[Path],
    method: Mapping[str, Any],
    out: Path,
    shard_bytes: int = 10**12,
    *,
    keep: bool = True,
) -> tuple[Measured, Stages]:
    """Plan, calibrate and merge checkpoints in a process of their own; merged shards are deleted unless kept."""
    asked = {
        "base": str(base),
        "tasks": [str(task) for task in tasks],
        "method": method,
        "out": str(out),
        "shard_bytes": shard_bytes,
        "keep": keep,
    }
    run = measure([sys.executable, ONE_MERGE, json.dumps(asked)], environment())
    return run, Stages(**json.loads(run.output.splitlines()[-1]))
