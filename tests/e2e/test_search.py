"""Merges that nodes search for together: candidates travel out, signed scores back, and the best is published."""

from __future__ import annotations

import base64
import contextlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fedmerge.config import Config
from fedmerge.errors import FedmergeError, RoundFailed, VerificationError
from fedmerge.node.node import Node
from fedmerge.publishing.attest import MODEL_SIGNATURE
from fedmerge.publishing.provenance_file import PROVENANCE
from fedmerge.publishing.publish import LINEAGE, SIGNATURE, file_digests
from fedmerge.sim import FederationResult, World, node_home, prepare_nodes, result_of, simulate
from fedmerge.statements import Candidates, Lineage, MergeRecord, MetricsStatement, digest_of
from fedmerge.store.blobs import BlobStore
from fedmerge.store.ledger import Ledger
from fedmerge.tensors import Checkpoint
from fedmerge.trust.sign import SigningKey
from fedmerge.verify import History, replay, verify_directory
from fedmerge_client.link import GrpcLink
from tests.conftest import ServerProcess, StepTrainer, make_config
from tests.provenance import read_provenance, write_provenance

NAMES = ("east", "north", "south")
OPTIMUM = {"east": 0.8, "north": 0.1, "south": 0.4}  # coefficients of the nodes' steps in the model that scores best
EXTRA = """
[delta]
values = "fp32"
downlink = "fp32"
[screen]
weighting = "equal"
[merge]
method = "{method}"
[search]
strategy = "{strategy}"
evaluations = {evaluations}
deadline_s = {deadline_s}
"""


@dataclass
class Judge(StepTrainer):
    """Trains by a known step, and scores a model by its distance to a target that no node could train to alone."""

    target: Tensor | None = None
    before_scoring: Callable[[], None] = lambda: None

    def evaluate(self, model_dir: Path) -> dict[str, float]:
        self.before_scoring()
        if self.target is None:
            return {}
        return {"loss": float((Checkpoint(model_dir)["matrix"] - self.target).square().sum())}


def write_base(folder: Path) -> Path:
    base = folder / "base"
    if not base.exists():
        base.mkdir(parents=True)
        save_file(
            {"matrix": torch.randn(20, 50, generator=torch.Generator().manual_seed(0))}, base / "model.safetensors"
        )
        (base / "config.json").write_text("{}")
    return base


def make_judges(folder: Path) -> dict[str, Judge]:
    before = Checkpoint(write_base(folder))["matrix"]
    judges = {name: Judge(seed) for seed, name in enumerate(NAMES)}
    target = before + sum(OPTIMUM[name] * judge.step("matrix", before) for name, judge in judges.items())
    for judge in judges.values():
        judge.target = target
    return judges


def configure(
    folder: Path,
    *,
    strategy: str = "cma_es",
    method: str = "task_arithmetic",
    evaluations: int = 40,
    deadline_s: float = 600,
    **settings: int,
) -> tuple[Config, Path]:
    write_base(folder)
    extra = EXTRA.format(strategy=strategy, method=method, evaluations=evaluations, deadline_s=deadline_s)
    return make_config(folder, extra=extra, **settings)  # type: ignore[arg-type]


def run_simulated(folder: Path, judges: Mapping[str, Judge] | None = None, **settings: object) -> FederationResult:
    config, _ = configure(folder, **settings)  # type: ignore[arg-type]
    return simulate(config, folder / "base", judges or make_judges(folder))


def history_of(folder: Path, result: FederationResult) -> History:
    key = SigningKey.load(folder / "coordinator.key").public
    _, history, checks = verify_directory(result.model_dir, {key.key_id: key})
    assert "search" in {check.name for check in checks if check.passed}
    return history


def require_replay(folder: Path, history: History) -> None:
    assert replay(history, Checkpoint(folder / "base"), BlobStore(folder / "state" / "blobs")).passed


def kinds(folder: Path) -> list[str]:
    ledger = Ledger(folder / "state" / "ledger.sqlite")
    try:
        return [entry.event.kind for entry in ledger.entries]
    finally:
        ledger.close()


