"""Verification as an outsider does it: whatever was changed is found, for the right reason, and the rest is checked."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import zstandard
from safetensors.torch import save_file

from fedmerge.cli.app import main
from fedmerge.events import MergeFinished, RoundPublished
from fedmerge.publishing.attest import MODEL_SIGNATURE
from fedmerge.publishing.provenance_file import PROVENANCE, ProvenanceFile
from fedmerge.publishing.publish import LINEAGE, SIGNATURE, file_digests
from fedmerge.rounds.provenance import COSIGNATURE, provenance_of
from fedmerge.sim import simulate
from fedmerge.statements import (
    DeltaStatement,
    Lineage,
    MergeRecord,
    MetricsStatement,
    RoundSpec,
    digest_of,
)
from fedmerge.store.blobs import BlobStore
from fedmerge.store.ledger import Ledger
from fedmerge.tensors import Checkpoint
from fedmerge.trust.sign import PublicKey, SigningKey
from fedmerge.verify import Check, Checklist, examine_directory, replay_rounds
from tests.conftest import StepTrainer, make_base, make_config
from tests.provenance import read_provenance, write_provenance

NUM_ROUNDS = 3
TRAINERS = {"north": StepTrainer(1, 10), "south": StepTrainer(2, 20), "west": StepTrainer(3, 30)}


def run_federation(folder: Path) -> Path:
    """Run three rounds of three nodes on a model of 640 numbers; return the last published directory."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "base").mkdir()
    generator = torch.Generator().manual_seed(0)
    tensors = {"matrix": torch.randn(20, 30, generator=generator), "vector": torch.randn(40, generator=generator)}
    save_file(tensors, folder / "base" / "model.safetensors")
    (folder / "base" / "config.json").write_text('{"model_type": "made-up"}')
    extra = "[delta]\nvalues = 'fp32'\n[outer]\nname = 'momentum'\nlr = 0.7\nmomentum = 0.5\n"
    config, _ = make_config(folder, num_rounds=NUM_ROUNDS, min_nodes=2, extra=extra)
    return simulate(config, folder / "base", TRAINERS).model_dir


@dataclass
class Published:
    """A federation that has ended. `folder` is never changed: tests work on copies."""

    folder: Path
    model_dir: Path

    @property
    def key(self) -> SigningKey:
        return SigningKey.load(self.folder / "coordinator.key")

    @property
    def trusted(self) -> dict[str, PublicKey]:
        return {self.key.public.key_id: self.key.public}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Published:
    folder = tmp_path_factory.mktemp("published")
    return Published(folder, run_federation(folder))


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Published:
    """Another federation of the same name, model and nodes, whose coordinator has another key."""
    folder = tmp_path_factory.mktemp("foreign")
    return Published(folder, run_federation(folder))


class Forgery:
    """A copy of a published directory whose history the coordinator itself changes, and signs again."""

    def __init__(self, published: Published, directory: Path) -> None:
        shutil.copytree(published.model_dir, directory)
        self.key, self.own, self.directory = published.key, published.trusted, directory
        found = read_provenance(directory / PROVENANCE)
        self.entries = [(entry["kind"], entry["envelope"].encode()) for entry in found]

    def places(self, kind: str) -> list[int]:
        return [number for number, entry in enumerate(self.entries) if entry[0] == kind]

    def record(self, round_number: int) -> tuple[int, MergeRecord]:
        place = self.places(MergeRecord.kind)[round_number - 1]
        return place, MergeRecord.open(self.entries[place][1], self.own, where="record")[0]

    def change_record(self, round_number: int, **changes: object) -> None:
        place, record = self.record(round_number)
        self.entries[place] = (MergeRecord.kind, record.model_copy(update=changes).sign(self.key))

    def seal(self) -> None:
        entries = [{"kind": kind, "envelope": envelope.decode()} for kind, envelope in self.entries]
        write_provenance(self.directory / PROVENANCE, entries)
        (self.directory / MODEL_SIGNATURE).unlink()
        lineage = Lineage.from_payload((self.directory / LINEAGE).read_bytes(), where="lineage")
        lineage = lineage.model_copy(update={"files": file_digests(self.directory)})
        (self.directory / LINEAGE).write_bytes(lineage.to_payload())
        (self.directory / SIGNATURE).write_bytes(lineage.sign(self.key))


def examined(
    directory: Path, trusted: dict[str, PublicKey], state: Path | None = None, base: Path | None = None
) -> list[Check]:
    checks = Checklist()
    found = examine_directory(directory, trusted, checks)
    if found and state and base:
        replay_rounds(found[1], Checkpoint(base), BlobStore(state / "blobs"), checks)
    return checks.checks


def failures(checks: list[Check]) -> list[tuple[str, str, str]]:
    return [(check.name, check.reason, check.detail) for check in checks if check.outcome == "failed"]


