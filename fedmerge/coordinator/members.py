"""Who takes part: what newcomers, nodes and the operator say about keys, checked, carried out and put in the ledger.

The trust store says who is trusted now, the ledger who was, when, and by whose word. The operator changes the first;
`sync` follows with the second, as signed statements.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping

from fedmerge.errors import BadSignature, Busy, InputError, InvalidToken
from fedmerge.events import KeyRotated, MemberAdmitted, MemberRevoked
from fedmerge.rounds.journal import Journal, merged_rounds
from fedmerge.statements import Enrolment, EnrolmentRequest, KeyRotation, Revocation
from fedmerge.trust.keys import Member, Role, TrustStore, token_digest
from fedmerge.trust.sign import PublicKey

log = logging.getLogger(__name__)

# Wrong join tokens a minute that are looked at. Guessing is hopeless anyway; this bounds what it costs.
MAX_WRONG_TOKENS = 20
WINDOW_S = 60.0


class Members:
    """The keys of a federation's nodes: the trust store, and what the ledger says about it."""

    def __init__(self, journal: Journal, trust: TrustStore) -> None:
        self._journal = journal
        self._trust = trust
        self._wrong_tokens_at_s: deque[float] = deque(maxlen=MAX_WRONG_TOKENS)
        self._synced: tuple[Mapping[str, Member], Mapping[str, MemberAdmitted]] | None = None
        for entry in journal.ledger.entries:
            if isinstance(entry.event, KeyRotated) and entry.event.node_id in trust.members():
                self._succeed(entry.event)  # a crash came between the two
        self.sync()

    def enrol(self, token: str, spki: bytes, envelope: bytes, use_nonce: Callable[[str], None]) -> bool:
        """Enrol the key `spki`, which signs `envelope`, by a join token; return if it is trusted now, or else pending.

        `use_nonce` raises `BadSignature` for a nonce that is not fresh. A key that is known already is told so again.
        Raises `BadSignature`, `InvalidToken`, `Refused`, or `Busy` after many wrong tokens.
        """
        key = _checked(lambda: PublicKey.from_spki(spki, where="enrolment request"))
        request, _ = EnrolmentRequest.open(envelope, {key.key_id: key}, where="enrolment request")
        use_nonce(request.nonce)
        if (request.coordinator_key, request.node_id) != (self._journal.key.public.key_id, key.key_id):
            raise BadSignature("the enrolment request is for another coordinator, or another key")
        if request.token != token_digest(token):
            raise BadSignature("the enrolment request is for another join token")
        with self._journal.lock:
            if key.key_id in self._trust.members():
                return True
            if any(member.key == key for member in self._trust.pending()):
                return False
            now_s, recent = self._journal.clock(), self._wrong_tokens_at_s
            if len(recent) == recent.maxlen and now_s < recent[0] + WINDOW_S:
                raise Busy("too many wrong join tokens came in the last minute", hint="try again in a minute")
            try:
                is_trusted = self._trust.redeem(token, key, now_s)
            except InvalidToken:
                recent.append(now_s)
                raise
        log.info("key %s was enrolled%s", key.short, "" if is_trusted else ", and waits for: fedmerge nodes approve")
        return is_trusted

    def rotate(self, caller_id: str, envelope: bytes, proof: bytes) -> None:
        """Replace the caller's key by the one that it signs for; `proof` is the same statement under the new key.

        From then on the old key is refused. What it delivered in the current round counts, and nothing else of this
        node does. Raises `BadSignature` or `Refused`.
        """
        keys = {key_id: member.key for key_id, member in self._trust.members().items()}
        rotation, signed = KeyRotation.open(envelope, keys, where="key rotation")
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
            self.sync()
        log.info("node %s has a new key, %s", caller_id[:12], new.short)

    def sync(self) -> list[str]:
        """Put into the ledger who came and who went since the last look; return the key ids that went."""
        with self._journal.lock:
            trusted, known = self._trust.members(), self._journal.state.members
            if self._synced is not None and trusted is self._synced[0] and known is self._synced[1]:
                return []  # a simulation's never change, and may be thousands
            new = [
                member
                for key_id, member in sorted(trusted.items())
                if (before := known.get(key_id)) is None or _place(before) != _place(member)
            ]
            if new:
                self._journal.append(*map(self._admitted, new))
            for member in new:
                log.info("%s of %s takes part, with key %s", member.name, member.organisation, member.key.short)
            gone = sorted(known.keys() - trusted.keys())
            for key_id in gone:
                self._journal.append(self._revoked(known[key_id]))
                log.warning("%s with key %s was revoked", known[key_id].name, key_id[:12])
            self._synced = trusted, self._journal.state.members
        return gone

    def is_on_record(self, member: Member) -> bool:
        """Whether the ledger has this member as it is now; what it costs does not depend on how many there are."""
        known = self._journal.state.members.get(member.key.key_id)
        return known is not None and _place(known) == _place(member)

    def _admitted(self, member: Member) -> MemberAdmitted:
        created = self._journal.created
        enrolment = Enrolment(
            federation=created.federation,
            run=created.run,
            name=member.name,
            organisation=member.organisation,
            role=member.role,
            node_id=member.key.key_id,
            key=member.key.pem(),
        )
        envelope = enrolment.sign(self._journal.key).decode()
        name, organisation, role = _place(member)
        return MemberAdmitted(
            node_id=member.key.key_id, name=name, organisation=organisation, role=role, envelope=envelope
        )

    def _revoked(self, known: MemberAdmitted) -> MemberRevoked:
        created = self._journal.created
        reasons = {member.key.key_id: member.reason for member in self._trust.revoked()}
        revocation = Revocation(
            federation=created.federation,
            run=created.run,
            name=known.name,
            organisation=known.organisation,
            node_id=known.node_id,
            reason=reasons.get(known.node_id, "its key was taken out of the folder of trusted keys"),
            rounds=merged_rounds(self._journal.state, self._journal.ledger.entries, known.node_id),
        )
        return MemberRevoked(node_id=known.node_id, envelope=revocation.sign(self._journal.key).decode())

    def _succeed(self, event: KeyRotated) -> None:
        old = self._trust.require(event.node_id)
        rotation, _ = KeyRotation.open(event.envelope.encode(), {old.key.key_id: old.key}, where="key rotation")
        self._trust.succeed(old, _new_key(rotation))


def _place(member: Member | MemberAdmitted) -> tuple[str, str, Role]:
    return member.name, member.organisation, member.role


def _new_key(rotation: KeyRotation) -> PublicKey:
    return _checked(lambda: PublicKey.from_pem(rotation.new_key, where="the new key"))


def _checked(parse: Callable[[], PublicKey]) -> PublicKey:
    try:
        return parse()
    except InputError as err:
        raise BadSignature(err.message) from err
