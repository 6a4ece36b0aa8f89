"""What commands say: tables for people, JSON for programs, and one sentence for what goes wrong."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from service.client import CatmergeError, ProblemError, WaitTimeout
from service.contract.job import Status
from service.contract.resources import EVALUATIONS
from service.contract.settings import SettingsError
from service.processes import UpError

JsonObject = dict[str, Any]

REFUSED, STILL_GOING, INTERRUPTED = 1, 6, 130
EXIT = {Status.SUCCEEDED: 0, Status.REJECTED: 3, Status.FAILED: 4, Status.CANCELLED: 5}
COLORS = {
    Status.QUEUED: "cyan",
    Status.RUNNING: "blue",
    Status.SUCCEEDED: "green",
    Status.REJECTED: "yellow",
    Status.FAILED: "red",
    Status.CANCELLED: "magenta",
}

# Where nobody looks, nothing is folded to the width of a window that is not there.
out = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 160)
err = Console(stderr=True, highlight=False, soft_wrap=True)


class Refused(Exception):
    """The command can't be carried out; the sentence says why."""


@contextmanager
def answering(as_json: bool) -> Iterator[None]:
    """Turn what is expected to go wrong into one sentence and an exit code."""
    try:
        yield
    except WaitTimeout as error:
        fail(str(error), as_json, code="still_going", status=STILL_GOING)
    except ProblemError as error:
        fail(str(error), as_json, problem=error.problem)
    except (CatmergeError, UpError, SettingsError, Refused) as error:
        fail(str(error), as_json)
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None


def fail(
    sentence: str,
    as_json: bool,
    *,
    code: str = "refused",
    status: int = REFUSED,
    problem: Mapping[str, Any] | None = None,
) -> NoReturn:
    """Say what went wrong, and leave."""
    if as_json:
        print(json.dumps({"error": problem or {"code": code, "detail": sentence}}), file=sys.stderr)
    else:
        err.print(f"[bold red]catmerge:[/] {escape(sentence)}")
    raise typer.Exit(status)


def print_json(value: object) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False), flush=True)


def print_line(value: object) -> None:
    """One JSON value on one line."""
    print(json.dumps(value, ensure_ascii=False), flush=True)


def note(markup: str) -> None:
    """Say something on standard error, in rich's markup."""
    err.print(markup)


def exit_code(job: JsonObject) -> int:
    """How a job that has ended came out."""
    return EXIT[Status(job["status"])]


def status_markup(status: str) -> str:
    return f"[{COLORS[Status(status)]}]{status}[/]"


