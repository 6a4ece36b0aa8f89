"""The commands about reports: open one, and set jobs side by side."""

from __future__ import annotations

import webbrowser
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from service.cli.comparison import Comparison, compared
from service.cli.comparison_page import page
from service.cli.options import JobId, Json, Url, connect
from service.cli.output import Refused, answering, columns, note, out, print_json
from service.cli.wording import LANGUAGES, Language
from service.contract import artifacts

NO_BROWSER = "There is no browser to open it in; open the file yourself, or pass --no-open."


def report(
    context: typer.Context,
    job_id: JobId,
    to: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="The folder. [default: one named like the job]")
    ] = None,
    is_opened: Annotated[bool, typer.Option("--open/--no-open", help="Open it in the browser.")] = True,
    language: Annotated[str | None, typer.Option("--lang", help="en or ja. [default: what the recipe says]")] = None,
    as_json: Json = False,
    url: Url = None,
) -> None:
    """Bring a job's report here and open it in the browser; prints where it lies."""
    with answering(as_json), connect(context, url) as client:
        if language is not None:
            _known(language)
        (path,) = client.download(job_id, to or Path(job_id), match=[artifacts.REPORT_HTML], overwrite=True)
        query = f"?lang={language}" if language else ""
        opened = is_opened and webbrowser.open(path.resolve().as_uri() + query)
        if as_json:
            print_json({"out": str(path), "opened": opened})
        else:
            out.print(escape(str(path)))
        if is_opened and not opened:
            note(NO_BROWSER)


def compare(
    context: typer.Context,
    job_ids: Annotated[list[str], typer.Argument(metavar="ID ID ...", help="Two jobs or more.")],
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write it as a page too.")] = None,
    language: Annotated[str, typer.Option("--lang", help="en or ja; JSON is always English.")] = "en",
    as_json: Json = False,
    url: Url = None,
) -> None:
    """Set jobs side by side, of evaluations every model: what they keep, how their recipes differ, what they cost."""
    with answering(as_json), connect(context, url) as client:
        if len(set(job_ids)) < 2:
            raise Refused("Name two different jobs or more to compare")
        spoken = _known(language)
        jobs = [client.get(job_id) for job_id in dict.fromkeys(job_ids)]
        found = compared(jobs, spoken)
        if html is not None:
            _write(html, page(found))
        if as_json:
            print_json(compared(jobs).as_json())
        else:
            _show(found)
            if html is not None:
                out.print(f"\n{escape(str(html))} is written.")


COMMANDS = (report, compare)


def _known(language: str) -> Language:
    for known in LANGUAGES:
        if language == known:
            return known
    raise Refused(f"--lang is {language!r}: reports speak {' and '.join(LANGUAGES)}")


def _show(found: Comparison) -> None:
    """Jobs as columns; the best figure of each row stands out."""
    table = columns(["", *found.jobs], right=found.jobs)
    for section in found.sections:
        table.add_row(f"[bold]{escape(section.title)}[/]")
        for row in section.rows:
            cells = [
                f"[bold green]{escape(cell)}[/]" if place in row.best else escape(cell)
                for place, cell in enumerate(row.cells)
            ]
            table.add_row(f"  {escape(row.name)}", *cells)
    out.print(table)
    for warning in found.warnings:
        out.print(f"[yellow]{escape(warning)}[/]")


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise Refused(f"{path} can't be written: {error.strerror}") from None
