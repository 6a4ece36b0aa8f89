"""Running services that tests share, and their logs where a test fails."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
import torch

from service.contract.settings import Connections
from tests.checkpoints import Family, write_family
from tests.end_to_end.stack import Stack, open_stack
from tests.servers import PostgresServer, S3Server, postgres_server, redis_server, s3_server

BUCKETS = ("catmerge", "models", "merged", "faults")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    if report.failed:  # type: ignore[attr-defined]  # a hook wrapper is sent the result
        for value in getattr(item, "funcargs", {}).values():
            if isinstance(value, Stack):
                report.sections.append(("logs of the service", value.logs()))  # type: ignore[attr-defined]
    return report


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    with postgres_server() as server:
        yield server


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    with s3_server("moto", buckets=BUCKETS) as server:
        yield server


def connect(postgres: PostgresServer, s3: S3Server, broker_url: str, database: str, **values: object) -> Connections:
    """Connections to the real servers, with a database of their own."""
    with psycopg.connect(postgres.dsn, autocommit=True) as connection:
        connection.execute(f'create database "{database}"'.encode())
    environment = {
        **s3.environment(),
        "CATMERGE_DATABASE_URL": postgres.url.rpartition("/")[0] + f"/{database}",
        "CATMERGE_BROKER_URL": broker_url,
    }
    return Connections.from_environment(environment).model_copy(update=values)


@pytest.fixture(scope="session")
def real(tmp_path_factory: pytest.TempPathFactory, postgres: PostgresServer, s3: S3Server) -> Iterator[Stack]:
    """PostgreSQL, Valkey and an S3 server."""
    with (
        redis_server() as broker,
        open_stack(tmp_path_factory.mktemp("real"), connect(postgres, s3, broker.url, "real")) as stack,
    ):
        yield stack


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder under which the embedded stack may be given ``file:///`` addresses."""
    return tmp_path_factory.mktemp("files")


@pytest.fixture(scope="session")
def embedded(tmp_path_factory: pytest.TempPathFactory, files: Path) -> Iterator[Stack]:
    """SQLite and a folder; the broker is a real one."""
    folder = tmp_path_factory.mktemp("embedded")
    with redis_server() as broker:
        connections = Connections(
            database_url=f"sqlite:///{folder / 'jobs.db'}",
            broker_url=broker.url,
            object_store=f"file://{folder / 'objects'}",
            file_roots=(files,),
            buckets=("models", "merged"),
        )
        with open_stack(folder, connections) as stack:
            yield stack


@pytest.fixture(scope="session")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return write_family(tmp_path_factory.mktemp("vit"), "vit", {"cars": 3, "pets": 5, "food": 2})


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return write_family(tmp_path_factory.mktemp("bert"), "bert", {"news": 4, "mood": 3}, dtype=torch.bfloat16)
