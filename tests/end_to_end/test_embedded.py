"""`catmerge up` as people use it: one command, real processes, the demo's models."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from service.client import CatmergeClient
from service.up import running
from tests.end_to_end.stack import until
from tests.service.test_up import ended

DEMO = Path(__file__).parents[2] / "deploy" / "demo"
TASKS = ("digits", "rotated", "inverted", "mirrored")
START_SECONDS, STOP_SECONDS, WAIT_SECONDS = 120.0, 60.0, 150.0
# A part whose worker was killed is taken up again when its lease ends.
QUICK = {"CATMERGE_LEASE_SECONDS": "4", "CATMERGE_HEARTBEAT_SECONDS": "1", "OMP_NUM_THREADS": "1"}


def recipe(scaling: float) -> dict[str, Any]:
    tasks = [
        {
            "name": name,
            "checkpoint": f"file://{DEMO}/tasks/{name}/",
            "exemplars": f"file://{DEMO}/tasks/{name}/exemplars.safetensors",
        }
        for name in TASKS
    ]
    rows = [{"task": name, "labeled": f"file://{DEMO}/tasks/{name}/val.safetensors"} for name in TASKS]
    method = {"name": "cat", "scaling": scaling}
    return {"base": f"file://{DEMO}/base/", "tasks": tasks, "method": method, "evaluation": {"tasks": rows}}


def searched() -> dict[str, Any]:
    """The same with labels for validation and for test, and without a scaling."""
    asked = recipe(0.4)
    rows = [
        {**row, "validation": row["labeled"], "labeled": row["labeled"].replace("val.", "test.")}
        for row in asked["evaluation"]["tasks"]
    ]
    return {**asked, "method": {"name": "task_arithmetic"}, "evaluation": {"tasks": rows}}


def default_search(job: dict[str, Any]) -> set[float]:
    """The scalings that were tried to the end; what was chosen is what was best, and what the result has."""
    assert job["recipe"]["search"]["sampler"] == "grid"
    found = job["result"]["search"]
    whole = [row for row in found["trials"] if row["state"] == "complete"]
    assert found["chosen"] == max(whole, key=lambda row: (row["value"], -row["number"]))["parameters"]
    return {row["parameters"]["scaling"] for row in whole}


@dataclass
class Up:
    """A `catmerge up`, and every process that was ever seen of it."""

    data: Path
    log: Path
    process: subprocess.Popen[bytes] = field(init=False)
    pids: set[int] = field(default_factory=set)

    def start(self) -> None:
        plain = {name: text for name, text in os.environ.items() if not name.startswith("CATMERGE_")}
        command = ["up", "--port", "0", "--data", str(self.data), "--root", str(DEMO)]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "service.cli", *command],
                env={**plain, **QUICK},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        until(self._is_up, "catmerge up is up", self.logs, START_SECONDS)

    def _is_up(self) -> bool:
        assert self.process.poll() is None, self.logs()
        state = running(self.data)
        if state is None or state["pid"] != self.process.pid:
            return False
        self.look()
        return True

    def look(self) -> dict[str, int]:
        """The programs' process ids; all there are by now are remembered, down to the pool's."""
        state = running(self.data)
        pids: dict[str, int] = state["pids"] if state else {}
        self.pids |= descendants(self.process.pid)
        return pids

    def client(self) -> CatmergeClient:
        state = running(self.data)
        assert state is not None
        return CatmergeClient(state["url"], attempts=12)

    def leave_nothing(self) -> None:
        def left() -> list[int]:
            return [pid for pid in self.pids if not ended(pid)]

        until(lambda: not left(), "nothing is left running", lambda: f"{left()}\n{self.logs()}", STOP_SECONDS)

    def logs(self) -> str:
        files = [self.log, *sorted(self.data.glob("logs/*.log"))]
        return "\n".join(f"{file}:\n{file.read_text(errors='replace')[-3000:]}" for file in files if file.exists())


def descendants(pid: int) -> set[int]:
    """A process and everything below it."""
    lines = subprocess.run(["ps", "-e", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    parent = {int(child): int(above) for child, above in (line.split() for line in lines.splitlines())}
    found = {pid}
    while more := {child for child, above in parent.items() if above in found} - found:
        found |= more
    return found


@contextmanager
def up(folder: Path) -> Iterator[Up]:
    opened = Up(folder / "data", folder / "up.log")
    opened.start()
    try:
        yield opened
    finally:
        opened.look()
        opened.process.send_signal(signal.SIGINT)
        try:
            opened.process.wait(STOP_SECONDS)
        finally:
            opened.process.kill()
            for pid in opened.pids:
                if not ended(pid):
                    os.kill(pid, signal.SIGKILL)


@pytest.mark.slow
def test_a_second_up_finishes_what_the_first_had_accepted(tmp_path: Path) -> None:
    with up(tmp_path) as opened:
        second = subprocess.run(
            [sys.executable, "-m", "service.cli", "up", "--port", "0", "--data", str(opened.data)],
            capture_output=True,
            text=True,
            check=False,
            timeout=START_SECONDS,
        )
        assert (second.returncode, second.stdout) == (1, "")
        assert f"Another catmerge up (process {opened.process.pid})" in second.stderr

        with opened.client() as client:
            jobs = [client.submit(asked)["id"] for asked in (recipe(0.3), searched())]
            until(lambda: client.get(jobs[0])["stage"] is not None, "the first began", opened.logs, WAIT_SECONDS)
        opened.look()
        opened.process.kill()
        opened.process.wait()
        opened.leave_nothing()

        opened.start()
        with opened.client() as client:
            ended_jobs = [client.wait(job, timeout_seconds=WAIT_SECONDS) for job in jobs]
            assert [job["status"] for job in ended_jobs] == ["succeeded"] * 2, ended_jobs
            assert ended_jobs[0]["result"]["metrics"]["mean_retention"] > 0.5
            assert default_search(ended_jobs[1]) == {0.2, 0.3, 0.4, 0.5, 0.6}
            paths = client.download(jobs[1], tmp_path / "result")
            assert {"model.safetensors", "config.json"} <= {path.name for path in paths}
        opened.look()
        opened.process.send_signal(signal.SIGINT)
        assert opened.process.wait(STOP_SECONDS) == 0
        opened.leave_nothing()
        assert not (opened.data / "up.json").exists()


@pytest.mark.slow
def test_what_dies_is_started_again(tmp_path: Path) -> None:
    with up(tmp_path) as opened:
        with opened.client() as client:
            job = client.submit(recipe(0.3))["id"]
            until(lambda: client.get(job)["stage"] is not None, "it began", opened.logs, WAIT_SECONDS)
            before = opened.look()
            assert before.keys() == {"broker", "api", "worker"}
            for pid in before.values():
                os.kill(pid, signal.SIGKILL)
            until(
                lambda: not set(opened.look().values()) & set(before.values()),
                "all three were started again",
                opened.logs,
                START_SECONDS,
            )
            ended_job = client.wait(job, timeout_seconds=WAIT_SECONDS)
            assert ended_job["status"] == "succeeded", json.dumps(ended_job["error"])
        opened.look()
        opened.process.send_signal(signal.SIGTERM)
        assert opened.process.wait(STOP_SECONDS) == 0
        opened.leave_nothing()