def test_cma_es_finds_better_weights_than_the_plain_merge_and_they_replay(tmp_path: Path) -> None:
    result = run_simulated(tmp_path, evaluations=90)
    history = history_of(tmp_path, result)
    search = history.records[0].search
    assert search is not None
    plain, best = search.scores[0], search.scores[search.chosen]
    assert plain is not None
    assert best is not None
    assert best > 0.05 * plain  # losses, so both are negative
    names = {node.node_id: node.name for node in result.nodes}
    found = {names[each.node_id]: each.weight for each in history.records[0].contributions}
    assert found == pytest.approx(OPTIMUM, abs=0.12)
    judge = make_judges(tmp_path)["north"]
    assert judge.evaluate(result.model_dir)["loss"] == pytest.approx(-best, rel=1e-6)
    require_replay(tmp_path, history)
    blobs = [path for path in (tmp_path / "state" / "blobs").rglob("*") if path.is_file()]
    assert len(blobs) == 4  # three deltas and the update that won
    assert not list(tmp_path.rglob("candidates/*"))


def test_a_greedy_soup_is_what_exhaustive_arithmetic_says(tmp_path: Path) -> None:
    result = run_simulated(tmp_path, strategy="greedy_soup", method="fedavg")
    judges = make_judges(tmp_path)
    before = Checkpoint(tmp_path / "base")["matrix"]

    def loss(members: frozenset[str]) -> float:
        merged = before + sum(judges[name].step("matrix", before) for name in members) / len(members)
        return float((merged - judges["north"].target).square().sum())  # type: ignore[operator]

    ranked = sorted(NAMES, key=lambda name: loss(frozenset([name])))
    soup = frozenset(ranked[:1])
    for name in ranked[1:]:
        if loss(soup | {name}) <= loss(soup):
            soup |= {name}
    history = history_of(tmp_path, result)
    names = {node.node_id: node.name for node in result.nodes}
    assert {names[c.node_id] for c in history.records[0].contributions if c.weight} == soup
    assert judges["north"].evaluate(result.model_dir)["loss"] == pytest.approx(loss(soup), rel=1e-4)
    require_replay(tmp_path, history)


def test_every_round_of_several_searches_anew(tmp_path: Path) -> None:
    extra = "[outer]\nname = 'nesterov'\nlr = 0.7\n"
    write_base(tmp_path)
    text = EXTRA.format(strategy="cma_es", method="ties", evaluations=10, deadline_s=600)
    text = text.replace("[search]", "density = 0.5\n[search]\nvary = { density = [0.2, 0.9] }") + extra
    config, _ = make_config(tmp_path, num_rounds=2, extra=text)
    result = simulate(config, tmp_path / "base", make_judges(tmp_path))
    history = history_of(tmp_path, result)
    densities = [record.merge["params"]["density"] for record in history.records]
    assert len(densities) == 2
    assert all(0.2 <= density <= 0.9 for density in densities)
    require_replay(tmp_path, history)


def test_a_node_without_test_data_has_no_say(tmp_path: Path) -> None:
    judges = make_judges(tmp_path)
    judges["south"].target = None
    result = run_simulated(tmp_path, judges, strategy="greedy_soup")
    search = history_of(tmp_path, result).records[0].search
    assert search is not None
    assert len(search.panel) == 2
    for judge in judges.values():
        judge.target = None
    with pytest.raises(RoundFailed, match="nobody scored every candidate"):
        run_simulated(tmp_path / "nobody", judges, strategy="greedy_soup")


@contextlib.contextmanager
def running_nodes(folder: Path, server: ServerProcess, judges: Mapping[str, Judge]) -> Iterator[dict[str, Path]]:
    """Run nodes over gRPC, each in a thread, with the keys that a simulation would give them."""
    config, _ = configure(folder)
    keys = prepare_nodes(config, list(NAMES))
    finished: dict[str, Path] = {}

    def take_part(name: str) -> None:
        link = GrpcLink(server.address, server.bundle, keys[name], connect_patience_s=30)
        with contextlib.suppress(Stopped):
            finished[name] = Node(link, judges[name], keys[name], link.coordinator, node_home(config, name)).run()
        link.close()

    threads = [threading.Thread(target=take_part, args=(name,), daemon=True) for name in judges]
    for thread in threads:
        thread.start()
    yield finished
    for thread in threads:
        thread.join(60)


class Stopped(Exception):
    """A node's process ended."""


class Stop:
    """Raises `Stopped` when it is called for the `at`-th time."""

    def __init__(self, at: int) -> None:
        self._left = at
        self.reached = threading.Event()

    def __call__(self) -> None:
        self._left -= 1
        if self._left == 0:
            self.reached.set()
            raise Stopped


