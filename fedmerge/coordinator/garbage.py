"""Garbage collection: blobs that nothing in the ledger leads to, and deltas that nobody wants to check any more.

What is left behind by a merge that was interrupted, or by an upload that was stored and then not recorded, is named
nowhere. Everything that any event or signed statement names stays: the replay of every round needs its deltas. Only who
asks for it loses the deltas of old rounds; models, lineage and everything that is signed stay verifiable, but those
rounds can't be merged again.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator

from fedmerge.events import DeltaAccepted, MergeFinished, to_json
from fedmerge.rounds.journal import Journal
from fedmerge.statements import MergeRecord
from fedmerge.store.blobs import BlobStore
from fedmerge.store.shelves import Stored

_ROOT = re.compile(rb"(?<![0-9a-f])[0-9a-f]{64}(?![0-9a-f])")


def garbage(journal: Journal, blobs: BlobStore, *, forget_before: int = 0) -> list[Stored]:
    """Return the stored blobs that can go: what nothing names, and deltas merged in rounds before `forget_before`.

    The result holds as long as nobody else writes: it is for whoever has the lease on the ledger.
    """
    named = {root.decode() for text in _texts(journal) for root in _ROOT.findall(text)}
    forgotten = _forgotten(journal, forget_before)
    return sorted(found for found in blobs.stored() if found.root not in named or found.root in forgotten)


def _texts(journal: Journal) -> Iterator[bytes]:
    """Yield all that the ledger says: events, and what stands in their envelopes and those of unfinished uploads."""
    for entry in journal.ledger.entries:
        body = to_json(entry.event)
        yield body
        for name, value in json.loads(body).items():
            if name.endswith("envelope"):
                yield _signed(value)
    for upload in journal.ledger.uploads():
        yield _signed(upload.envelope)


def _signed(envelope: str | bytes) -> bytes:
    return base64.b64decode(json.loads(envelope)["payload"])


def _forgotten(journal: Journal, forget_before: int) -> set[str]:
    """Return the deltas that earlier rounds merged, but for those that any other blob is the same as."""
    merged: set[str] = set()
    kept: set[str] = set()
    for entry in journal.ledger.entries:
        if isinstance(entry.event, MergeFinished):
            envelope = entry.event.record_envelope.encode()
            record = MergeRecord.open(envelope, journal.own_keys, where="merge record")[0]
            roots = {contribution.payload_root for contribution in record.contributions}
            (merged if record.round < forget_before else kept).update(roots)
            kept |= {entry.event.update_root, *entry.event.step_roots, record.outer_state_root or ""}
        elif isinstance(entry.event, DeltaAccepted) and entry.event.round >= forget_before:
            kept.add(entry.event.payload_root)
    return merged - kept
