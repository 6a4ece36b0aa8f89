"""Times one search with one worker process and with two: the same trials, from the first part to the last.

    python -m tests.benchmarks.search_workers [--processes 1 2] [--runs 3]

Each run is a `catmerge up` of its own, which searches the demo's models for CAT's scaling and rank by a grid of twenty.
The machine's cores are shared out among the processes, as a worker does by itself. Leave it alone meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from service.client import CatmergeClient

DEMO = Path(__file__).resolve().parents[2] / "deploy" / "demo"
STOP_SECONDS = 60
SPACE = {"scaling": [0.3, 0.4, 0.5, 0.6, 0.7], "rank": [0, 2, 4, 8]}


def recipe() -> dict[str, Any]:
    tasks = sorted(folder for folder in (DEMO / "tasks").iterdir() if folder.is_dir())
    files = {"labeled": "test", "validation": "val"}
    return {
        "base": f"file://{DEMO}/base/",
        "tasks": [
            {"name": task.name, "checkpoint": f"file://{task}/", "exemplars": f"file://{task}/exemplars.safetensors"}
            for task in tasks
        ],
        "method": {"name": "cat"},
        "evaluation": {
            "tasks": [
                {"task": task.name, **{key: f"file://{task}/{file}.safetensors" for key, file in files.items()}}
                for task in tasks
            ]
        },
        "search": {"space": SPACE, "sampler": "grid"},
    }


@contextmanager
def service(data: Path, processes: int) -> Iterator[str]:
    """The address of a service whose worker has so many processes."""
    settings = {name: text for name, text in os.environ.items() if not name.startswith("CATMERGE_")}
    command = ["up", "--port", "0", "--data", str(data), "--root", str(DEMO), "--json"]
    running = subprocess.Popen(
        [sys.executable, "-m", "service.cli", *command],
        env={**settings, "CATMERGE_WORKER_PROCESSES": str(processes)},
        stdout=subprocess.PIPE,
    )
    try:
        yield json.loads(running.stdout.readline() if running.stdout else b"")["url"]
    finally:
        running.send_signal(signal.SIGINT)
        running.wait(STOP_SECONDS)


def search_seconds(processes: int) -> float:
    """From the search's first part to the merge's."""
    with (
        tempfile.TemporaryDirectory() as folder,
        service(Path(folder), processes) as url,
        CatmergeClient(url) as client,
    ):
        job = client.wait(client.submit(recipe())["id"])
        if job["status"] != "succeeded":
            raise RuntimeError(f"{job['id']} {job['status']}: {job['error']}")
        began = {
            event["data"]["stage"]: datetime.fromisoformat(event["created_at"])
            for event in client.events(job["id"])
            if event["type"] == "stage.started"
        }
    return (began["merge"] - began["search"]).total_seconds()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    found: dict[int, list[float]] = {processes: [] for processes in options.processes}
    for _ in range(options.runs):  # interleaved, so that what else the machine does falls on both
        for processes in options.processes:
            found[processes].append(search_seconds(processes))
    print("| worker processes | search, s | runs |")
    print("|---|---|---|")
    for processes, seconds in found.items():
        runs = ", ".join(f"{value:.1f}" for value in seconds)
        print(f"| {processes} | {statistics.median(seconds):.1f} | {runs} |")


if __name__ == "__main__":
    main()
