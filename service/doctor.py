"""Looks at what is configured, and says what is reachable, what is missing, and what to do about it."""

from __future__ import annotations

import os
import platform
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import redis
from celery import Celery
from kombu.exceptions import KombuError
from sqlalchemy import delete
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from service.client import CatmergeClient, CatmergeError
from service.contract.settings import SECRETS, Connections, variable
from service.contract.workers import gigabytes
from service.processes import UpError
from service.stores.blocks import used_bytes
from service.stores.database import Database
from service.stores.objects import Objects, StoreError, open_objects
from service.stores.schema import idempotency_keys
from service.up import find_broker, running

PYTHONS = ((3, 11), (3, 13))
WORKER_PACKAGES = ("torch", "transformers", "safetensors", "numpy", "jinja2")
ANSWER_SECONDS = 3.0


class State(StrEnum):
    """How a check came out: ``note`` is worth knowing, ``broken`` keeps the service from working."""

    OK = "ok"
    NOTE = "note"
    BROKEN = "broken"


@dataclass(frozen=True)
class Setting:
    """A variable, its value with secrets masked, and where it comes from: environment, catmerge up, or default."""

    name: str
    value: str
    source: str


@dataclass(frozen=True)
class Check:
    """What was looked at, how it is, and what to do about it."""

    name: str
    state: State
    found: str
    advice: str = ""


def settings_in_force(environ: Mapping[str, str], data: Path) -> list[Setting]:
    """Every setting, as a command in this folder would have it. Raises SettingsError."""
    running_ones = _running_settings(data)
    connections = Connections.from_environment({**running_ones, **_given(environ)})
    values = connections.to_environment()
    rows = []
    for field in Connections.model_fields:
        name = variable(field)
        source = "environment" if environ.get(name) else "catmerge up" if name in running_ones else "default"
        rows.append(Setting(name, _masked(field, values.get(name, "")), source))
    return rows


def examine(environ: Mapping[str, str], data: Path, url: str) -> list[Check]:
    """Look at everything, in the order in which it would be set up. Raises SettingsError."""
    connections = Connections.from_environment({**_running_settings(data), **_given(environ)})
    broker = check_broker(connections.broker_url)
    checks = [check_python(), check_database(connections.database_url), *check_objects(connections), broker]
    checks += check_input_cache(connections)
    checks += [check_workers(connections.broker_url)] if broker.state is not State.BROKEN else []
    return [*checks, check_api(url), check_worker_packages(), check_embedded_broker()]


def check_python() -> Check:
    """Whether this Python is one that the project is tested with."""
    lowest, highest = PYTHONS
    if lowest <= sys.version_info[:2] <= highest:
        return Check("Python", State.OK, platform.python_version())
    return Check("Python", State.BROKEN, platform.python_version(), "use Python 3.11, 3.12 or 3.13")


def check_database(url: str) -> Check:
    """Whether it answers, has this version's schema, and may be written to. Nothing is made or changed."""
    parsed = make_url(url)
    if parsed.get_backend_name() == "sqlite" and not Path(parsed.database or "").exists():
        return Check("database", State.NOTE, f"{parsed.database} is not there yet", "the API makes it when it starts")
    database = Database(url)
    try:
        if not database.is_current():
            return Check(
                "database",
                State.BROKEN,
                "answers, but its schema is not this version's",
                "start the API of this version, or run catmerge migrate: they bring the schema up to date",
            )
        with database.write() as connection:  # a transaction that may only read refuses this
            connection.execute(delete(idempotency_keys).where(idempotency_keys.c.key == secrets.token_hex(16)))
    except SQLAlchemyError as error:
        return Check("database", State.BROKEN, _first_line(error), f"look at {variable('database_url')}")
    finally:
        database.close()
    return Check("database", State.OK, "answers, schema up to date, may be written to")


def check_objects(connections: Connections) -> Iterator[Check]:
    """Whether the workspace can be written to, and each bucket and folder that recipes may name be listed."""
    objects = open_objects(connections)
    workspace = f"{connections.workspace}doctor/{secrets.token_hex(8)}"
    yield _stored("workspace", lambda: _write_read_delete(objects, workspace), "written to, read and cleaned up again")
    for bucket in connections.buckets or ():
        yield _stored(f"bucket {bucket}", lambda bucket=bucket: _list(objects, f"s3://{bucket}/"), "can be listed")  # type: ignore[misc]
    for root in connections.file_roots:
        there = root.is_dir()
        advice = "" if there else f"make it, or take it out of {variable('file_roots')}"
        yield Check(f"folder {root}", State.OK if there else State.BROKEN, "is there" if there else "missing", advice)


