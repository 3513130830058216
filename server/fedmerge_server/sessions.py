"""Sessions: which key a call comes from. A node signs a nonce once, and gets a token for its later calls."""

from __future__ import annotations

import secrets
import time
from collections import deque

from fedmerge.errors import BadSignature, NoSession, UntrustedKey
from fedmerge.statements import SessionProof
from fedmerge.trust.keys import Member, TrustStore
from fedmerge.trust.sign import PublicKey, claimed_signer

NONCE_LIFETIME_S = 60.0
MAX_PENDING_NONCES = 10_000
# Of one key; its oldest gives way. A node that opens more has lost the others, or wants to fill the memory.
MAX_SESSIONS = 64


class Sessions:
    """Nonces given out and sessions opened; in memory only, so a restart asks every node to prove itself again."""

    def __init__(self, coordinator: PublicKey, trust: TrustStore) -> None:
        self._coordinator_id = coordinator.key_id
        self._trust = trust
        self._nonces: dict[str, float] = {}
        self._key_ids: dict[str, str] = {}
        self._tokens: dict[str, deque[str]] = {}

    def begin(self) -> bytes:
        """Return a fresh nonce."""
        now_s = time.monotonic()
        while self._nonces:  # the oldest first: giving one out must not cost more where many are waiting
            oldest, made_s = next(iter(self._nonces.items()))
            if now_s < made_s + NONCE_LIFETIME_S and len(self._nonces) < MAX_PENDING_NONCES:
                break
            del self._nonces[oldest]
        nonce = secrets.token_bytes(32)
        self._nonces[nonce.hex()] = now_s
        return nonce

    def use(self, nonce: str) -> None:
        """Take a nonce back, once; raise `BadSignature` when it was not given out within the last minute."""
        made_s = self._nonces.pop(nonce, None)
        if made_s is None or time.monotonic() >= made_s + NONCE_LIFETIME_S:
            raise BadSignature("the nonce is unknown, used or expired", hint="connect again")

    def open(self, envelope: bytes) -> str:
        """Exchange a signed nonce for a token. Raises `BadSignature`, `UntrustedKey` or `RevokedKey`."""
        key = self._trust.require(claimed_signer(envelope, where="session proof")).key
        proof, _ = SessionProof.open(envelope, {key.key_id: key}, where="session proof")
        self.use(proof.nonce)
        if proof.coordinator_key != self._coordinator_id:
            raise BadSignature(
                "session proof: made for another coordinator",
                hint="the key in that coordinator.pem never was this one's: ask its operator for the right file",
            )
        token = secrets.token_urlsafe(32)
        self._key_ids[token] = key.key_id
        tokens = self._tokens.setdefault(key.key_id, deque())
        tokens.append(token)
        if len(tokens) > MAX_SESSIONS:
            self._key_ids.pop(tokens.popleft(), None)
        return token

    def caller(self, token: str) -> Member:
        """Return who is behind a token. Raises `NoSession`, `RevokedKey`, or `UntrustedKey` for a removed key."""
        key_id = self._key_ids.get(token)
        if key_id is None:
            raise NoSession("the coordinator does not know this session", hint="connect again")
        try:
            return self._trust.require(key_id)
        except UntrustedKey:
            self._key_ids.pop(token, None)
            raise
