"""The lease: who may write."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Make the table and its only row, which nobody holds."""
    lease = op.create_table(
        "lease",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("token", sa.BigInteger, nullable=False),
        sa.Column("beat", sa.BigInteger, nullable=False),
        sa.Column("holder", sa.String(1000), nullable=False),
    )
    op.bulk_insert(lease, [{"id": 1, "token": 0, "beat": 0, "holder": ""}])
