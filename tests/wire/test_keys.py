"""Keys that are replaced while a coordinator runs."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from fedmerge.errors import BadSignature, ConflictingSubmission, Equivocation, Refused, RevokedKey, UntrustedKey
from fedmerge.events import HandedOver, KeyRotated
from fedmerge.statements import KeyRotation, RoundSpec
from fedmerge.statements.handover import sign_handover
from fedmerge.store.ledger import Ledger
from fedmerge.trust.keys import TrustStore
from fedmerge.trust.sign import PublicKey, SigningKey
from fedmerge.v1 import session_pb2
from fedmerge_client.link import GrpcLink
from tests.conftest import Federation, ServerProcess
from tests.wire.test_upload import site_of, translated


def test_a_key_that_was_replaced_is_refused_and_its_delta_counts_once(
    federation: Federation,
    server: ServerProcess,
    run: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path: Path,
) -> None:
    site = site_of(federation, server, federation.keys["north"])
    spec, _ = site.spec()
    site.submit(site.payload(spec))
    old, path = site.key.public, tmp_path / "north.key"
    (tmp_path / "passphrase").write_text("correct horse\n")
    site.key.save(path, b"correct horse")
    rotate = ("keys", "rotate", path, "--coordinator", server.address, "--trust", server.bundle, "--algorithm", "p256")
    lost = run(*rotate)
    assert (lost.returncode, lost.stderr.splitlines()[0]) == (2, f"error: {path}: needs a passphrase")
    done = json.loads(run(*rotate, "--passphrase-file", "passphrase", "--json").stdout)

    new = SigningKey.load(path, lambda _: b"correct horse")
    assert (done["key_id"], done["replaced"]) == (new.public.key_id, old.key_id)
    assert SigningKey.load(Path(f"{path}.{old.short}"), lambda _: b"correct horse").public == old
    assert PublicKey.load(Path(f"{path}.pub")) == new.public
    trust = TrustStore(federation.config.federation.trusted)
    assert trust.names() == {new.public.key_id: "north", federation.keys["south"].public.key_id: "south"}
    with pytest.raises(RevokedKey, match="replaced by its owner"):
        site.spec()
    site.link.close()

    after = site_of(federation, server, new)
    spec, _ = after.spec()
    with pytest.raises(ConflictingSubmission):
        after.submit(after.payload(spec))
    after.link.close()
    # A restart finds both keys as they are, and so does a coordinator that was killed before it wrote the folder.
    server.kill()
    (trust.directory / "north.pem").write_text(old.pem())
    again = federation.serve()
    resumed = GrpcLink(again.address, again.bundle, new)
    resumed.connect()
    resumed.close()
    assert again.stop() == 0
    assert trust.names()[new.public.key_id] == "north"
    ledger = Ledger(federation.config.federation.state / "ledger.sqlite")
    (event,) = [entry.event for entry in ledger.entries if isinstance(entry.event, KeyRotated)]
    ledger.close()
    assert (event.node_id, event.new_node_id) == (old.key_id, new.public.key_id)


def test_only_both_keys_together_replace_one(federation: Federation, server: ServerProcess) -> None:
    site, south = site_of(federation, server, federation.keys["north"]), federation.keys["south"]
    new, stranger = SigningKey.generate(), SigningKey.generate()
    me = site.link.coordinator.key_id

    def attempt(signed_by: SigningKey, proven_by: SigningKey, *, old: str = site.node_id, at: str = me) -> None:
        statement = KeyRotation(coordinator_key=at, old_key=old, new_key=proven_by.public.pem())
        promised = KeyRotation(coordinator_key=at, old_key=old, new_key=new.public.pem())
        request = session_pb2.RotateKeyRequest(envelope=promised.sign(signed_by), proof=statement.sign(proven_by))
        translated(
            lambda: site.link.connection.stubs.sessions.RotateKey(request, metadata=site.link.connection.metadata())
        )

    with pytest.raises(BadSignature):
        attempt(south, new)  # another node's word
    with pytest.raises(BadSignature):
        attempt(south, new, old=south.public.key_id)  # an honest one, sent by somebody else
    with pytest.raises(BadSignature):
        attempt(site.key, new, at="0" * 64)
    with pytest.raises(Exception, match="not trusted"):
        attempt(site.key, stranger)  # the new key's owner has not agreed
    with pytest.raises(Refused, match="in use"):
        site.link.rotate_key(south)
    site.spec()
    site.link.close()


def test_nodes_follow_the_coordinators_key_and_nobody_elses(
    federation: Federation, server: ServerProcess, run: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    """One node is there when the key is handed over, one comes later with the old bundle, one with the new one."""
    given = tmp_path / "given.pem"
    given.write_bytes(server.bundle.read_bytes())
    there = GrpcLink(server.address, given, federation.keys["north"], home=tmp_path / "there")
    old = there.coordinator
    spec = next(iter(there.watch())).spec_envelope
    running = run("keys", "handover", federation.config_path)
    assert (running.returncode, "another coordinator is running" in running.stderr) == (8, True)
    assert server.stop() == 0
    done = json.loads(run("keys", "handover", federation.config_path, "--json").stdout)
    assert done["replaced"] == old.key_id

    again = federation.serve(listen=server.address)
    view = next(iter(there.watch()))
    assert there.coordinator.key_id == done["key_id"]
    assert PublicKey.load(again.bundle) == there.coordinator
    # The round goes on as it was planned: the same statement, under the key that speaks for the coordinator now.
    before, _ = RoundSpec.open(spec, {old.key_id: old}, where="spec")
    assert RoundSpec.open(view.spec_envelope, there.pin.now, where="spec")[0] == before
    for name, bundle in (("late", given), ("newcomer", again.bundle)):
        link = GrpcLink(server.address, bundle, federation.keys["south"], home=tmp_path / name)
        link.connect()
        assert list(link.pin.ever) == [old.key_id, done["key_id"]]
        link.close()
    # Who has the old key has nothing: a site that followed takes no other successor of it, nor its word.
    thief = SigningKey.generate()
    stolen = SigningKey.load(federation.folder / f"coordinator.key.{old.short}")
    with pytest.raises(Equivocation):
        there.pin.follow([sign_handover(before.federation, before.run, stolen, thief)])
    with pytest.raises(UntrustedKey):
        RoundSpec.open(spec, GrpcLink(server.address, given, thief, home=tmp_path / "late").pin.now, where="spec")
    # Nor is a key believed that nobody handed over to.
    text = given.read_text()
    (tmp_path / "other.pem").write_text(text[: text.index("-----BEGIN PUBLIC KEY")] + thief.public.pem())
    stranger = GrpcLink(server.address, tmp_path / "other.pem", federation.keys["south"])
    with pytest.raises(BadSignature, match="made for another coordinator") as caught:
        stranger.connect()
    assert "never was this one's" in (caught.value.hint or "")
    for link in (there, stranger):
        link.close()
    assert again.stop() == 0


def test_a_hand_over_that_was_interrupted_is_finished(
    federation: Federation, run: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    assert federation.serve().stop() == 0
    key = federation.folder / "coordinator.key"
    before = key.read_bytes()
    done = json.loads(run("keys", "handover", federation.config_path, "--json").stdout)
    # As if it had been killed after the ledger had it, and before the key was in its place.
    key.rename(f"{key}.next")
    key.write_bytes(before)
    key.chmod(0o600)
    told = run("serve", federation.config_path)
    assert (told.returncode, "fedmerge keys handover does so" in told.stderr) == (2, True)
    assert json.loads(run("keys", "handover", federation.config_path, "--json").stdout) == done
    assert federation.serve().stop() == 0
    ledger = Ledger(federation.config.federation.state / "ledger.sqlite")
    assert sum(isinstance(entry.event, HandedOver) for entry in ledger.entries) == 1
    ledger.close()