@pytest.mark.slow
def test_a_coordinator_and_a_node_killed_in_a_search_end_it_as_they_would_have(tmp_path: Path) -> None:
    undisturbed = run_simulated(tmp_path / "undisturbed", evaluations=12)
    folder = tmp_path / "killed"
    config, path = configure(folder, evaluations=12)
    prepare_nodes(config, list(NAMES))
    judges = make_judges(folder)
    stop = Stop(at=5)  # after the base, its own and two candidates
    judges["south"].before_scoring = stop
    server = ServerProcess(path)
    try:
        with running_nodes(folder, server, judges) as finished:
            assert stop.reached.wait(60)
            server.kill()
            server = ServerProcess(path, listen=server.address)
            with running_nodes(folder, server, {"south": make_judges(folder)["south"]}) as finished_again:
                pass
    finally:
        assert server.stop() == 0
    assert sorted([*finished, *finished_again]) == list(NAMES)
    result = result_of(configure(folder)[0])
    assert result.version == undisturbed.version
    require_replay(folder, history_of(folder, result))


class Crash(Exception):
    """Everything in the process ended."""


def test_interrupted_before_any_event_a_search_goes_on_to_the_same_model(tmp_path: Path) -> None:
    undisturbed = run_simulated(tmp_path / "undisturbed", evaluations=12)
    folder = tmp_path / "interrupted"
    config, _ = configure(folder, evaluations=12)
    num_calls = 0

    class FragileWorld(World):
        def clock(self) -> float:
            # Asked for before every event, and to find out what is due.
            nonlocal num_calls
            num_calls += 1
            if num_calls == crash_at:
                raise Crash
            return super().clock()

    num_crashes, result = 0, None
    while result is None:
        # Far enough apart to get on, and never long at the same distance.
        num_calls, crash_at = 0, 19 + num_crashes % 5
        try:
            result = simulate(config, folder / "base", make_judges(folder), world=FragileWorld())
        except Crash:
            num_crashes += 1
    assert num_crashes > 5
    assert result.version == undisturbed.version
    require_replay(folder, history_of(folder, result))
    # Nothing was scored twice, but for what the crash itself undid.
    assert kinds(folder).count("metrics_reported") == kinds(tmp_path / "undisturbed").count("metrics_reported")


def test_a_search_goes_on_without_a_node_that_left(tmp_path: Path) -> None:
    config, path = configure(tmp_path, deadline_s=4.0, evaluations=20)
    prepare_nodes(config, list(NAMES))
    judges = make_judges(tmp_path)
    judges["south"].before_scoring = Stop(at=5)  # after the base, its own and two candidates
    server = ServerProcess(path)
    try:
        with running_nodes(tmp_path, server, judges) as finished:
            pass
    finally:
        assert server.stop() == 0
    assert sorted(finished) == ["east", "north"]
    result = result_of(configure(tmp_path)[0])
    history = history_of(tmp_path, result)
    search = history.records[0].search
    assert search is not None
    left = next(node.node_id for node in result.nodes if node.name == "south")
    assert left not in search.panel
    assert len(search.panel) == 2
    judged = [proposal.judges for proposal in history.proposals.values()]
    assert left in judged[0]
    assert all(left not in judges for judges in judged[1:])
    require_replay(tmp_path, history)


# What a coordinator that signs whatever it likes can't get past an auditor who knows the nodes' keys


class Forgery:
    """A published directory, taken apart, to be changed and signed again with the coordinator's key."""

    def __init__(self, folder: Path, directory: Path) -> None:
        self.key = SigningKey.load(folder / "coordinator.key")
        self.own = {self.key.public.key_id: self.key.public}
        self.directory = directory
        found = read_provenance(directory / PROVENANCE)
        self.entries = [(entry["kind"], entry["envelope"].encode()) for entry in found]

    def record(self) -> MergeRecord:
        return MergeRecord.open(self.entries[self.last(MergeRecord.kind)][1], self.own, where="record")[0]

    def last(self, kind: str) -> int:
        return max(number for number, entry in enumerate(self.entries) if entry[0] == kind)

    def first(self, kind: str) -> int:
        return next(number for number, entry in enumerate(self.entries) if entry[0] == kind)

    def write(self, **changes: object) -> None:
        record = self.record().model_copy(update=changes)
        self.entries[self.last(MergeRecord.kind)] = (MergeRecord.kind, record.sign(self.key))
        entries = [{"kind": kind, "envelope": envelope.decode()} for kind, envelope in self.entries]
        write_provenance(self.directory / PROVENANCE, entries)
        (self.directory / MODEL_SIGNATURE).unlink(missing_ok=True)
        lineage = Lineage.from_payload((self.directory / LINEAGE).read_bytes(), where="lineage")
        lineage = lineage.model_copy(update={"files": file_digests(self.directory)})
        (self.directory / LINEAGE).write_bytes(lineage.to_payload())
        (self.directory / SIGNATURE).write_bytes(lineage.sign(self.key))

    def verify(self) -> History:
        return verify_directory(self.directory, self.own)[1]


