"""The files that parts read, and what workers keep of them."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    op.add_column("parts", sa.Column("inputs", sa.JSON(), nullable=True))
    op.add_column("workers", sa.Column("input_cache", sa.JSON(), nullable=True))


def downgrade() -> None:
    op.drop_column("workers", "input_cache")
    op.drop_column("parts", "inputs")