def check_input_cache(connections: Connections) -> list[Check]:
    """Whether a worker on this machine could keep inputs, where it is told to. Nothing is made or changed."""
    folder, limit = connections.input_cache, connections.input_cache_bytes
    if folder is None or limit is None:
        return []
    if connections.object_store != "s3":
        advice = f"objects lie in folders already; {variable('input_cache')} is for an S3 server"
        return [Check("input cache", State.NOTE, "not used", advice)]
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        advice = f"workers go on without; let them write to it, or change {variable('input_cache')}"
        return [Check("input cache", State.NOTE, f"{there} may not be written to", advice)]
    used, free = used_bytes(folder), shutil.disk_usage(there).free
    if used + free < limit:
        advice = f"workers keep what fits; lower {variable('input_cache_bytes')} to leave room for others on this disk"
        return [Check("input cache", State.NOTE, f"{gigabytes(limit)} allowed, {gigabytes(used + free)} there", advice)]
    return [Check("input cache", State.OK, f"{gigabytes(used)} of {gigabytes(limit)} used in {folder}")]


def check_broker(url: str) -> Check:
    """Whether it answers, and whether it throws messages away when its memory is full."""
    client = redis.Redis.from_url(url, socket_timeout=ANSWER_SECONDS, socket_connect_timeout=ANSWER_SECONDS)
    try:
        client.ping()
        policy = client.config_get("maxmemory-policy").get("maxmemory-policy", "unknown")
    except redis.ResponseError:  # hosted servers keep their configuration to themselves
        return Check(
            "broker", State.OK, "answers; its eviction policy can't be seen", "make sure that it is noeviction"
        )
    except redis.RedisError as error:
        return Check("broker", State.BROKEN, _first_line(error), f"start it, or look at {variable('broker_url')}")
    finally:
        client.close()
    if policy != "noeviction":
        advice = "set maxmemory-policy to noeviction, or messages vanish when memory is full"
        return Check("broker", State.NOTE, f"answers; its eviction policy is {policy}", advice)
    return Check("broker", State.OK, "answers; its eviction policy is noeviction")


def check_workers(url: str) -> Check:
    """Which workers answer over the broker."""
    app = Celery("catmerge-doctor", broker=url, set_as_current=False)
    try:
        answers = app.control.ping(timeout=ANSWER_SECONDS / 2)
    except (KombuError, redis.RedisError, OSError) as error:
        return Check("workers", State.BROKEN, _first_line(error))
    finally:
        app.close()
    names = sorted(name for answer in answers for name in answer)
    if not names:
        return Check("workers", State.NOTE, "none answers", "start one: catmerge up, or python -m workers")
    return Check("workers", State.OK, ", ".join(names))


def check_api(url: str) -> Check:
    """Whether a service answers at ``url``, and is ready."""
    with CatmergeClient(url, timeout_seconds=ANSWER_SECONDS, attempts=1) as client:
        try:
            readiness = client.ready()
        except CatmergeError as error:
            return Check("API", State.NOTE, str(error), "start it: catmerge up, or python -m service.api")
    troubles = [f"{part}: {said}" for part, said in readiness["checks"].items() if said != "ok"]
    if readiness["status"] != "ready":
        return Check("API", State.BROKEN, f"{url} is not ready: {'; '.join(troubles)}")
    return Check("API", State.OK, f"{url} is ready{''.join(f'; {trouble}' for trouble in troubles)}")


def check_worker_packages() -> Check:
    """What a worker needs on this machine, told without importing any of it."""
    found = {name: _installed(name) for name in WORKER_PACKAGES}
    missing = [name for name, number in found.items() if number is None]
    if missing:
        advice = "only needed where a worker runs: pip install 'catmerge[worker]'"
        return Check("worker packages", State.NOTE, f"missing: {', '.join(missing)}", advice)
    return Check("worker packages", State.OK, ", ".join(f"{name} {number}" for name, number in found.items()))


def check_embedded_broker() -> Check:
    """Whether `catmerge up` could start a broker of its own."""
    try:
        return Check("embedded broker", State.OK, str(find_broker()))
    except UpError as error:
        return Check("embedded broker", State.NOTE, str(error))


def _given(environ: Mapping[str, str]) -> dict[str, str]:
    return {name: text for name, text in environ.items() if text}


def _running_settings(data: Path) -> dict[str, str]:
    settings: dict[str, str] = (running(data) or {}).get("settings", {})
    return settings


def _masked(field: str, text: str) -> str:
    """A value as it may be shown: without keys, and without the password in an address."""
    if field in SECRETS:
        return "***" if text else ""
    if "://" not in text:
        return text
    parts = urlsplit(text)
    user, colon, _ = parts.netloc.rpartition("@")[0].partition(":")
    if not colon:
        return text
    return urlunsplit(parts._replace(netloc=f"{user}:***@{parts.netloc.rpartition('@')[2]}"))


def _stored(name: str, look: Callable[[], None], found: str) -> Check:
    try:
        look()
    except StoreError as error:
        return Check(name, State.BROKEN, str(error), f"look at {variable('object_store')} and {variable('workspace')}")
    return Check(name, State.OK, found)


def _write_read_delete(objects: Objects, address: str) -> None:
    objects.put(address, b"catmerge doctor", "text/plain")
    try:
        objects.read_all(address, 100)
    finally:
        objects.delete(address)


def _list(objects: Objects, prefix: str) -> None:
    next(iter(objects.list(prefix)), None)


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
