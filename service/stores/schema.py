"""The tables: one schema for SQLite and PostgreSQL. Times are seconds since the epoch by the database's clock."""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Double,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    cast,
)
from sqlalchemy.dialects.postgresql import JSONB

metadata = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s",
    }
)

FOLDER = Text().with_variant(Text(collation="C"), "postgresql")  # by bytes: what lies below a folder is a range

jobs = Table(
    "jobs",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("caller", String(255), nullable=False),
    Column("status", String(16), nullable=False),
    Column("stage", String(16)),
    Column("recipe", JSON, nullable=False),
    Column("recipe_sha256", String(64), nullable=False),
    Column("metadata", JSON, nullable=False),
    Column("prefix", FOLDER, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("version", Integer, nullable=False),
    Column("last_seq", Integer, nullable=False),
    Column("error", JSON(none_as_null=True)),
    Column("warnings", JSON, nullable=False),
    Column("result", JSON(none_as_null=True)),
    Column("created_at", Double, nullable=False),
    Column("queued_at", Double, nullable=False),
    Column("started_at", Double),
    Column("finished_at", Double),
    Column("deadline_at", Double),
    Column("expires_at", Double),
    Column("tidied_at", Double),  # when what its workers may have left half written was cleared away
    # Whose turn it is: see claiming.py.
    Column("queue", String(32)),  # of the stage whose parts may be claimed; none where the job has ended
    Column("priority", Integer, nullable=False, server_default="0"),
    Column("given", Integer, nullable=False, server_default="0"),  # parts claimed since the job was queued
    Column("turn_at", Double, nullable=False, server_default="0"),  # since when it waits for its turn
    Column("served_at", Double),  # when a part of it was last claimed
    Column("stuck_since", Double),  # since when no worker has the memory for its parts
    Index(None, "caller", "id"),
    Index(None, "status", "id"),
    Index(None, "prefix"),
    Index(None, "tidied_at", "finished_at"),
    Index(None, "expires_at"),
    Index(None, "caller", "served_at"),
)
Index("ix_jobs_turns", jobs.c.queue, jobs.c.caller, jobs.c.priority.desc(), jobs.c.turn_at, jobs.c.id)

# On PostgreSQL the jobs with a label are found by index; SQLite looks at each.
labels = cast(jobs.c.metadata, JSONB)
Index(
    "ix_jobs_labels", labels.label("labels"), postgresql_using="gin", postgresql_ops={"labels": "jsonb_path_ops"}
).ddl_if(dialect="postgresql")

parts = Table(
    "parts",
    metadata,
    Column("job_id", String(64), ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    Column("stage", String(16), primary_key=True),
    Column("part", Integer, primary_key=True),
    Column("name", Text, nullable=False),
    Column("state", String(16), nullable=False),  # waiting, ready, claimed, done, cancelled
    Column("weight", Double, nullable=False),
    Column("tries", Integer, nullable=False),  # attempts since the last retry of the job, against part_attempts
    Column("attempt", Integer, nullable=False),
    Column("claim", String(64)),  # the fencing token: every write of a worker carries the one it was given
    Column("owner", String(255)),
    Column("committing", Boolean, nullable=False),
    Column("lease_until", Double),
    Column("sent_at", Double),
    Column("not_before", Double, nullable=False),
    Column("tensors_done", BigInteger, nullable=False),
    Column("tensors_total", BigInteger, nullable=False),
    Column("bytes_read", BigInteger, nullable=False),
    Column("bytes_written", BigInteger, nullable=False),
    Column("output", JSON(none_as_null=True)),
    Column("peak_bytes", BigInteger, nullable=False, server_default="0"),  # the memory that it will need
    Column("deaths", Integer, nullable=False, server_default="0"),  # workers it has cost since the job's last retry
    Column("inputs", JSON(none_as_null=True)),  # addresses of the files that it reads and not all of its stage do
    Index(None, "state", "not_before"),
    Index(None, "job_id", "state", "not_before"),
)

trials = Table(  # of a job's search; gone with the parts that made them, as when a job is planned again
    "trials",
    metadata,
    Column("job_id", String(64), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("stage", String(16), nullable=False),
    Column("part", Integer, nullable=False),
    Column("state", String(16), nullable=False),  # running, complete, failed, lost
    Column("parameters", JSON, nullable=False),
    Column("value", Double),
    Column("detail", Text),
    Column("output", JSON, nullable=False),
    Column("started_at", Double, nullable=False),
    Column("finished_at", Double),
    ForeignKeyConstraint(
        ["job_id", "stage", "part"], ["parts.job_id", "parts.stage", "parts.part"], ondelete="CASCADE"
    ),
)

events = Table(
    "events",
    metadata,
    Column("job_id", String(64), ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    Column("seq", Integer, primary_key=True, autoincrement=False),
    Column("type", String(64), nullable=False),
    Column("created_at", Double, nullable=False),
    Column("data", JSON, nullable=False),
)

idempotency_keys = Table(
    "idempotency_keys",
    metadata,
    Column("scope", String(320), primary_key=True),  # caller, method and path
    Column("key", String(255), primary_key=True),
    Column("fingerprint", String(64), nullable=False),
    Column("status", Integer, nullable=False),
    Column("body", JSON, nullable=False),
    Column("created_at", Double, nullable=False),
    Index(None, "created_at"),
)

workers = Table(  # a row for each process that does parts
    "workers",
    metadata,
    Column("id", String(255), primary_key=True),
    Column("host", String(255), nullable=False),
    Column("pid", Integer, nullable=False),
    Column("device", String(64), nullable=False),
    Column("memory_bytes", BigInteger, nullable=False),
    Column("usable_bytes", BigInteger, nullable=False),
    Column("processes", Integer, nullable=False),
    Column("queues", JSON, nullable=False),
    Column("version", String(64), nullable=False),
    Column("engine", String(64), nullable=False),
    Column("started_at", Double, nullable=False),
    Column("seen_at", Double, nullable=False),
    Column("input_cache", JSON(none_as_null=True)),
)

leaders = Table(
    "leaders",
    metadata,
    Column("duty", String(64), primary_key=True),
    Column("owner", String(255), nullable=False),
    Column("until", Double, nullable=False),
)