def choose_another(forgery: Forgery) -> None:
    search = forgery.record().search
    assert search is not None
    forgery.write(search=search.model_copy(update={"chosen": (search.chosen + 1) % len(search.scores)}))


def raise_a_score(forgery: Forgery) -> None:
    search = forgery.record().search
    assert search is not None
    forgery.write(search=search.model_copy(update={"scores": [0.0, *search.scores[1:]], "chosen": 0}))


def sign_for_a_node(forgery: Forgery) -> None:
    number = forgery.first(MetricsStatement.kind)
    body = json.loads(forgery.entries[number][1])
    payload = base64.b64decode(body["payload"])
    said = MetricsStatement.from_payload(payload, where="metrics")
    forged = said.model_copy(update={"values": {"loss": 0.0}}).sign(forgery.key)
    forgery.entries[number] = (MetricsStatement.kind, forged)
    forgery.write()


def leave_out_an_answer(forgery: Forgery) -> None:
    del forgery.entries[forgery.first(MetricsStatement.kind)]
    forgery.write()


def deny_the_search(forgery: Forgery) -> None:
    forgery.write(search=None)


def propose_something_else(forgery: Forgery) -> None:
    """Say that the first candidate, a single model, was the mean of two: its digest and scores stay as they were."""
    number = forgery.first(Candidates.kind)
    proposal, _ = Candidates.open(forgery.entries[number][1], forgery.own, where="candidates")
    first, *others = proposal.candidates
    changed = [first.model_copy(update={"factors": [1.0, 1.0, 0.0]}), *others]
    forged = proposal.model_copy(update={"candidates": changed})
    forgery.entries[number] = (Candidates.kind, forged.sign(forgery.key))
    search = forgery.record().search
    assert search is not None
    digests = [digest_of(forged.to_payload()), *search.proposals[1:]]
    forgery.write(search=search.model_copy(update={"proposals": digests}))


@pytest.mark.parametrize(
    ("forge", "error"),
    [
        (choose_another, "do not lead to the candidate that was chosen"),
        (raise_a_score, "do not lead to the candidate that was chosen"),
        (sign_for_a_node, "."),
        (leave_out_an_answer, "."),
        (deny_the_search, "was not searched for, as its round spec promised"),
        (propose_something_else, "not those that the search in the round spec proposes"),
    ],
)
def test_a_choice_that_the_nodes_did_not_sign_for_is_found_out(
    tmp_path: Path, forge: Callable[[Forgery], None], error: str
) -> None:
    result = run_simulated(tmp_path, strategy="greedy_soup", method="fedavg")
    forgery = Forgery(tmp_path, result.model_dir)
    forgery.write()
    forgery.verify()  # signed again, but as it was
    forge(forgery)
    with pytest.raises(VerificationError, match=error):
        forgery.verify()


def test_weights_that_do_not_give_the_winner_do_not_replay(tmp_path: Path) -> None:
    result = run_simulated(tmp_path, evaluations=1)
    forgery = Forgery(tmp_path, result.model_dir)
    search = forgery.record().search
    assert search is not None
    number = forgery.first(Candidates.kind)
    proposal, _ = Candidates.open(forgery.entries[number][1], forgery.own, where="candidates")
    changed = [each.model_copy(update={"factors": [0.5, 0.5, 0.5]}) for each in proposal.candidates]
    forged = proposal.model_copy(update={"candidates": changed})
    forgery.entries[number] = (Candidates.kind, forged.sign(forgery.key))
    forgery.write(
        search=search.model_copy(update={"proposals": [digest_of(forged.to_payload()), *search.proposals[1:]]})
    )
    history = forgery.verify()
    with pytest.raises(FedmergeError, match=r"screening the same deltas again gives node \w+ weight"):
        require_replay(tmp_path, history)
