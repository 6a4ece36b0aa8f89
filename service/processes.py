"""Processes that are kept running while `catmerge up` does, and never longer."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, cast

LOOK_SECONDS = 0.1
GUARD_SECONDS = 5.0  # what a guard needs on top of its process's grace
STEADY_SECONDS = 60.0  # a process that ran for so long starts with a clean slate
RESTARTS = 5
LONGEST_PAUSE_SECONDS = 10.0
UNUSABLE_SETTINGS = 2  # the exit status of our programs where a setting can't be used: trying again is no use
LOG_TAIL_BYTES = 2000
KILLED = 128  # a guard's exit status is this plus the signal's number where its process was killed
GUARD = Path(__file__).with_name("guard.py")
LOCK = "up.lock"


class UpError(Exception):
    """It can't be brought up, or not be kept up; the sentence says what to do."""


@dataclass(frozen=True)
class Program:
    """One of the processes, and how long it may take to stop."""

    name: str
    command: tuple[str, ...]
    grace_seconds: float


class Asked:
    """How often this process was asked to stop: the second time it hurries."""

    def __init__(self) -> None:
        self.times = 0
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._note)

    def _note(self, _signal: int, _frame: FrameType | None) -> None:
        self.times += 1


class Lock:
    """The one `catmerge up` of a data folder. Guards hold it too, so that it is free when all is stopped."""

    def __init__(self, data: Path) -> None:
        self._path = data / LOCK
        self.file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)

    def take(self, patience_seconds: float, say: Callable[[str], None]) -> None:
        """Raises UpError where another `up` runs; what a killed one left behind is waited for."""
        deadline = time.monotonic() + patience_seconds
        has_said = False
        while not self._try():
            holder = self._holder()
            if holder is not None and is_alive(holder):
                raise UpError(
                    f"Another catmerge up (process {holder}) uses {self._path.parent}. "
                    "Stop it, or choose another folder with --data."
                )
            if time.monotonic() > deadline:
                raise UpError(f"Processes of an earlier catmerge up still use {self._path.parent} and do not stop.")
            if not has_said:
                say("Waiting for what an earlier catmerge up left behind to stop ...")
                has_said = True
            time.sleep(LOOK_SECONDS)
        os.truncate(self.file, 0)
        os.pwrite(self.file, str(os.getpid()).encode(), 0)

    def _try(self) -> bool:
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _holder(self) -> int | None:
        text = os.pread(self.file, 20, 0).decode(errors="replace")
        return int(text) if text.isdecimal() else None

    def close(self) -> None:
        os.close(self.file)


class Process:
    """A program behind its guard, which can be kept running.

    Args:
        program: what to run.
        environment: its variables, all of them.
        log: where it writes.
        lifeline: see ``lifeline``; when that closes, the program is stopped.
        held: open files that the guard is to hold as long as the program runs.
    """

    def __init__(self, program: Program, environment: Mapping[str, str], log: Path, lifeline: int, *held: int) -> None:
        self.program = program
        self.log = log
        self._environment = environment
        self._fds = (lifeline, *held)
        self._failures = 0
        self._restart_at: float | None = None
        self._start()

    def _start(self) -> None:
        guard = [sys.executable, "-I", "-S", str(GUARD), str(self._fds[0]), str(self.program.grace_seconds)]
        with self.log.open("ab") as log:
            self._guard = subprocess.Popen(
                [*guard, *self.program.command],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                env=dict(self._environment),
                pass_fds=self._fds,
                start_new_session=True,  # out of reach of the terminal's Ctrl-C
            )
        self._started = time.monotonic()
        self._restart_at = None
        self.pid = self._read_pid()

    def _read_pid(self) -> int:
        with cast(IO[bytes], self._guard.stdout) as told:
            line = told.readline()
        if not line.strip().isdigit():
            self._guard.wait()
            raise UpError(f"The {self.program.name} could not be started.\n{self.last_words()}")
        return int(line)

    @property
    def has_ended(self) -> bool:
        return self._guard.poll() is not None

    def keep(self, say: Callable[[str], None]) -> bool:
        """Start it again where it ended, a little later each time; whether it was. Raises UpError when that is vain."""
        if not self.has_ended:
            return False
        if self._restart_at is None:
            self._restart_at = self._plan_restart(say)
        if time.monotonic() < self._restart_at:
            return False
        self._start()
        return True

    def _plan_restart(self, say: Callable[[str], None]) -> float:
        if time.monotonic() - self._started > STEADY_SECONDS:
            self._failures = 0
        self._failures += 1
        status = self._guard.returncode
        if self._failures > RESTARTS or status == UNUSABLE_SETTINGS:
            raise UpError(f"The {self.program.name} does not stay up: it {_ended(status)}.\n{self.last_words()}")
        pause = min(0.25 * 2.0**self._failures, LONGEST_PAUSE_SECONDS)
        say(f"The {self.program.name} {_ended(status)}; it starts again in {pause:.1f} s (see {self.log})")
        return time.monotonic() + pause

    def last_words(self) -> str:
        """The end of its log."""
        with self.log.open("rb") as log:
            log.seek(max(0, self.log.stat().st_size - LOG_TAIL_BYTES))
            return f"{self.log}:\n{log.read().decode(errors='replace').rstrip()}"

    def ask(self) -> None:
        """Ask it to stop."""
        if not self.has_ended:
            self._guard.terminate()

    def wait(self, in_a_hurry: Callable[[], bool] = lambda: False) -> None:
        """Until it has stopped; it is killed where that takes too long, or where somebody is in a hurry."""
        deadline = time.monotonic() + self.program.grace_seconds + GUARD_SECONDS
        while not self.has_ended and time.monotonic() < deadline and not in_a_hurry():
            time.sleep(LOOK_SECONDS / 4)
        if not self.has_ended:
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            self._guard.kill()
        self._guard.wait()


@contextmanager
def lifeline() -> Iterator[int]:
    """The reading end of a pipe that closes with this process."""
    reading, writing = os.pipe()
    try:
        yield reading
    finally:
        os.close(writing)
        os.close(reading)


def is_alive(pid: int) -> bool:
    """Whether there is such a process."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # somebody else's
    return True


def _ended(status: int) -> str:
    """An exit status in words; the guard's own death counts as its process's."""
    number = -status if status < 0 else status - KILLED
    if number in set(signal.Signals):
        return f"was killed by {signal.Signals(number).name}"
    return f"ended with status {status}"
