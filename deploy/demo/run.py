"""The demo: merges four small vision transformers into one over HTTP, by three methods, and compares them.

    make demo

Starts a service of its own with ``catmerge up`` and stops it whatever happens. Each job searches for its method's
scaling on the validation samples, and is measured once on the test samples, whoever wins. A report has the last word.
"""

from __future__ import annotations

import json
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
from typing import Any, Literal, NoReturn

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
LOW = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
HIGH = (0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.4)  # methods that average, and then make up for what averages lose
GATES = [
    {"metric": "worst_task_retention", "at_least": 0.8},
    {"metric": "mean_retention", "at_least": 0.9, "use": "bound"},
]
REPORTED = "auto"
TEST_IMAGES = 350  # of each task
READY_SECONDS = 120.0
STEPS = 100

console = Console(highlight=False)


class DemoError(Exception):
    """The demo can't go on; the sentence says why."""


@dataclass(frozen=True)
class Contestant:
    """A method as a recipe names it, and the scalings that are tried."""

    title: str
    method: str | dict[str, Any]
    scalings: tuple[float, ...]


METHODS = {
    "task_arithmetic": Contestant("Task Arithmetic", {"name": "task_arithmetic"}, LOW),
    "cat": Contestant("CAT", "paper", LOW),
    "auto": Contestant("auto", "auto", HIGH),
}


@dataclass(frozen=True)
class Merge:
    """What came of a method."""

    job: dict[str, Any]

    @property
    def metrics(self) -> dict[str, Any]:
        """Per task accuracies on test, mean and worst retention."""
        measured: dict[str, Any] = self.job["result"]["metrics"]
        return measured

    @property
    def search(self) -> dict[str, Any]:
        """The trials on validation, and which of them was chosen."""
        found: dict[str, Any] = self.job["result"]["search"]
        return found

    @property
    def scaling(self) -> float:
        return float(self.search["chosen"]["scaling"])


