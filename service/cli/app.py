"""Puts the commands together: wiring and nothing else."""

from __future__ import annotations

import typer

from service.cli import house, jobs, reports
from service.cli.options import CommonUrl, Settings

EPILOG = (
    "Exit codes: 0 it went well, or the job succeeded; 1 refused, unreachable, or could not be done; 2 wrong usage; "
    "3 a gate rejected the result; 4 the job failed; 5 it was cancelled; 6 it had not ended when --timeout was over; "
    "130 interrupted. With --json, standard output is JSON alone; errors, then JSON too, and progress go to standard "
    "error."
)

app = typer.Typer(
    name="catmerge",
    help="Merge fine-tuned checkpoints without training.",
    epilog=EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (
    house.up,
    house.doctor,
    house.migrate,
    *jobs.COMMANDS,
    *reports.COMMANDS,
    house.calibrate,
    house.version,
):
    app.command()(command)


@app.callback()
def settings(context: typer.Context, url: CommonUrl = None) -> None:
    context.obj = Settings(url)


def main() -> None:
    """The program `catmerge`."""
    app()
