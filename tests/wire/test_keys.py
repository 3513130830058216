"""Keys that are replaced while a coordinator runs."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from fedmerge.errors import BadSignature, ConflictingSubmission, Refused, RevokedKey
from fedmerge.events import KeyRotated
from fedmerge.sign import PublicKey, SigningKey
from fedmerge.statements import KeyRotation
from fedmerge.store.ledger import Ledger
from fedmerge.trust import TrustStore
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
        translated(lambda: site.link._sessions.RotateKey(request, metadata=site.link._metadata()))

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
