"""Where blobs lie: a folder and a bucket keep the same promises."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import obstore
import pytest
from obstore.store import from_url

from fedmerge.errors import DigestMismatch, ResourceError, UnknownVersion
from fedmerge.store.blobs import BlobStore
from fedmerge.store.objects import ObjectShelf
from fedmerge.store.shelves import FolderShelf
from fedmerge.transparency.merkle import LEAF_BYTES, leaf_hash, leaves_of, merkle_root
from tests.buckets import BucketServer

Open: TypeAlias = Callable[[str], BlobStore]


@pytest.fixture(params=["folder", "bucket"])
def opened(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Open:
    """Opens the blob store of a coordinator, by its name; all of them share what is stored."""
    if request.param == "folder":
        return lambda name: BlobStore(tmp_path / name, FolderShelf(tmp_path / "shared"))
    server: BucketServer = request.getfixturevalue("bucket_server")
    for variable, value in server.environ.items():
        monkeypatch.setenv(variable, value)
    url = server.new_bucket()
    return lambda name: BlobStore(tmp_path / name, ObjectShelf(url, tmp_path / name))


def payload(path: Path, num_bytes: int) -> str:
    """Write a file of random bytes and return its Merkle root."""
    path.write_bytes(random.Random(num_bytes).randbytes(num_bytes))
    return merkle_root(leaves_of(path)).hex()


@pytest.mark.parametrize("num_bytes", [1, LEAF_BYTES + 1, 40_000_000])
def test_a_blob_is_there_for_all_with_every_byte(opened: Open, tmp_path: Path, num_bytes: int) -> None:
    root = payload(tmp_path / "file", num_bytes)
    data = (tmp_path / "file").read_bytes()
    first, second = opened("first"), opened("second")
    assert not first.has(root)
    with pytest.raises(UnknownVersion):
        second.path(root)
    assert first.add(tmp_path / "file") == root
    for store in (first, second, opened("third")):
        assert store.has(root)
        assert store.path(root).read_bytes() == data
    assert [(found.root, found.num_bytes) for found in second.stored()] == [(root, num_bytes)]
    second.drop(root)
    assert not first.has(root)
    assert list(first.stored()) == []
    second.drop(root)


def test_an_upload_becomes_a_blob_and_storing_it_twice_changes_nothing(opened: Open, tmp_path: Path) -> None:
    root = payload(tmp_path / "file", LEAF_BYTES + 1000)
    data, leaves = (tmp_path / "file").read_bytes(), leaves_of(tmp_path / "file")
    for name in ("first", "second", "first"):
        blobs = opened(name)
        blobs.begin_part("u1")
        stored = blobs.write_part("u1", 0, data[:LEAF_BYTES], leaves, len(data))
        blobs.write_part("u1", stored, data[LEAF_BYTES:], leaves, len(data))
        blobs.finish_part("u1", root)
        assert blobs.part_bytes("u1") == 0
        assert blobs.path(root).read_bytes() == data


def test_what_lies_beside_blobs_is_not_one(opened: Open, tmp_path: Path) -> None:
    blobs = opened("first")
    blobs.part_path("u1").write_bytes(b"part")
    assert list(blobs.stored()) == []


@pytest.fixture
def bucket(bucket_server: BucketServer, monkeypatch: pytest.MonkeyPatch) -> str:
    for variable, value in bucket_server.environ.items():
        monkeypatch.setenv(variable, value)
    return bucket_server.new_bucket()


def test_an_object_that_was_changed_is_not_used(tmp_path: Path, bucket: str) -> None:
    root = payload(tmp_path / "file", 1000)
    ObjectShelf(bucket, tmp_path / "first").install(tmp_path / "file", root)
    obstore.put(from_url(bucket), f"{root[:2]}/{root}", b"something else")
    with pytest.raises(DigestMismatch, match="changed"):
        ObjectShelf(bucket, tmp_path / "second").find(root)
    assert not list((tmp_path / "second").rglob("*.*"))


def test_a_bucket_that_is_not_there_is_one_clear_error(tmp_path: Path, bucket: str) -> None:
    with pytest.raises(ResourceError, match="nobodys-bucket") as caught:
        ObjectShelf("s3://nobodys-bucket/x", tmp_path / "cache")
    assert "AWS_ENDPOINT" in (caught.value.hint or "")


def test_a_server_that_is_away_is_one_clear_error(tmp_path: Path, bucket: str) -> None:
    server = BucketServer()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT", server.environ["AWS_ENDPOINT"])
        shelf = ObjectShelf(server.new_bucket(), tmp_path / "cache", patience_s=0.5)
    server.stop()
    for ask in (shelf.has, shelf.find, shelf.drop):
        with pytest.raises(ResourceError, match="s3://bucket1/"):
            ask(leaf_hash(b"x").hex())
