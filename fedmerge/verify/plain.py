"""Files that nobody has vouched for yet: a signed list of the others, and how much of any is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from fedmerge.errors import BadSignature, DigestMismatch, InputError, VerificationError
from fedmerge.publishing.provenance_file import read_lines
from fedmerge.statements import Export, Lineage, LocalMerge
from fedmerge.trust.sign import MAX_ENVELOPE_BYTES, PublicKey
from fedmerge.verify.checks import Checklist

PLAIN_FILES = "only plain files belong there"
# Of files with one statement after the other, such as a long federation's history.
MAX_TEXT_BYTES = 1 << 30

Manifest = TypeVar("Manifest", Lineage, LocalMerge, Export)


def read_plain(path: Path, max_bytes: int = MAX_ENVELOPE_BYTES) -> bytes:
    """Read a file, and no more of it than `max_bytes` and one. Raises `VerificationError` or `InputError`."""
    with _plain(path), path.open("rb") as file:
        return file.read(max_bytes + 1)


def provenance_lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yield places and lines of a provenance file. Raises `VerificationError` or `InputError`."""
    with _plain(path):
        for number, line in enumerate(read_lines(path), start=1):
            yield f"{path}:{number}", line


@contextmanager
def _plain(path: Path) -> Iterator[None]:
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise VerificationError(f"{path}: {PLAIN_FILES}")
    try:
        yield
    except OSError as err:
        raise InputError(
            f"{path}: can't be read ({err.strerror})", hint="is this a directory that fedmerge published?"
        ) from err


def open_manifest(
    payload_file: Path,
    signature_file: Path,
    kind: type[Manifest],
    trusted: Mapping[str, PublicKey],
    checks: Checklist,
) -> tuple[Manifest, PublicKey] | None:
    """Check who signed a list of files, noted as `signature`; return the list and the key, or None.

    The list is the one that was signed, even if the file beside it says something else.
    """
    payload = read_plain(payload_file)
    with checks.attempt("signature"):
        if not signature_file.exists():
            raise BadSignature(
                f"{payload_file.parent}: not signed, has no {signature_file.name}",
                hint="to sign a merge: fedmerge merge --key",
            )
        manifest, signed = kind.open(read_plain(signature_file), trusted, where=str(signature_file))
        if signed.payload != payload:
            checks.fail("signature", DigestMismatch(f"{payload_file}: differs from what was signed"))
        else:
            checks.ok("signature", f"{payload_file.name} is signed by key {signed.signer.short}")
        return manifest, signed.signer
    return None
