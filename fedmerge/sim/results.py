"""What a federation's ledger says about how it went: scores by node, and bytes both ways."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from fedmerge.config import Config, Simulate
from fedmerge.delta import delta_schema
from fedmerge.errors import MissingExtra, RoundFailed
from fedmerge.events import CandidatesProposed, DeltaAccepted, MetricsReported, RoundOpened, RoundPublished
from fedmerge.journal import Journal
from fedmerge.rounds import Phase
from fedmerge.sign import SigningKey
from fedmerge.sim.adversary import bad_nodes
from fedmerge.statements import MergeRecord, MetricsStatement
from fedmerge.store.database import Database
from fedmerge.store.ledger import Ledger
from fedmerge.tensors import Checkpoint
from fedmerge.trust import TrustStore
from fedmerge.versions import cheapest_route

if TYPE_CHECKING:
    import pandas as pd


@dataclass
class NodeResult:
    """One node's outcome: scores of three models on its own test data, and the deltas and bytes it sent in all rounds.

    `num_merged` of its deltas passed the screening. `is_bad` says whether it was simulated to be bad.
    `base` is the base model, `own` the node's fine-tune of it in round 1, before any merge, `merged` the last model.
    """

    name: str
    node_id: str
    num_examples: int = 0
    num_deltas: int = 0
    num_merged: int = 0
    sent_bytes: int = 0
    is_bad: bool = False
    base: dict[str, float] = field(default_factory=dict)
    own: dict[str, float] = field(default_factory=dict)
    merged: dict[str, float] = field(default_factory=dict)


@dataclass
class RoundResult:
    """One round and its deltas: when it opened, and its model was published, in seconds since the federation began.

    `num_merged` deltas, of this round or of some before, passed the screening of its merge. `metrics` are the model's,
    each the mean over the nodes that evaluated it.
    """

    round: int
    opened_s: float
    published_s: float = 0.0
    num_deltas: int = 0
    sent_bytes: int = 0
    num_merged: int = 0
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class FederationResult:
    """What a federation left: the last published directory and its version, and how each round and each node fared.

    `fetched_bytes` is what a node that took part in every round fetched, `dense_bytes` what one model is in fp32.
    """

    model_dir: Path
    version: str
    num_rounds: int
    rounds: list[RoundResult]
    nodes: list[NodeResult]
    fetched_bytes: int
    dense_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON types."""
        return {**asdict(self), "model_dir": str(self.model_dir)}

    def to_frame(self) -> pd.DataFrame:
        """Return one row per round, with its metrics as columns. Raises `MissingExtra` without pandas."""
        try:
            import pandas as pd
        except ModuleNotFoundError as err:
            raise MissingExtra("a data frame needs pandas", hint='pip install "fedmerge[plots]"') from err
        rows = [{**asdict(each), **each.metrics} for each in self.rounds]
        return pd.DataFrame(rows).drop(columns="metrics").set_index("round")


def result_of(config: Config) -> FederationResult:
    """Read a federation's result from its state folder; raise `RoundFailed` when it ended without a model."""
    state_dir, trust = config.federation.state, TrustStore(config.federation.trusted)
    ledger = Ledger(Database(config.database_url()))
    journal = Journal(ledger, SigningKey.load(config.federation.key), lambda: 0.0)
    try:
        state, record = journal.state, journal.record()
        if record is None or state.phase != Phase.PUBLISHED:
            raise RoundFailed(f"round {state.round} failed: {state.failure or state.phase}")
        model_dir = state_dir / "models" / f"round-{record.round:04d}"
        schema = delta_schema(Checkpoint(model_dir).schema)
        return FederationResult(
            model_dir=model_dir,
            version=record.model.digest,
            num_rounds=record.round,
            rounds=_rounds(journal, trust),
            nodes=_nodes(journal, trust, config.simulate),
            fetched_bytes=_fetched_bytes(journal) + _candidate_bytes(journal),
            dense_bytes=4 * sum(spec.num_elements for spec in schema.values()),
        )
    finally:
        journal.ledger.close()


def _candidate_bytes(journal: Journal) -> int:
    events = [entry.event for entry in journal.ledger.entries]
    return sum(event.num_bytes for event in events if isinstance(event, CandidatesProposed))


def _records(journal: Journal) -> Iterator[MergeRecord]:
    for merge in journal.state.merges:
        yield MergeRecord.open(merge.record_envelope.encode(), journal.own_keys, where="merge record")[0]


def _fetched_bytes(journal: Journal) -> int:
    """Return the bytes of all files that a node fetches on the way from the base to each version in turn."""
    fetched: dict[str, int] = {}
    for record in _records(journal):
        steps = cheapest_route(record.model, {record.before.digest}, fetched)
        fetched |= {file.root: file.num_bytes for file in steps or record.model.updates}
    return sum(fetched.values())


def _rounds(journal: Journal, trust: TrustStore) -> list[RoundResult]:
    keys, began_s = trust.keys(), journal.ledger.entries[0].at_s
    rounds: dict[int, RoundResult] = {}
    reports: defaultdict[tuple[int, str], list[float]] = defaultdict(list)
    for entry in journal.ledger.entries:
        match entry.event:
            case RoundOpened(round=number):  # again, after a failure
                rounds[number] = RoundResult(number, entry.at_s - began_s)
            case DeltaAccepted(round=number, payload_bytes=num_bytes):
                rounds[number].num_deltas += 1
                rounds[number].sent_bytes += num_bytes
            case RoundPublished(round=number):
                rounds[number].published_s = entry.at_s - began_s
            case MetricsReported(envelope=envelope):
                statement, _ = MetricsStatement.open(envelope.encode(), keys, where="metrics")
                if statement.model == "global":
                    for name, value in statement.values.items():
                        reports[statement.round, name].append(value)
            case _:
                pass
    for (number, name), values in reports.items():
        if number in rounds:
            rounds[number].metrics[name] = fmean(values)
    for record in _records(journal):
        rounds[record.round].num_merged = sum(each.accepted for each in record.contributions)
    return list(rounds.values())


def _nodes(journal: Journal, trust: TrustStore, simulated: Simulate) -> list[NodeResult]:
    names, keys = trust.names(), trust.keys()
    records = list(_records(journal))
    nodes = {key_id: NodeResult(name, key_id) for key_id, name in sorted(names.items(), key=lambda item: item[1])}
    for entry in journal.ledger.entries:
        fact = entry.event
        if isinstance(fact, DeltaAccepted) and fact.node_id in nodes:
            nodes[fact.node_id].num_deltas += 1
            nodes[fact.node_id].sent_bytes += fact.payload_bytes
            nodes[fact.node_id].num_examples = fact.num_examples
        elif isinstance(fact, MetricsReported) and fact.node_id in nodes:
            statement, _ = MetricsStatement.open(fact.envelope.encode(), keys, where="metrics")
            match statement.model, statement.round:
                case "global", 0:
                    nodes[fact.node_id].base = statement.values
                case "own", 1:
                    nodes[fact.node_id].own = statement.values
                case "global", number if number == records[-1].round:
                    nodes[fact.node_id].merged = statement.values
    for contribution in itertools.chain.from_iterable(record.contributions for record in records):
        if contribution.node_id in nodes:
            nodes[contribution.node_id].num_merged += contribution.accepted
    bad = set(bad_nodes(simulated, names.values()))
    for node in nodes.values():
        node.is_bad = node.name in bad
    return [node for node in nodes.values() if node.num_examples]
