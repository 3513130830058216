"""What a coordinator promises, checked from what it left on disk and what nodes were told.

The ledger is read with `sqlite3` and `json`, its chain and all signatures are checked here, not by the product's code.
"""

from __future__ import annotations

import base64
import hashlib
import json
import sqlite3
from collections import Counter
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from calls import LEAF_BYTES, Observed
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from disturbed import Template
from drawn import Schedule

from fedmerge.store.blobs import BlobStore
from fedmerge.store.shelves import FolderShelf
from fedmerge.tensors import Checkpoint
from fedmerge.verify import replay, verify_directory

# Whose deltas of how many rounds before were merged in each round, and how they were weighed.
History: TypeAlias = tuple[tuple[tuple[str, int, bool], ...], ...]


class Broken(Exception):
    """A promise was not kept."""


@dataclass(frozen=True)
class Fact:
    """An event of the ledger."""

    number: int
    kind: str
    body: dict[str, Any]
    hash: str


def require(holds: bool, what: str) -> None:
    """Raise `Broken` with `what` unless it holds."""
    if not holds:
        raise Broken(what)


def read_ledger(path: Path) -> list[Fact]:
    """Return the events, after checking the hash chain over them."""
    with closing(sqlite3.connect(path)) as database:
        rows = database.execute("SELECT number, at_s, body, hash FROM events ORDER BY number").fetchall()
    head, facts = hashlib.sha256(b"fedmerge.ledger.v1").hexdigest(), []
    for expected, (number, at_s, body, found) in enumerate(rows):
        head = hashlib.sha256(
            bytes.fromhex(head) + expected.to_bytes(8, "big") + float(at_s).hex().encode() + b"\n" + body
        ).hexdigest()
        require((number, found) == (expected, head), f"event {expected} is not in the chain")
        facts.append(Fact(number, json.loads(body)["kind"], json.loads(body), found))
    return facts


def opened(envelope: str | bytes, key: Ed25519PublicKey, kind: str) -> tuple[dict[str, Any], str]:
    """Return the predicate of a DSSE envelope and its payload's digest, after checking type and signature."""
    parsed = json.loads(envelope)
    payload, kind = base64.b64decode(parsed["payload"]), f"application/vnd.fedmerge.{kind}.v1+json"
    require(parsed["payloadType"] == kind, f"an envelope is a {parsed['payloadType']}, not a {kind}")
    signed = b"DSSEv1 %d %s %d %s" % (len(kind), kind.encode(), len(payload), payload)
    try:
        key.verify(base64.b64decode(parsed["signatures"][0]["sig"]), signed)
    except InvalidSignature as err:
        raise Broken(f"a {kind} has a wrong signature") from err
    return json.loads(payload)["predicate"], hashlib.sha256(payload).hexdigest()


