"""Who may call what. Every method of every service has a line here; one that has none is refused."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from functools import lru_cache

from fedmerge.errors import CertificateExpired, CertificateMismatch, CertificateRequired, NotAllowed
from fedmerge.trust.certificates import Peer
from fedmerge.trust.keys import Member, Role


@dataclass(frozen=True)
class Rule:
    """Roles that may call a method; `any_certificate` says that a ticket will do where certificates are asked for."""

    roles: frozenset[Role]
    any_certificate: bool = False


MEMBERS: frozenset[Role] = frozenset({"node", "auditor"})
NODES: frozenset[Role] = frozenset({"node"})
AUDITORS: frozenset[Role] = frozenset({"auditor"})

# None: anybody, with no session. Those calls give out nonces, and check what is signed themselves.
METHODS: dict[str, Rule | None] = {
    "BeginSession": None,
    "OpenSession": None,
    "Enroll": None,
    "RotateKey": Rule(MEMBERS, any_certificate=True),
    "IssueCertificate": Rule(MEMBERS, any_certificate=True),
    "WatchRounds": Rule(MEMBERS),
    "ReportMetrics": Rule(NODES),
    "BeginUpload": Rule(NODES),
    "UploadDelta": Rule(NODES),
    "GetUpload": Rule(NODES),
    "CommitDelta": Rule(NODES),
    "FetchArtifact": Rule(MEMBERS),
    "GetCheckpoint": Rule(MEMBERS),
    "GetInclusion": Rule(MEMBERS),
    "Cosign": Rule(MEMBERS),
    "FetchExport": Rule(AUDITORS),
}


def require_allowed(method: str, member: Member) -> Rule:
    """Return a method's rule; raise `NotAllowed` unless the member may call it."""
    rule = METHODS.get(method)
    if rule is None or member.role not in rule.roles:
        raise NotAllowed(f"{member.name} takes part as {member.role}, which may not call {method}")
    return rule


def require_certificate(pem: bytes | None, member: Member, rule: Rule, now: dt.datetime) -> None:
    """Raise unless the certificate that TLS has verified is good for this member's call, now.

    A connection outlives the certificate that opened it, so this is asked in every call. Raises `CertificateRequired`,
    `CertificateExpired` or `CertificateMismatch`.
    """
    if pem is None:
        raise CertificateRequired("this coordinator asks for a client certificate")
    peer = _parse(pem)
    if now >= peer.not_after:
        raise CertificateExpired(f"the client certificate expired at {peer.not_after}", hint="connect again")
    if peer.is_ticket and not rule.any_certificate:
        raise CertificateRequired("this call takes a certificate of the node's own, not a ticket")
    if peer.key_id not in (None, member.key.key_id):
        raise CertificateMismatch(f"the client certificate is of another node than key {member.key.short}")


@lru_cache(maxsize=1024)
def _parse(pem: bytes) -> Peer:
    return Peer.parse(pem)
