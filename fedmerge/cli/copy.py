"""`fedmerge copy`: copy a coordinator's ledger and blobs, to move them or to keep them."""

from __future__ import annotations

import os
import time
from contextlib import closing
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from fedmerge.cli.output import JsonFlag, print_json, stdout
from fedmerge.config import load_config
from fedmerge.errors import ConfigError


def copy(
    config: Annotated[Path, Parameter(help="The federation's configuration.")] = Path("fedmerge.toml"),
    /,
    *,
    database: Annotated[str | None, Parameter(help="Where to copy the ledger, as [store] database has it.")] = None,
    blobs: Annotated[str | None, Parameter(help="Where to copy deltas, updates and steps, as [store] blobs.")] = None,
    json: JsonFlag = False,
) -> None:
    """Copy a ledger or blobs elsewhere; a second time only what is new. No coordinator may lead meanwhile."""
    if database is None and blobs is None:
        raise ConfigError("copy what? Give --database, --blobs or both")
    wanted = {"FEDMERGE_STORE__DATABASE": database, "FEDMERGE_STORE__BLOBS": blobs}
    given = {variable: value for variable, value in wanted.items() if value is not None}
    source, target = load_config(config), load_config(config, environ={**os.environ, **given})
    from fedmerge.coordinator.ownership import open_seat
    from fedmerge.store.copy import copy_blobs, copy_ledger
    from fedmerge.store.database import Database

    num_blobs = num_events = 0
    with closing(open_seat(source, time.monotonic)) as seat:
        seat.take()
        if blobs is not None:
            num_blobs = copy_blobs(source.open_blobs(), target.open_blobs())
        if database is not None:
            with closing(Database(target.database_url())) as copied:
                num_events = copy_ledger(seat.database, copied)
    if json:
        print_json({"events": num_events, "blobs": num_blobs})
        return
    stdout.print(f"{num_events} events are there, {num_blobs} blobs were copied")
