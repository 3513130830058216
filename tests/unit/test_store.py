"""The ledger and the blob store: what is acknowledged is there after a restart, what was altered is noticed."""

from __future__ import annotations

import random
import resource
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from fedmerge.errors import BadOffset, DigestMismatch, ResourceError, UnknownVersion
from fedmerge.events import MergeStarted, RoundCutShort, RoundFailed, RoundPublished, RoundSealed
from fedmerge.store.blobs import BlobStore, split_leaf_hashes
from fedmerge.store.database import REVISION, Database, metadata
from fedmerge.store.entries import BATCH
from fedmerge.store.ledger import Ledger, UploadRow
from fedmerge.store.migrations import scripts
from fedmerge.store.shelves import FolderShelf
from fedmerge.transparency.merkle import LEAF_BYTES, leaf_hash, merkle_root
from tests.databases import PostgresServer

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


@pytest.fixture
def own_postgres() -> Iterator[PostgresServer]:
    """A server that a test may kill."""
    server = PostgresServer()
    yield server
    server.remove()


def filled(url: str) -> Database:
    database = Database(url)
    ledger = Ledger(database)
    for number, fact in enumerate(FACTS):
        ledger.append(fact, at_s=100.0 + number / 3)
    return database


def test_events_come_back_in_order_with_their_times_and_hashes(database_url: str) -> None:
    filled(database_url).close()
    ledger = Ledger(Database(database_url))
    assert [entry.event for entry in ledger.entries] == FACTS
    assert [entry.at_s for entry in ledger.entries] == [100.0 + number / 3 for number in range(4)]
    assert len({entry.hash for entry in ledger.entries}) == len(FACTS)
    assert ledger.head == ledger.entries[-1].hash
    ledger.close()


@pytest.mark.parametrize(
    "tampering",
    [
        "UPDATE events SET body = (SELECT body FROM events WHERE number = 2) WHERE number = 3",
        "UPDATE events SET at_s = 99.0 WHERE number = 1",
        "DELETE FROM events WHERE number = 1",
        "UPDATE events SET hash = (SELECT hash FROM events WHERE number = 0) WHERE number = 2",
        "UPDATE events SET number = 9 WHERE number = 3",
    ],
)
def test_an_altered_ledger_is_not_opened(database_url: str, tampering: str) -> None:
    database = filled(database_url)
    with database.engine.begin() as connection:
        assert connection.exec_driver_sql(tampering).rowcount == 1
    with pytest.raises(DigestMismatch, match="event"):
        Ledger(database)
    database.close()


def long_ledger(path: Path, num_events: int) -> Ledger:
    """Return a ledger with more events than it holds in memory, appended in groups of many sizes."""
    ledger, rng = Ledger(path), random.Random(num_events)
    while (begin := len(ledger.entries)) < num_events:
        facts = [MergeStarted(round=number) for number in range(begin, min(begin + rng.randint(1, 90), num_events))]
        ledger.append(*facts, at_s=float(begin))
    return ledger


@pytest.mark.parametrize("num_events", [BATCH - 1, BATCH, BATCH + 1, 2 * BATCH, 3 * BATCH + 100])
def test_a_long_ledger_is_read_like_a_list_also_after_a_restart(tmp_path: Path, num_events: int) -> None:
    ledger = long_ledger(tmp_path / "ledger.sqlite", num_events)
    entries = list(ledger.entries)
    assert [entry.number for entry in entries] == list(range(num_events))
    assert [entry.event for entry in entries] == [MergeStarted(round=number) for number in range(num_events)]
    rng = random.Random(0)
    bounds = [None, 0, BATCH, num_events, *(rng.randint(-num_events - 9, num_events + 9) for _ in range(30))]
    slices = [slice(rng.choice(bounds), rng.choice(bounds), rng.choice([None, 1, 7, -1, -3])) for _ in range(200)]
    indices = [0, -1, *(rng.randrange(-num_events, num_events) for _ in range(30))]
    again = Ledger(tmp_path / "ledger.sqlite")
    for found in (ledger, again):
        assert (len(found.entries), found.head) == (num_events, entries[-1].hash)
        assert list(reversed(found.entries)) == entries[::-1]
        assert [found.entries[each] for each in slices] == [entries[each] for each in slices]
        assert [found.entries[each] for each in indices] == [entries[each] for each in indices]
        with pytest.raises(IndexError):
            found.entries[num_events]
    again.append(RoundCutShort(round=1, reason="enough"), at_s=1.0)
    assert [entry.number for entry in again.entries] == list(range(num_events + 1))
    ledger.close()
    again.close()


@pytest.mark.parametrize(
    "tampering",
    [
        "UPDATE events SET body = (SELECT body FROM events WHERE number = 2) WHERE number = 3",
        "UPDATE events SET number = -1 WHERE number = 3",
        "DELETE FROM events WHERE number = 3",
        "DELETE FROM events WHERE number > 2",
    ],
)
def test_what_is_altered_while_a_ledger_is_open_is_noticed_when_it_is_read(tmp_path: Path, tampering: str) -> None:
    ledger = long_ledger(tmp_path / "ledger.sqlite", 2 * BATCH)
    newest = ledger.entries[-1]
    database = Database(f"sqlite:///{tmp_path / 'ledger.sqlite'}")
    with database.engine.begin() as connection:
        connection.exec_driver_sql(tampering)
    with pytest.raises(DigestMismatch, match="event 3 does not continue the hash chain"):
        list(ledger.entries)
    assert ledger.entries[-1] == newest
    database.close()
    ledger.close()


