"""A federation whose coordinator gets another key between its rounds, and those who check it from either key."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from fedmerge.cli.app import main
from fedmerge.coordinator.coordinator import Coordinator
from fedmerge.errors import ConfigError, RevokedKey
from fedmerge.node.node import Node
from fedmerge.node.witness import Witness
from fedmerge.publishing.export import LOG
from fedmerge.publishing.provenance_file import PROVENANCE
from fedmerge.publishing.publish import LINEAGE, SIGNATURE, file_digests
from fedmerge.sim.sites import LocalLink
from fedmerge.statements import Handover, Lineage, MergeRecord
from fedmerge.statements.handover import Pin, sign_handover
from fedmerge.trust.sign import PublicKey, SigningKey
from fedmerge.verify import Checklist, examine_directory
from tests.conftest import Federation, StepTrainer, make_federation
from tests.e2e.test_verify import failures
from tests.provenance import read_provenance, write_provenance


@dataclass
class Rotated:
    """A federation of two rounds, one under each of the coordinator's keys. Never changed: tests work on copies."""

    federation: Federation
    old: SigningKey
    new: SigningKey

    @property
    def folder(self) -> Path:
        return self.federation.folder

    @property
    def published(self) -> Path:
        return self.folder / "state" / "models" / "round-0002"

    def pem(self, key: SigningKey) -> str:
        path = self.folder / f"{key.public.short}.pem"
        path.write_text(key.public.pem())
        return str(path)


def play(federation: Federation, pins: dict[str, Pin]) -> None:
    """Have both nodes deliver a round, and witness it when it is out."""
    coordinator = Coordinator(federation.config, federation.folder / "base", clock=time.time)
    while coordinator.advance():
        pass
    nodes = {}
    for number, (name, key) in enumerate(federation.keys.items()):
        link, home = LocalLink(coordinator, key.public.key_id), federation.folder / "nodes" / name
        pins[name].follow(coordinator.journal.state.handovers)
        witness = Witness(home, link, key, pins[name], time.time)
        trainer = StepTrainer(number)
        nodes[name] = link, Node(link, trainer, key, pins[name], home, base=federation.folder / "base", witness=witness)
    for link, node in nodes.values():
        node.react(link.view())
    while coordinator.advance():
        pass
    for link, node in nodes.values():
        node.react(link.view())
    coordinator.close()


@pytest.fixture(scope="module")
def rotated(tmp_path_factory: pytest.TempPathFactory) -> Rotated:
    folder = tmp_path_factory.mktemp("rotated")
    federation = make_federation(folder, num_rounds=2, extra="[delta]\nvalues = 'int8'\n")
    old = SigningKey.load_or_create(federation.config.federation.key)
    homes = {name: folder / "nodes" / name for name in federation.keys}
    play(federation, {name: Pin(old.public, home / "log") for name, home in homes.items()})
    assert main(["keys", "handover", str(federation.config_path)]) == 0
    new = SigningKey.load(federation.config.federation.key)
    assert SigningKey.load(folder / f"coordinator.key.{old.public.short}").public == old.public != new.public
    # Both nodes had pinned the old key.
    play(federation, {name: Pin(old.public, home / "log") for name, home in homes.items()})
    return Rotated(federation, old, new)


def examined(directory: Path, key: PublicKey) -> Checklist:
    checks = Checklist()
    examine_directory(directory, {key.key_id: key}, checks)
    return checks


@pytest.mark.parametrize("pinned", ["old", "new"])
def test_either_key_verifies_all_of_it(rotated: Rotated, pinned: str, capsys: pytest.CaptureFixture[str]) -> None:
    key, folder = rotated.pem(getattr(rotated, pinned)), rotated.folder
    base = ["--base", str(folder / "base")]
    assert main(["verify", str(rotated.published), "--key", key, "--replay", str(folder / "state"), *base]) == 0
    export = folder / f"{pinned}.tar"
    assert main(["export", str(rotated.federation.config_path), "--out", str(export), "--with-deltas"]) == 0
    assert main(["verify", str(export), "--key", key, *base]) == 0
    shown = capsys.readouterr().out
    line = f"the coordinator's key was handed over: {rotated.old.public.short} to {rotated.new.public.short}"
    assert shown.count(line) == 2
    assert shown.count("merging the deltas of 2 rounds again gives the same bits") == 2
    # Members' checkpoints before and after are of one history.
    logs = [str(folder / "nodes" / name / "log") for name in rotated.federation.keys]
    assert main(["audit", *logs, "--trust", key]) == 0
    (kept,) = Path(logs[0]).glob("handover-*.json")
    assert kept.name == f"handover-{rotated.old.public.short}-{rotated.new.public.short}.json"