class Promises:
    """Checks what became of schedules, and remembers which history led to which model."""

    def __init__(self, template: Template) -> None:
        self._template = template
        self._coordinator = _ed25519(template.coordinator_key.public.pem())
        self._nodes = {key.public.key_id: _ed25519(key.public.pem()) for key in template.node_keys.values()}
        self.digests: dict[tuple[tuple[str, int, int], History], str] = {}
        self.undisturbed: set[tuple[str, int, int]] = set()

    def check(self, schedule: Schedule, seen: Observed) -> None:
        """Raise `Broken` unless everything that is promised holds."""
        shared = self._template.run_folder / "shared"
        facts = read_ledger(shared / "ledger.sqlite")
        merges = [fact for fact in facts if fact.kind == "merge_finished"]
        published = [fact.body["round"] for fact in facts if fact.kind == "round_published"]
        require(published == list(range(1, schedule.num_rounds + 1)), f"rounds {published} were published")
        require([fact.body["round"] for fact in merges] == published, "a round was merged more than once")
        self._no_receipt_is_lost(facts, seen)
        history = self._only_what_was_signed_and_in_time_is_merged(facts, schedule, shared / "blobs")
        final = merges[-1].body["version"]
        directory = self._published_directories_are_whole(merges)
        self._what_nodes_saw_was_published(merges, seen, final, directory)
        self._the_same_deltas_give_the_same_model(schedule, history, final, directory)

    def _no_receipt_is_lost(self, facts: list[Fact], seen: Observed) -> None:
        for envelope in seen.receipts:
            receipt, _ = opened(envelope, self._coordinator, "receipt")
            number = receipt["event"]
            require(number < len(facts), f"the receipt for event {number} is for one that is not in the ledger")
            fact = facts[number]
            is_it = fact.hash == receipt["event_hash"] and fact.kind == "delta_accepted"
            require(is_it, f"the receipt for event {number} is for another event")
            require(fact.body["statement_digest"] == receipt["statement_digest"], "a receipt is for another delta")

    def _only_what_was_signed_and_in_time_is_merged(
        self, facts: list[Fact], schedule: Schedule, folder: Path
    ) -> History:
        """Follow the ledger, and return what was merged in each round."""
        specs: dict[str, dict[str, Any]] = {}
        spec_of_round: dict[int, str] = {}
        waiting: dict[str, dict[str, Any]] = {}  # delivered, and not merged yet, by statement digest
        excluded: set[str] = set()
        delivered: Counter[tuple[str, str]] = Counter()
        sealed: set[str] = set()
        history: list[tuple[tuple[str, int, bool], ...]] = []
        phase = ""
        for fact in facts:
            body = fact.body
            match fact.kind:
                case "round_opened":
                    spec, digest = opened(body["spec_envelope"], self._coordinator, "roundspec")
                    specs[digest], spec_of_round[spec["round"]] = spec, digest
                    phase = "open"
                case "delta_accepted":
                    node = self._nodes[body["node_id"]]
                    statement, digest = opened(body["statement_envelope"], node, "delta")
                    require(digest == body["statement_digest"], "a delta is accepted for another statement")
                    spec = specs[statement["spec_digest"]]
                    require(
                        statement["spec_digest"] == spec_of_round.get(spec["round"]), "a delta is of a round given up"
                    )
                    newest = max(spec_of_round)
                    late = newest - spec["round"] + (phase != "open")
                    require(late <= spec["max_staleness"], f"a delta is accepted {late} rounds late")
                    require(statement["base_digest"] == spec["model"]["digest"], "a delta is from another model")
                    delivered[statement["spec_digest"], body["node_id"]] += 1
                    waiting[digest] = statement | {"late": late}
                case "round_sealed":
                    phase = "sealed"
                    sealed = set(waiting)
                case "round_failed":
                    phase = "failed"
                    given_up = {key for key, each in waiting.items() if each["round"] == body["round"]}
                    excluded |= given_up  # with the reason that the event gives
                    for digest in given_up:
                        del waiting[digest]
                    del spec_of_round[body["round"]]
                case "merge_finished":
                    record, _ = opened(body["record_envelope"], self._coordinator, "mergerecord")
                    listed = {each["statement_digest"]: each for each in record["contributions"]}
                    require(set(listed) == sealed, "what was merged is not what was sealed")
                    for digest, each in listed.items():
                        statement = waiting.pop(digest)
                        require(each["accepted"] or each["reason"], "a delta was left out without a reason")
                        require(each["staleness"] == record["round"] - statement["round"], "a delta's age is wrong")
                        require(each["payload_root"] == statement["payload_root"], "another payload was merged")
                        require(_root(folder, each["payload_root"]) == each["payload_root"], "a payload is lost")
                    history.append(
                        tuple(
                            sorted((each["node_id"], each["staleness"], each["accepted"]) for each in listed.values())
                        )
                    )
                    phase = "merged"
        require(not waiting, f"{len(waiting)} acknowledged deltas were neither merged nor given up")
        require(max(delivered.values()) == 1, "a node delivered twice in a round")
        return tuple(history)

    def _what_nodes_saw_was_published(self, merges: list[Fact], seen: Observed, final: str, published: Path) -> None:
        weights = (published / "model.safetensors").read_bytes()
        versions = {fact.body["round"]: fact.body["version"] for fact in merges}
        for envelope in filter(None, seen.records):
            record, _ = opened(envelope, self._coordinator, "mergerecord")
            version = record["model"]["digest"]
            require(versions.get(record["round"]) == version, f"round {record['round']} was published otherwise before")
        for name, directory in seen.finals.items():
            require(directory.name == final, f"{name} ended with version {directory.name[:12]}, not {final[:12]}")
            require((directory / "model.safetensors").read_bytes() == weights, f"{name} has other weights")

    def _published_directories_are_whole(self, merges: list[Fact]) -> Path:
        """Return the directory of the last one, as the coordinator that published it wrote it."""
        for fact in merges:
            name = f"state/models/round-{fact.body['round']:04d}"
            found = sorted(self._template.run_folder.glob(f"host-*/{name}"))
            require(bool(found), f"{name} is not there")
            for directory in found:
                lineage, _ = opened((directory / "lineage.sig.json").read_text(), self._coordinator, "lineage")
                require(lineage["model"]["digest"] == fact.body["version"], f"{directory} has another version")
                for file, digest in lineage["files"].items():
                    content = (directory / file).read_bytes()
                    require(hashlib.sha256(content).hexdigest() == digest, f"{directory / file} was changed")
        return found[0]

    def _the_same_deltas_give_the_same_model(
        self, schedule: Schedule, history: History, final: str, directory: Path
    ) -> None:
        """Compare with what the same deltas gave before; for the first time, have an auditor merge them again."""
        key = schedule.variant, history
        if key not in self.digests:
            trusted = {self._template.coordinator_key.public.key_id: self._template.coordinator_key.public}
            _, provenance, _ = verify_directory(directory, trusted)
            shared = self._template.run_folder / "shared"
            blobs = BlobStore(shared, FolderShelf(shared / "blobs"))
            replay(provenance, Checkpoint(self._template.base), blobs)
            self.digests[key] = final
        if not schedule.faults:
            self.undisturbed.add(schedule.variant)
        require(self.digests[key] == final, f"the same deltas gave {self.digests[key][:12]} before, {final[:12]} now")


def _ed25519(pem: str) -> Ed25519PublicKey:
    key = load_pem_public_key(pem.encode())
    assert isinstance(key, Ed25519PublicKey)
    return key


def _root(folder: Path, root: str) -> str:
    """Return the RFC 6962 root of a stored payload, computed from its bytes."""
    content = (folder / root[:2] / root).read_bytes()
    level = [
        hashlib.sha256(b"\0" + content[start : start + LEAF_BYTES]).digest()
        for start in range(0, len(content), LEAF_BYTES)
    ]
    while len(level) > 1:
        pairs = [hashlib.sha256(b"\1" + a + b).digest() for a, b in zip(level[::2], level[1::2], strict=False)]
        level = pairs + level[2 * len(pairs) :]
    return level[0].hex()
