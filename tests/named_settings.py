"""The names of all CATMERGE_ variables, told by the code that reads them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import typer
from click import Parameter

from service.cli.app import app
from service.contract.settings import Connections, variable
from service.settings import Settings
from workers.settings import WorkerSettings

BETWEEN_PROCESSES = {
    "CATMERGE_STOP_FILE",
    "CATMERGE_WORKER_NAME",
}  # a worker's parent tells its children; nobody else sets it


class AskedFor(Mapping[str, str]):
    """An empty environment that remembers what it was asked for."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def __getitem__(self, name: str) -> str:
        self.names.add(name)
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


def of_processes() -> set[str]:
    """What the API and the workers read."""
    fields = (*Connections.model_fields, *Settings.model_fields)
    return {variable(field) for field in fields} | set(_of_a_worker()) - BETWEEN_PROCESSES


def of_callers() -> set[str]:
    """What only the command line reads."""
    root = typer.main.get_command(app)
    commands = [root, *getattr(root, "commands", {}).values()]
    return {name for command in commands for option in command.params for name in _variables(option)} - of_processes()


def _of_a_worker() -> set[str]:
    environ = AskedFor()
    WorkerSettings.from_environment(environ)
    return environ.names


def _variables(option: Parameter) -> tuple[str, ...]:
    names = option.envvar or ()
    return (names,) if isinstance(names, str) else tuple(names)
