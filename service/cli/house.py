"""The commands about the service itself, and about this machine."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import asdict
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from service.cli.options import DataFolder, Json, Url, service_url
from service.cli.output import REFUSED, Refused, answering, columns, err, facts, out, print_json, print_line
from service.up import DATA, Options, Running
from service.up import up as bring_up

if TYPE_CHECKING:
    from service.doctor import Check, Setting

MARKS = {"ok": "[green]ok[/]", "note": "[yellow]note[/]", "broken": "[red]broken[/]"}


def up(
    port: Annotated[int, typer.Option(min=0, max=65535, envvar="CATMERGE_PORT", help="0 takes a free one.")] = 8000,
    host: Annotated[str, typer.Option(envvar="CATMERGE_HOST", help="Where to listen.")] = "127.0.0.1",
    data: DataFolder = DATA,
    root: Annotated[
        list[Path] | None,
        typer.Option(metavar="DIR", help="A folder that recipes may name as file:///...; may be repeated."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Bring up the API, a worker and a broker, with no server to install; Ctrl-C stops them all.

    What CATMERGE_ variables say wins: CATMERGE_DATABASE_URL, CATMERGE_BROKER_URL and CATMERGE_OBJECT_STORE put
    your own in place of the ones that live in the data folder. A second `up` on the same data finishes what the
    first had accepted.
    """

    def show(running: Running) -> None:
        if as_json:
            print_line(asdict(running))
            return
        out.print(f"[bold green]catmerge is up:[/] {running.url}")
        out.print(facts([("docs", running.docs), ("data", escape(running.data)), ("logs", escape(running.logs))]))
        out.print("[dim]Ctrl-C stops everything.[/]")

    with answering(as_json):
        bring_up(
            Options(data=data, host=host, port=port, roots=tuple(root or ())),
            say=lambda sentence: err.print(escape(sentence)),
            on_ready=show,
        )


def doctor(context: typer.Context, data: DataFolder = DATA, as_json: Json = False, url: Url = None) -> None:
    """Say what is configured, what is reachable and what is missing; exits with 1 where something needed is broken."""
    from service.doctor import State, examine, settings_in_force  # the stores' libraries load slowly: only where needed

    with answering(as_json):
        settings = settings_in_force(os.environ, data)
        checks = examine(os.environ, data, service_url(context, url))
    if as_json:
        print_json({"settings": [asdict(row) for row in settings], "checks": [asdict(row) for row in checks]})
    else:
        _show_settings(settings)
        _show_checks(checks)
    if any(check.state is State.BROKEN for check in checks):
        raise typer.Exit(REFUSED)


def migrate(as_json: Json = False) -> None:
    """Bring the database that CATMERGE_DATABASE_URL names up to this version's schema.

    The API does so by itself when it starts, unless CATMERGE_MIGRATE_AT_START is false.
    """
    from service.contract.settings import Connections

    with answering(as_json):
        revision = _migrated(Connections.from_environment(os.environ).database_url)
    if as_json:
        print_json({"revision": revision})
    else:
        out.print(f"The schema is up to date: revision {revision}.")


def calibrate(
    checkpoint: Annotated[Path, typer.Option(metavar="DIR", help="The fine-tuned checkpoint's folder.")],
    exemplars: Annotated[Path, typer.Option(metavar="FILE", help="A .safetensors file of unlabeled model inputs.")],
    to: Annotated[Path, typer.Option("--out", metavar="FILE", help="The statistics file to write.")],
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    as_json: Json = False,
) -> None:
    """Make a statistics file here, so that a team can merge without sharing a single sample."""
    with answering(as_json):
        if importlib.util.find_spec("torch") is None:
            raise Refused("Calibrating needs torch on this machine: pip install 'catmerge[worker]'")
        if not to.absolute().parent.is_dir():
            raise Refused(f"{to.parent} is no folder: --out names a file to write in one that is there")
        options = ["--checkpoint", str(checkpoint), "--exemplars", str(exemplars), "--out", str(to)]
        command = [sys.executable, "-m", "workers.calibrate", *options, "--batch-size", str(batch_size)]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode != 0:
            raise Refused(_last_line(done.stderr) or f"calibrating ended with status {done.returncode}")
        if as_json:
            print_json({"out": str(to), "bytes": to.stat().st_size})
        else:
            out.print(f"{escape(str(to))} is written: name it in a recipe as a task's `statistics`.")


def version(as_json: Json = False) -> None:
    """Say which version this is."""
    number = installed_version("catmerge")
    if as_json:
        print_json({"version": number})
    else:
        out.print(f"catmerge {number}")


def _migrated(url: str) -> str | None:
    """The revision that the schema is at now. Raises Refused."""
    from sqlalchemy.exc import DBAPIError  # loads slowly: only where needed

    from service.stores.database import Database

    database = Database(url)
    try:
        database.migrate()
        return database.revision()
    except DBAPIError as error:
        raise Refused(f"The database can't be migrated: {str(error.orig).strip()}") from None
    finally:
        database.close()


def _last_line(text: str) -> str:
    return text.strip().rpartition("\n")[2].removeprefix("catmerge calibrate: ")


def _show_settings(settings: list[Setting]) -> None:
    table = columns(["setting", "value", "from"])
    for row in settings:
        table.add_row(row.name, escape(row.value), f"[dim]{row.source}[/]")
    out.print(table)
    out.print()


def _show_checks(checks: list[Check]) -> None:
    table = columns(["check", "", "what was found"])
    for row in checks:
        advice = f" [bold]->[/] {escape(row.advice)}" if row.advice else ""
        table.add_row(row.name, MARKS[row.state], escape(row.found) + advice)
    out.print(table)
