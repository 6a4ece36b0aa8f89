"""Workers, and the memory that parts need."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    op.create_table(
        "workers",
        sa.Column("id", sa.String(length=255), nullable=False),
        sa.Column("host", sa.String(length=255), nullable=False),
        sa.Column("pid", sa.Integer(), nullable=False),
        sa.Column("device", sa.String(length=64), nullable=False),
        sa.Column("memory_bytes", sa.BigInteger(), nullable=False),
        sa.Column("usable_bytes", sa.BigInteger(), nullable=False),
        sa.Column("processes", sa.Integer(), nullable=False),
        sa.Column("queues", sa.JSON(), nullable=False),
        sa.Column("version", sa.String(length=64), nullable=False),
        sa.Column("engine", sa.String(length=64), nullable=False),
        sa.Column("started_at", sa.Double(), nullable=False),
        sa.Column("seen_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_workers")),
    )
    op.add_column("parts", sa.Column("peak_bytes", sa.BigInteger(), server_default="0", nullable=False))
    op.add_column("parts", sa.Column("deaths", sa.Integer(), server_default="0", nullable=False))
    op.add_column("jobs", sa.Column("stuck_since", sa.Double(), nullable=True))


def downgrade() -> None:
    op.drop_column("jobs", "stuck_since")
    op.drop_column("parts", "deaths")
    op.drop_column("parts", "peak_bytes")
    op.drop_table("workers")
