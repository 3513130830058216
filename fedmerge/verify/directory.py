"""A published directory, checked without any other file than the coordinator's public key."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from fedmerge.errors import BadSignature, DigestMismatch, VerificationError
from fedmerge.publishing.attest import MODEL_KEY, MODEL_SIGNATURE, check_model_signature
from fedmerge.publishing.provenance_file import PROVENANCE
from fedmerge.publishing.publish import ADAPTER, LINEAGE, SIGNATURE, file_digests
from fedmerge.statements import PREDICATE_ROOT, Handover, Lineage, LocalMerge
from fedmerge.tensors import Checkpoint, model_digest
from fedmerge.trust.sign import PublicKey
from fedmerge.verify.checks import Check, Checklist, shortened
from fedmerge.verify.history import Entry, History, Origin, read_history
from fedmerge.verify.keys import KeyLine
from fedmerge.verify.plain import PLAIN_FILES, open_manifest, provenance_lines, read_plain


def verify_directory(directory: Path, trusted: Mapping[str, PublicKey]) -> tuple[Lineage, History, list[Check]]:
    """Do as `examine_directory`, and return what was checked. Raises the first thing that does not hold."""
    checks = Checklist()
    found = examine_directory(directory, trusted, checks)
    checks.require()
    assert found is not None
    return *found, checks.checks


def examine_directory(
    directory: Path, trusted: Mapping[str, PublicKey], checks: Checklist
) -> tuple[Lineage, History] | None:
    """Check everything that needs no other file, note what holds and what does not, and go on after it.

    `trusted` are the coordinators' keys by key id. Returns None when no trusted key signed it, so that there is nothing
    to check against. Raises `InputError` when the directory is not a published model.
    """
    lineage_file, signature_file = directory / LINEAGE, directory / SIGNATURE
    handovers = KeyLine.read(provenance_lines(directory / PROVENANCE), "kind", Handover.kind, "envelope")
    opened = open_manifest(lineage_file, signature_file, Lineage, handovers.trusted(trusted), checks)
    if opened is None:
        handovers.note(checks)
        for name in ("files", "version", "history"):
            checks.skip(name, f"no trusted key says what the {name} should be")
        return None
    lineage, signer = opened
    _check_files(directory, lineage.files, checks)
    _check_version(directory, lineage.model.digest, checks)
    node_keys: dict[str, PublicKey] = {}
    for key_id, pem in lineage.node_keys.items():
        with checks.attempt("statements"):
            node_keys[key_id] = PublicKey.from_pem(pem, where=f"{LINEAGE}: node key {key_id[:12]}")
    origin = Origin(lineage.federation, lineage.run, handovers.up_to(signer, checks), node_keys)
    history = read_history(_entries(directory / PROVENANCE, checks), origin, lineage.model, checks)
    strangers = sorted(key_id for key_id in lineage.node_keys if key_id not in trusted)
    if strangers:
        shown = shortened([key_id[:12] for key_id in strangers])
        checks.skip("node keys", f"the coordinator vouches for the node keys {shown}; you do not know them")
    return lineage, history


def verify_local(directory: Path, trusted: Mapping[str, PublicKey]) -> tuple[LocalMerge, list[Check]]:
    """Check a directory that `fedmerge merge --key` wrote, as `verify_directory` does a federation's."""
    checks = Checklist()
    merge = examine_local(directory, trusted, checks)
    checks.require()
    assert merge is not None
    return merge, checks.checks


def examine_local(directory: Path, trusted: Mapping[str, PublicKey], checks: Checklist) -> LocalMerge | None:
    """Check a directory that `fedmerge merge --key` wrote, as `examine_directory` does a federation's."""
    opened = open_manifest(directory / LINEAGE, directory / SIGNATURE, LocalMerge, trusted, checks)
    if opened is None:
        for name in ("files", "version"):
            checks.skip(name, f"no trusted key says what the {name} should be")
        return None
    merge, _ = opened
    _check_files(directory, merge.files, checks)
    _check_version(directory, merge.model_digest, checks)
    return merge


def is_local(directory: Path) -> bool:
    """Whether a directory says it was merged locally; its signature must then be one over such a statement."""
    return f"{PREDICATE_ROOT}/{LocalMerge.kind}/".encode() in read_plain(directory / LINEAGE)


def _check_files(directory: Path, signed_files: Mapping[str, str], checks: Checklist) -> None:
    for path in directory.iterdir():
        inner = list(path.iterdir()) if path.name == ADAPTER and path.is_dir() and not path.is_symlink() else [path]
        for each in inner:
            if each.is_symlink() or not each.is_file():
                checks.fail("files", VerificationError(f"{each}: {PLAIN_FILES}"))
    found = file_digests(directory) if checks.holds("files") else {}
    for name in sorted(signed_files.keys() | found.keys()) if checks.holds("files") else ():
        if name not in found:
            checks.fail("files", DigestMismatch(f"{directory / name}: is missing"))
        elif name not in signed_files:
            checks.fail("files", DigestMismatch(f"{directory / name}: is not part of what was signed"))
        elif found[name] != signed_files[name]:
            hint = "fetch the model again; do not use this copy"
            checks.fail("files", DigestMismatch(f"{directory / name}: was changed after it was signed", hint=hint))
    if checks.holds("files"):
        checks.ok("files", f"all {len(signed_files)} files have their signed SHA-256, and no other file is there")
    if MODEL_SIGNATURE not in signed_files:
        return
    with checks.attempt("model.sig"):
        model_key, where = PublicKey.load(directory / MODEL_KEY), str(directory / MODEL_SIGNATURE)
        check_model_signature(read_plain(directory / MODEL_SIGNATURE), signed_files, model_key, where=where)
        detail = f"{MODEL_SIGNATURE} names the same files, for OpenSSF model-signing tools and the key in {MODEL_KEY}"
        checks.ok("model.sig", detail)


def _check_version(directory: Path, expected: str, checks: Checklist) -> None:
    with checks.attempt("version"):
        found = model_digest(Checkpoint(directory))
        if found != expected:
            raise DigestMismatch(f"{directory}: the weights are version {found[:12]}, not {expected[:12]}")
        checks.ok("version", f"the weights are version {found[:12]}")


def _entries(path: Path, checks: Checklist) -> Iterator[Entry]:
    """Yield what a provenance file has."""
    with checks.attempt("statements"):
        for where, line in provenance_lines(path):
            try:
                entry = json.loads(line)
                yield Entry(where, str(entry["kind"]), entry["envelope"].encode())
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                checks.fail("statements", BadSignature(f"{where}: not a provenance entry"))
