"""What attackers send a coordinator (`hostile.py`): each request is wrong in one way at least, and known to be."""

from __future__ import annotations

import base64
import json
import random
import secrets
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedmerge.statements import (
    DeltaStatement,
    EnrolmentRequest,
    KeyRotation,
    MetricsStatement,
    RoundSpec,
    SessionProof,
    digest_of,
)
from fedmerge.transparency.log import cosign
from fedmerge.transparency.merkle import leaf_hash
from fedmerge.trust.keys import token_digest
from fedmerge.trust.sign import SigningKey
from fedmerge.v1 import delta_pb2, log_pb2, model_pb2, round_pb2, session_pb2

MIB = 1 << 20
# Every method that nodes can call, and whether an answer without an error gives an attacker anything.
METHODS: dict[str, bool] = {
    "SessionService/BeginSession": False,  # nonces are for everybody
    "SessionService/OpenSession": True,
    "SessionService/Enroll": True,
    "SessionService/RotateKey": True,
    "SessionService/IssueCertificate": True,
    "RoundService/WatchRounds": True,
    "RoundService/ReportMetrics": True,
    "DeltaService/BeginUpload": True,
    "DeltaService/UploadDelta": True,
    "DeltaService/GetUpload": True,
    "DeltaService/CommitDelta": True,
    "ModelService/FetchArtifact": True,
    "LogService/GetCheckpoint": True,
    "LogService/GetInclusion": True,
    "LogService/Cosign": True,
    "LogService/FetchExport": True,
}
# Signed requests of each kind that an attacker makes, to send them again and again.
POOL = 300
PATHS = (
    "../../etc/passwd",
    "/etc/passwd",
    "config.json",
    "..",
    ".",
    "\0",
    "a" * 5000,
    "%2e%2e/x",
    "blobs/parts",
    "~root",
)


@dataclass(frozen=True)
class Known:
    """What attackers have: keys (32 bytes each) and session tokens by name, and what they saw on the wire."""

    secrets: dict[str, bytes]
    honest_ids: list[str]
    tokens: dict[str, str]
    coordinator_id: str
    spec: bytes
    other_spec: bytes
    note: bytes
    other_note: bytes
    captured: list[bytes]
    certificate: bytes


@dataclass(frozen=True)
class Attack:
    """One request. `messages` are its protobufs, `raw` bytes for a bare connection instead, perhaps within TLS."""

    kind: str
    method: str = ""
    messages: list[bytes] = field(default_factory=list)
    token: str | None = None
    must_fail: bool = True
    raw: bytes | None = None
    in_tls: bool = False


