"""Blobs in an object store that speaks S3, through obstore; the extra `s3` brings it.

Objects are written in one atomic step and never change, so that several coordinators may share a bucket. What passes
through here is kept in a local folder as well: merges read files. Credentials and the like come from the environment,
as AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT and AWS_ALLOW_HTTP.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import obstore
from obstore import Bytes
from obstore.exceptions import BaseError
from obstore.store import from_url

from fedmerge.errors import DigestMismatch, ResourceError, reporting_os_errors
from fedmerge.store.shelves import ROOT, FolderShelf, Stored
from fedmerge.transparency.merkle import leaves_of, merkle_root

PART_BYTES = 16 << 20


class ObjectShelf:
    """The objects below `url`, s3://BUCKET/PREFIX, and copies of them below the folder `cache`.

    A store that does not answer is asked again for `patience_s` before it is an error. Raises `ResourceError`.
    """

    def __init__(self, url: str, cache: Path, *, patience_s: float = 60.0) -> None:
        self._url = url
        self._cache = FolderShelf(cache)
        self._cache_dir = cache
        with reporting_os_errors(cache):
            cache.mkdir(parents=True, exist_ok=True)
        retry = {"max_retries": 8, "retry_timeout": timedelta(seconds=patience_s)}
        with self._reported():
            self._objects = from_url(url, retry_config=retry)  # type: ignore[call-overload]
            next(iter(obstore.list(self._objects)), None)  # what is wrong with it is reported now, not by an upload

    def has(self, root: str) -> bool:
        """Whether the object is there; a copy in the cache proves nothing."""
        with self._reported():
            try:
                obstore.head(self._objects, _key(root))
            except FileNotFoundError:
                return False
        return True

    def find(self, root: str) -> Path | None:
        """Return the copy, fetched and checked if there is none."""
        return self._cache.find(root) or self._fetch(root)

    def install(self, source: Path, root: str) -> None:
        """Upload the file, then keep it as the copy."""
        with self._reported():
            obstore.put(self._objects, _key(root), source, chunk_size=PART_BYTES)
        self._cache.install(source, root)

    def drop(self, root: str) -> None:
        """Delete the object and the copy."""
        with self._reported():
            obstore.delete(self._objects, _key(root))
        self._cache.drop(root)

    def stored(self) -> Iterator[Stored]:
        """Yield the objects."""
        with self._reported():
            for page in obstore.list(self._objects):
                for found in page:
                    root = found["path"].rpartition("/")[2]
                    if ROOT.fullmatch(root):
                        yield Stored(root, found["size"], found["last_modified"].timestamp())

    def _fetch(self, root: str) -> Path | None:
        scratch = self._cache_dir / f".{secrets.token_hex(8)}"
        try:
            with reporting_os_errors(scratch), scratch.open("wb") as file:
                for chunk in self._chunks(root):
                    file.write(chunk)
            if scratch.stat().st_size == 0:
                return None
            if merkle_root(leaves_of(scratch)).hex() != root:
                raise DigestMismatch(f"{self._url}/{_key(root)}: was changed after it was stored")
            self._cache.install(scratch, root)
        finally:
            scratch.unlink(missing_ok=True)
        return self._cache.find(root)

    def _chunks(self, root: str) -> Iterator[Bytes]:
        """Yield what an object holds; nothing when there is none."""
        with self._reported(), suppress(FileNotFoundError):
            yield from obstore.get(self._objects, _key(root)).stream(min_chunk_size=1 << 20)

    @contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            yield
        except (BaseError, FileNotFoundError) as err:
            first_line = str(err).strip().partition("\n")[0]
            raise ResourceError(
                f"{self._url}: {first_line}", hint="are the bucket, AWS_ENDPOINT and the credentials right?"
            ) from err


def _key(root: str) -> str:
    return f"{root[:2]}/{root}"
