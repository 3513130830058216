"""What an operator tells a running coordinator, and what becomes of the federation."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from fedmerge.cli import main
from fedmerge.coordinator.coordinator import Coordinator
from fedmerge.errors import FedmergeError, Unreachable, VerificationError, WrongPhase
from fedmerge.node.node import Node
from fedmerge.publishing.attest import MODEL_SIGNATURE
from fedmerge.publishing.provenance_file import PROVENANCE
from fedmerge.publishing.publish import LINEAGE, SIGNATURE, file_digests
from fedmerge.sim import LocalLink, node_home, prepare_nodes
from fedmerge.statements import Lineage, MergeRecord, Rollback
from fedmerge.store.blobs import BlobStore
from fedmerge.tensors import Checkpoint
from fedmerge.trust.sign import PublicKey, SigningKey
from fedmerge.verify import replay, verify_directory
from fedmerge_client.link import GrpcLink
from fedmerge_server.admin import SOCKET, commanding
from tests.conftest import ServerProcess, StepTrainer, make_config
from tests.provenance import read_provenance, write_provenance

TRAINERS = {"north": StepTrainer(1), "south": StepTrainer(2)}
OUTER = (
    "[delta]\nvalues = 'fp32'\ndownlink = 'fp32'\n[outer]\nname = 'nesterov'\nlr = 0.7\n[publish]\nkeep_rounds = 2\n"
)


def coordinator_key(folder: Path) -> dict[str, PublicKey]:
    key = SigningKey.load(folder / "coordinator.key").public
    return {key.key_id: key}


class Table:
    """A coordinator and its nodes in one process, and a clock that the test sets."""

    def __init__(self, folder: Path, *, num_rounds: int, rounds: str = "grace_s = 60", min_nodes: int = 2) -> None:
        self.now_s = 0.0
        self.folder = folder
        self.config, _ = make_config(folder, num_rounds=num_rounds, rounds=rounds, min_nodes=min_nodes, extra=OUTER)
        self.keys = prepare_nodes(self.config, list(TRAINERS))
        self.coordinator = Coordinator(self.config, folder / "base", clock=lambda: self.now_s)
        self.operator = self.coordinator.operator
        self.state = lambda: self.coordinator.journal.state

    def advance(self) -> None:
        while self.coordinator.advance():
            pass

    def train(self, *names: str) -> None:
        for name in names or TRAINERS:
            link = LocalLink(self.coordinator, self.keys[name].public.key_id)
            home, own = node_home(self.config, name), self.coordinator.key.public
            Node(link, TRAINERS[name], self.keys[name], own, home, base=self.folder / "base").react(link.view())

    def run_rounds(self, number: int) -> None:
        for _ in range(number):
            self.advance()
            self.train()
        self.advance()

    def vector(self, round_number: int) -> Checkpoint:
        return Checkpoint(self.coordinator.published_dir(round_number))


@pytest.fixture
def table(tmp_path: Path) -> Iterator[Table]:
    found = Table(tmp_path, num_rounds=4, rounds="deadline_s = 100\ngrace_s = 10")
    yield found
    found.coordinator.close()


def test_a_pause_closes_and_opens_nothing_and_costs_the_round_no_time(table: Table) -> None:
    table.advance()
    table.train("north")
    table.now_s = 40.0
    table.operator.pause("patch day")
    with pytest.raises(WrongPhase, match="already"):
        table.operator.pause("again")
    table.train("south")  # deltas are still taken
    table.now_s = 500.0
    table.advance()
    assert table.state().phase == "open"
    table.operator.resume("patched")
    table.advance()
    assert (table.state().round, table.state().phase) == (2, "open")
    table.operator.pause("again")
    table.now_s = 700.0
    table.operator.resume("go on")
    table.now_s = 500.0 + 100 + 200 - 1
    table.advance()
    assert table.state().phase == "open"
    table.now_s += 1
    table.advance()
    assert table.state().phase == "failed"
    with pytest.raises(WrongPhase, match="not paused"):
        table.operator.resume("for nothing")


def test_a_pause_between_rounds_opens_none(table: Table) -> None:
    table.advance()
    table.train("north")
    table.operator.pause("hold the next")
    table.train("south")
    table.advance()
    assert table.state().phase == "open"
    table.operator.resume("go")
    table.advance()
    assert table.state().round == 2


def test_close_seals_what_is_there_if_min_nodes_are(table: Table) -> None:
    table.advance()
    with pytest.raises(WrongPhase, match="0 nodes, and needs those of 2"):
        table.operator.close("in a hurry")
    table.train()
    table.advance()
    assert table.state().round == 2
    sealed = [entry.event for entry in table.coordinator.journal.ledger.entries if entry.event.kind == "round_sealed"]
    assert [event.closed_by for event in sealed] == ["everyone"]  # type: ignore[union-attr]


def test_extend_moves_the_deadline_both_ways(table: Table) -> None:
    table.advance()
    table.operator.extend(50.0, "a site is down")
    table.now_s = 149.0
    table.advance()
    assert table.state().phase == "open"
    table.operator.extend(-10.0, "it is back")
    table.advance()
    assert table.state().phase == "failed"
    with pytest.raises(WrongPhase, match="not open"):
        table.operator.extend(1.0, "too late")


def test_a_failed_round_is_opened_again_live_under_another_nonce(table: Table) -> None:
    table.advance()
    with pytest.raises(WrongPhase, match="only a round that failed"):
        table.operator.retry("for nothing")
    first = table.coordinator.journal.spec()
    table.now_s = 100.0
    table.advance()
    assert table.coordinator.finished()
    table.operator.retry("the sites are back")
    assert not table.coordinator.finished()
    table.advance()
    second = table.coordinator.journal.spec()
    assert first is not None
    assert second is not None
    assert (second.round, second.nonce == first.nonce) == (1, False)
    table.run_rounds(4)
    assert table.state().round == 4


@pytest.mark.parametrize("to_round", [0, 1])
def test_after_a_rollback_rounds_go_on_as_if_what_followed_had_not_been(
    tmp_path: Path, table: Table, to_round: int
) -> None:
    table.run_rounds(3)  # round 4 is open
    table.operator.roll_back(to_round, "round 2 was poisoned")
    with pytest.raises(WrongPhase, match="is the current one"):
        table.operator.roll_back(to_round, "again")
    table.run_rounds(1)
    assert (table.state().round, table.state().phase) == (4, "published")
    with pytest.raises(WrongPhase, match="last round"):
        table.operator.roll_back(1, "too late")

    # The steps are the same in each round, and so is the momentum that was built up before.
    straight = Table(tmp_path / "straight", num_rounds=to_round + 1)
    straight.run_rounds(to_round + 1)
    expected = straight.vector(to_round + 1)["vector"]
    straight.coordinator.close()
    published = table.coordinator.published_dir(4)
    torch.testing.assert_close(Checkpoint(published)["vector"], expected, atol=1e-6, rtol=0)
    assert (table.vector(3)["vector"] - expected).abs().max() > 0.01

    _, history, checks = verify_directory(published, coordinator_key(tmp_path))
    assert [record.round for record in history.records] == [*range(1, to_round + 1), 4]
    assert any("round 2 was poisoned" in check.detail for check in checks)
    blobs = BlobStore(table.config.federation.state / "blobs")
    assert replay(history, Checkpoint(tmp_path / "base"), blobs).passed


def test_a_rollback_that_nobody_signed_and_a_delta_merged_twice_do_not_verify(tmp_path: Path, table: Table) -> None:
    table.run_rounds(2)
    table.operator.roll_back(1, "why not")
    table.run_rounds(2)
    published, key = table.coordinator.published_dir(4), SigningKey.load(tmp_path / "coordinator.key")
    told = read_provenance(published / PROVENANCE)

    def forged(change: Callable[[list[dict[str, str]]], None]) -> None:
        """Have the coordinator sign a history that did not happen."""
        entries = copy.deepcopy(told)
        change(entries)
        write_provenance(published / PROVENANCE, entries)
        trusted = coordinator_key(tmp_path)
        lineage, _ = Lineage.open((published / SIGNATURE).read_bytes(), trusted, where="lineage")
        (published / MODEL_SIGNATURE).unlink(missing_ok=True)
        lineage = lineage.model_copy(update={"files": file_digests(published)})
        (published / LINEAGE).write_bytes(lineage.to_payload())
        (published / SIGNATURE).write_bytes(lineage.sign(key))

    def without_rollback(entries: list[dict[str, str]]) -> None:
        entries[:] = [entry for entry in entries if entry["kind"] != Rollback.kind]

    def twice(entries: list[dict[str, str]]) -> None:
        """The last record takes in a delta of the record before as well, as if it had been late."""
        trusted = coordinator_key(tmp_path)
        places = [index for index, entry in enumerate(entries) if entry["kind"] == MergeRecord.kind]
        former, last = (
            MergeRecord.open(entries[place]["envelope"].encode(), trusted, where="record")[0] for place in places[-2:]
        )
        again = former.contributions[0].model_copy(update={"staleness": 1})
        last = last.model_copy(update={"contributions": [*last.contributions, again]})
        entries[places[-1]]["envelope"] = last.sign(key).decode()

    forged(lambda entries: None)
    verify_directory(published, coordinator_key(tmp_path))
    for change, expected in ((without_rollback, "does not"), (twice, "too late, or was merged before")):
        forged(change)
        with pytest.raises(VerificationError, match=expected):
            verify_directory(published, coordinator_key(tmp_path))


# Over the socket, to a process


@contextlib.contextmanager
def running(folder: Path, *, num_rounds: int, rounds: str) -> Iterator[tuple[ServerProcess, Path, Path]]:
    config, path = make_config(folder, num_rounds=num_rounds, rounds=rounds)
    prepare_nodes(config, list(TRAINERS))
    server = ServerProcess(path)
    try:
        yield server, path, config.federation.state
    finally:
        if server.child.poll() is None:
            server.stop()


def take_part(folder: Path, server: ServerProcess, names: tuple[str, ...]) -> list[threading.Thread]:
    config, _ = make_config(folder)
    keys = prepare_nodes(config, list(TRAINERS))

    def run(name: str) -> None:
        link = GrpcLink(server.address, server.bundle, keys[name])
        with contextlib.suppress(FedmergeError):
            Node(link, TRAINERS[name], keys[name], link.coordinator, node_home(config, name)).run()
        link.close()

    threads = [threading.Thread(target=run, args=(name,), daemon=True) for name in names]
    for thread in threads:
        thread.start()
    return threads


def rounds_json(path: Path) -> dict[str, object]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main(["rounds", str(path), "--json"]) == 0
    found: dict[str, object] = json.loads(out.getvalue())
    return found


def wait_for(path: Path, condition: Callable[[list[dict[str, object]]], bool]) -> list[dict[str, object]]:
    give_up_s = time.monotonic() + 60
    while time.monotonic() < give_up_s:
        rows = rounds_json(path)["rounds"]
        assert isinstance(rows, list)
        if condition(rows):
            return rows
        time.sleep(0.05)
    raise AssertionError(rows)


def test_the_operator_steers_a_running_coordinator_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with running(tmp_path, num_rounds=2, rounds="deadline_s = 2000\ngrace_s = 2000") as (server, path, state):
        wait_for(path, bool)
        mode = (state / SOCKET).stat().st_mode
        assert stat.S_ISSOCK(mode)
        assert stat.S_IMODE(mode) == 0o600
        assert main(["rounds", "extend", "-1990", str(path), "--reason", "too long"]) == 0
        [row] = wait_for(path, lambda rows: rows[0]["phase"] == "failed")
        assert row["notes"] == ["deadline moved by -1990 s: too long"]
        assert main(["rounds", "retry", str(path), "--reason", "now they are here"]) == 0
        wait_for(path, lambda rows: rows[0]["phase"] == "open")
        assert main(["rounds", "pause", str(path), "--reason", "wait for south"]) == 0
        threads = take_part(tmp_path, server, ("north", "south"))
        wait_for(path, lambda rows: rows[0]["num_deltas"] == 2)
        assert main(["rounds", "close", str(path), "--reason", "whole"]) == 0
        assert rounds_json(path)["is_paused"] is True
        assert main(["rounds", "resume", str(path), "--reason", "go"]) == 0
        wait_for(path, lambda rows: len(rows) > 1)
        for thread in threads:
            thread.join(60)
        rows = wait_for(path, lambda rows: rows[-1]["phase"] == "published")
        assert [row["num_deltas"] for row in rows] == [2, 2]
        assert all(row["metrics"] for row in rows)
        capsys.readouterr()
        assert main(["rounds", str(path)]) == 0
        text = capsys.readouterr().out
        assert str(rows[1]["version"])[:12] in text
        assert "closed by the operator: whole" in text
        assert main(["rounds", "rollback", "1", str(path), "--reason", "x"]) == WrongPhase.exit_code
        assert "last round is over" in capsys.readouterr().err
    assert main(["rounds", "pause", str(path), "--reason", "x"]) == Unreachable.exit_code
    assert "no coordinator is running" in capsys.readouterr().err


def test_a_coordinator_killed_amid_commands_remembers_them(tmp_path: Path) -> None:
    with running(tmp_path, num_rounds=1, rounds="deadline_s = 2000\ngrace_s = 2000") as (server, path, state):
        wait_for(path, bool)
        with commanding(state) as coordinator:
            coordinator.pause("maintenance")
        server.kill()
        with pytest.raises(Unreachable), commanding(state) as coordinator:
            coordinator.resume("nobody is there")
        again = ServerProcess(path)
        try:
            threads = take_part(tmp_path, again, ("north", "south"))
            wait_for(path, lambda rows: rows[0]["num_deltas"] == 2)
            assert rounds_json(path)["is_paused"] is True
            with commanding(state) as coordinator:
                coordinator.resume("done")
            wait_for(path, lambda rows: rows[0]["phase"] == "published")
            for thread in threads:
                thread.join(60)
        finally:
            again.stop()
