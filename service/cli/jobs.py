"""The commands about jobs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.markup import escape

from service.cli.options import JobId, Json, RecipeFile, Url, connect
from service.cli.output import (
    JsonObject,
    Refused,
    about,
    answering,
    columns,
    exit_code,
    facts,
    human_bytes,
    note,
    out,
    print_json,
    print_line,
    show_job,
    sought,
    status_markup,
)
from service.cli.watching import download_bar, follow
from service.client import CatmergeClient
from service.contract.job import Status

Watch = Annotated[bool, typer.Option("--watch", help="Follow the job to its end.")]
Key = Annotated[str | None, typer.Option("--key", help="Idempotency key: the same key and recipe are one job.")]
Timeout = Annotated[float | None, typer.Option("--timeout", metavar="SECONDS", help="Stop watching after so long.")]


def _submits(name: str, ask: Callable[..., JsonObject], help_text: str) -> Callable[..., None]:
    """A command that submits a recipe, and follows the job where that is wanted."""

    def command(
        context: typer.Context,
        recipe: RecipeFile,
        watch: Watch = False,
        key: Key = None,
        timeout: Timeout = None,
        as_json: Json = False,
        url: Url = None,
    ) -> None:
        with answering(as_json), connect(context, url) as client:
            job = ask(client, _read_recipe(recipe), idempotency_key=key)
            _show_to_its_end(client, job, watch, timeout, as_json)

    command.__name__, command.__doc__ = name, help_text
    return command


submit = _submits("submit", CatmergeClient.submit, "Submit a merge; with --watch, follow it to its end.")
analyze = _submits(
    "analyze",
    CatmergeClient.analyze,
    "Measure how much tasks disturb each other before you merge them; no weights are written.",
)
evaluate = _submits(
    "evaluate",
    CatmergeClient.evaluate,
    "Measure checkpoints on labeled samples: a merged model, a base, or two that are to be compared.",
)


def watch(
    context: typer.Context, job_id: JobId, timeout: Timeout = None, as_json: Json = False, url: Url = None
) -> None:
    """Follow a job to its end; the exit code says how it came out."""
    with answering(as_json), connect(context, url) as client:
        job = follow(client, job_id, timeout)
        _show(job, as_json)
        raise typer.Exit(exit_code(job))


def ls(
    context: typer.Context,
    status: Annotated[Status | None, typer.Option(help="Only those that stand there.")] = None,
    label: Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="Only those with this label.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="How many at most.")] = 20,
    evaluations: Annotated[bool, typer.Option("--evaluations", help="List evaluations in place of merges.")] = False,
    as_json: Json = False,
    url: Url = None,
) -> None:
    """List jobs, newest first."""
    with answering(as_json), connect(context, url) as client:
        labels = dict(_label(text) for text in label or [])
        kind: Literal["merge", "evaluation"] = "evaluation" if evaluations else "merge"
        pages = client.list(status=status, metadata=labels, page_size=min(limit, 100), kind=kind)
        jobs = list(islice(pages, limit))
        if as_json:
            print_json(jobs)
            return
        told = ["models" if evaluations else "method", "tasks"]
        table = columns(["id", "status", "done", *told, "created (UTC)"], right=["done"])
        for job in jobs:
            table.add_row(
                job["id"],
                status_markup(job["status"]),
                f"{job['progress']['fraction']:.0%}",
                *(escape(text) for text in about(job["recipe"])),
                job["created_at"].partition(".")[0].replace("T", " "),
            )
        out.print(table if jobs else "There are no such jobs.")


def get(context: typer.Context, job_id: JobId, as_json: Json = False, url: Url = None) -> None:
    """Show a job as it is now."""
    with answering(as_json), connect(context, url) as client:
        _show(client.get(job_id), as_json)


def cancel(context: typer.Context, job_id: JobId, as_json: Json = False, url: Url = None) -> None:
    """End a job; one that has ended stays as it is."""
    with answering(as_json), connect(context, url) as client:
        _show(client.cancel(job_id), as_json)


def retry(context: typer.Context, job_id: JobId, as_json: Json = False, url: Url = None) -> None:
    """Let a failed or cancelled job go on from the parts that are done."""
    with answering(as_json), connect(context, url) as client:
        _show(client.retry(job_id), as_json)


def delete(
    context: typer.Context,
    job_id: JobId,
    artifacts: Annotated[bool, typer.Option("--artifacts", help="Remove what it wrote too.")] = False,
    as_json: Json = False,
    url: Url = None,
) -> None:
    """Forget a job that has ended."""
    with answering(as_json), connect(context, url) as client:
        client.delete(job_id, artifacts=artifacts)
        if as_json:
            print_json({"id": job_id, "deleted": True})
        else:
            out.print(f"{job_id} is forgotten.")


def download(
    context: typer.Context,
    job_id: JobId,
    to: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="The folder. [default: one named like the job]")
    ] = None,
    match: Annotated[list[str] | None, typer.Option(metavar="PATTERN", help="Only files named so: 'merge/*'.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files with other content.")] = False,
    as_json: Json = False,
    url: Url = None,
) -> None:
    """Download a result: goes on where it stopped, and checks every file's SHA-256."""
    folder = to or Path(job_id)
    with answering(as_json), connect(context, url) as client:
        with download_bar() as show:
            paths = client.download(job_id, folder, progress=show, match=match or (), overwrite=overwrite)
        if as_json:
            print_json({"out": str(folder), "files": [str(path) for path in paths]})
        else:
            size = human_bytes(sum(path.stat().st_size for path in paths))
            out.print(f"{len(paths)} files, {size}, checked: {escape(str(folder))}")


