"""What other tools check a published directory by: an OpenSSF model signature, and an in-toto provenance statement.

`model.sig` is a Sigstore bundle as OpenSSF Model Signing v1.0 has it (https://github.com/ossf/model-signing-spec): a
DSSE envelope of an in-toto statement that names every file by SHA-256. That format knows EC keys alone, so it is signed
with a P-256 key, whose public half stands beside it. `provenance.intoto.json` is a SLSA provenance statement (v1,
https://slsa.dev/spec/v1.0/provenance) in a DSSE envelope under the same key.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from typing import Any

from fedmerge.errors import BadSignature, DigestMismatch
from fedmerge.statements import MERKLE_DIGEST, MODEL_DIGEST, PREDICATE_ROOT, STATEMENT_TYPE, MergeRecord
from fedmerge.trust.sign import PublicKey, SigningKey, open_envelope, parse_json_object

MODEL_SIGNATURE = "model.sig"
MODEL_KEY = "model.sig.pub"
SLSA_PROVENANCE = "provenance.intoto.json"

IN_TOTO = "application/vnd.in-toto+json"
BUNDLE = "application/vnd.dev.sigstore.bundle.v0.3+json"
OMS_PREDICATE = "https://model_signing/signature/v1.0"
SLSA_PREDICATE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = f"{PREDICATE_ROOT}/merge/v1"
BUILDER = f"{PREDICATE_ROOT}/coordinator"


def model_signature(name: str, files: Mapping[str, str], ignored: Collection[str], key: SigningKey) -> bytes:
    """Return the bundle (JSON) for a model called `name` whose `files` have these SHA-256 (hex).

    `ignored` are files that come later, and that a verifier is to pass over. `key` must be a P-256 key.
    """
    resources = [
        {"name": file, "algorithm": "sha256", "digest": digest}
        for file, digest in sorted(files.items())
        if file not in ignored
    ]
    statement = {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": name, "digest": {"sha256": _root(resources)}}],
        "predicateType": OMS_PREDICATE,
        "predicate": {
            "serialization": {
                "method": "files",
                "hash_type": "sha256",
                "allow_symlinks": False,
                "ignore_paths": sorted(ignored),
            },
            "resources": resources,
        },
    }
    envelope = json.loads(key.sign(IN_TOTO, json.dumps(statement).encode()))
    envelope["signatures"] = [{"sig": signature["sig"], "keyid": ""} for signature in envelope["signatures"]]
    bundle = {
        "mediaType": BUNDLE,
        "verificationMaterial": {"publicKey": {"hint": _hint(key.public)}, "tlogEntries": []},
        "dsseEnvelope": envelope,
    }
    return json.dumps(bundle, indent=2).encode()


def check_model_signature(bundle: bytes, files: Mapping[str, str], key: PublicKey, *, where: str) -> None:
    """Check that a bundle is signed by `key` and names exactly the `files` that it does not ignore.

    Raises `BadSignature` or `DigestMismatch`.
    """
    parsed = parse_json_object(bundle, where=where)
    try:
        envelope = dict(parsed["dsseEnvelope"])
        (signature,) = envelope["signatures"]
        envelope["signatures"] = [{"sig": signature["sig"], "keyid": key.key_id}]
        signed = open_envelope(json.dumps(envelope).encode(), IN_TOTO, {key.key_id: key}, where=where)
        predicate = parse_json_object(signed.payload, where=where)["predicate"]
        named = {resource["name"]: resource["digest"] for resource in predicate["resources"]}
        ignored = set(predicate["serialization"]["ignore_paths"])
    except (KeyError, TypeError, ValueError) as err:
        raise BadSignature(f"{where}: not a model signature ({type(err).__name__})") from err
    if named != {file: digest for file, digest in files.items() if file not in ignored}:
        raise DigestMismatch(f"{where}: names other files than are here")


def slsa_provenance(record: MergeRecord, files: Mapping[str, str], key: SigningKey) -> bytes:
    """Return the signed provenance of `files` (SHA-256, hex, by name), which the round of `record` made."""
    materials = [{"name": "base", "digest": {MODEL_DIGEST: record.model.base_digest}}]
    materials += [{"name": "before", "digest": {MODEL_DIGEST: record.before.digest}}]
    deltas: list[dict[str, Any]] = [
        {
            "name": f"delta of node {each.node_id}",
            "digest": {MERKLE_DIGEST: each.payload_root},
            "annotations": {"statement": each.statement_digest, "accepted": each.accepted, "weight": each.weight},
        }
        for each in record.contributions
    ]
    statement = {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": file, "digest": {"sha256": digest}} for file, digest in sorted(files.items())],
        "predicateType": SLSA_PREDICATE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": {
                    "federation": record.federation,
                    "round": record.round,
                    "merge": record.merge,
                    "merge_seed": record.merge_seed,
                    "outer": record.outer,
                },
                "internalParameters": {"round_spec": record.spec_digest},
                "resolvedDependencies": [*materials, *deltas],
            },
            "runDetails": {
                "builder": {"id": BUILDER, "version": record.software},
                "metadata": {"invocationId": f"{record.run}/{record.round}"},
            },
        },
    }
    return key.sign(IN_TOTO, json.dumps(statement, separators=(",", ":")).encode())


def _root(resources: list[dict[str, str]]) -> str:
    return hashlib.sha256(b"".join(bytes.fromhex(each["digest"]) for each in resources)).hexdigest()


def _hint(key: PublicKey) -> str:
    return hashlib.sha256(key.pem().encode()).hexdigest()
