"""Published directories, checked by the tools that other people have."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from google.protobuf import json_format
from in_toto_attestation.v1 import statement_pb2
from in_toto_attestation.v1.statement import Statement
from model_signing import verifying

from fedmerge.errors import VerificationError
from fedmerge.sim import simulate
from fedmerge.trust.sign import PublicKey, SigningKey
from fedmerge.verify import verify_directory
from tests.conftest import StepTrainer, make_config


@pytest.fixture(scope="module", params=["ed25519", "p256"])
def published(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PublicKey]:
    """A model directory, and the public key of its coordinator."""
    folder = tmp_path_factory.mktemp("published")
    config, _ = make_config(folder)
    SigningKey.generate(request.param).save(config.federation.key)
    trainers = {"north": StepTrainer(1), "south": StepTrainer(2)}
    result = simulate(config, folder / "base", trainers)
    return result.model_dir, SigningKey.load(config.federation.key).public


def oms_verify(directory: Path) -> None:
    """What `model_signing verify key` does."""
    verifier = verifying.Config().use_elliptic_key_verifier(public_key=directory / "model.sig.pub")
    verifier.verify(directory, directory / "model.sig")


def test_the_openssf_verifier_takes_the_published_model_and_no_changed_one(published: tuple[Path, PublicKey]) -> None:
    directory, coordinator = published
    oms_verify(directory)
    is_own_key = PublicKey.load(directory / "model.sig.pub") == coordinator
    assert is_own_key is (coordinator.algorithm == "p256")
    weights = directory / "model.safetensors"
    before = weights.read_bytes()
    changes: list[tuple[Callable[[], object], Callable[[], object]]] = [
        (lambda: weights.write_bytes(before[:-1] + bytes([before[-1] ^ 1])), lambda: weights.write_bytes(before)),
        ((directory / "more").touch, (directory / "more").unlink),
        (
            lambda: weights.rename(directory / "other.safetensors"),
            lambda: (directory / "other.safetensors").rename(weights),
        ),
    ]
    for change, undo in changes:
        change()
        with pytest.raises(ValueError, match="Signature mismatch"):
            oms_verify(directory)
        undo()
    oms_verify(directory)


def test_our_own_check_follows_it(published: tuple[Path, PublicKey], tmp_path: Path) -> None:
    directory, coordinator = published
    _, _, checks = verify_directory(directory, {coordinator.key_id: coordinator})
    assert next(check for check in checks if check.name == "model.sig").passed
    for name in ("model.sig", "model.sig.pub", "provenance.intoto.json"):
        path = directory / name
        before = path.read_bytes()
        path.write_bytes(before.replace(b"A", b"B", 1))
        with pytest.raises(VerificationError, match=name):
            verify_directory(directory, {coordinator.key_id: coordinator})
        path.write_bytes(before)


def test_the_provenance_is_an_in_toto_statement_about_every_file(published: tuple[Path, PublicKey]) -> None:
    directory, _ = published
    envelope = json.loads((directory / "provenance.intoto.json").read_bytes())
    payload = base64.b64decode(envelope["payload"])
    (signature,) = envelope["signatures"]
    key = serialization.load_pem_public_key((directory / "model.sig.pub").read_bytes())
    assert isinstance(key, ec.EllipticCurvePublicKey)
    kind = b"application/vnd.in-toto+json"
    pae = b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)
    key.verify(base64.b64decode(signature["sig"]), pae, ec.ECDSA(hashes.SHA256()))

    body = json.loads(payload)
    Statement.copy_from_pb(json_format.Parse(payload, statement_pb2.Statement())).validate()
    later = {"model.sig", "provenance.intoto.json", "lineage.json", "lineage.sig.json"}
    assert {each["name"]: each["digest"]["sha256"] for each in body["subject"]} == {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.iterdir()
        if path.name not in later
    }
    assert body["predicateType"] == "https://slsa.dev/provenance/v1"
    materials = body["predicate"]["buildDefinition"]["resolvedDependencies"]
    assert len([each for each in materials if each["name"].startswith("delta of node ")]) == 2
