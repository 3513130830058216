"""How a ledger's tables came to be, step by step; Alembic runs the steps that a database has not had."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from alembic.migration import MigrationContext
from alembic.operations import Operations
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import Connection, inspect

from fedmerge.errors import ResourceError

FIRST = "0001"


def scripts() -> ScriptDirectory:
    """Return the migrations, in `versions` beside this file."""
    return ScriptDirectory(str(Path(__file__).parent))


def upgrade(connection: Connection, name: str) -> None:
    """Bring the tables of the database called `name` up to date, within the connection's transaction.

    Raises `ResourceError` when a newer fedmerge wrote them.
    """
    directory = scripts()

    def steps(revision: Any, _context: MigrationContext) -> Any:
        try:
            return directory._upgrade_revs("head", revision)
        except CommandError as err:
            raise ResourceError(
                f"{name}: the ledger was written by a newer fedmerge", hint="upgrade fedmerge; nothing was changed"
            ) from err

    context = MigrationContext.configure(connection, opts={"fn": steps})
    if context.get_current_revision() is None and inspect(connection).has_table("events"):
        context.stamp(directory, FIRST)  # made before there were migrations
    with Operations.context(context):
        context.run_migrations()
