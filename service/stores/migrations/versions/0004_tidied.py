"""When a job's leftovers were cleared away."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.add_column("jobs", sa.Column("tidied_at", sa.Double(), nullable=True))
    op.create_index(op.f("ix_jobs_tidied_at_finished_at"), "jobs", ["tidied_at", "finished_at"])
    op.create_index(op.f("ix_jobs_expires_at"), "jobs", ["expires_at"])


def downgrade() -> None:
    op.drop_index(op.f("ix_jobs_expires_at"), table_name="jobs")
    op.drop_index(op.f("ix_jobs_tidied_at_finished_at"), table_name="jobs")
    op.drop_column("jobs", "tidied_at")
