"""The demo: merges four small vision transformers into one over HTTP, by Task Arithmetic and by CAT, and compares them.

    make demo

Starts a service of its own with ``catmerge up`` and stops it whatever happens. Each method is tried at the same
scalings on the validation samples, and the one that is best there is what is shown on the test samples, whoever wins.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from service.client import CatmergeClient, CatmergeError
from service.processes import Process, Program, UpError, lifeline
from service.up import running

HERE = Path(__file__).resolve().parent
OUT = HERE.parents[1] / ".catmerge" / "demo"
TASKS = tuple(sorted(folder.name for folder in (HERE / "tasks").iterdir() if folder.is_dir()))
SCALINGS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
METHODS = {"task_arithmetic": "Task Arithmetic", "cat": "CAT"}
TEST_IMAGES = 350  # of each task
READY_SECONDS = 120.0
STEPS = 100

console = Console(highlight=False)


class DemoError(Exception):
    """The demo can't go on; the sentence says why."""


@dataclass(frozen=True)
class Tried:
    """A method at one scaling, and the job that tried it."""

    method: str
    scaling: float
    job: dict[str, Any]

    @property
    def metrics(self) -> dict[str, Any]:
        """Per task accuracies, mean and worst retention."""
        measured: dict[str, Any] = self.job["result"]["metrics"]
        return measured


def recipe(method: str, scaling: float, samples: str) -> dict[str, Any]:
    """A merge of all tasks, measured on ``samples``: val or test."""
    tasks = [
        {"name": name, "checkpoint": address(f"tasks/{name}/"), "exemplars": address(f"tasks/{name}/exemplars")}
        for name in TASKS
    ]
    labeled = [{"task": name, "labeled": address(f"tasks/{name}/{samples}")} for name in TASKS]
    return {
        "base": address("base/"),
        "tasks": tasks,
        "method": {"name": method, "scaling": scaling},
        "evaluation": {"tasks": labeled, "batch_size": TEST_IMAGES},
        "metadata": {"demo": samples},
    }


def address(path: str) -> str:
    """The file:/// address of a folder (ending in a slash) or a safetensors file of the demo."""
    return f"file://{HERE}/{path}" if path.endswith("/") else f"file://{HERE}/{path}.safetensors"


@contextmanager
def service(data: Path) -> Iterator[str]:
    """The address of a service that lives as long as the block, and no longer even if this process is killed."""
    options = ["--port", "0", "--data", str(data), "--root", str(HERE)]
    program = Program("up", (sys.executable, "-m", "service.cli", "up", *options), grace_seconds=45.0)
    # Settings of another catmerge must not leak into the demo.
    environment = {name: text for name, text in os.environ.items() if not name.startswith("CATMERGE_")}
    with lifeline() as line:
        process = Process(program, environment, data / "logs" / "up.log", line)
        try:
            yield wait_until_up(process, data)
        finally:
            process.ask()
            process.wait()


def wait_until_up(process: Process, data: Path) -> str:
    """The service's address. Raises DemoError."""
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline and not process.has_ended:
        state = running(data)
        if state is not None:
            return str(state["url"])
        time.sleep(0.1)
    raise DemoError(f"catmerge up did not come up.\n{process.last_words()}")


def try_all(client: CatmergeClient, wanted: Sequence[tuple[str, float]], samples: str) -> list[Tried]:
    """Submit all merges at once, and watch them one after the other."""
    jobs = [client.submit(recipe(method, scaling, samples))["id"] for method, scaling in wanted]
    columns = (TextColumn("  {task.description:<44}"), BarColumn(bar_width=30), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=STEPS * len(jobs))
        tried = []
        for position, (job_id, (method, scaling)) in enumerate(zip(jobs, wanted, strict=True)):

            def show(job: Mapping[str, Any], position: int = position, what: str = f"{method} {scaling}") -> None:
                done = STEPS * (position + job["progress"]["fraction"])
                where = job["stage"] or job["status"]
                progress.update(bar, completed=done, description=f"{position + 1} of {len(jobs)}: {what}, {where}")

            job = client.wait(job_id, on_change=show, every_seconds=1.0)
            tried.append(Tried(method, scaling, succeeded(job)))
        progress.update(bar, description=f"{len(jobs)} merges, measured on {samples}")
    return tried


