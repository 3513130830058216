"""`fedmerge gc`: delete blobs that nothing leads to, and on request the deltas of old rounds."""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from fedmerge.cli.output import JsonFlag, format_bytes, print_json, stdout
from fedmerge.config import load_config
from fedmerge.errors import ConfigError


def gc(
    config: Annotated[Path, Parameter(help="The federation's configuration.")] = Path("fedmerge.toml"),
    /,
    *,
    forget_before: Annotated[
        int, Parameter(help="Delete the deltas of rounds before this one too: their merges can't be replayed any more.")
    ] = 0,
    dry_run: Annotated[bool, Parameter(negative=(), help="Only say what would be deleted.")] = False,
    json: JsonFlag = False,
) -> None:
    """Delete what crashes left behind in a coordinator's store. No coordinator may lead meanwhile."""
    settings = load_config(config)
    if forget_before < 0:
        raise ConfigError("--forget-before should be the number of a round")
    from fedmerge.coordinator.garbage import garbage
    from fedmerge.coordinator.ownership import open_seat
    from fedmerge.rounds.journal import Journal
    from fedmerge.trust.sign import SigningKey

    key = SigningKey.load(settings.federation.key)
    with closing(open_seat(settings, time.monotonic)) as seat:
        seat.take()
        journal = Journal(seat.open_ledger(), key, time.time)
        blobs = settings.open_blobs()
        if forget_before > journal.state.round:
            raise ConfigError(f"--forget-before {forget_before}: only {journal.state.round} round(s) were opened")
        found = garbage(journal, blobs, forget_before=forget_before)
        if not dry_run:
            journal.ledger.require_lease()
            for blob in found:
                blobs.drop(blob.root)
    num_bytes = sum(blob.num_bytes for blob in found)
    if json:
        print_json({"deleted": not dry_run, "blobs": [blob.root for blob in found], "num_bytes": num_bytes})
        return
    done = "would delete" if dry_run else "deleted"
    stdout.print(f"{done} {len(found)} blobs, {format_bytes(num_bytes)}")
