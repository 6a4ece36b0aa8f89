"""Stands between `catmerge up` and one of its processes, and ends that process whenever `up` is gone.

    python guard.py LIFELINE GRACE_SECONDS COMMAND...

LIFELINE is the number of an inherited pipe whose other end only `up` holds: it closes when `up` ends, however it ends.
The process runs in a group of its own, out of reach of the terminal's Ctrl-C; SIGTERM to the guard, or the end of the
lifeline, asks the process to stop, and after the grace the whole group is killed. The first line on standard output is
the process's id. Started by its path and with the standard library alone, so that it costs little and imports nothing
of a folder it happens to stand in.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from types import FrameType

PR_SET_PDEATHSIG = 1
KILLED = 128  # plus the signal's number: the exit status of a process that was killed
LOOK_SECONDS = 0.1


class Asked:
    """Whether the guard was asked to stop its process."""

    def __init__(self, lifeline: int) -> None:
        self._lifeline = lifeline
        self._by_signal = False
        signal.signal(signal.SIGTERM, self._note)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def _note(self, _signal: int, _frame: FrameType | None) -> None:
        self._by_signal = True

    def within(self, seconds: float) -> bool:
        """Look, for a while."""
        readable, _, _ = select.select([self._lifeline], [], [], seconds)
        return self._by_signal or bool(readable)


def main() -> int:
    """Run a process to its end or until asked to stop; the exit status is the process's, as a shell would give it."""
    lifeline, grace_seconds, command = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]
    asked = Asked(lifeline)
    # The guard has one thread, which makes preexec_fn safe here.
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=sys.stderr, start_new_session=True, preexec_fn=_before
    )
    print(process.pid, flush=True)
    while process.poll() is None and not asked.within(LOOK_SECONDS):
        pass
    _stop(process, grace_seconds)
    return process.returncode if process.returncode >= 0 else KILLED - process.returncode


def _before() -> None:
    """Runs in the new process: default signals, and on Linux an end together with the guard."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))


def _stop(process: subprocess.Popen[bytes], grace_seconds: float) -> None:
    """Ask the process, then kill what is left of its group."""
    if process.poll() is None:
        process.terminate()
        _wait(process, grace_seconds)
    with suppress(ProcessLookupError):  # nothing is left
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _wait(process: subprocess.Popen[bytes], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(LOOK_SECONDS / 5)


if __name__ == "__main__":
    sys.exit(main())