class Forgery:
    """A copy of what was published, which whoever has a key of the coordinator's changes and signs again."""

    def __init__(self, rotated: Rotated, directory: Path) -> None:
        shutil.copytree(rotated.published, directory)
        self.rotated, self.directory = rotated, directory
        self.entries = read_provenance(directory / PROVENANCE)

    def place(self, kind: str, number: int = 0) -> int:
        return [place for place, entry in enumerate(self.entries) if entry["kind"] == kind][number]

    def seal(self, key: SigningKey) -> Path:
        write_provenance(self.directory / PROVENANCE, self.entries)
        (self.directory / "model.sig").unlink()
        lineage = Lineage.from_payload((self.directory / LINEAGE).read_bytes(), where="lineage")
        lineage = lineage.model_copy(update={"files": file_digests(self.directory)})
        (self.directory / LINEAGE).write_bytes(lineage.to_payload())
        (self.directory / SIGNATURE).write_bytes(lineage.sign(key))
        return self.directory


def test_a_key_that_was_handed_over_signs_nothing_more(rotated: Rotated, tmp_path: Path) -> None:
    forgery = Forgery(rotated, tmp_path / "late")
    place = forgery.place(MergeRecord.kind, 1)
    new = {rotated.new.public.key_id: rotated.new.public}
    record, _ = MergeRecord.open(forgery.entries[place]["envelope"].encode(), new, where="record")
    forgery.entries[place]["envelope"] = record.sign(rotated.old).decode()
    found = failures(examined(forgery.seal(rotated.new), rotated.new.public).checks)
    assert ("statements", RevokedKey.reason) in [(name, reason) for name, reason, _ in found]

    again = Forgery(rotated, tmp_path / "signed-by-the-old")
    found = failures(examined(again.seal(rotated.old), rotated.old.public).checks)
    assert [(name, reason) for name, reason, _ in found][:1] == [("keys", "HANDOVER_INVALID")]
    assert f"the hand-overs lead to {rotated.new.public.short}" in found[0][2]


def test_a_forged_or_missing_hand_over_leads_nowhere(rotated: Rotated, tmp_path: Path) -> None:
    thief = SigningKey.generate()
    forgery = Forgery(rotated, tmp_path / "forged")
    place = forgery.place(Handover.kind)
    parts = json.loads(sign_handover("test", "r", rotated.old, thief))
    stranger = json.loads(sign_handover("test", "r", SigningKey.generate(), thief))
    forgery.entries[place]["envelope"] = json.dumps({**parts, "envelope": stranger["envelope"]})
    directory = forgery.seal(thief)
    found = [(name, reason) for name, reason, _ in failures(examined(directory, rotated.old.public).checks)]
    assert found == [("signature", "UNTRUSTED_KEY"), ("keys", "HANDOVER_INVALID")]

    missing = Forgery(rotated, tmp_path / "missing")
    del missing.entries[missing.place(Handover.kind)]
    directory = missing.seal(rotated.new)
    found = [(name, reason) for name, reason, _ in failures(examined(directory, rotated.old.public).checks)]
    assert found == [("signature", "UNTRUSTED_KEY")]
    found = [(name, reason) for name, reason, _ in failures(examined(directory, rotated.new.public).checks)]
    assert ("statements", "UNTRUSTED_KEY") in found


def test_a_changed_hand_over_in_an_export_is_named(rotated: Rotated, tmp_path: Path) -> None:
    folder = tmp_path / "export"
    assert main(["export", str(rotated.federation.config_path), "--out", str(folder)]) == 0
    log = folder / LOG
    thief = SigningKey.generate()
    forged = json.dumps(json.loads(sign_handover("test", "r", thief, rotated.new)))
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    for line in lines:
        event = json.loads(line["event"])
        if event["kind"] == "handed_over":
            line["event"] = json.dumps({**event, "handover": forged})
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["verify", str(folder), "--key", rotated.pem(rotated.old)]) == 3
    assert main(["verify", str(folder), "--key", rotated.pem(rotated.new)]) == 3


def test_the_old_key_does_not_start_the_federation_again(rotated: Rotated, tmp_path: Path) -> None:
    config = rotated.federation.config
    old = config.model_copy(
        update={
            "federation": config.federation.model_copy(
                update={"key": rotated.folder / f"coordinator.key.{rotated.old.public.short}"}
            )
        }
    )
    with pytest.raises(ConfigError, match=f"was handed over, to key {rotated.new.public.short}"):
        Coordinator(old, rotated.folder / "base", clock=time.time)
