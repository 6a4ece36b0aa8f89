"""A progress bar for a job, and one for a download, on standard error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TaskProgressColumn, TextColumn, TransferSpeedColumn

from service.cli.output import JsonObject, err, human_bytes, note, status_markup
from service.client import CatmergeClient, DownloadProgress
from service.contract.job import Status

LOOK_SECONDS = 1.0  # how long the service holds an answer back while the job goes on
STEPS = 1000


def follow(client: CatmergeClient, job_id: str, timeout_seconds: float | None) -> JsonObject:
    """Show how a job goes until it has ended; returns it. Ctrl-C leaves the job alone."""
    watcher = job_bar if err.is_terminal else job_lines
    try:
        with watcher() as show:
            return client.wait(job_id, timeout_seconds=timeout_seconds, on_change=show, every_seconds=LOOK_SECONDS)
    except KeyboardInterrupt:
        note(f"The job goes on. To look again: catmerge watch {job_id}; to end it: catmerge cancel {job_id}")
        raise


@contextmanager
def job_bar() -> Iterator[Callable[[JsonObject], None]]:
    """A bar that moves as the job does."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        TaskProgressColumn(),
        TextColumn("[dim]{task.fields[detail]}"),
    )
    with Progress(*columns, console=err, transient=True) as progress:
        bar = progress.add_task("queued", total=STEPS, detail="")

        def show(job: JsonObject) -> None:
            done = round(STEPS * job["progress"]["fraction"])
            progress.update(bar, description=escape(_where(job)), completed=done, detail=escape(_detail(job)))

        yield show


@contextmanager
def job_lines() -> Iterator[Callable[[JsonObject], None]]:
    """Where there is no terminal: a line whenever the job moves on."""
    said = ""

    def show(job: JsonObject) -> None:
        nonlocal said
        line = _where(job)
        if line != said:
            said = line
            style = status_markup(line) if line in set(Status) else line
            note(f"{job['id']} {style} ({job['progress']['fraction']:.0%})")

    yield show


def _where(job: JsonObject) -> str:
    return str(job["stage"] or job["status"]) if job["status"] == Status.RUNNING else str(job["status"])


def _detail(job: JsonObject) -> str:
    if job["queue_position"] is not None:
        return f"number {job['queue_position']} in the queue"
    progress = job["progress"]
    parts = [progress["current"] or "", f"{progress['tensors_done']} of {progress['tensors_total']} tensors"]
    parts.append(f"{human_bytes(progress['bytes_read'])} read")
    if progress["eta_seconds"] is not None:
        parts.append(f"about {progress['eta_seconds']:.0f} s left")
    return ", ".join(part for part in parts if part)


@contextmanager
def download_bar() -> Iterator[Callable[[DownloadProgress], None]]:
    """A bar over all files of a download."""
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=30), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=err, transient=True) as progress:
        bar = progress.add_task("", total=None)

        def show(at: DownloadProgress) -> None:
            progress.update(bar, description=escape(at.name), completed=at.bytes_done, total=at.bytes_total)

        yield show
