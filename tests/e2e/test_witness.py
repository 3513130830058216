"""Members as witnesses: a coordinator that tells two histories, or forgets a receipt, is caught with proof in hand."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from fedmerge.cli.app import main
from fedmerge.config import Config, load_config
from fedmerge.coordinator.coordinator import Coordinator
from fedmerge.errors import BadSignature, ConfigError, Equivocation, ReceiptNotListed, UntrustedKey
from fedmerge.node.node import Node
from fedmerge.node.witness import Witness
from fedmerge.rounds.state import Phase
from fedmerge.sim import simulate
from fedmerge.sim.inline import LocalLink
from fedmerge.statements import KeyRotation, RoundSpec
from fedmerge.transparency.log import cosign
from fedmerge.trust.sign import PublicKey, SigningKey
from fedmerge.verify import verify_directory
from fedmerge_client.link import GrpcLink
from tests.cli.conftest import clean_environment, run
from tests.conftest import Federation, StepTrainer, make_config, make_federation

__all__ = ["clean_environment", "run"]

Run = Callable[..., subprocess.CompletedProcess[str]]
MINE = "[delta]\nvalues = 'fp32'\n"


class Site:
    """A node in this process, which can be moved from one coordinator to another."""

    def __init__(self, federation: Federation, name: str) -> None:
        self.home, self.key = federation.folder / "nodes" / name, federation.keys[name]
        self._base = federation.folder / "base"

    def link(self, coordinator: Coordinator) -> LocalLink:
        return LocalLink(coordinator, self.key.public.key_id)

    def witness(self, coordinator: Coordinator) -> Witness:
        return Witness(self.home, self.link(coordinator), self.key, coordinator.key.public, time.time)

    def contribute(self, coordinator: Coordinator) -> None:
        link = self.link(coordinator)
        trainer = StepTrainer(int(self.key.public.key_id[:8], 16))  # no two nodes send the same
        node = Node(link, trainer, self.key, coordinator.key.public, self.home, base=self._base)
        node.react(link.view())

    def observe(self, coordinator: Coordinator) -> int:
        created = coordinator.journal.created
        return self.witness(coordinator).observe(created.federation, created.run).size


def opened(config: Config, base: Path) -> Coordinator:
    coordinator = Coordinator(config, base, clock=time.time)
    while coordinator.advance():
        pass
    return coordinator


def forked(federation: Federation) -> tuple[Coordinator, Coordinator]:
    """Two coordinators with one key and one beginning."""
    base = federation.folder / "base"
    first = opened(federation.config, base)
    first.close()
    other = federation.folder / "other-state"
    shutil.copytree(federation.config.federation.state, other)
    fork = federation.config.model_copy(
        update={"federation": federation.config.federation.model_copy(update={"state": other})}
    )
    return opened(federation.config, base), opened(fork, base)


@pytest.fixture
def federation(tmp_path: Path) -> Federation:
    return make_federation(tmp_path, extra=MINE)


def test_a_coordinator_that_tells_two_histories_is_caught(federation: Federation, run: Run) -> None:
    one, other = forked(federation)
    north, south = Site(federation, "north"), Site(federation, "south")
    (federation.folder / "c.pem").write_text(one.key.public.pem())
    notes = (federation.folder / "nodes" / "north" / "log", federation.folder / "nodes" / "south" / "log")
    audit = ("audit", *notes, "--trust", federation.folder / "c.pem")

    # To begin with both are shown the same.
    assert north.observe(one) == south.observe(other)
    fine = run(*audit)
    assert (fine.returncode, fine.stderr) == (0, "")
    assert fine.stdout.startswith("ok  all 2 checkpoints are signed, and no two of one size differ\n")

    # Then each is told its own delta, and not the other's.
    north.contribute(one)
    south.contribute(other)
    assert north.observe(one) == south.observe(other)
    caught = run(*audit)
    assert caught.returncode == 3
    assert "two histories of" in caught.stderr
    assert "both are signed by the coordinator" in caught.stderr
    # Whoever meets the other one sees it at once, and keeps the proof.
    with pytest.raises(Equivocation, match="two histories"):
        north.observe(other)
    assert list((north.home / "log").glob("fork-*.note"))
    for coordinator in (one, other):
        coordinator.close()


def test_a_coordinator_that_goes_back_is_caught(federation: Federation) -> None:
    one, other = forked(federation)
    north = Site(federation, "north")
    north.contribute(one)
    north.observe(one)
    north.observe(one)
    with pytest.raises(Equivocation, match="shorter"):
        north.observe(other)
    for coordinator in (one, other):
        coordinator.close()


def test_a_node_follows_nobody_but_its_coordinator(federation: Federation) -> None:
    one = opened(federation.config, federation.folder / "base")
    north = Site(federation, "north")
    link = north.link(one)
    node = Node(link, StepTrainer(3), north.key, one.key.public, north.home, base=federation.folder / "base")
    view = link.view()
    spec, _ = RoundSpec.open(view.spec_envelope, {one.key.public.key_id: one.key.public}, where="spec")
    with pytest.raises(UntrustedKey, match="round spec: signed by key"):
        node.react(replace(view, spec_envelope=spec.sign(SigningKey.generate())))
    as_another = view.spec_envelope.replace(b"roundspec", b"candidates")
    with pytest.raises(BadSignature, match=r"round spec: signed as .*candidates"):
        node.react(replace(view, spec_envelope=as_another))
    assert not list(north.home.glob("rounds/*"))
    one.close()


def test_a_receipt_that_is_not_listed_is_proof(federation: Federation) -> None:
    one, other = forked(federation)
    north, south = Site(federation, "north"), Site(federation, "south")
    north.contribute(one)
    south.contribute(other)
    with pytest.raises(ReceiptNotListed, match=r"receipt\.json"):
        north.observe(other)  # for the first time, so that nothing else speaks against it

    # The log lists it, but the merge record does not.
    shutil.rmtree(south.home)
    south.contribute(one)
    while one.advance():
        pass
    assert one.journal.state.phase == Phase.PUBLISHED
    record = one.journal.record()
    assert record is not None
    witness = north.witness(one)
    witness.require_listed(record)
    own = [each for each in record.contributions if each.node_id != north.key.public.key_id]
    with pytest.raises(ReceiptNotListed, match="merge record"):
        witness.require_listed(record.model_copy(update={"contributions": own}))
    for coordinator in (one, other):
        coordinator.close()


def test_only_true_checkpoints_are_cosigned_and_recorded(federation: Federation) -> None:
    one, other = forked(federation)
    north = Site(federation, "north")
    north.contribute(other)
    note = other.log.growth(0).note
    with pytest.raises(BadSignature, match="not one of this log"):
        one.log.cosign(north.key.public.key_id, note, cosign(note, north.key, 0))
    good = one.log.growth(0).note
    with pytest.raises(Exception, match="no signature of key"):
        one.log.cosign(north.key.public.key_id, good, cosign(good, federation.keys["south"], 0))
    for coordinator in (one, other):
        coordinator.close()


def test_a_model_waits_for_its_witnesses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two of three nodes must cosign; the third does not witness anything."""
    names = ("north", "south", "west")
    rounds = "grace_s = 60\npublish_after_cosignatures = 2"
    federation = make_federation(tmp_path, names, min_nodes=3, rounds=rounds, extra=MINE)
    coordinator = opened(federation.config, tmp_path / "base")
    sites = [Site(federation, name) for name in names]
    for site in sites:
        site.contribute(coordinator)
    sites[0].observe(coordinator)  # before the merge: does not count for it
    while coordinator.advance():
        pass
    state = coordinator.journal.state
    assert (state.phase, state.num_witnesses()) == (Phase.PUBLISHING, 0)
    assert coordinator.record_envelope() == b""
    sites[0].observe(coordinator)
    sites[0].observe(coordinator)  # the same member again does not count twice
    assert not coordinator.advance()
    assert main(["rounds", str(federation.config_path)]) == 0
    assert "waits for cosignatures: of 1 members, and 2 are needed" in capsys.readouterr().out
    old, new = sites[0].key, SigningKey.generate()  # nor does it under another key
    statement = KeyRotation(
        coordinator_key=coordinator.key.public.key_id, old_key=old.public.key_id, new_key=new.public.pem()
    )
    coordinator.members.rotate(old.public.key_id, statement.sign(old), statement.sign(new))
    sites[0].key = new
    sites[0].observe(coordinator)
    assert not coordinator.advance()
    sites[1].observe(coordinator)
    while coordinator.advance():
        pass
    assert coordinator.journal.state.phase == Phase.PUBLISHED
    key = coordinator.key.public
    _, _, checks = verify_directory(coordinator.published_dir(1), {key.key_id: key})
    (found,) = [check for check in checks if check.name == "witnesses"]
    assert found.passed
    assert found.detail.startswith("2 members cosigned the log, the last at ")
    coordinator.close()


