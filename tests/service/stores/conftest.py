"""Both databases, empty and migrated, for every test that asks for one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import text

from service.stores.database import Database
from service.stores.schema import metadata
from tests.servers import PostgresServer, postgres_server


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    with postgres_server() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    if request.param == "sqlite":
        opened = Database(f"sqlite:///{tmp_path / 'jobs.db'}")
        opened.migrate()
    else:
        opened = Database(request.getfixturevalue("postgres").url)
        opened.migrate()
        with opened.write() as connection:
            connection.execute(text(f"truncate {', '.join(metadata.tables)}"))
    yield opened
    opened.close()