def raw_bytes(address: str, data: bytes, in_tls: bool) -> str:
    """Open a connection, send bytes that are no request, and hang up; return how it went."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=5) as plain:
            if not in_tls:
                plain.sendall(data)
                return "HUNG UP"
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            context.set_alpn_protocols(["h2"])
            with context.wrap_socket(plain) as wrapped:
                wrapped.sendall(data)
            return "HUNG UP"
    except OSError:
        return "CUT OFF"


class Attacker:
    """Makes up requests from a seed. `next` returns one; none of them may be taken."""

    def __init__(self, known: Known, seed: int) -> None:
        self._known, self._rng = known, random.Random(seed)
        self._keys = {
            name: SigningKey(Ed25519PrivateKey.from_private_bytes(secret)) for name, secret in known.secrets.items()
        }
        self._keys["stranger"] = SigningKey.generate()
        self._spec = _spec_in(known.spec)
        self._other = _spec_in(known.other_spec)
        self._payload = self._rng.randbytes(3000)
        self._leaf = leaf_hash(self._payload)
        self._big = bytes(5 * MIB)
        self._statements = [self._forged_statement() for _ in range(200)]
        self._proofs = [self._forged_proof() for _ in range(100)]
        self._kinds: list[tuple[int, Callable[[], Attack]]] = [
            (30, self._random_message),
            (200, self._mutated_message),
            (150, self._bad_token),
            (150, self._forged_delta),
            (60, self._replayed_statement),
            (60, self._forged_session),
            (40, lambda: self._one_of(self._guessed_token)),
            (40, lambda: self._one_of(self._forged_rotation)),
            (60, lambda: self._one_of(self._forged_metrics)),
            (40, lambda: self._one_of(self._forged_cosignature)),
            (60, self._wrong_role),
            (60, self._revoked),
            (60, self._path),
            (80, self._wrong_chunks),
            (1, self._oversized),
            (4, self._raw),
        ]
        self._weights = [weight for weight, _ in self._kinds]
        self._signed: dict[str, list[Attack]] = {}

    def next(self) -> Attack:
        """Return a request."""
        (_, make), *_ = self._rng.choices(self._kinds, self._weights)
        return make()

    def _one_of(self, make: Callable[[], Attack]) -> Attack:
        """Return one of many that `make` made before: signing takes the attackers longer than refusing the server."""
        pool = self._signed.setdefault(make.__name__, [])
        if len(pool) < POOL:
            pool.append(make())
            return pool[-1]
        return self._rng.choice(pool)

    # Bytes that are wrong

    def _random_message(self) -> Attack:
        method = self._rng.choice(list(METHODS))
        data = self._rng.randbytes(self._rng.choice((1, 10, 100, 3000)))
        return Attack("random bytes as a message", method, [data], self._any_token(), must_fail=self._matters(method))

    def _mutated_message(self) -> Attack:
        """A message that would be refused anyway, with its bytes changed as well."""
        make: Callable[[], Attack] = self._rng.choice(
            (self._forged_delta, self._forged_metrics, self._forged_session, self._path)
        )
        whole = make() if make == self._path else self._one_of(make)
        data = bytearray(whole.messages[0])
        for _ in range(self._rng.choice((1, 1, 2, 8))):
            match self._rng.randrange(4):
                case 0 if data:
                    data[self._rng.randrange(len(data))] ^= 1 << self._rng.randrange(8)
                case 1:
                    del data[self._rng.randrange(len(data) + 1) :]
                case 2 if data:
                    place = self._rng.randrange(len(data))
                    data[place:place] = self._rng.randbytes(self._rng.randrange(1, 9))
                case _ if data:
                    place = self._rng.randrange(len(data))
                    data += data[place : place + 64]
                case _:
                    pass
        return Attack("mutated message", whole.method, [bytes(data)], whole.token, whole.must_fail)

    def _oversized(self) -> Attack:
        method = self._rng.choice([name for name in METHODS if name != "SessionService/BeginSession"])
        message = delta_pb2.BeginUploadRequest(envelope=self._big).SerializeToString()
        return Attack("oversized message", method, [message], self._any_token())

    def _raw(self) -> Attack:
        preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
        data = self._rng.randbytes(self._rng.choice((0, 1, 60, 2000)))
        shape = self._rng.randrange(4)
        if shape == 0:
            return Attack("random bytes on the port", raw=data)
        if shape == 1:
            return Attack("half a TLS handshake", raw=b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + data[:200])
        garbage = preface + data if shape == 2 else b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" + data
        return Attack("garbage within TLS", raw=garbage, in_tls=True)

    # Who calls

    def _bad_token(self) -> Attack:
        method = self._rng.choice([name for name in METHODS if "SessionService" not in name])
        good = self._known.tokens["liar"]
        token = self._rng.choice(
            (None, "", secrets.token_urlsafe(32), good[:-1], good.swapcase(), good + "A", "x" * 4000)
        )
        return Attack("no session, or a wrong one", method, [self._plain(method)], token)

    def _wrong_role(self) -> Attack:
        names = ("BeginUpload", "UploadDelta", "GetUpload", "CommitDelta")
        method = self._rng.choice(("RoundService/ReportMetrics", *(f"DeltaService/{name}" for name in names)))
        return Attack("an auditor as a node", method, [self._plain(method)], self._known.tokens["auditor"])

    def _revoked(self) -> Attack:
        if self._rng.random() < 0.3:
            return self._one_of(self._session_of_revoked)
        method = self._rng.choice([name for name in METHODS if "SessionService" not in name])
        return Attack("a revoked key", method, [self._plain(method)], self._known.tokens["gone"])

    def _session_of_revoked(self) -> Attack:
        return Attack("a revoked key", "SessionService/OpenSession", [self._proof("gone", secrets.token_hex(32))])

    def _forged_session(self) -> Attack:
        return Attack("a forged or replayed proof", "SessionService/OpenSession", [self._rng.choice(self._proofs)])

    def _forged_proof(self) -> bytes:
        nonce = self._rng.choice(("0" * 64, secrets.token_hex(32), self._spec.nonce))
        return self._proof(self._rng.choice(("liar", "foreign", "stranger")), nonce)

    def _proof(self, name: str, nonce: str) -> bytes:
        proof = SessionProof(coordinator_key=self._known.coordinator_id, nonce=nonce)
        return session_pb2.OpenSessionRequest(envelope=proof.sign(self._keys[name])).SerializeToString()

    def _guessed_token(self) -> Attack:
        token, key = f"fedmerge-join-{secrets.token_urlsafe(32)}", self._keys["stranger"]
        request = EnrolmentRequest(
            coordinator_key=self._known.coordinator_id,
            nonce=secrets.token_hex(32),
            token=token_digest(token),
            node_id=key.public.key_id,
        )
        message = session_pb2.EnrollRequest(token=token, key=key.public.spki, envelope=request.sign(key))
        return Attack("a guessed join token", "SessionService/Enroll", [message.SerializeToString()])

    def _forged_rotation(self) -> Attack:
        """The liar has a node's place taken by its key, or by one that it does not hold."""
        liar, stranger = self._keys["liar"], self._keys["stranger"]
        victim = self._rng.choice([*self._known.honest_ids, liar.public.key_id])
        statement = KeyRotation(
            coordinator_key=self._rng.choice((self._known.coordinator_id, "0" * 64)),
            old_key=victim,
            new_key=stranger.public.pem(),
        )
        # Never signed by the new key: that would be a key of the liar's own, which it may rotate to.
        message = session_pb2.RotateKeyRequest(envelope=statement.sign(liar), proof=statement.sign(liar))
        return Attack(
            "a forged key rotation",
            "SessionService/RotateKey",
            [message.SerializeToString()],
            self._known.tokens["liar"],
        )

    # What is signed

    def _forged_statement(self) -> bytes:
        spec, other, liar = self._spec, self._other, self._keys["liar"]
        truth: dict[str, Any] = {
            "federation": spec.federation,
            "run": spec.run,
            "round": spec.round,
            "spec_digest": digest_of(spec.to_payload()),
            "nonce": spec.nonce,
            "base_digest": spec.model.digest,
            "schema_digest": spec.schema_digest,
            "node_id": liar.public.key_id,
            "submission_id": secrets.token_hex(16),
            "codec": spec.codec,
            "payload_bytes": len(self._payload),
            "payload_root": self._leaf.hex(),
            "num_examples": 10,
            "metrics": {},
            "software": "mine",
        }
        lies: list[dict[str, Any]] = [
            {"federation": "another"},
            {"run": other.run, "spec_digest": digest_of(other.to_payload()), "nonce": other.nonce},
            {"round": spec.round + self._rng.randrange(1, 100)},
            {"spec_digest": secrets.token_hex(32)},
            {"nonce": secrets.token_hex(32)},
            {"base_digest": secrets.token_hex(32)},
            {"schema_digest": secrets.token_hex(32)},
            {"node_id": self._rng.choice(self._known.honest_ids)},
            {"codec": {"values": "int4"}},
            {"payload_bytes": 1 << 45},
            {"payload_root": secrets.token_hex(32)},
        ]
        lie = self._rng.choice(lies)
        signer = self._rng.choice(("liar", "liar", "liar", "stranger", "foreign", "gone"))
        envelope = DeltaStatement.model_validate(truth | lie).sign(self._keys[signer])
        return self._spoilt(envelope) if self._rng.random() < 0.3 else envelope

    def _spoilt(self, envelope: bytes) -> bytes:
        """Return an envelope with a signature, type or key that is not its own."""
        body = json.loads(envelope)
        match self._rng.randrange(5):
            case 0:
                body["signatures"] *= 2
            case 1:
                body["signatures"] = []
            case 2:
                body["payloadType"] = body["payloadType"].replace("delta", "receipt")
            case 3:
                body["signatures"][0]["keyid"] = self._rng.choice(self._known.honest_ids)
            case _:
                body["signatures"][0]["sig"] = body["signatures"][0]["sig"][::-1]
        return json.dumps(body).encode()

    def _forged_delta(self) -> Attack:
        leaves = self._rng.choice((self._leaf, self._leaf, b"", self._rng.randbytes(32), self._rng.randbytes(31)))
        message = delta_pb2.BeginUploadRequest(envelope=self._rng.choice(self._statements), leaf_hashes=leaves)
        return self._by_liar("a forged delta statement", "DeltaService/BeginUpload", message)

    def _replayed_statement(self) -> Attack:
        """A statement that an honest node did sign, in the liar's or the auditor's session, or in another method."""
        envelope = self._rng.choice(self._known.captured)
        if self._rng.random() < 0.5:
            message: Any = delta_pb2.BeginUploadRequest(envelope=envelope, leaf_hashes=self._leaf)
            return self._by_liar("a replayed statement", "DeltaService/BeginUpload", message)
        message = round_pb2.ReportMetricsRequest(envelope=envelope)
        return self._by_liar("a replayed statement", "RoundService/ReportMetrics", message)

    def _forged_metrics(self) -> Attack:
        said = MetricsStatement(
            federation=self._rng.choice((self._spec.federation, "another")),
            run=self._other.run,
            round=self._spec.round,
            node_id=self._keys["liar"].public.key_id,
            model="global",
            digest=self._spec.model.digest,
            values={"accuracy": self._rng.random()},
        )
        envelope = said.sign(self._keys[self._rng.choice(("liar", "liar", "stranger"))])
        return self._by_liar(
            "forged metrics", "RoundService/ReportMetrics", round_pb2.ReportMetricsRequest(envelope=envelope)
        )

    def _forged_cosignature(self) -> Attack:
        name = self._rng.choice(("liar", "stranger"))
        note = self._known.other_note if name == "liar" else self._known.note
        line = cosign(note, self._keys[name], self._rng.randrange(1 << 40))
        return self._by_liar(
            "a forged cosignature", "LogService/Cosign", log_pb2.CosignRequest(note=note, cosignature=line)
        )

    # What is asked for

    def _path(self) -> Attack:
        name = self._rng.choice(PATHS)
        message: Any = self._rng.choice(
            (
                model_pb2.FetchArtifactRequest(root=name),
                delta_pb2.CommitDeltaRequest(upload_id=name),
                delta_pb2.GetUploadRequest(upload_id=name),
            )
        )
        methods = {
            "FetchArtifactRequest": "ModelService/FetchArtifact",
            "CommitDeltaRequest": "DeltaService/CommitDelta",
        }
        method = methods.get(type(message).__name__, "DeltaService/GetUpload")
        return self._by_liar("a path for an id", method, message)

    def _wrong_chunks(self) -> Attack:
        """Chunks of an upload that was never begun, out of order, too long or too many."""
        upload_id = self._rng.choice((secrets.token_hex(32), self._known.coordinator_id, ""))
        chunks = [
            delta_pb2.UploadDeltaRequest(
                upload_id=upload_id,
                offset=self._rng.choice((0, MIB, -1, 7, 1 << 62)),
                data=self._payload[: self._rng.randrange(len(self._payload))],
            ).SerializeToString()
            for _ in range(self._rng.randrange(1, 4))
        ]
        return Attack("wrong chunks", "DeltaService/UploadDelta", chunks, self._known.tokens["liar"])

    # Helpers

    def _by_liar(self, kind: str, method: str, message: Any) -> Attack:
        return Attack(kind, method, [message.SerializeToString()], self._known.tokens["liar"])

    def _any_token(self) -> str | None:
        return self._rng.choice((None, *self._known.tokens.values()))

    def _matters(self, method: str) -> bool:
        """Whether an answer would give anything; who takes part may read, whatever is in the bytes that it sends."""
        reads = {"WatchRounds", "GetCheckpoint", "GetInclusion", "FetchExport"}
        return METHODS[method] and method.partition("/")[2] not in reads

    def _plain(self, method: str) -> bytes:
        """Return a message that would be right, as far as its form goes."""
        envelope = self._known.captured[0]
        messages: dict[str, Any] = {
            "ReportMetrics": round_pb2.ReportMetricsRequest(envelope=envelope),
            "BeginUpload": delta_pb2.BeginUploadRequest(envelope=envelope, leaf_hashes=self._leaf),
            "UploadDelta": delta_pb2.UploadDeltaRequest(upload_id="0" * 64, data=self._payload),
            "GetUpload": delta_pb2.GetUploadRequest(upload_id="0" * 64),
            "CommitDelta": delta_pb2.CommitDeltaRequest(upload_id="0" * 64),
            "FetchArtifact": model_pb2.FetchArtifactRequest(root=self._spec.base_files[0].root),
            "GetInclusion": log_pb2.GetInclusionRequest(index=0, size=1),
            "Cosign": log_pb2.CosignRequest(note=self._known.note, cosignature=b"x"),
        }
        message = messages.get(method.partition("/")[2])
        return b"" if message is None else bytes(message.SerializeToString())


def _spec_in(envelope: bytes) -> RoundSpec:
    """Return the round spec in an envelope, as an attacker reads it: without a look at the signature."""
    return RoundSpec.from_payload(base64.b64decode(json.loads(envelope)["payload"]), where="spec")