def test_a_simulation_witnesses_itself(tmp_path: Path) -> None:
    config, _ = make_config(tmp_path, num_rounds=2)
    config = config.model_copy(update={"rounds": config.rounds.model_copy(update={"publish_after_cosignatures": 2})})
    result = simulate(config, tmp_path / "base", {"a": StepTrainer(1), "b": StepTrainer(2)})
    key = SigningKey.load(config.federation.key).public
    _, _, checks = verify_directory(result.model_dir, {key.key_id: key})
    assert [check.passed for check in checks if check.name == "witnesses"] == [True]


def test_over_grpc(federation: Federation, run: Run) -> None:
    server = federation.serve()
    key = federation.keys["north"]
    key.save(federation.folder / "north.key")
    link = GrpcLink(server.address, server.bundle, key)
    home = federation.folder / "north"
    view = next(iter(link.watch()))
    coordinator = PublicKey.load(server.bundle)
    spec, _ = RoundSpec.open(view.spec_envelope, {coordinator.key_id: coordinator}, where="spec")
    witness = Witness(home, link, key, coordinator, time.time)
    sizes = [witness.observe(spec.federation, spec.run).size for _ in range(3)]
    assert sizes == sorted(sizes)
    link.close()
    address = ("--coordinator", server.address, "--key", federation.folder / "north.key")
    audit = run("audit", home, "--trust", server.bundle, *address)
    assert (audit.returncode, audit.stderr) == (0, "")
    assert "continues each of them" in audit.stdout
    report = json.loads(run("audit", home, "--trust", server.bundle, *address, "--json").stdout)
    assert report["consistent"]
    assert report["continued_to"] >= sizes[-1]
    assert server.stop() == 0


def test_more_witnesses_than_nodes_can_be_are_refused(tmp_path: Path) -> None:
    text = "num_rounds = 1\npublish_after_cosignatures = 3"
    _, path = make_config(tmp_path)
    path.write_text(path.read_text().replace("num_rounds = 1", text))
    with pytest.raises(ConfigError, match="min_nodes"):
        load_config(path)