def test_a_file_that_is_no_database_is_one_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    path.write_bytes(b"this is not a database, but it is long enough to look like one" * 100)
    with pytest.raises(ResourceError, match=r"ledger\.sqlite"):
        Ledger(path)


def test_a_server_that_is_not_there_is_one_clear_error_without_the_password(tmp_path: Path) -> None:
    with pytest.raises(ResourceError) as caught:
        Database(f"postgresql+psycopg://someone:secret@/ledger?host={tmp_path}")
    assert "someone:***" in caught.value.message
    assert "secret" not in caught.value.message + (caught.value.hint or "")


def test_uploads_outlive_a_restart_and_end_with_their_event(database_url: str) -> None:
    row = UploadRow("u1", 1, "a" * 64, b"envelope", b"leaves")
    ledger = Ledger(Database(database_url))
    ledger.begin_upload(row)
    ledger.close()
    ledger = Ledger(Database(database_url))
    assert ledger.uploads() == [row]
    ledger.append(FACTS[0], at_s=1.0, ends_upload="u1")
    assert ledger.uploads() == []
    ledger.close()


def test_a_ledger_of_before_migrations_is_brought_up_to_date_with_its_events(database_url: str) -> None:
    database = filled(database_url)
    with database.engine.begin() as connection:
        connection.exec_driver_sql("DROP TABLE alembic_version")
        connection.exec_driver_sql("DROP TABLE lease")
    database.close()
    database = Database(database_url)
    assert [entry.event for entry in Ledger(database).entries] == FACTS
    with database.engine.connect() as connection:
        assert connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar() == REVISION
    database.close()


def test_a_ledger_of_a_newer_version_is_refused_and_left_alone(database_url: str) -> None:
    database = filled(database_url)
    with database.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = 'from the future'")
    database.close()
    with pytest.raises(ResourceError, match="newer fedmerge") as caught:
        Database(database_url)
    assert "upgrade fedmerge" in (caught.value.hint or "")


def test_migrations_lead_to_the_tables_that_the_code_uses(database_url: str) -> None:
    database = Database(database_url)
    assert scripts().get_current_head() == REVISION
    with database.engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
    database.close()


def test_two_that_open_an_empty_database_at_once_make_its_tables_once(database_url: str) -> None:
    with ThreadPoolExecutor(4) as pool:
        for database in pool.map(Database, [database_url] * 4):
            database.close()


def test_work_waits_for_a_server_that_is_killed_and_is_done_once(own_postgres: PostgresServer) -> None:
    ledger = Ledger(Database(own_postgres.new_database()))
    ledger.append(FACTS[0], at_s=1.0)
    own_postgres.kill()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(ledger.append, FACTS[1], at_s=2.0)
        own_postgres.start()
        assert waiting.result(60)[0].number == 1
    ledger.close()


def test_whoever_waits_for_a_server_can_be_told_to_stop(own_postgres: PostgresServer) -> None:
    database = Database(own_postgres.new_database())
    ledger = Ledger(database)
    own_postgres.kill()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(ledger.append, FACTS[0], at_s=1.0)
        database.abandon()
        with pytest.raises(ResourceError):
            waiting.result(60)
    own_postgres.start()
    ledger.close()


def test_an_upload_becomes_a_blob_named_by_its_root(tmp_path: Path) -> None:
    blobs = BlobStore(tmp_path)
    blobs.begin_part("u1")
    offset = 0
    for chunk in CHUNKS:
        offset = blobs.write_part("u1", offset, chunk, LEAVES, len(DATA))
    blobs.finish_part("u1", ROOT)
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


def test_a_leaf_that_the_disk_took_half_of_is_taken_whole_later(tmp_path: Path) -> None:
    data = bytes(range(256)) * 1000
    leaves = [leaf_hash(data)]
    store = BlobStore(tmp_path)
    store.begin_part("u")
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(ResourceError, match="large"):
            store.write_part("u", 0, data, leaves, len(data))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert store.part_bytes("u") == 0
    assert store.write_part("u", 0, data, leaves, len(data)) == len(data)


def test_what_could_not_be_synced_has_to_come_again(tmp_path: Path) -> None:
    part = tmp_path / "part"
    part.symlink_to("/dev/null")
    with pytest.raises(ResourceError, match="Invalid argument"):  # which is what that device says to a sync
        FolderShelf(tmp_path / "blobs").install(part, "a" * 64)
    assert not part.is_symlink()


@pytest.mark.parametrize("root", ["", "..", "../../etc/passwd", "A" * 64, "0" * 63, "0" * 64])
def test_a_name_from_outside_is_never_a_path(tmp_path: Path, root: str) -> None:
    with pytest.raises(UnknownVersion):
        BlobStore(tmp_path).path(root)


@pytest.mark.parametrize("change", [b"", b"".join(LEAVES[:-1]), b"".join(LEAVES) + b"\0" * 32, b"".join(LEAVES[::-1])])
def test_leaf_hashes_must_fit_the_size_and_the_root(change: bytes) -> None:
    assert split_leaf_hashes(b"".join(LEAVES), len(DATA), ROOT) == LEAVES
    with pytest.raises(DigestMismatch):
        split_leaf_hashes(change, len(DATA), ROOT)
