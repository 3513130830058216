"""What a federation's ledger says about how it went: scores by node, and bytes both ways."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from fedmerge.config import Config, Simulate
from fedmerge.delta.task_vector import delta_schema
from fedmerge.errors import MissingExtra, RoundFailed
from fedmerge.events import (
    CandidatesProposed,
    DeltaAccepted,
    MergeFinished,
    MetricsReported,
    RoundOpened,
    RoundPublished,
)
from fedmerge.models.versions import cheapest_route
from fedmerge.rounds.journal import Journal
from fedmerge.rounds.state import Phase
from fedmerge.sim.adversary import bad_nodes
from fedmerge.statements import MergeRecord, MetricsStatement
from fedmerge.store.database import Database
from fedmerge.store.entries import LedgerEntry
from fedmerge.store.ledger import Ledger
from fedmerge.tensors import Checkpoint
from fedmerge.trust.keys import TrustStore
from fedmerge.trust.sign import SigningKey

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
        tally = _Tally(journal, trust, config.simulate)
        for entry in journal.ledger.entries:
            tally.add(entry)
        return FederationResult(
            model_dir=model_dir,
            version=record.model.digest,
            num_rounds=record.round,
            rounds=tally.all_rounds(),
            nodes=[node for node in tally.nodes.values() if node.num_examples],
            fetched_bytes=sum(tally.fetched.values()) + tally.candidate_bytes,
            dense_bytes=4 * sum(spec.num_elements for spec in schema.values()),
        )
    finally:
        journal.ledger.close()


class _Tally:
    """What the events of a federation add up to."""

    def __init__(self, journal: Journal, trust: TrustStore, simulated: Simulate) -> None:
        self._keys, self._own = trust.keys(), journal.own_keys
        self._began_s = journal.ledger.entries[0].at_s
        self._last_round = journal.state.merges[-1].round
        self._rounds: dict[int, RoundResult] = {}
        self._reports: defaultdict[tuple[int, str], list[float]] = defaultdict(list)
        names = trust.names()
        bad = set(bad_nodes(simulated, names.values()))
        self.nodes = {
            key_id: NodeResult(name, key_id, is_bad=name in bad)
            for key_id, name in sorted(names.items(), key=lambda item: item[1])
        }
        # The bytes of all files that a node fetches on the way from the base to each version in turn, by root.
        self.fetched: dict[str, int] = {}
        self.candidate_bytes = 0

    def add(self, entry: LedgerEntry) -> None:
        """Take up an event."""
        match entry.event:
            case RoundOpened(round=number):  # again, after a failure
                self._rounds[number] = RoundResult(number, entry.at_s - self._began_s)
            case DeltaAccepted() as event:
                self._rounds[event.round].num_deltas += 1
                self._rounds[event.round].sent_bytes += event.payload_bytes
                if (node := self.nodes.get(event.node_id)) is not None:
                    node.num_deltas += 1
                    node.sent_bytes += event.payload_bytes
                    node.num_examples = event.num_examples
            case CandidatesProposed(num_bytes=num_bytes):
                self.candidate_bytes += num_bytes
            case MergeFinished(record_envelope=envelope):
                self._add_merge(MergeRecord.open(envelope.encode(), self._own, where="merge record")[0])
            case RoundPublished(round=number):
                self._rounds[number].published_s = entry.at_s - self._began_s
            case MetricsReported(envelope=envelope):
                self._add_metrics(MetricsStatement.open(envelope.encode(), self._keys, where="metrics")[0])
            case _:
                pass

    def _add_merge(self, record: MergeRecord) -> None:
        steps = cheapest_route(record.model, {record.before.digest}, self.fetched)
        self.fetched |= {file.root: file.num_bytes for file in steps or record.model.updates}
        accepted = [each.node_id for each in record.contributions if each.accepted]
        self._rounds[record.round].num_merged = len(accepted)
        for node_id in accepted:
            if (node := self.nodes.get(node_id)) is not None:
                node.num_merged += 1

    def _add_metrics(self, statement: MetricsStatement) -> None:
        node = self.nodes.get(statement.node_id)
        if statement.model == "global":
            for name, value in statement.values.items():
                self._reports[statement.round, name].append(value)
        if node is None:
            return
        match statement.model, statement.round:
            case "global", 0:
                node.base = statement.values
            case "own", 1:
                node.own = statement.values
            case "global", self._last_round:
                node.merged = statement.values

    def all_rounds(self) -> list[RoundResult]:
        """Return the rounds, each metric the mean of what nodes reported."""
        for (number, name), values in self._reports.items():
            if number in self._rounds:
                self._rounds[number].metrics[name] = fmean(values)
        return list(self._rounds.values())
