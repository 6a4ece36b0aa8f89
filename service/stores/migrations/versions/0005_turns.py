"""Whose turn it is: queues, priorities and turns of jobs."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"

LIGHT, HEAVY = "catmerge.light", "catmerge.heavy"
LIGHT_STAGES = ("plan", "finalize")


def upgrade() -> None:
    for column in (
        sa.Column("queue", sa.String(length=32), nullable=True),
        sa.Column("priority", sa.Integer(), server_default="0", nullable=False),
        sa.Column("given", sa.Integer(), server_default="0", nullable=False),
        sa.Column("turn_at", sa.Double(), server_default="0", nullable=False),
        sa.Column("served_at", sa.Double(), nullable=True),
    ):
        op.add_column("jobs", column)
    _fill()
    op.create_index(op.f("ix_jobs_caller_served_at"), "jobs", ["caller", "served_at"], unique=False)
    op.create_index(
        "ix_jobs_turns", "jobs", ["queue", "caller", sa.text("priority DESC"), "turn_at", "id"], unique=False
    )
    op.create_index(op.f("ix_parts_job_id_state_not_before"), "parts", ["job_id", "state", "not_before"], unique=False)


def _fill() -> None:
    """Jobs that wait or run wait for their turn since they were queued, in the queue of their open stage."""
    jobs = sa.table("jobs", *map(sa.column, ("id", "status", "queue", "turn_at", "queued_at")))
    parts = sa.table("parts", *map(sa.column, ("job_id", "state", "stage")))
    is_light = sa.exists().where(
        parts.c.job_id == jobs.c.id, parts.c.state.in_(("ready", "claimed")), parts.c.stage.in_(LIGHT_STAGES)
    )
    queue = sa.case((is_light, LIGHT), else_=HEAVY)
    active = jobs.c.status.in_(("queued", "running"))
    op.execute(sa.update(jobs).where(active).values(queue=queue, turn_at=jobs.c.queued_at))


def downgrade() -> None:
    op.drop_index(op.f("ix_parts_job_id_state_not_before"), table_name="parts")
    op.drop_index("ix_jobs_turns", table_name="jobs")
    op.drop_index(op.f("ix_jobs_caller_served_at"), table_name="jobs")
    for name in ("served_at", "turn_at", "given", "priority", "queue"):
        op.drop_column("jobs", name)
