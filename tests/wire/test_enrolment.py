"""Newcomers with join tokens, and members that are revoked while they upload."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fedmerge.coordinator.coordinator import Coordinator
from fedmerge.errors import (
    BadSignature,
    Busy,
    FedmergeError,
    InputError,
    InvalidToken,
    PendingKey,
    Refused,
    RevokedKey,
    UnknownUpload,
    UntrustedKey,
)
from fedmerge.events import MemberAdmitted, MemberRevoked
from fedmerge.files import replace_file
from fedmerge.statements import Enrolment, EnrolmentRequest, Revocation
from fedmerge.store.ledger import Ledger
from fedmerge.transparency.merkle import LEAF_BYTES
from fedmerge.trust.keys import Member, TrustStore, token_digest
from fedmerge.trust.sign import PublicKey, SigningKey
from fedmerge.v1 import session_pb2
from fedmerge_client.link import GrpcLink
from tests.conftest import Federation, ServerProcess
from tests.wire.test_upload import site_of, translated

Run = Callable[..., subprocess.CompletedProcess[str]]


def link_of(server: ServerProcess, key: SigningKey) -> GrpcLink:
    return GrpcLink(server.address, server.bundle, key, connect_patience_s=0.5)


def test_a_newcomer_is_invited_enrols_waits_is_approved_and_is_revoked(
    federation: Federation, server: ServerProcess, run: Run
) -> None:
    config = ("--config", federation.config_path)
    invited = run("nodes", "invite", "east", "--org", "East Ltd", "--expires", "2h", *config)
    token, trust = invited.stdout.strip(), TrustStore(federation.config.federation.trusted)
    assert invited.stderr.startswith("give it to east over a safe channel")
    everything = b"".join(path.read_bytes() for path in federation.folder.rglob("*") if path.is_file())
    assert token.encode() not in everything
    assert hashlib.sha256(token.encode()).hexdigest().encode() in everything

    key = SigningKey.generate()
    link = link_of(server, key)
    with pytest.raises(UntrustedKey):
        link.connect()
    assert link.enrol(token) is False
    assert link.enrol(token) is False  # its answer may have been lost
    with pytest.raises(PendingKey):
        link.connect()
    thief = link_of(server, SigningKey.generate())
    with pytest.raises(InvalidToken):
        thief.enrol(token)
    thief.close()
    listed = json.loads(run("nodes", "list", *config, "--json").stdout)["nodes"]
    assert [(row["name"], row["status"]) for row in listed] == [
        ("east", "pending"), ("north", "trusted"), ("south", "trusted"),
    ]  # fmt: skip
    assert (listed[0]["organisation"], listed[0]["key_id"]) == ("East Ltd", key.public.key_id)
    assert {row["role"] for row in listed} == {"node"}
    assert run("nodes", "approve", "east", *config).stdout == f"trusted east of East Ltd, key id {key.public.key_id}\n"
    link.connect()
    link.close()

    site = site_of(federation, server, key)
    spec, _ = site.spec()
    payload = site.payload(spec)
    upload = site.begin(payload)
    site.send(upload.upload_id, [(0, payload.read_bytes()[:LEAF_BYTES])])
    revoked = run("nodes", "revoke", "east", "--reason", "left the\nfederation", *config)
    assert revoked.stdout == (f"revoked east, key id {key.public.key_id}\nrounds whose models have its deltas: none\n")
    with pytest.raises(RevokedKey, match="left the federation"):
        site.send(upload.upload_id, [(LEAF_BYTES, payload.read_bytes()[LEAF_BYTES : 2 * LEAF_BYTES])])
    with pytest.raises(RevokedKey):
        site.spec()
    site.link.close()
    with pytest.raises(Refused, match="revoked before"):
        trust.require_new(key.public)

    # By the next look of the coordinator its upload is gone, and the ledger tells the story under its signature.
    deadline_s = time.monotonic() + 10
    while any((federation.config.federation.state / "blobs").rglob(f"*{upload.upload_id}*")):
        assert time.monotonic() < deadline_s
        time.sleep(0.1)
    assert server.stop() == 0
    ledger = Ledger(federation.config.federation.state / "ledger.sqlite")
    facts = [entry.event for entry in ledger.entries]
    ledger.close()
    coordinator = PublicKey.load(server.bundle)
    keys = {coordinator.key_id: coordinator}
    admitted = [
        Enrolment.open(fact.envelope.encode(), keys, where="t")[0] for fact in facts if isinstance(fact, MemberAdmitted)
    ]
    assert {(each.name, each.organisation) for each in admitted} == {
        ("north", "north"), ("south", "south"), ("east", "East Ltd"),
    }  # fmt: skip
    (gone,) = [
        Revocation.open(fact.envelope.encode(), keys, where="t")[0] for fact in facts if isinstance(fact, MemberRevoked)
    ]
    assert (gone.node_id, gone.reason, gone.rounds) == (key.public.key_id, "left the federation", [])


def test_what_no_token_opens(federation: Federation, server: ServerProcess) -> None:
    trust = TrustStore(federation.config.federation.trusted)
    expired = trust.invite("late", "Late", expires_at_s=time.time() - 1, approved=True)
    good = trust.invite("early", "Early", expires_at_s=time.time() + 60, approved=True)
    link = link_of(server, SigningKey.generate())
    for token in ("", "fedmerge-join-x", good[:-1], good.upper(), token_digest(good)):
        with pytest.raises(InvalidToken, match="unknown"):
            link.enrol(token)
    with pytest.raises(InvalidToken, match="expired"):
        link.enrol(expired)

    me, stranger = SigningKey.generate(), SigningKey.generate()

    def attempt(**changes: str) -> bool:
        truth = {
            "coordinator_key": link.coordinator.key_id,
            "nonce": link.connection.nonce(),
            "token": token_digest(good),
            "node_id": me.public.key_id,
        }
        signer = stranger if changes.pop("signer", "") else me
        envelope = EnrolmentRequest.model_validate(truth | changes).sign(signer)
        request = session_pb2.EnrollRequest(token=good, key=me.public.spki, envelope=envelope)
        return bool(translated(lambda: link.connection.stubs.sessions.Enroll(request)).trusted)

    for field in ("coordinator_key", "nonce", "token", "node_id"):
        with pytest.raises(BadSignature):
            attempt(**{field: "0" * 64})
    with pytest.raises(FedmergeError, match="not trusted"):
        attempt(signer="a stranger")
    request = session_pb2.EnrollRequest(token=good, key=b"junk", envelope=b"junk")
    with pytest.raises(BadSignature):
        translated(lambda: link.connection.stubs.sessions.Enroll(request))
    assert attempt() is True  # trusted at once, as the invitation says
    assert trust.names()[me.public.key_id] == "early"
    # Many guesses are not even looked at.

    def guess() -> str:
        truth = {
            "coordinator_key": link.coordinator.key_id,
            "nonce": link.connection.nonce(),
            "token": token_digest("guess"),
        }
        envelope = EnrolmentRequest(**truth, node_id=stranger.public.key_id).sign(stranger)
        request = session_pb2.EnrollRequest(token="guess", key=stranger.public.spki, envelope=envelope)
        with pytest.raises((InvalidToken, Busy)) as caught:
            translated(lambda: link.connection.stubs.sessions.Enroll(request))
        return caught.value.reason

    assert [guess() for _ in range(30)][-3:] == [Busy.reason] * 3
    link.close()


def test_the_ledger_has_a_member_before_its_first_call_and_nobody_else_is_looked_at(federation: Federation) -> None:
    coordinator = Coordinator(federation.config, federation.folder / "base", clock=time.time)
    key, trust = SigningKey.generate().public, coordinator.trust
    path = trust.add(key, "east")
    coordinator.welcome(trust.require(key.key_id))
    members = coordinator.journal.state.members
    assert members[key.key_id].name == "east"
    coordinator.welcome(trust.require(key.key_id))
    assert coordinator.journal.state.members is members

    replace_file(path, Member("east", key, "East Ltd").to_text().encode())
    coordinator.welcome(trust.require(key.key_id))
    assert coordinator.journal.state.members[key.key_id].organisation == "East Ltd"

    trust.directory.joinpath("broken.pem").write_text("no key")
    coordinator.welcome(trust.require(key.key_id))
    with pytest.raises(InputError, match=r"broken\.pem"):
        coordinator.follow_trust()
    coordinator.close()


def test_a_delta_of_a_revoked_node_is_not_merged(federation: Federation, server: ServerProcess, run: Run) -> None:
    north = site_of(federation, server, federation.keys["north"])
    spec, _ = north.spec()
    north.submit(north.payload(spec))
    assert next(iter(north.link.watch())).num_deltas == 1
    trust = TrustStore(federation.config.federation.trusted)
    trust.revoke("south", "a test")
    (trust.directory / "north.pem").unlink()  # taken out by hand is as good
    with pytest.raises(UntrustedKey):
        north.spec()
    east = SigningKey.generate()
    trust.add(east.public, "east")
    site = site_of(federation, server, east)
    deadline_s = time.monotonic() + 10
    while next(iter(site.link.watch())).num_deltas:
        assert time.monotonic() < deadline_s
        time.sleep(0.1)
    with pytest.raises(UnknownUpload):
        site.committed("0" * 64)
    for each in (north, site):
        each.link.close()


def test_invitations_and_keys_in_the_folder(tmp_path: Path) -> None:
    store, key = TrustStore(tmp_path / "trusted"), SigningKey.generate().public
    first = store.invite("north", "North Ltd", expires_at_s=100.0, approved=False)
    second = store.invite("north", "North Ltd", expires_at_s=100.0, approved=False)
    assert re.fullmatch(r"fedmerge-join-[A-Za-z0-9_-]{43}", first)
    with pytest.raises(InvalidToken):
        store.redeem(first, key, 0.0)  # the newer one counts
    with pytest.raises(InvalidToken, match="expired"):
        store.redeem(second, key, 100.0)
    assert store.redeem(second, key, 99.0) is False
    with pytest.raises(InputError, match="already known"):
        store.invite("north", "North Ltd", expires_at_s=100.0, approved=False)
    assert store.members() == {}
    assert store.approve("north").key == key
    assert store.members()[key.key_id].organisation == "North Ltd"
    with pytest.raises(InputError, match="waits"):
        store.approve("north")
    # A crash between writing a key and using up its token: the token is no good for another key.
    token = store.invite("south", "South", expires_at_s=100.0, approved=True)
    store.add(SigningKey.generate().public, "south")
    with pytest.raises(FedmergeError, match="already exists"):
        store.redeem(token, SigningKey.generate().public, 0.0)
    store.revoke("south", "x")
    assert store.invitations() == {}
    for name in ("../x", "", "a/b"):
        with pytest.raises(InputError, match="usable name"):
            store.revoke(name, "x")
    with pytest.raises(InputError, match="printable"):
        store.invite("west", "a\x1b[2J", expires_at_s=1.0, approved=True)
    (tmp_path / "trusted" / "invited" / "west.json").write_text('{"token": 1}')
    with pytest.raises(InputError, match="not an invitation"):
        store.invitations()