def recipe(contestant: Contestant) -> dict[str, Any]:
    """A merge of all tasks: the scaling that is best on validation, measured on test."""
    tasks = [
        {"name": name, "checkpoint": address(f"tasks/{name}/"), "exemplars": address(f"tasks/{name}/exemplars")}
        for name in TASKS
    ]
    labeled = [
        {"task": name, "labeled": address(f"tasks/{name}/test"), "validation": address(f"tasks/{name}/val")}
        for name in TASKS
    ]
    return {
        "base": address("base/"),
        "tasks": tasks,
        "method": contestant.method,
        "search": {"space": {"scaling": list(contestant.scalings)}, "sampler": "grid"},
        "evaluation": {"tasks": labeled, "batch_size": TEST_IMAGES},
        "gates": GATES,
        "metadata": {"demo": contestant.title},
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


def merge_all(client: CatmergeClient) -> dict[str, Merge]:
    """Submit all merges at once, and watch them one after the other."""
    jobs = {name: client.submit(recipe(contestant))["id"] for name, contestant in METHODS.items()}
    columns = (TextColumn("  {task.description:<44}"), BarColumn(bar_width=30), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=STEPS * len(jobs))
        merges = {}
        for position, (name, job_id) in enumerate(jobs.items()):

            def show(job: Mapping[str, Any], position: int = position, title: str = METHODS[name].title) -> None:
                done = STEPS * (position + job["progress"]["fraction"])
                where = job["stage"] or job["status"]
                progress.update(bar, completed=done, description=f"{position + 1} of {len(jobs)}: {title}, {where}")

            merges[name] = Merge(ended(client.wait(job_id, on_change=show, every_seconds=1.0)))
        progress.update(bar, description=f"{len(jobs)} searches, merged and measured")
    return merges


def ended(job: dict[str, Any]) -> dict[str, Any]:
    """The job itself, which has a result also where a gate rejected it. Raises DemoError where it has none."""
    if job["status"] not in ("succeeded", "rejected"):
        raise DemoError(f"{job['id']} {job['status']}: {(job['error'] or {}).get('detail', '')}")
    return job


def table(title: str, columns: Sequence[str], first: Literal["left", "right"] = "left") -> Table:
    """A table whose first column is text and whose other columns are figures; prints its title, which may be long."""
    console.print(f"[bold]{title}[/]")
    made = Table(header_style="bold")
    for position, name in enumerate(columns):
        made.add_column(name, justify="right" if position else first)
    return made


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def megabytes(count: int) -> str:
    return f"{count / 1e6:.2f} MB"


def show_validation(merges: Mapping[str, Merge]) -> None:
    """Mean and worst retention at every scaling that was tried."""
    titles = [METHODS[name].title for name in merges]
    shown = table(
        "Validation: at each scaling, share of the experts' accuracy kept, mean (worst)", titles, first="right"
    )
    for trials in zip(*[merge.search["trials"] for merge in merges.values()], strict=True):
        shown.add_row(*map(validation_cell, trials, merges.values()))
    console.print(shown)
    console.print("Chosen (green): the best mean on validation; of equal ones the smallest scaling.\n")


def validation_cell(trial: Mapping[str, Any], merge: Merge) -> str:
    """What a trial kept; the one that was chosen stands out."""
    worst = min(trial["retention"].values())
    text = f"{trial['parameters']['scaling']:.1f}: {percent(trial['value'])} ({percent(worst)})"
    return f"[bold green]{text}[/]" if trial["parameters"] == merge.search["chosen"] else text


def show_test(merges: Mapping[str, Merge]) -> None:
    """What is asked for: accuracy per task of base, expert and every method, then average and worst."""
    names = [f"{METHODS[name].title} at {merge.scaling}" for name, merge in merges.items()]
    shown = table("Test: accuracy", ["task", "base", "expert", *names])
    first = next(iter(merges.values())).metrics
    rows = {
        task: [first["tasks"][task][key] for key in ("base", "expert")]
        + [merge.metrics["tasks"][task]["merged"] for merge in merges.values()]
        for task in TASKS
    }
    for task, cells in rows.items():
        shown.add_row(task, *map(percent, cells), end_section=task == TASKS[-1])
    by_column = list(zip(*rows.values(), strict=True))
    shown.add_row("average", *[percent(sum(column) / len(column)) for column in by_column])
    shown.add_row("worst", *[percent(min(column)) for column in by_column], end_section=True)
    for title, key in (("retention, average", "mean_retention"), ("retention, worst", "worst_retention")):
        shown.add_row(title, "", "", *[percent(merge.metrics[key]) for merge in merges.values()])
    shown.add_row("gates", "", "", *[gates_met(merge.job) for merge in merges.values()])
    console.print(shown)
    auto = merges["auto"].job["recipe"]["method"]["name"]
    console.print(
        f"auto is {auto} here, CAT is at the paper's settings. The base is read through each expert's own head."
    )
    console.print("Retention is the share of the expert's accuracy.")
    arithmetic, *others = [[row["merged"] for row in merge.metrics["tasks"].values()] for merge in merges.values()]
    for name, shares in zip(list(merges)[1:], others, strict=True):
        console.print(verdict(METHODS[name].title, arithmetic, shares))
    console.print()


def gates_met(job: Mapping[str, Any]) -> str:
    """How many of the gates a merge met; one that missed any is rejected."""
    gates = job["result"]["gates"]
    met = sum(gate["passed"] for gate in gates)
    return f"{'[green]' if met == len(gates) else '[red]'}{met} of {len(gates)}[/]"


def verdict(title: str, arithmetic: Sequence[float], shares: Sequence[float]) -> str:
    """How far a method is from Task Arithmetic on average, and how far the draw of test images moves an average."""
    difference = 100 * (sum(shares) - sum(arithmetic)) / len(shares)
    error = 100 * sum(share * (1 - share) / TEST_IMAGES for share in shares) ** 0.5 / len(shares)
    leader = f"{title} is ahead" if difference > 0 else "Task Arithmetic is ahead"
    return (
        f"[bold]{'A tie' if abs(difference) < error else leader}[/]: {title}'s average is {difference:+.1f} points "
        f"from Task Arithmetic's, and the standard error of one average is {error:.1f} points."
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


def show_cost(merges: Mapping[str, Merge]) -> None:
    """Seconds, bytes and memory, of search, merge and evaluation together."""
    shown = table("Cost", ["merge", "seconds", "read", "written", "peak memory", "four models", "merged and heads"])
    for name, merge in merges.items():
        cost, savings = merge.job["result"]["cost"], merge.job["result"]["savings"]
        figures = [cost["bytes_read"], cost["bytes_written"], cost["peak_memory_bytes"]]
        figures += [savings["bytes_before"], savings["bytes_after"]]
        shown.add_row(METHODS[name].title, f"{cost['seconds']:.1f}", *map(megabytes, figures))
    console.print(shown)
    console.print("Whichever comes first reads more: the scores of the base and the experts are kept for the others.\n")


def download(client: CatmergeClient, merges: Mapping[str, Merge]) -> dict[str, Path]:
    """Bring the results to where they outlive the service."""
    places = {name: OUT / name for name in merges}
    for name, place in places.items():
        shutil.rmtree(place, ignore_errors=True)
        client.download(merges[name].job["id"], place)
    return places


def show_places(places: Mapping[str, Path]) -> None:
    """Where everything lies."""
    console.print("[bold]The artifacts[/], downloaded and checked against their SHA-256:")
    for name, place in places.items():
        console.print(f"  {METHODS[name].title}: {place}", soft_wrap=True)
    place = places[REPORTED]
    console.print(f"  to load one: transformers.AutoModelForImageClassification.from_pretrained({str(place)!r})\n")


def show_report(place: Path) -> None:
    """The report in one minute, in its own figures."""
    report = json.loads((place / "merge" / "report.json").read_text())
    console.print(f"[bold]The report in one minute[/]: {report['title']}")
    for line in summarized(report):
        console.print(f"  {line}", soft_wrap=True)
    console.print(f"  all of it: {place / 'merge' / 'report.html'}\n", soft_wrap=True)


def summarized(report: Mapping[str, Any]) -> Iterator[str]:
    """What a manager wants to know first."""
    metrics, savings, cost, search = (report[key] for key in ("metrics", "savings", "cost", "search"))
    missed = [gate for gate in report["gates"] if not gate["passed"]]
    yield f"verdict: {'[red]rejected' if missed else '[green]accepted'}[/], {len(report['gates'])} gates"
    for gate in report["gates"]:
        limit = f"at least {percent(gate['at_least'])} was agreed on"
        bound = ", by its cautious bound" if gate["use"] == "bound" else ""
        yield f"  {'✓' if gate['passed'] else '✗'} {gate['metric']} {percent(gate['value'])}{bound}; {limit}"
    worst, mean = (between(metrics, key) for key in ("worst_retention", "mean_retention"))
    yield f"kept of the experts' accuracy: {mean} on average, {worst} at worst ({metrics['worst_task']})"
    before, after = (megabytes(savings[key]) for key in ("bytes_before", "bytes_after"))
    yield f"models: {savings['models_before']} → {savings['models_after']}"
    yield f"storage: {before} → {after}, {percent(savings['bytes_saved_share'])} saved"
    yield (
        f"cost: {cost['seconds']:.1f} s on {cost['device']}, {megabytes(cost['bytes_read'])} read, "
        f"{megabytes(cost['peak_memory_bytes'])} of memory at most"
    )
    chosen = ", ".join(f"{name} {value}" for name, value in search["chosen"].items())
    yield (
        f"search: {chosen}, the best of {len(search['trials'])} trials; mean kept "
        f"{percent(search['validation'])} on validation, {percent(search['test'])} on test"
    )
    if report["warnings"]:
        yield f"warnings to read: {len(report['warnings'])}"


def between(metrics: Mapping[str, Any], key: str) -> str:
    """A share with its interval."""
    low, high = metrics[f"{key}_interval"]
    return f"{percent(metrics[key])} ({percent(low)} to {percent(high)})"


def run(url: str) -> None:
    """The demo against a service that is up."""
    with CatmergeClient(url) as client:
        console.print(f"The service is up at {url} (its documentation: {url}/docs)\n")
        merges = merge_all(client)
        places = download(client, merges)
    console.print()
    show_validation(merges)
    show_test(merges)
    show_trimmed(merges["cat"].job)
    show_cost(merges)
    show_places(places)
    show_report(places[REPORTED])


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
