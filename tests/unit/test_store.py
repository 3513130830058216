"""The ledger and the blob store: what is acknowledged is there after a restart, what was altered is noticed."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from fedmerge.errors import BadOffset, DigestMismatch, ResourceError, UnknownVersion
from fedmerge.events import MergeStarted, RoundFailed, RoundPublished, RoundSealed
from fedmerge.merkle import LEAF_BYTES, leaf_hash, merkle_root
from fedmerge.store.blobs import BlobStore, split_leaf_hashes
from fedmerge.store.ledger import Ledger, UploadRow

FACTS = [
    RoundSealed(round=1, node_ids=["a" * 64], closed_by="everyone", quorum=1, grace_s=0.0),
    MergeStarted(round=1),
    RoundPublished(round=1, version="b" * 64),
    RoundFailed(round=2, reason="nobody came"),
]
DATA = bytes(i % 253 for i in range(2 * LEAF_BYTES + 1000))
CHUNKS = [DATA[i : i + LEAF_BYTES] for i in range(0, len(DATA), LEAF_BYTES)]
LEAVES = [leaf_hash(chunk) for chunk in CHUNKS]
ROOT = merkle_root(LEAVES).hex()


def filled(path: Path) -> Path:
    ledger = Ledger(path)
    for number, fact in enumerate(FACTS):
        ledger.append(fact, at_s=100.0 + number)
    ledger.close()
    return path


def test_events_come_back_in_order_with_their_times_and_hashes(tmp_path: Path) -> None:
    path = filled(tmp_path / "deep" / "ledger.sqlite")
    ledger = Ledger(path)
    assert [entry.event for entry in ledger.entries] == FACTS
    assert [entry.at_s for entry in ledger.entries] == [100.0, 101.0, 102.0, 103.0]
    assert len({entry.hash for entry in ledger.entries}) == len(FACTS)
    assert ledger.head == ledger.entries[-1].hash
    ledger.close()


@pytest.mark.parametrize(
    "tampering",
    [
        "UPDATE events SET body = replace(body, 'nobody', 'someone') WHERE number = 3",
        "UPDATE events SET at_s = 99.0 WHERE number = 1",
        "DELETE FROM events WHERE number = 1",
        "UPDATE events SET hash = (SELECT hash FROM events WHERE number = 0) WHERE number = 2",
        "UPDATE events SET number = 9 WHERE number = 3",
    ],
)
def test_an_altered_ledger_is_not_opened(tmp_path: Path, tampering: str) -> None:
    path = filled(tmp_path / "ledger.sqlite")
    with sqlite3.connect(path) as connection:
        assert connection.execute(tampering).rowcount == 1
    connection.close()
    with pytest.raises(DigestMismatch, match="event"):
        Ledger(path)


def test_a_file_that_is_no_database_is_one_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    path.write_bytes(b"this is not a database, but it is long enough to look like one" * 100)
    with pytest.raises(ResourceError, match=r"ledger\.sqlite"):
        Ledger(path)


def test_uploads_outlive_a_restart_and_end_with_their_event(tmp_path: Path) -> None:
    row = UploadRow("u1", 1, "a" * 64, b"envelope", b"leaves")
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.begin_upload(row)
    ledger.close()
    ledger = Ledger(tmp_path / "ledger.sqlite")
    assert ledger.uploads() == [row]
    ledger.append(FACTS[0], at_s=1.0, ends_upload="u1")
    assert ledger.uploads() == []
    ledger.close()


def test_an_upload_becomes_a_blob_named_by_its_root(tmp_path: Path) -> None:
    blobs = BlobStore(tmp_path)
    blobs.begin_part("u1")
    offset = 0
    for chunk in CHUNKS:
        offset = blobs.write_part("u1", offset, chunk, LEAVES, len(DATA))
    assert blobs.finish_part("u1", ROOT).read_bytes() == DATA
    assert blobs.path(ROOT).read_bytes() == DATA
    assert blobs.part_bytes("u1") == 0


@pytest.mark.parametrize("offset", [1, LEAF_BYTES, -LEAF_BYTES])
def test_only_the_next_leaf_is_taken(tmp_path: Path, offset: int) -> None:
    blobs = BlobStore(tmp_path)
    with pytest.raises(BadOffset):
        blobs.write_part("u1", offset, CHUNKS[0], LEAVES, len(DATA))
    with pytest.raises(DigestMismatch):
        blobs.write_part("u1", 0, CHUNKS[1], LEAVES, len(DATA))
    assert blobs.part_bytes("u1") == 0


@pytest.mark.parametrize("garbage", [b"", b"x", CHUNKS[1][:-1], b"\0" * LEAF_BYTES])
def test_after_a_crash_a_part_keeps_its_whole_and_correct_leaves(tmp_path: Path, garbage: bytes) -> None:
    blobs = BlobStore(tmp_path)
    blobs.part_path("u1").write_bytes(CHUNKS[0] + garbage)
    assert blobs.recover_part("u1", LEAVES) == LEAF_BYTES
    assert blobs.write_part("u1", LEAF_BYTES, CHUNKS[1], LEAVES, len(DATA)) == 2 * LEAF_BYTES


@pytest.mark.parametrize("root", ["", "..", "../../etc/passwd", "A" * 64, "0" * 63, "0" * 64])
def test_a_name_from_outside_is_never_a_path(tmp_path: Path, root: str) -> None:
    with pytest.raises(UnknownVersion):
        BlobStore(tmp_path).path(root)


@pytest.mark.parametrize("change", [b"", b"".join(LEAVES[:-1]), b"".join(LEAVES) + b"\0" * 32, b"".join(LEAVES[::-1])])
def test_leaf_hashes_must_fit_the_size_and_the_root(change: bytes) -> None:
    assert split_leaf_hashes(b"".join(LEAVES), len(DATA), ROOT) == LEAVES
    with pytest.raises(DigestMismatch):
        split_leaf_hashes(change, len(DATA), ROOT)
