"""Indexes by which PostgreSQL finds the jobs with a label, and those below a folder."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    if op.get_bind().dialect.name == "postgresql":
        op.alter_column("jobs", "prefix", type_=sa.Text(collation="C"), existing_nullable=False)
        op.create_index(
            "ix_jobs_labels",
            "jobs",
            [sa.text("(metadata::jsonb) jsonb_path_ops")],
            unique=False,
            postgresql_using="gin",
        )


def downgrade() -> None:
    if op.get_bind().dialect.name == "postgresql":
        op.drop_index("ix_jobs_labels", table_name="jobs")
        op.alter_column("jobs", "prefix", type_=sa.Text(), existing_nullable=False)
