"""Who takes part: what nodes and the operator say about keys, checked, carried out and put in the ledger."""

from __future__ import annotations

import logging

from fedmerge.errors import BadSignature, InputError
from fedmerge.events import KeyRotated
from fedmerge.journal import Journal
from fedmerge.sign import PublicKey
from fedmerge.statements import KeyRotation
from fedmerge.trust import TrustStore

log = logging.getLogger(__name__)


class Members:
    """The keys of a federation's nodes: the trust store, and what the ledger says about it."""

    def __init__(self, journal: Journal, trust: TrustStore) -> None:
        self._journal = journal
        self._trust = trust
        for entry in journal.ledger.entries:
            if isinstance(entry.event, KeyRotated) and entry.event.node_id in trust.keys():  # noqa: SIM118
                self._succeed(entry.event)  # a crash came between the two

    def rotate(self, caller_id: str, envelope: bytes, proof: bytes) -> None:
        """Replace the caller's key by the one that it signs for; `proof` is the same statement under the new key.

        From then on the old key is refused. What it delivered in the current round counts, and nothing else of this
        node does. Raises `BadSignature` or `Refused`.
        """
        rotation, signed = KeyRotation.open(envelope, self._trust.keys(), where="key rotation")
        new = _new_key(rotation)
        held, _ = KeyRotation.open(proof, {new.key_id: new}, where="proof of the new key")
        if held != rotation or {signed.signer.key_id, rotation.old_key} != {caller_id}:
            raise BadSignature("the key rotation was not signed by the key that calls and the one it names")
        if rotation.coordinator_key != self._journal.key.public.key_id:
            raise BadSignature("the key rotation is for another coordinator")
        with self._journal.lock:
            self._trust.require_new(new)
            event = KeyRotated(node_id=caller_id, new_node_id=new.key_id, envelope=envelope.decode())
            self._journal.append(event)
            self._succeed(event)
        log.info("node %s has a new key, %s", caller_id[:12], new.short)

    def _succeed(self, event: KeyRotated) -> None:
        old = self._trust.require(event.node_id)
        rotation, _ = KeyRotation.open(event.envelope.encode(), {old.key_id: old}, where="key rotation")
        self._trust.succeed(old, _new_key(rotation))


def _new_key(rotation: KeyRotation) -> PublicKey:
    try:
        return PublicKey.from_pem(rotation.new_key, where="the new key")
    except InputError as err:
        raise BadSignature(err.message) from err
