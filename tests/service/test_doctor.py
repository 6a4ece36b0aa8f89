from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from service.contract.settings import SettingsError
from service.doctor import (
    Check,
    State,
    check_api,
    check_broker,
    check_database,
    check_embedded_broker,
    check_input_cache,
    check_objects,
    check_python,
    check_worker_packages,
    check_workers,
    examine,
    settings_in_force,
)
from service.stores.blocks import Blocks
from service.stores.database import Database
from tests.servers import free_port, redis_server
from tests.service.front import connections_to, open_front

DEAD = "redis://127.0.0.1:1/0"


def states(checks: list[Check]) -> dict[str, State]:
    return {check.name: check.state for check in checks}


def test_everything_there(tmp_path: Path) -> None:
    with redis_server() as broker:
        connections = connections_to(tmp_path, broker_url=broker.url, file_roots=(tmp_path,), buckets=("models",))
        with open_front(tmp_path, connections) as front:
            checks = examine(connections.to_environment(), tmp_path, str(front.http.base_url))
    found = states(checks)
    assert found.pop("workers") is State.NOTE
    assert set(found.values()) == {State.OK}, checks
    assert {"bucket models", f"folder {tmp_path}", "workspace", "API"} <= found.keys()
    assert not list((tmp_path / "objects" / "workspace").glob("doctor/*"))


def test_nothing_there(tmp_path: Path) -> None:
    connections = connections_to(tmp_path, file_roots=(tmp_path / "gone",))
    checks = examine(connections.to_environment(), tmp_path, f"http://127.0.0.1:{free_port()}")
    found = states(checks)
    assert (found["database"], found["broker"], found["API"]) == (State.NOTE, State.BROKEN, State.NOTE)
    assert found[f"folder {tmp_path / 'gone'}"] is State.BROKEN
    assert "workers" not in found
    assert all(check.advice for check in checks if check.state is not State.OK)
    assert not (tmp_path / "catmerge.db").exists(), "looking makes nothing"


def test_a_database_of_another_version(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'empty.db'}"
    (tmp_path / "empty.db").touch()
    assert check_database(url).state is State.BROKEN
    database = Database(url)
    database.migrate()
    database.close()
    assert check_database(url).state is State.OK


def test_a_database_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("no database " * 1000)
    assert check_database(f"sqlite:///{tmp_path / 'text.db'}").state is State.BROKEN
    found = check_database(f"postgresql://user:hidden@127.0.0.1:{free_port()}/x")
    assert found.state is State.BROKEN
    assert "hidden" not in found.found


def test_a_store_that_can_not_be_written(tmp_path: Path) -> None:
    (tmp_path / "objects").write_text("a file where a folder belongs")
    (workspace, *_) = check_objects(connections_to(tmp_path))
    assert workspace.state is State.BROKEN


def test_a_broker_that_forgets() -> None:
    import redis

    with redis_server() as server:
        assert check_broker(server.url).state is State.OK
        client = redis.Redis.from_url(server.url)
        client.config_set("maxmemory-policy", "allkeys-lru")
        client.close()
        found = check_broker(server.url)
        assert (found.state, "allkeys-lru" in found.found) == (State.NOTE, True)
        assert check_workers(server.url).state is State.NOTE
    assert check_broker(DEAD).state is State.BROKEN


def test_this_machine() -> None:
    assert check_python().state is State.OK
    assert check_worker_packages().state in (State.OK, State.NOTE)
    assert check_embedded_broker().state in (State.OK, State.NOTE)
    assert check_api(f"http://127.0.0.1:{free_port()}").state is State.NOTE


def test_settings_say_where_they_come_from_and_no_secret(tmp_path: Path) -> None:
    environ = {
        "CATMERGE_DATABASE_URL": "postgresql://me:s3cret@db/catmerge",
        "CATMERGE_S3_ACCESS_KEY": "AKIA-s3cret",
        "CATMERGE_S3_SECRET_KEY": "very-s3cret",
        "CATMERGE_WORKSPACE": "",
    }
    running = {"pid": os.getpid(), "settings": {"CATMERGE_BROKER_URL": "redis://:s3cret@127.0.0.1:7/0"}}
    (tmp_path / "up.json").write_text(json.dumps(running))
    rows = {row.name: row for row in settings_in_force(environ, tmp_path)}
    assert "s3cret" not in str(rows)
    assert rows["CATMERGE_DATABASE_URL"].value == "postgresql://me:***@db/catmerge"
    sources = {name: row.source for name, row in rows.items()}
    assert sources["CATMERGE_DATABASE_URL"] == "environment"
    assert sources["CATMERGE_BROKER_URL"] == "catmerge up"
    assert sources["CATMERGE_WORKSPACE"] == "default"
    with pytest.raises(SettingsError, match="CATMERGE_OBJECT_STORE"):
        settings_in_force({"CATMERGE_OBJECT_STORE": "ftp://x"}, tmp_path)


def test_the_command(tmp_path: Path) -> None:
    environ = {**os.environ, **connections_to(tmp_path).to_environment(), "CATMERGE_URL": "http://127.0.0.1:1"}
    command = [sys.executable, "-m", "service.cli", "doctor", "--json"]
    done = subprocess.run(command, env=environ, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1, "the broker is away"
    answer = json.loads(done.stdout)
    assert {"name": "CATMERGE_BROKER_URL", "value": DEAD, "source": "environment"} in answer["settings"]
    assert {check["name"]: check["state"] for check in answer["checks"]}["broker"] == "broken"


def test_where_inputs_are_kept(tmp_path: Path) -> None:
    folder = tmp_path / "cache"

    def look(**changes: object) -> Check:
        keeping = {"object_store": "s3", "input_cache": folder, "input_cache_bytes": 1000, **changes}
        (check,) = check_input_cache(connections_to(tmp_path, **keeping))
        return check

    assert check_input_cache(connections_to(tmp_path)) == []
    assert look().state is State.OK
    assert not folder.exists(), "looking makes nothing"
    Blocks(folder, 1000)
    assert look().found == f"0.00 GB of 0.00 GB used in {folder}"
    large = look(input_cache_bytes=10**18)
    assert (large.state, "CATMERGE_INPUT_CACHE_BYTES" in large.advice) == (State.NOTE, True)
    assert look(object_store=f"file://{tmp_path}").found == "not used"
    (tmp_path / "file").touch()
    assert "may not be written to" in look(input_cache=tmp_path / "file" / "cache").found