def succeeded(job: dict[str, Any]) -> dict[str, Any]:
    """The job itself. Raises DemoError where it did not succeed."""
    if job["status"] != "succeeded":
        raise DemoError(f"{job['id']} {job['status']}: {(job['error'] or {}).get('detail', '')}")
    return job


def best(tried: Sequence[Tried], method: str) -> float:
    """The scaling with the highest mean retention on validation; of equal ones the smallest."""
    own = [one for one in tried if one.method == method]
    return max(own, key=lambda one: (round(one.metrics["mean_retention"], 9), -one.scaling)).scaling


def table(title: str, columns: Sequence[str]) -> Table:
    """A table whose first column is text and whose other columns are figures; prints its title, which may be long."""
    console.print(f"[bold]{title}[/]")
    made = Table(header_style="bold")
    for position, name in enumerate(columns):
        made.add_column(name, justify="right" if position else "left")
    return made


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def megabytes(count: int) -> str:
    return f"{count / 1e6:.2f} MB"


def show_validation(tried: Sequence[Tried], chosen: Mapping[str, float]) -> None:
    """Mean and worst retention at every scaling that was tried."""
    shown = table("Validation: share of the experts' accuracy kept, mean (worst)", ["scaling", *METHODS.values()])
    found = {(one.method, one.scaling): one.metrics for one in tried}
    for scaling in SCALINGS:
        cells = []
        for method in METHODS:
            measured = found[method, scaling]
            text = f"{percent(measured['mean_retention'])} ({percent(measured['worst_retention'])})"
            cells.append(f"[bold green]{text}[/]" if chosen[method] == scaling else text)
        shown.add_row(f"{scaling:.1f}", *cells)
    console.print(shown)
    console.print("Chosen (green): the best mean on validation; of equal ones the smallest scaling.\n")


def show_test(final: Mapping[str, Tried]) -> None:
    """What is asked for: accuracy per task of base, expert and both methods, then average and worst."""
    names = [f"{METHODS[method]} at {one.scaling}" for method, one in final.items()]
    shown = table("Test: accuracy", ["task", "base", "expert", *names])
    first = next(iter(final.values())).metrics
    rows = {
        name: [first["tasks"][name][key] for key in ("base", "expert")]
        + [one.metrics["tasks"][name]["merged"] for one in final.values()]
        for name in TASKS
    }
    for name, cells in rows.items():
        shown.add_row(name, *map(percent, cells), end_section=name == TASKS[-1])
    by_column = list(zip(*rows.values(), strict=True))
    shown.add_row("average", *[percent(sum(column) / len(column)) for column in by_column])
    shown.add_row("worst", *[percent(min(column)) for column in by_column], end_section=True)
    for title, key in (("retention, average", "mean_retention"), ("retention, worst", "worst_retention")):
        shown.add_row(title, "", "", *[percent(one.metrics[key]) for one in final.values()])
    console.print(shown)
    console.print("The base is read through each expert's own head. Retention is the share of the expert's accuracy.")
    console.print(verdict(*[[row["merged"] for row in final[method].metrics["tasks"].values()] for method in METHODS]))
    console.print()


def verdict(arithmetic: Sequence[float], cat: Sequence[float]) -> str:
    """How far CAT is from Task Arithmetic on average, and how far the draw of test images alone moves an average."""
    difference = 100 * (sum(cat) - sum(arithmetic)) / len(cat)
    error = 100 * sum(share * (1 - share) / TEST_IMAGES for share in cat) ** 0.5 / len(cat)
    leader = "CAT is ahead" if difference > 0 else "Task Arithmetic is ahead"
    return (
        f"[bold]{'A tie' if abs(difference) < error else leader}[/]: CAT's average is {difference:+.1f} points from "
        f"Task Arithmetic's, and the standard error of one average is {error:.1f} points."
    )


