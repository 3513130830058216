"""Exports: what an outsider gets, in equal bytes each time, and whatever was changed in them is found."""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
import tarfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from fedmerge.archive import opened
from fedmerge.cli.app import main
from fedmerge.config import load_config
from fedmerge.errors import NotAllowed, VerificationError
from fedmerge.publishing.export import (
    BLOBS,
    CHECKPOINT,
    LOG,
    MANIFEST,
    MANIFEST_SIGNATURE,
    RECEIPTS,
    export,
    publication,
)
from fedmerge.statements import Export, MergeRecord, Rejection
from fedmerge.store.blobs import BlobStore
from fedmerge.store.database import Database
from fedmerge.store.ledger import Ledger
from fedmerge.store.shelves import FolderShelf
from fedmerge.tensors import Checkpoint
from fedmerge.transparency.log import LogCheckpoint, log_leaf, log_origin, sign_checkpoint
from fedmerge.transparency.merkle import merkle_root
from fedmerge.trust.keys import TrustStore
from fedmerge.trust.sign import SigningKey
from fedmerge.verify import Check, Checklist, examine_export, replay_rounds
from fedmerge_client.link import GrpcLink
from tests.conftest import Federation, ServerProcess
from tests.e2e.test_verify import Published, failures, foreign, published

__all__ = ["foreign", "published"]


def write(published: Published, target: Path, **options: Any) -> Export:
    config = load_config(published.folder / "fedmerge.toml", environ={})
    with closing(Ledger(Database(config.database_url()))) as ledger:
        models = config.federation.state / "models"
        return export(ledger, config.open_blobs(), models, published.key, target, **options)


