"""Starts a worker: ``python -m workers``."""

from __future__ import annotations

import faulthandler
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from service.contract.settings import Connections, SettingsError
from workers.settings import WorkerSettings

# Threads that spin while they wait made an eigenproblem 70 times slower beside one busy process; and glibc that returns
# every large block to the system pays for each page again. The children are new interpreters and start with these.
ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "0",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_ARENA_MAX": "1",  # what one thread gives back is there for the others
    "HF_HUB_OFFLINE": "1",  # a worker loads what it is given, and nothing from a hub
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
}
STOP_LIMIT_SECONDS = 25  # less than the 30 s that orchestrators allow before they kill


def main() -> int:
    """Run until SIGTERM or SIGINT, then stop at the next tensor. The exit code is 1 where no child could start."""
    try:
        Connections.from_environment(os.environ)
        settings = WorkerSettings.from_environment(os.environ)
    except SettingsError as error:
        print(f"catmerge worker: {error}", file=sys.stderr)
        return 2
    for name, value in {**ENVIRONMENT, "OMP_NUM_THREADS": str(settings.threads)}.items():
        os.environ.setdefault(name, value)
    with tempfile.TemporaryDirectory(prefix="catmerge-worker-") as folder:
        os.environ["CATMERGE_WORKER_NAME"] = settings.name
        os.environ["CATMERGE_STOP_FILE"] = str(Path(folder) / "stop")
        return _run(Path(os.environ["CATMERGE_STOP_FILE"]), settings)


def _run(stop_file: Path, settings: WorkerSettings) -> int:
    from celery.signals import worker_shutting_down

    from workers.app import app, failed_file

    def leave(**_: Any) -> None:
        stop_file.touch()
        # Celery waits for its pool without a limit. Children leave at the next tensor whether it lives or not.
        faulthandler.dump_traceback_later(STOP_LIMIT_SECONDS, exit=True)

    worker_shutting_down.connect(leave)
    queues = ",".join(queue.value for queue in settings.queues)
    app.worker_main(
        ["worker", "--pool=prefork", "--loglevel=INFO", "-Q", queues, "--without-gossip", "--without-mingle"]
    )
    return 1 if failed_file(stop_file).exists() else 0


if __name__ == "__main__":
    sys.exit(main())