def test_all_of_an_honest_federation_is_checked(published: Published) -> None:
    checks = examined(published.model_dir, published.trusted, published.folder / "state", published.folder / "base")
    outcomes = {check.name: check.outcome for check in checks}
    names = ("signature", "files", "model.sig", "version", "history", "deltas", "members", "witnesses", "replay")
    assert outcomes == dict.fromkeys(names, "ok") | {"node keys": "not checked"}


def test_a_changed_byte_is_found_wherever_it_is_and_the_rest_checked(published: Published, tmp_path: Path) -> None:
    directory = tmp_path / "copy"
    shutil.copytree(published.model_dir, directory)
    rng = random.Random(5)
    for path in sorted(directory.iterdir()):
        original = path.read_bytes()
        for position in {0, len(original) - 1, *(rng.randrange(len(original)) for _ in range(4))}:
            changed = bytearray(original)
            changed[position] ^= 1 << rng.randrange(8)
            path.write_bytes(changed)
            checks = examined(directory, published.trusted)
            found = failures(checks)
            blamed = "signature" if path.name in {LINEAGE, SIGNATURE} else "files"
            assert [name for name, _, detail in found if path.name in detail][:1] == [blamed], (path.name, position)
            if blamed == "files":  # what does not depend on this file holds all the same
                held = {check.name for check in checks if check.outcome == "ok"}
                assert held >= {"signature"} | ({"history"} if path.name != PROVENANCE else {"version"})
        path.write_bytes(original)
    assert failures(examined(directory, published.trusted)) == []


