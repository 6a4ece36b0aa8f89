"""One way into the database: engines, transactions, the database's own clock, and migrations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import alembic.command
import alembic.config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, create_engine, event, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.expression import FunctionElement
from sqlalchemy.types import Double

MIGRATIONS = Path(__file__).parent / "migrations"
BUSY_TIMEOUT_SECONDS = 30
POSTGRES_PATIENCE = {  # a server whose machine is gone says nothing more: without these one waits for it for minutes
    "connect_timeout": 10,
    "keepalives_idle": 20,
    "keepalives_interval": 5,
    "keepalives_count": 4,
    "tcp_user_timeout": 30_000,  # milliseconds
}


class now(FunctionElement[float]):  # noqa: N801 (reads as the SQL function that it is)
    """Seconds since the epoch by the database's clock: workers' clocks may be off, and leases must not be."""

    type = Double()
    inherit_cache = True


@compiles(now, "postgresql")
def _now_postgresql(_element: now, _compiler: Any, **_: Any) -> str:
    return "extract(epoch from clock_timestamp())::double precision"


@compiles(now, "sqlite")
def _now_sqlite(_element: now, _compiler: Any, **_: Any) -> str:
    return "((julianday('now') - 2440587.5) * 86400.0)"


class Database:
    """Transactions on SQLite (WAL, one writer at a time) or PostgreSQL, with the same behavior."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.engine = _engine(url)

    @property
    def is_sqlite(self) -> bool:
        return self.engine.dialect.name == "sqlite"

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction that may write. On SQLite it takes the write lock at once, so it can't fail halfway."""
        with self.engine.execution_options(catmerge_writes=True).begin() as connection:
            yield connection

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that only reads."""
        with self.engine.begin() as connection:
            yield connection

    def clock(self) -> float:
        """Seconds since the epoch, by the database."""
        with self.read() as connection:
            return float(connection.execute(now().select()).scalar_one())

    def serialize(self, connection: Connection, topic: str) -> None:
        """Let only one transaction at a time past this line for ``topic``, until it has committed."""
        if not self.is_sqlite:
            connection.execute(text("select pg_advisory_xact_lock(hashtextextended(:topic, 0))"), {"topic": topic})

    def migrate(self) -> None:
        """Bring the schema up to date."""
        with self.write() as connection:
            self.serialize(connection, "migrate")
            config = alembic.config.Config()
            config.set_main_option("script_location", str(MIGRATIONS))
            config.attributes["connection"] = connection
            alembic.command.upgrade(config, "head")

    def is_current(self) -> bool:
        """Whether the schema is the one this code was written for."""
        return self.revision() == ScriptDirectory(str(MIGRATIONS)).get_current_head()

    def revision(self) -> str | None:
        """The schema's revision; None where there is none yet."""
        with self.read() as connection:
            return MigrationContext.configure(connection).get_current_revision()

    def close(self) -> None:
        self.engine.dispose()


def is_outage(error: DBAPIError) -> bool:
    """Whether the database is away or overloaded, as opposed to being asked something wrong."""
    return error.connection_invalidated or type(error).__name__ in ("OperationalError", "InterfaceError")


def _engine(url: str) -> Engine:
    parsed = make_url(url)
    if parsed.get_backend_name() == "sqlite":
        return _sqlite(url)
    if parsed.drivername == "postgresql":
        parsed = parsed.set(drivername="postgresql+psycopg")
    return create_engine(parsed, pool_pre_ping=True, pool_size=10, max_overflow=30, connect_args=POSTGRES_PATIENCE)


def _sqlite(url: str) -> Engine:
    database = make_url(url).database
    if database:
        Path(database).parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(url, connect_args={"timeout": BUSY_TIMEOUT_SECONDS}, pool_size=10, max_overflow=60)

    @event.listens_for(engine, "connect")
    def _on_connect(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # the driver must not open transactions of its own
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def _on_begin(connection: Connection) -> None:
        writes = connection.get_execution_options().get("catmerge_writes", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine
