"""The ledger's events as a hash chain, wherever they are kept: in a database, or in an export."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fedmerge.events import Event

# Events that are read at once, and of the newest those that stay in memory: some rounds of a hundred nodes.
BATCH = 1024
GENESIS = hashlib.sha256(b"fedmerge.ledger.v1").hexdigest()


@dataclass(frozen=True)
class LedgerEntry:
    """An event in its place: `number` from 0, `at_s` the wall clock when written, `hash` the chain after it."""

    number: int
    at_s: float
    event: Event
    hash: str


def chain_hash(head: str, number: int, at_s: float, body: bytes) -> str:
    """Return the chain's hash (hex) after event `number`, whose JSON is `body`; `head` is the hash before it."""
    digest = hashlib.sha256(bytes.fromhex(head))
    digest.update(number.to_bytes(8, "big") + at_s.hex().encode() + b"\n" + body)
    return digest.hexdigest()


def entries_from(entries: Sequence[LedgerEntry], begin: int, end: int) -> Iterator[LedgerEntry]:
    """Yield events `begin` to `end - 1`; of a ledger's never more than `BATCH` are in memory."""
    for at in range(begin, end, BATCH):
        yield from entries[at : min(at + BATCH, end)]