def facts(rows: Sequence[tuple[str, str]]) -> Table:
    """Names and values, one pair a line."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    return table


def columns(titles: Sequence[str], *, right: Sequence[str] = ()) -> Table:
    """A table with a line under its titles."""
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for title in titles:
        table.add_column(title, justify="right" if title in right else "left", overflow="fold", no_wrap=title == "id")
    return table


def show_job(job: JsonObject) -> None:
    """A job, for people."""
    out.print(facts(list(_job_facts(job))))
    measured = (job["result"] or {}).get("metrics")
    if measured:
        out.print()
        out.print(standings(measured) if _is_evaluation(job) else scores(measured))
    analysis = (job["result"] or {}).get("analysis")
    if analysis:
        out.print()
        out.print(verdicts(analysis))


def about(recipe: JsonObject) -> tuple[str, str]:
    """What a recipe is about, in two cells: method and tasks of a merge, models and tasks of an evaluation."""
    if recipe.get("mode") == "evaluation":
        tasks = [row["task"] for row in recipe["evaluation"]["tasks"]]
        return ", ".join(model["name"] for model in recipe["models"]), ", ".join(tasks)
    return recipe["method"]["name"], ", ".join(task["name"] for task in recipe["tasks"])


def _is_evaluation(job: JsonObject) -> bool:
    return job.get("object") == EVALUATIONS.name


def _job_facts(job: JsonObject) -> Iterator[tuple[str, str]]:
    recipe, progress, error = job["recipe"], job["progress"], job["error"]
    yield "job", job["id"]
    yield (
        "status",
        status_markup(job["status"]) + (f" at {job['stage']}" if job["stage"] and not job["finished_at"] else ""),
    )
    yield "progress", f"{progress['fraction']:.0%} of {progress['parts_total']} parts"
    if job["queue_position"] is not None:
        yield "in the queue", f"number {job['queue_position']}"
    if _is_evaluation(job):
        yield "models", ", ".join(escape(model["name"]) for model in recipe["models"])
    else:
        yield "method", f"{recipe['method']['name']} of {len(recipe['tasks'])} tasks"
    if recipe.get("search"):
        yield "search", f"over {sought(recipe['search'])}"
    yield "created", job["created_at"]
    if job["finished_at"]:
        yield "finished", job["finished_at"]
    for warning in job["warnings"]:
        yield "warning", f"[yellow]{escape(warning)}[/]"
    if error:
        yield "error", f"[red]{escape(error['detail'])}[/] ({error['code']}, blame: {error['blame']})"
    if job["result"]:
        yield from _result_facts(job)


def sought(search: JsonObject) -> str:
    """What is searched for, and what makes one trial better than another."""
    objective = search["objective"]
    by = objective if isinstance(objective, str) else " and ".join(name for name, weight in objective.items() if weight)
    return escape(f"{', '.join(search['space'])} by {by}")


def _result_facts(job: JsonObject) -> Iterator[tuple[str, str]]:
    found = job["result"].get("search")
    if found:
        yield "chosen", escape(", ".join(f"{name} = {value}" for name, value in found["chosen"].items()))
    cost = job["result"].get("cost")
    if cost:
        read, written = human_bytes(cost["bytes_read"]), human_bytes(cost["bytes_written"])
        peak = cost.get("peak_memory_bytes")  # older jobs did not measure it
        memory = f", {human_bytes(peak)} of memory at most" if peak else ""
        yield "cost", f"{cost['seconds']:.1f} s, {read} read, {written} written{memory}"
    for gate in job["result"].get("gates", []):
        name = " ".join(filter(None, (gate["metric"], gate["task"], gate.get("model") and f"of {gate['model']}")))
        verdict = "[green]passed[/]" if gate["passed"] else "[red]missed[/]"
        yield "gate", f"{verdict}: {name} is {figure(gate['value'])}, {_limit(gate)} was asked for"
    yield "result", escape(job["recipe"]["output"]["prefix"])


def _limit(gate: JsonObject) -> str:
    if gate.get("at_most") is not None:
        return f"at most {figure(gate['at_most'])}"
    return f"at least {figure(gate['at_least'])}"


def scores(measured: JsonObject) -> Table:
    """Accuracy per task of base, expert and merged model."""
    table = columns(["task", "base", "expert", "merged", "retention"], right=["base", "expert", "merged", "retention"])
    for name, row in measured["tasks"].items():
        table.add_row(name, *[figure(row[key]) for key in ("base", "expert", "merged", "retention")])
    table.add_row("average", *[figure(measured["mean_accuracy"][key]) for key in ("base", "expert", "merged")], "")
    table.add_row("mean retention", "", "", "", figure(measured["mean_retention"]))
    table.add_row("worst retention", "", "", measured["worst_task"] or "", figure(measured["worst_retention"]))
    return table


def standings(measured: JsonObject) -> Table:
    """Every model's score on every task, with its interval, and what it keeps of the reference's."""
    table = columns(
        ["task", "metric", "model", "score", "from", "to", "retention"], right=["score", "from", "to", "retention"]
    )
    for task, row in measured["tasks"].items():
        for name, model in row["models"].items():
            low, high = model["interval"] or (None, None)
            kept = "reference" if name == row["reference"] else figure(model["retention"])
            table.add_row(task, row["metric"], name, *[figure(value) for value in (model["score"], low, high)], kept)
    for name, model in measured["models"].items():
        if model["worst_retention"] is not None:
            table.add_row("mean retention", "", name, "", "", "", figure(model["mean_retention"]))
            table.add_row("worst retention", "", name, model["worst_task"], "", "", figure(model["worst_retention"]))
    return table


def figure(value: float | None) -> str:
    """A score with three decimals."""
    return "-" if value is None else f"{value:.3f}"


def human_bytes(count: float) -> str:
    """``1234567`` as ``1.2 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


VERDICTS = {
    "well": "[green]merge well[/]",
    "care": "[yellow]merge with care[/]",
    "leave_out": "[red]leave this task out[/]",
}


def verdicts(analysis: Mapping[str, Any]) -> Table:
    """What an analysis says of each task, and by which figures."""
    table = columns(["task", "verdict", "disturbed by", "disturbs by"], right=["disturbed by", "disturbs by"])
    for name, row in analysis["verdict"]["tasks"].items():
        amounts = ("–" if row[key] is None else f"{row[key]:.2f}" for key in ("suffers", "causes"))
        table.add_row(escape(name), VERDICTS[row["verdict"]], *amounts)
    return table
