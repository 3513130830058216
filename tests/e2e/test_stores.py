"""Stores are copied whole, and garbage collection never deletes what a verification or the next round needs."""

from __future__ import annotations

import json
import shutil
import time
from contextlib import closing
from pathlib import Path

import pytest

from fedmerge.cli.copy import copy
from fedmerge.cli.gc import gc
from fedmerge.config import Config
from fedmerge.coordinator.coordinator import Coordinator
from fedmerge.errors import ConfigError, ResourceError, UnknownVersion
from fedmerge.store.blobs import BlobStore
from fedmerge.tensors import Checkpoint
from fedmerge.verify import History, replay, verify_directory
from tests.buckets import BucketServer
from tests.conftest import make_config
from tests.databases import PostgresServer
from tests.e2e.test_federation import coordinator_key, run_simulated

# An outer state, steps, and candidates that a search leaves behind.
EXTRA = "[outer]\nname = 'nesterov'\nlr = 0.7\n[delta]\ndownlink = 'steps'\nsnapshot_every = 1\n"


def collect(config_path: Path, capsys: pytest.CaptureFixture[str], **options: object) -> list[str]:
    """Run `fedmerge gc --json` and return the roots that it deleted."""
    capsys.readouterr()
    gc(config_path, json=True, **options)  # type: ignore[arg-type]
    found: list[str] = json.loads(capsys.readouterr().out)["blobs"]
    return found


def with_orphans(config: Config, folder: Path) -> set[str]:
    """Store blobs that nothing leads to."""
    roots = set()
    for number in range(3):
        (folder / "orphan").write_bytes(b"nobody knows me" * (number + 1))
        roots.add(config.open_blobs().add(folder / "orphan"))
    return roots


def history_of(folder: Path, num_rounds: int) -> History:
    directory = folder / "state" / "models" / f"round-{num_rounds:04d}"
    return verify_directory(directory, coordinator_key(folder))[1]


def test_only_what_nothing_leads_to_is_deleted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_simulated(tmp_path, num_rounds=2, extra=EXTRA)
    config, path = make_config(tmp_path, num_rounds=3, extra=EXTRA)
    blobs = BlobStore(tmp_path / "state" / "blobs")
    before = {found.root for found in blobs.stored()}
    orphans = with_orphans(config, tmp_path)
    assert set(collect(path, capsys, dry_run=True)) == orphans
    assert set(collect(path, capsys)) == orphans
    assert {found.root for found in blobs.stored()} == before
    assert replay(history_of(tmp_path, 2), Checkpoint(tmp_path / "base"), blobs).passed
    undisturbed = run_simulated(tmp_path / "undisturbed", num_rounds=3, extra=EXTRA)
    assert run_simulated(tmp_path, num_rounds=3, extra=EXTRA).version == undisturbed.version
    assert collect(path, capsys) == []


def test_old_deltas_go_only_when_asked_for_and_everything_else_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_simulated(tmp_path, num_rounds=2, extra=EXTRA)
    _, path = make_config(tmp_path, num_rounds=3, extra=EXTRA)
    deleted = collect(path, capsys, forget_before=2)
    history = history_of(tmp_path, 2)
    assert set(deleted) == {delta.payload_root for delta in history.deltas.values() if delta.round == 1}
    with pytest.raises(UnknownVersion):
        replay(history, Checkpoint(tmp_path / "base"), BlobStore(tmp_path / "state" / "blobs"))
    undisturbed = run_simulated(tmp_path / "undisturbed", num_rounds=3, extra=EXTRA)
    assert run_simulated(tmp_path, num_rounds=3, extra=EXTRA).version == undisturbed.version


def test_nothing_is_deleted_while_a_coordinator_leads_or_for_rounds_to_come(tmp_path: Path) -> None:
    run_simulated(tmp_path)
    config, path = make_config(tmp_path)
    orphans = with_orphans(config, tmp_path)
    with (
        closing(Coordinator(config, tmp_path / "base", clock=time.time)),
        pytest.raises(ResourceError, match="another coordinator"),
    ):
        gc(path)
    with pytest.raises(ConfigError, match="only 1 round"):
        gc(path, forget_before=2)
    assert orphans <= {found.root for found in config.open_blobs().stored()}


def test_a_federation_goes_on_from_another_database_and_bucket(
    tmp_path: Path, postgres: PostgresServer, bucket_server: BucketServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable, value in bucket_server.environ.items():
        monkeypatch.setenv(variable, value)
    run_simulated(tmp_path, num_rounds=1, extra=EXTRA)
    _, path = make_config(tmp_path, num_rounds=1, extra=EXTRA)
    database, bucket = postgres.new_database(), bucket_server.new_bucket()
    for _ in range(2):
        copy(path, database=database, blobs=bucket)
    (tmp_path / "state" / "ledger.sqlite").rename(tmp_path / "old.sqlite")
    for folder in (tmp_path / "state" / "blobs").glob("??"):
        shutil.rmtree(folder)
    extra = EXTRA + f"[store]\ndatabase = '{database}'\nblobs = '{bucket}'\n"
    undisturbed = run_simulated(tmp_path / "undisturbed", num_rounds=2, extra=EXTRA)
    assert run_simulated(tmp_path, num_rounds=2, extra=extra).version == undisturbed.version
    config, path = make_config(tmp_path, num_rounds=2, extra=extra)
    assert replay(history_of(tmp_path, 2), Checkpoint(tmp_path / "base"), config.open_blobs()).passed
    with pytest.raises(ResourceError, match="another ledger"):
        copy(path, database=f"sqlite:///{tmp_path / 'undisturbed' / 'state' / 'ledger.sqlite'}")