def show_trimmed(job: Mapping[str, Any]) -> None:
    """What CAT took away, by the role of the parameter."""
    columns = ["role", "task vectors", "trimmed", "energy removed", "conflict before", "after"]
    shown = table("Trimmed by CAT, by role", columns)
    for role, found in job["result"]["trimmed"].items():
        conflicts = [f"{found[key]:.4g}" if found[key] else "-" for key in ("conflict_before", "conflict_after")]
        counts = [str(found["vectors"]), str(found["trimmed"])]
        shown.add_row(role, *counts, percent(found["energy_removed"]), *conflicts)
    console.print(shown)
    console.print()


def show_cost(final: Mapping[str, Tried], places: Mapping[str, Path]) -> None:
    """Seconds and bytes, and where everything lies."""
    shown = table("Cost", ["merge", "seconds", "read", "written", "four models", "merged and heads"])
    for method, one in final.items():
        cost, savings = one.job["result"]["cost"], one.job["result"]["savings"]
        figures = [cost["bytes_read"], cost["bytes_written"], savings["bytes_before"], savings["bytes_after"]]
        shown.add_row(METHODS[method], f"{cost['seconds']:.2f}", *map(megabytes, figures))
    console.print(shown)
    console.print("Whichever comes first reads more: the scores of the base and the experts are kept for the other.")
    console.print("\n[bold]The artifacts[/], downloaded and checked against their SHA-256:")
    for method, place in places.items():
        console.print(f"  {METHODS[method]}: {place}", soft_wrap=True)
    place = places["cat"]
    console.print(f"  a report to read: {place / 'merge' / 'report.html'}", soft_wrap=True)
    console.print(f"  to load it: transformers.AutoModelForImageClassification.from_pretrained({str(place)!r})\n")


def download(client: CatmergeClient, final: Mapping[str, Tried]) -> dict[str, Path]:
    """Bring both results to where they outlive the service."""
    places = {method: OUT / method for method in final}
    for method, place in places.items():
        shutil.rmtree(place, ignore_errors=True)
        client.download(final[method].job["id"], place)
    return places


def run(url: str) -> None:
    """The demo against a service that is up."""
    with CatmergeClient(url) as client:
        console.print(f"The service is up at {url} (its documentation: {url}/docs)\n")
        tried = try_all(client, [(method, scaling) for scaling in SCALINGS for method in METHODS], "val")
        chosen = {method: best(tried, method) for method in METHODS}
        final = {one.method: one for one in try_all(client, list(chosen.items()), "test")}
        places = download(client, final)
    console.print()
    show_validation(tried, chosen)
    show_test(final)
    show_trimmed(final["cat"].job)
    show_cost(final, places)


@contextmanager
def fresh_folder() -> Iterator[Path]:
    """Where the service keeps everything while the demo runs; only its logs stay. Raises DemoError."""
    data, logs = OUT / "service", OUT / "logs"
    other = running(data)
    if other is not None:
        raise DemoError(f"Another demo is running here, or still stopping (process {other['pid']}): try again later.")
    shutil.rmtree(data, ignore_errors=True)
    (data / "logs").mkdir(parents=True)
    try:
        yield data
    finally:
        shutil.rmtree(logs, ignore_errors=True)
        shutil.move(data / "logs", logs)
        shutil.rmtree(data, ignore_errors=True)


def leave(_signal: int, _frame: FrameType | None) -> NoReturn:
    """End in an orderly way: what was started is stopped on the way out."""
    sys.exit(143)


def main() -> int:
    """Run the demo; the exit status is 1 where it could not be finished."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it otherwise
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, leave)
    began = time.monotonic()
    console.print("[bold]catmerge demo[/]: four experts on handwritten digits become one model. Starting a service ...")
    try:
        with fresh_folder() as data, service(data) as url:
            run(url)
    except (DemoError, CatmergeError, UpError) as error:
        console.print(f"[bold red]The demo did not finish:[/] {escape(str(error))}", soft_wrap=True)
        console.print(f"Logs: {OUT / 'logs'}", soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        console.print("Interrupted; everything is stopped.")
        return 130
    console.print(f"Everything is stopped. The demo took {time.monotonic() - began:.0f} s.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
