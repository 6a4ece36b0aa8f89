"""Databases of earlier versions become what the code expects, with what is in them."""

from __future__ import annotations

import alembic.autogenerate
import alembic.command
import alembic.config
import pytest
from alembic.runtime.migration import MigrationContext
from sqlalchemy import text

from service.contract.stages import Queue, Stage
from service.stores.database import MIGRATIONS, Database
from service.stores.jobs import JobStore
from service.stores.parts import PartStore
from service.stores.schema import metadata
from tests.service.jobs_by_hand import merges, plan, submit


def move(database: Database, revision: str) -> None:
    with database.write() as connection:
        config = alembic.config.Config()
        config.set_main_option("script_location", str(MIGRATIONS))
        config.attributes["connection"] = connection
        turn = alembic.command.upgrade if revision == "head" else alembic.command.downgrade
        turn(config, revision)


@pytest.mark.filterwarnings("ignore:autogenerate skipping metadata-specified expression-based index")  # of SQLite
def test_the_migrations_make_the_schema(database: Database) -> None:
    with database.read() as connection:
        context = MigrationContext.configure(connection, opts={"compare_server_default": False})
        assert alembic.autogenerate.compare_metadata(context, metadata) == []


def test_jobs_of_before_there_were_turns_wait_for_theirs(database: Database) -> None:
    jobs, parts = JobStore(database), PartStore(database, lease_seconds=60, part_attempts=3)
    queued, running, ended = (submit(jobs).id for _ in range(3))
    plan(parts, running, *merges(2))
    jobs.cancel("anonymous", ended)
    move(database, "0004")
    try:
        with database.read() as connection:
            assert "turn_at" not in list(connection.execute(text("select * from jobs")).keys())
    finally:
        move(database, "head")
    held = [parts.claim_next([queue], "worker") for queue in (Queue.LIGHT, Queue.HEAVY, Queue.HEAVY)]
    assert [(claim.job_id, claim.stage) for claim in held if claim] == [
        (queued, Stage.PLAN),
        (running, Stage.MERGE),
        (running, Stage.MERGE),
    ]
    assert parts.claim_next(list(Queue), "worker") is None
    assert jobs.get("anonymous", queued).queue_position is None
