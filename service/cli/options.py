"""The options that commands share, and how a command finds the service."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from service.client import DEFAULT_URL, CatmergeClient
from service.up import DATA, running

Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
JobId = Annotated[str, typer.Argument(metavar="ID", help="The job's id: mrg_... or evl_...")]
RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe in JSON; - reads standard input.")]
Url = Annotated[str | None, typer.Option("--url", metavar="URL", help="Where the service answers.")]
CommonUrl = Annotated[
    str | None,
    typer.Option(
        "--url",
        envvar="CATMERGE_URL",
        metavar="URL",
        help=f"Where the service answers. [default: the `catmerge up` of this folder, else {DEFAULT_URL}]",
    ),
]
DataFolder = Annotated[
    Path, typer.Option("--data", envvar="CATMERGE_DATA", metavar="DIR", help="Where `catmerge up` keeps everything.")
]


@dataclass(frozen=True)
class Settings:
    """What was said before the command's name."""

    url: str | None


def service_url(context: typer.Context, url: str | None) -> str:
    """What was asked for, else what runs in this folder, else the usual address."""
    settings: Settings = context.obj
    data = Path(os.environ.get("CATMERGE_DATA") or DATA)
    return url or settings.url or (running(data) or {}).get("url") or DEFAULT_URL


def connect(context: typer.Context, url: str | None) -> CatmergeClient:
    """A client of the service."""
    return CatmergeClient(service_url(context, url))