@pytest.fixture(scope="module")
def folder(published: Published, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export with deltas, as a folder. Never changed."""
    target = tmp_path_factory.mktemp("export") / "whole"
    write(published, target, with_deltas=True)
    return target


def examined(path: Path, published: Published, scratch: Path) -> list[Check]:
    """Check an export, and replay what it has."""
    checks = Checklist()
    with opened(path) as directory:
        found = examine_export(directory, published.trusted, checks)
        if found is not None and (directory / BLOBS).is_dir():
            blobs = BlobStore(scratch, FolderShelf(directory / BLOBS))
            replay_rounds(found[1], Checkpoint(published.folder / "base"), blobs, checks)
    return checks.checks


def test_an_export_checks_itself_whole_or_in_part(published: Published, folder: Path, tmp_path: Path) -> None:
    names = [
        "signature",
        "files",
        "log",
        "events",
        "history",
        "deltas",
        "members",
        "witnesses",
        "receipts",
        "published",
    ]
    checks = examined(folder, published, tmp_path)
    assert [(check.name, check.outcome) for check in checks] == [(name, "ok") for name in [*names, "blobs", "replay"]]
    write(published, tmp_path / "last.tar", rounds=[3], with_deltas=True)
    checks = examined(tmp_path / "last.tar", published, tmp_path)
    assert failures(checks) == []
    replayed = [(check.outcome, check.detail) for check in checks if check.name == "replay"]
    assert [outcome for outcome, _ in replayed] == ["not checked", "not checked", "ok"]
    assert replayed[-1][1] == "merging the deltas of 1 rounds again gives the same bits"
    write(published, tmp_path / "small")
    checks = examined(tmp_path / "small", published, tmp_path)
    assert [(check.name, check.outcome) for check in checks] == [(name, "ok") for name in names]
    assert not (tmp_path / "small" / BLOBS).exists()


def test_the_same_ledger_gives_the_same_bytes_which_tar_opens(published: Published, tmp_path: Path) -> None:
    for name in ("one.tar", "other.tar"):
        write(published, tmp_path / name, with_deltas=True)
    assert (tmp_path / "one.tar").read_bytes() == (tmp_path / "other.tar").read_bytes()
    with tarfile.open(tmp_path / "one.tar") as tar:
        members = tar.getmembers()
        tar.extractall(tmp_path / "out", filter="data")
    assert [member.name for member in members] == sorted(member.name for member in members)
    assert {(member.mtime, member.uid, member.uname, member.mode) for member in members} == {(0, 0, "", 0o644)}
    assert failures(examined(tmp_path / "out", published, tmp_path)) == []


def test_a_changed_byte_of_any_file_is_found(published: Published, folder: Path, tmp_path: Path) -> None:
    copy, rng = tmp_path / "copy", random.Random(7)
    shutil.copytree(folder, copy)
    for path in sorted(each for each in copy.rglob("*") if each.is_file()):
        original, name = path.read_bytes(), path.relative_to(copy).as_posix()
        places = (
            {rng.randrange(len(original))} if name.startswith(BLOBS) else {0, len(original) // 2, len(original) - 1}
        )
        for position in places:
            changed = bytearray(original)
            changed[position] ^= 1 << rng.randrange(8)
            path.write_bytes(changed)
            checks = Checklist()
            examine_export(copy, published.trusted, checks)
            blamed = {MANIFEST: "signature", MANIFEST_SIGNATURE: "signature"}.get(name, name.split("/")[0])
            blamed = {BLOBS: "blobs", "signature": "signature"}.get(blamed, "files")
            found = [check for check, _, detail in failures(checks.checks) if Path(name).name in detail]
            assert blamed in found, (name, position)
        path.write_bytes(original)
    assert failures(examined(copy, published, tmp_path)) == []


def test_a_changed_byte_of_the_tar_is_found(published: Published, tmp_path: Path) -> None:
    path, rng = tmp_path / "export.tar", random.Random(8)
    write(published, path)
    original = path.read_bytes()
    for position in {0, 100, 156, len(original) - 1, *(rng.randrange(len(original)) for _ in range(24))}:
        changed = bytearray(original)
        changed[position] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
        try:
            found = failures(examined(path, published, tmp_path))
        except VerificationError as err:
            found = [("archive", err.reason, err.message)]
        assert found, position
        named = ("files", "log", "signature", "receipts", "published", "archive")
        assert found[0][0] in named, found
    for cut in (0, 511, 1024, len(original) - 512):
        path.write_bytes(original[:cut])
        with pytest.raises(VerificationError, match=r"ends in the middle|does not end as it should"):
            examined(path, published, tmp_path)


@pytest.mark.parametrize(
    "member",
    ["../escape", "/etc/passwd", "a/../../b", "blobs/.hidden", "a" * 120, "x\\y", "", "a/b/c/d/e"],
)
def test_a_tar_made_elsewhere_writes_nothing_outside(tmp_path: Path, member: str) -> None:
    path = tmp_path / "evil.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        tar.addfile(tarfile.TarInfo(member))
    with pytest.raises(VerificationError), opened(path):
        pass
    assert sorted(each.name for each in tmp_path.iterdir()) == ["evil.tar"]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.CHRTYPE, tarfile.XHDTYPE])
def test_links_folders_and_devices_are_no_members(tmp_path: Path, kind: bytes) -> None:
    path, member = tmp_path / "evil.tar", tarfile.TarInfo("log.jsonl")
    member.type, member.linkname, member.mode = kind, "/etc/passwd", 0o644
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        tar.addfile(member)
    with pytest.raises(VerificationError, match=r"no plain file|is not a name"), opened(path):
        pass


class Forgery:
    """An export whose log the coordinator itself changes, chains and signs again."""

    def __init__(self, published: Published, folder: Path, target: Path) -> None:
        shutil.copytree(folder, target)
        self.key, self.own, self.folder = published.key, published.trusted, target
        lines = [json.loads(line) for line in (target / LOG).read_text().splitlines()]
        self.events = [(line["at_s"], json.loads(line["event"])) for line in lines]

    def places(self, kind: str, round_number: int | None = None) -> list[int]:
        found = [number for number, (_, event) in enumerate(self.events) if event["kind"] == kind]
        return [n for n in found if round_number is None or self.events[n][1].get("round") == round_number]

    def change_record(self, round_number: int, change: Callable[[MergeRecord], dict[str, object]]) -> None:
        _, event = self.events[self.places("merge_finished", round_number)[0]]
        record, _ = MergeRecord.open(event["record_envelope"].encode(), self.own, where="record")
        event["record_envelope"] = record.model_copy(update=change(record)).sign(self.key).decode()

    def seal(self) -> None:
        """Chain and sign the log again, and all that is signed over it, but for receipts and what members said."""
        head, lines, leaves = hashlib.sha256(b"fedmerge.ledger.v1").digest(), [], []
        for number, (at_s, event) in enumerate(self.events):
            body = json.dumps(event).encode()
            at = float.fromhex(at_s).hex().encode()
            head = hashlib.sha256(head + number.to_bytes(8, "big") + at + b"\n" + body).digest()
            lines.append(json.dumps({"at_s": at_s, "hash": head.hex(), "event": body.decode()}) + "\n")
            leaves.append(log_leaf(head.hex()))
        (self.folder / LOG).write_text("".join(lines))
        manifest = Export.from_payload((self.folder / MANIFEST).read_bytes(), where=MANIFEST)
        origin = log_origin(manifest.federation, manifest.run)
        note = sign_checkpoint(LogCheckpoint(origin, len(leaves), merkle_root(leaves)), self.key)
        (self.folder / CHECKPOINT).write_bytes(note)
        self.sign(num_events=len(leaves))

    def sign(self, **changes: object) -> None:
        manifest = Export.from_payload((self.folder / MANIFEST).read_bytes(), where=MANIFEST)
        found = {name: hashlib.sha256((self.folder / name).read_bytes()).hexdigest() for name in manifest.files}
        manifest = manifest.model_copy(update={"files": found, **changes})
        (self.folder / MANIFEST).write_bytes(manifest.to_payload())
        (self.folder / MANIFEST_SIGNATURE).write_bytes(manifest.sign(self.key))


def drop_a_delta(forgery: Forgery) -> None:
    del forgery.events[forgery.places("delta_accepted", 2)[0]]


def leave_a_delta_out_of_a_merge(forgery: Forgery) -> None:
    forgery.change_record(2, lambda record: {"contributions": record.contributions[1:]})


def merge_a_delta_of_before(forgery: Forgery) -> None:
    earlier: list[object] = []
    forgery.change_record(1, lambda record: earlier.extend(record.contributions) or {})  # type: ignore[func-returns-value]
    forgery.change_record(2, lambda record: {"contributions": [*record.contributions, earlier[0]]})


def seal_before_the_deltas(forgery: Forgery) -> None:
    sealed, last = forgery.places("round_sealed", 2)[0], forgery.places("delta_accepted", 2)[-1]
    forgery.events.insert(last, forgery.events.pop(sealed))


def drop_a_round(forgery: Forgery) -> None:
    first, after = forgery.places("round_opened", 2)[0], forgery.places("round_opened", 3)[0]
    del forgery.events[first:after]


def count_more_examples(forgery: Forgery) -> None:
    forgery.events[forgery.places("delta_accepted", 1)[0]][1]["num_examples"] = 10**6


def take_a_delta_of_nobody(forgery: Forgery) -> None:
    _, delta = forgery.events[forgery.places("delta_accepted", 1)[0]]
    (enrolled,) = (n for n in forgery.places("member_admitted") if forgery.events[n][1]["node_id"] == delta["node_id"])
    del forgery.events[enrolled]


def say_another_organisation(forgery: Forgery) -> None:
    forgery.events[forgery.places("member_admitted")[0]][1]["organisation"] = "Friends of the coordinator"


def make_up_why_a_delta_was_refused(forgery: Forgery) -> None:
    _, delta = forgery.events[forgery.places("delta_accepted", 2)[0]]
    manifest = Export.from_payload((forgery.folder / MANIFEST).read_bytes(), where=MANIFEST)
    said = {"round": 2, "node_id": delta["node_id"], "statement_digest": "0" * 64, "reason": "INVALID_DELTA"}
    rejection = Rejection.model_validate(
        {"federation": manifest.federation, "run": manifest.run, **said, "detail": "a"}
    )
    event = {"kind": "delta_rejected", **said, "detail": "b", "envelope": rejection.sign(forgery.key).decode()}
    forgery.events.insert(forgery.places("round_sealed", 2)[0], (float(0).hex(), event))


def alter_the_recipe(forgery: Forgery) -> None:
    forgery.change_record(3, lambda record: {"merge": {"method": "ties"}})


def alter_a_weight(forgery: Forgery) -> None:
    def heavier(record: MergeRecord) -> dict[str, object]:
        first, *others = record.contributions
        return {"contributions": [first.model_copy(update={"weight": 0.9}), *others]}

    forgery.change_record(2, heavier)


LOGS: list[tuple[Callable[[Forgery], None], str, str]] = [
    (drop_a_delta, "events", "the merge of round 2 has a delta of node .* that was not sealed for it"),
    (leave_a_delta_out_of_a_merge, "events", "the merge of round 2 leaves out the delta of node"),
    (merge_a_delta_of_before, "events", "the merge of round 2 has a delta of node .* that was not sealed for it"),
    (seal_before_the_deltas, "events", "is late, or was there before|is not of the round that was sealed"),
    (drop_a_round, "history", "round 3: does not follow from the round before: it starts from version"),
    (count_more_examples, "events", "delta_accepted says something else than its statement"),
    (take_a_delta_of_nobody, "events", "which was not enrolled as a node then"),
    (make_up_why_a_delta_was_refused, "events", "delta_rejected says something else than its statement"),
    (say_another_organisation, "events", "member_admitted says something else than its statement"),
    (alter_the_recipe, "history", "round 3: was not merged as its round spec promised"),
    (alter_a_weight, "replay", "round 2: screening the same deltas again gives node .* weight"),
]


@pytest.mark.parametrize("case", LOGS, ids=[each[0].__name__ for each in LOGS])
def test_a_log_that_the_coordinator_signed_again_is_found_out(
    published: Published,
    folder: Path,
    tmp_path: Path,
    case: tuple[Callable[[Forgery], None], str, str],
) -> None:
    forge, name, reason = case
    forgery = Forgery(published, folder, tmp_path / "forged")
    forge(forgery)
    forgery.seal()
    found = failures(examined(forgery.folder, published, tmp_path))
    assert any(check == name and re.search(reason, detail) for check, _, detail in found), found
    # The members saw the history that was: what they cosigned is not of this one.
    assert any(check == "log" and "events that its checkpoint was signed for" in detail for check, _, detail in found)


def test_files_of_another_round_or_federation_do_not_fit(
    published: Published, foreign: Published, folder: Path, tmp_path: Path
) -> None:
    write(foreign, tmp_path / "foreign", with_deltas=True)
    checks = examined(tmp_path / "foreign", published, tmp_path)
    assert [(name, reason) for name, reason, _ in failures(checks)] == [("signature", "UNTRUSTED_KEY")]
    assert [check.outcome for check in checks] == ["failed", *["not checked"] * 3]

    def replaced(change: Callable[[Path], object]) -> list[tuple[str, str, str]]:
        forgery = Forgery(published, folder, tmp_path / f"forged-{len(list(tmp_path.iterdir()))}")
        change(forgery.folder)
        forgery.sign()
        return failures(examined(forgery.folder, published, tmp_path))

    found = replaced(lambda at: shutil.copy(at / publication(1), at / publication(2)))
    assert [(name, "was published, and" in detail) for name, _, detail in found] == [("published", True)]
    found = replaced(lambda at: shutil.copy(tmp_path / "foreign" / publication(1), at / publication(1)))
    assert [(name, reason) for name, reason, _ in found] == [("published", "UNTRUSTED_KEY")]
    found = replaced(lambda at: shutil.copy(tmp_path / "foreign" / CHECKPOINT, at / CHECKPOINT))
    assert [(name, reason) for name, reason, _ in found] == [("log", "UNTRUSTED_KEY")]
    found = replaced(lambda at: shutil.copy(tmp_path / "foreign" / LOG, at / LOG))
    assert any("is the log of another federation" in detail for _, _, detail in found)
    receipts = (folder / RECEIPTS).read_text().splitlines(keepends=True)
    found = replaced(lambda at: (at / RECEIPTS).write_text("".join(receipts[1:])))
    assert [(name, "has no receipt of the delta" in detail) for name, _, detail in found] == [("receipts", True)]
    found = replaced(lambda at: (at / RECEIPTS).write_text("".join([receipts[1], *receipts[1:]])))
    assert [(name, "no such delta" in detail) for name, _, detail in found] == [("receipts", True)]


def test_swapped_and_missing_blobs_are_named(published: Published, folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    one, other, gone, *_ = sorted(path for path in (copy / BLOBS).rglob("*") if path.is_file())
    kept = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(kept)
    gone.unlink()
    found = [detail for name, _, detail in failures(examined(copy, published, tmp_path)) if name == "blobs"]
    expected = [(one, "was changed after it was delivered"), (other, "was changed"), (gone, "is missing")]
    assert len(found) == 3
    assert all(path.name in each and said in each for each, (path, said) in zip(found, expected, strict=True))


def test_from_the_command_line(published: Published, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, out, pem = str(published.folder / "fedmerge.toml"), str(tmp_path / "export.tar"), tmp_path / "c.pem"
    pem.write_text(published.key.public.pem())
    assert main(["export", config, "--out", out, "--rounds", "2-3", "--with-deltas", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bytes"] == Path(out).stat().st_size
    verify = ["verify", out, "--key", str(pem)]
    assert main([*verify, "--base", str(published.folder / "base"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["verified"]
    assert [each["outcome"] for each in report["checks"] if each["name"] == "replay"] == ["not checked", "ok"]
    assert main(verify) == 0
    assert "the base model is needed" in capsys.readouterr().out
    for arguments, code, said in (
        (["export", config, "--out", out], 8, "already exists"),
        (["export", config, "--out", out + "x", "--rounds", "0-x"], 2, "expected numbers such as"),
        (["export", config, "--out", out + "x", "--rounds", "9"], 2, "round 9 has no merge"),
        (["export", "--out", "x.tar", "--coordinator", "127.0.0.1:1"], 2, "needs --trust and --key"),
    ):
        assert main(arguments) == code
        assert said in capsys.readouterr().err


def test_an_auditor_fetches_one_and_nobody_else(
    federation: Federation, server: ServerProcess, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = SigningKey.generate()
    key.save(tmp_path / "audit.key")
    TrustStore(federation.config.federation.trusted).add(key.public, "audit", "Audit Ltd", "auditor")
    out = tmp_path / "fetched.tar"
    where = ["--coordinator", server.address, "--trust", str(server.bundle)]
    assert main(["export", "--out", str(out), *where, "--key", str(tmp_path / "audit.key")]) == 0
    assert main(["verify", str(out), "--key", str(server.bundle), "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    checks = {each["name"]: each["outcome"] for each in json.loads(lines[-1])["checks"]}
    assert checks["log"] == "ok"
    assert checks["history"] == "not checked"  # nothing was merged yet
    node = closing(GrpcLink(server.address, server.bundle, federation.keys["north"]))
    with node as link, pytest.raises(NotAllowed, match="may not call FetchExport"):
        link.fetch_export(tmp_path / "other.tar", None, with_deltas=True)
    assert not (tmp_path / "other.tar").exists()