def test_everything_that_is_wrong_is_said_at_once(
    published: Published, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory, state = tmp_path / "copy", tmp_path / "state"
    shutil.copytree(published.model_dir, directory)
    shutil.copytree(published.folder / "state", state)
    (directory / "README.md").write_text("other")
    (directory / "extra.txt").write_text("more")
    _, statement = next(iter(statements_of(published).items()))
    blob = BlobStore(state / "blobs").path(statement.payload_root)
    blob.write_bytes(blob.read_bytes()[:-1] + b"\0")
    key, base = str(published.folder / "coordinator.key"), str(published.folder / "base")
    (tmp_path / "c.pem").write_text(SigningKey.load(Path(key)).public.pem())
    arguments = ["verify", str(directory), "--key", str(tmp_path / "c.pem"), "--replay", str(state), "--base", base]
    assert main([*arguments, "--json"]) == 3
    shown = capsys.readouterr()
    report = json.loads(shown.out)
    assert report["verified"] is False
    assert "README.md: was changed after it was signed (the first of 3 failures)" in shown.err
    found = [(each["name"], each.get("reason", "")) for each in report["checks"] if each["outcome"] == "failed"]
    assert found == [("files", "DIGEST_MISMATCH")] * 2 + [("replay", "DIGEST_MISMATCH")]
    replayed = [each["detail"] for each in report["checks"] if each["name"] == "replay"]
    assert replayed[0].startswith("round 1: ")
    assert replayed[0].endswith("was changed after it was delivered")
    # From what was published of the round that can't be replayed, the others can.
    assert replayed[1] == "merging the deltas of 2 rounds again gives the same bits"
    assert main(arguments) == 3
    lines = capsys.readouterr().out.splitlines()
    assert [line[:2] for line in lines].count("!!") == 3
    assert not any(line.startswith("verified") for line in lines)


def statements_of(published: Published) -> dict[str, DeltaStatement]:
    lineage = Lineage.from_payload((published.model_dir / LINEAGE).read_bytes(), where="lineage")
    keys = {key_id: PublicKey.from_pem(pem, where=key_id) for key_id, pem in lineage.node_keys.items()}
    found = {}
    for entry in read_provenance(published.model_dir / PROVENANCE):
        if entry["kind"] == DeltaStatement.kind:
            statement, signed = DeltaStatement.open(entry["envelope"].encode(), keys, where="delta")
            found[digest_of(signed.payload)] = statement
    return found


# What a coordinator that signs it all again would have to get past.


def alter_the_recipe(forgery: Forgery, _: Published) -> None:
    forgery.change_record(2, merge={"method": "ties"})


def alter_a_weight(forgery: Forgery, _: Published) -> None:
    _, record = forgery.record(2)
    first, *others = record.contributions
    forgery.change_record(2, contributions=[first.model_copy(update={"weight": 0.9}), *others])


def alter_a_count(forgery: Forgery, _: Published) -> None:
    _, record = forgery.record(2)
    first, *others = record.contributions
    forgery.change_record(2, contributions=[first.model_copy(update={"num_examples": 99}), *others])


def refuse_a_delta(forgery: Forgery, _: Published) -> None:
    _, record = forgery.record(2)
    first, *others = record.contributions
    forgery.change_record(2, contributions=[first.model_copy(update={"accepted": False, "reason": "NORM"}), *others])


def swap_two_deltas(forgery: Forgery, _: Published) -> None:
    _, record = forgery.record(2)
    one, other, *rest = record.contributions
    names = ("statement_digest", "payload_root")
    swapped = [
        one.model_copy(update={name: getattr(other, name) for name in names}),
        other.model_copy(update={name: getattr(one, name) for name in names}),
    ]
    forgery.change_record(2, contributions=[*swapped, *rest])


def drop_a_contribution(forgery: Forgery, _: Published) -> None:
    _, record = forgery.record(2)
    forgery.change_record(2, contributions=record.contributions[1:])


def drop_a_statement(forgery: Forgery, _: Published) -> None:
    del forgery.entries[forgery.places(DeltaStatement.kind)[4]]


def use_a_delta_of_another_round(forgery: Forgery, _: Published) -> None:
    _, former = forgery.record(1)
    _, record = forgery.record(2)
    forgery.change_record(2, contributions=[former.contributions[0], *record.contributions[1:]])


def drop_a_round_in_the_middle(forgery: Forgery, _: Published) -> None:
    del forgery.entries[forgery.record(2)[0]]


def tell_two_rounds_in_another_order(forgery: Forgery, _: Published) -> None:
    (one, _), (other, _) = forgery.record(2), forgery.record(3)
    forgery.entries[one], forgery.entries[other] = forgery.entries[other], forgery.entries[one]


def sign_a_delta_for_a_node(forgery: Forgery, published: Published) -> None:
    place = forgery.places(DeltaStatement.kind)[0]
    statement = next(iter(statements_of(published).values()))
    forged = statement.model_copy(update={"num_examples": 1000}).sign(forgery.key)
    forgery.entries[place] = (DeltaStatement.kind, forged)


def replay_a_statement_of_another_federation(forgery: Forgery, _: Published) -> None:
    place = forgery.places(RoundSpec.kind)[0]
    spec, _ = RoundSpec.open(forgery.entries[place][1], forgery.own, where="spec")
    forgery.entries[place] = (RoundSpec.kind, spec.model_copy(update={"run": "of another"}).sign(forgery.key))


def pass_off_one_kind_for_another(forgery: Forgery, _: Published) -> None:
    place = forgery.places(DeltaStatement.kind)[0]
    forgery.entries[place] = (MetricsStatement.kind, forgery.entries[place][1])


FORGERIES: list[tuple[Callable[[Forgery, Published], None], str, str]] = [
    (alter_the_recipe, "history", "round 2: was not merged as its round spec promised"),
    (alter_a_weight, "replay", "round 2: screening the same deltas again gives node .* weight .* says 0.9"),
    (alter_a_count, "history", "round 2: counts 99 examples of node .*, which signed"),
    (refuse_a_delta, "replay", "round 2: screening the same deltas again accepts other nodes"),
    (swap_two_deltas, "history", "round 2: node .* signed no such delta"),
    (drop_a_contribution, "replay", "round 2: screening the same deltas again gives node .* weight"),
    (drop_a_statement, "history", "round 2: node .* signed no such delta"),
    (use_a_delta_of_another_round, "history", "round 2: node .* signed no such delta"),
    (drop_a_round_in_the_middle, "history", "round 3: does not follow from the round before: it starts from version"),
    (tell_two_rounds_in_another_order, "history", "round 3: does not follow from the round before"),
    (sign_a_delta_for_a_node, "statements", "which is not trusted here"),
    (replay_a_statement_of_another_federation, "statements", "is of federation 'test', run of another"),
    (pass_off_one_kind_for_another, "statements", "signed as .*delta.*, expected .*metrics"),
]


@pytest.mark.parametrize(("forge", "name", "reason"), FORGERIES, ids=[each[0].__name__ for each in FORGERIES])
def test_a_history_that_the_coordinator_signed_again_is_found_out(
    published: Published, tmp_path: Path, forge: Callable[[Forgery, Published], None], name: str, reason: str
) -> None:
    forgery = Forgery(published, tmp_path / "copy")
    forgery.seal()
    state, base = published.folder / "state", published.folder / "base"
    assert failures(examined(forgery.directory, published.trusted, state, base)) == []
    forgery = Forgery(published, tmp_path / "forged")
    forge(forgery, published)
    forgery.seal()
    found = failures(examined(forgery.directory, published.trusted, state, base))
    assert found[0][0] == name, found
    assert re.search(reason, found[0][2]), found


def test_provenance_that_grew_is_that_of_the_whole_ledger_but_for_cosignatures_that_others_replaced(
    published: Published, tmp_path: Path
) -> None:
    entries = list(Ledger(published.folder / "state" / "ledger.sqlite").entries)
    merges = [entry.number for entry in entries if isinstance(entry.event, MergeFinished)]
    ends = [entry.number for entry in entries if isinstance(entry.event, RoundPublished)]
    assert len(merges) == len(ends) == NUM_ROUNDS
    for number, (merge, end) in enumerate(zip(merges, ends, strict=True), start=1):
        # As a coordinator does it that was started again just now.
        ProvenanceFile(tmp_path / "state").write(entries[:end], merge, tmp_path / "whole")
        found = published.model_dir.with_name(f"round-{number:04d}") / PROVENANCE
        assert found.read_bytes() == (tmp_path / "whole").read_bytes()
        told = [(each.kind, each.envelope) for each in provenance_of(entries[:end])]
        last = {text.split()[-2]: text for kind, text in told if kind == COSIGNATURE}
        expected = [each for each in told if each[0] != COSIGNATURE] + [(COSIGNATURE, text) for text in last.values()]
        assert Counter((each["kind"], each["envelope"]) for each in read_provenance(found)) == Counter(expected)
        assert last or number == 1


@pytest.mark.parametrize("happens", ["cut", "gone"])
def test_provenance_that_was_half_written_or_deleted_is_written_whole_later(
    published: Published, tmp_path: Path, happens: str
) -> None:
    entries = list(Ledger(published.folder / "state" / "ledger.sqlite").entries)
    merges = [entry.number for entry in entries if isinstance(entry.event, MergeFinished)]
    file = ProvenanceFile(tmp_path / "state")
    file.write(entries[: merges[0] + 1], merges[0], tmp_path / "first")
    if happens == "gone":
        (tmp_path / "state").unlink()
    else:
        with (tmp_path / "state").open("ab") as half:
            half.write(b"half of a frame")
    file.write(entries, merges[-1], tmp_path / "last")
    ProvenanceFile(tmp_path / "other").write(entries, merges[-1], tmp_path / "whole")
    assert (tmp_path / "last").read_bytes() == (tmp_path / "whole").read_bytes()


@pytest.mark.parametrize("content", [b"\n" * 30_000_000, b"x" * 30_000_000, b"\xff\n"])
def test_provenance_that_fills_the_memory_or_is_no_text_is_refused_whoever_signed_it(
    published: Published, tmp_path: Path, content: bytes
) -> None:
    forgery = Forgery(published, tmp_path / "forged")
    forgery.seal()
    (forgery.directory / PROVENANCE).write_bytes(zstandard.compress(content))
    found = failures(examined(forgery.directory, published.trusted))
    assert ("statements", "BAD_SIGNATURE") in {(name, reason) for name, reason, _ in found}
    assert ("files", "DIGEST_MISMATCH") in {(name, reason) for name, reason, _ in found}


def test_of_many_nodes_a_report_names_the_first(tmp_path: Path) -> None:
    make_base(tmp_path / "base")
    config, _ = make_config(tmp_path, min_nodes=20)
    trainers = {f"node-{number:02}": StepTrainer(number) for number in range(20)}
    model_dir = simulate(config, tmp_path / "base", trainers).model_dir
    key = SigningKey.load(tmp_path / "coordinator.key").public
    (members,) = [check.detail for check in examined(model_dir, {key.key_id: key}) if check.name == "members"]
    named = ", ".join(f"node-{number:02}" for number in range(12))
    assert members == f"the deltas are of 20 organisations: {named}, and 8 more"


def test_another_coordinators_federation_is_nobodys(published: Published, foreign: Published) -> None:
    checks = examined(foreign.model_dir, published.trusted)
    assert [(name, reason) for name, reason, _ in failures(checks)] == [("signature", "UNTRUSTED_KEY")]
    left = {check.name: check.outcome for check in checks if check.name != "signature"}
    assert left == dict.fromkeys(("files", "version", "history"), "not checked")


def test_swapped_and_missing_deltas_are_named(published: Published, tmp_path: Path) -> None:
    state = tmp_path / "state"
    shutil.copytree(published.folder / "state", state)
    blobs = BlobStore(state / "blobs")
    one, other, *_, last = (blobs.path(each.payload_root) for each in statements_of(published).values())
    kept = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(kept)
    last.unlink()
    checks = examined(published.model_dir, published.trusted, state, published.folder / "base")
    found = [(check.outcome, check.detail) for check in checks if check.name == "replay"]
    assert [outcome for outcome, _ in found] == ["failed", "not checked", "ok"]
    assert found[0][1].startswith("round 1: ")
    assert "was changed after it was delivered" in found[0][1]
    assert found[1][1].startswith("round 3: no blob ")
    assert found[2][1] == "merging the deltas of 1 rounds again gives the same bits"