def events(
    context: typer.Context,
    job_id: JobId,
    follow_up: Annotated[bool, typer.Option("--follow", "-f", help="Until the job has ended.")] = False,
    after: Annotated[int, typer.Option(min=0, help="Only events after this number.")] = 0,
    as_json: Json = False,
    url: Url = None,
) -> None:
    """Show what happened to a job; with --json one event a line."""
    with answering(as_json), connect(context, url) as client:
        for event in client.events(job_id, after=after, follow=follow_up):
            if as_json:
                print_line(event)
            else:
                data = " ".join(f"{name}={json.dumps(value)}" for name, value in event["data"].items())
                out.print(f"{event['seq']:>4}  {event['created_at']}  [bold]{event['type']}[/]  {escape(data)}")


def plan(context: typer.Context, recipe: RecipeFile, as_json: Json = False, url: Url = None) -> None:
    """See what a merge, or an evaluation, would do and need; nothing is stored."""
    with answering(as_json), connect(context, url) as client:
        planned = client.plan(_read_recipe(recipe))
        if as_json:
            print_json(planned)
            return
        out.print(facts([*(_measuring(planned) if "models" in planned else _merging(planned)), *_needs(planned)]))


def _measuring(planned: JsonObject) -> list[tuple[str, str]]:
    """What an evaluation would measure, line by line."""
    models = [(model["name"], f"on {', '.join(model['tasks'])}{_likewise(model)}") for model in planned["models"]]
    return [*((f"model {escape(name)}", escape(told)) for name, told in models), ("parts", str(planned["parts"]))]


def _likewise(model: JsonObject) -> str:
    """What else there is to say about a model, in parentheses."""
    heads = f"heads for {', '.join(model['heads'])}" if model["heads"] else ""
    told = [text for text in ("reference" if model["reference"] else "", heads) if text]
    return f" ({'; '.join(told)})" if told else ""


def _needs(planned: JsonObject) -> list[tuple[str, str]]:
    """What any plan needs, and warns of."""
    return [
        ("to read", human_bytes(planned["bytes_in"])),
        *([("to write", human_bytes(planned["bytes_out"]))] if "bytes_out" in planned else []),
        ("peak memory", human_bytes(planned["peak_memory_bytes"])),
        *[("warning", f"[yellow]{escape(warning)}[/]") for warning in planned["warnings"]],
    ]


def _merging(planned: JsonObject) -> list[tuple[str, str]]:
    """What a merge would do, line by line."""
    return [
        ("method", planned["method"]["name"]),
        ("search", f"{planned['trials']} trials over {sought(planned['search'])}" if planned["search"] else "none"),
        ("tensors", str(planned["tensors"])),
        ("roles", _counts(planned["roles"])),
        ("treatments", _counts(planned["treatments"])),
        ("files", str(len(planned["shards"]))),
    ]


def methods(context: typer.Context, as_json: Json = False, url: Url = None) -> None:
    """List the merge methods, the presets that name some of them, and the parameter treatments."""
    with answering(as_json), connect(context, url) as client:
        found = {"methods": client.methods(), "treatments": client.treatments()}
        presets = client.presets()
        if as_json:
            print_json({**found, "presets": presets})
            return
        for title, rows in found.items():
            table = columns([title, "parameters", "paper"])
            for row in rows:
                parameters = ", ".join(row["parameters"]["properties"])
                table.add_row(f"[bold]{row['name']}[/]", escape(parameters), escape(row["paper"]))
            out.print(table)
            out.print()
        table = columns(["presets", "method", "why"])
        for row in presets:
            table.add_row(f"[bold]{row['name']}[/]", escape(row["method"]["name"]), escape(row["summary"]))
        out.print(table)


COMMANDS = (submit, analyze, evaluate, watch, ls, get, cancel, retry, delete, download, events, plan, methods)


def _show_to_its_end(
    client: CatmergeClient, job: dict[str, Any], to_its_end: bool, timeout: float | None, as_json: bool
) -> None:
    """A job as it was submitted; or as it ended, where the command waits for that and leaves with its exit code."""
    if to_its_end:
        note(f"Submitted {job['id']}")
        job = follow(client, job["id"], timeout)
    _show(job, as_json)
    if to_its_end:
        raise typer.Exit(exit_code(job))


def _show(job: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(job)
    else:
        show_job(job)


def _read_recipe(path: Path) -> dict[str, Any]:
    """The recipe as it is written; the service says what is wrong with it."""
    try:
        text = sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")
        recipe = json.loads(text)
    except OSError as error:
        raise Refused(f"{path} can't be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise Refused(f"{path} is no text in UTF-8") from None
    except json.JSONDecodeError as error:
        raise Refused(f"{path} is no JSON: line {error.lineno}, column {error.colno}: {error.msg}") from None
    if not isinstance(recipe, dict):
        raise Refused(f"{path} holds no recipe: a recipe is a JSON object")
    return recipe


def _label(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise Refused(f"--label is {text!r}: write NAME=VALUE")
    return name, value


def _counts(counted: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counted.items()) or "none"
