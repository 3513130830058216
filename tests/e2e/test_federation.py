"""Whole federations: simulated and deployed, undisturbed and killed, always the same bits."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch

from fedmerge.cli import main
from fedmerge.cli.progress import describe
from fedmerge.errors import DigestMismatch, RoundFailed, VerificationError
from fedmerge.node.events import NodeEvent
from fedmerge.node.node import Node
from fedmerge.rounds.state import Phase
from fedmerge.sim import FederationResult, node_home, prepare_nodes, result_of, simulate
from fedmerge.statements import MergeRecord
from fedmerge.store.blobs import BlobStore
from fedmerge.store.ledger import Ledger
from fedmerge.tensors import Checkpoint, model_digest
from fedmerge.trust.sign import PublicKey, SigningKey
from fedmerge.verify import replay, verify_directory
from fedmerge_client.link import GrpcLink
from tests.conftest import ServerProcess, StepTrainer, make_config

TRAINERS = {"north": StepTrainer(1, num_examples=10), "south": StepTrainer(2, num_examples=30)}
LOSSLESS = "[delta]\nvalues = 'fp32'\ndownlink = 'fp32'\n"


def run_simulated(folder: Path, **settings: object) -> FederationResult:
    config, _ = make_config(folder, **settings)  # type: ignore[arg-type]
    return simulate(config, folder / "base", TRAINERS)


def test_fedavg_publishes_the_weighted_mean_of_the_fine_tunes(tmp_path: Path) -> None:
    result = run_simulated(tmp_path, extra=LOSSLESS)
    base, merged = Checkpoint(tmp_path / "base"), Checkpoint(result.model_dir)
    for name in ("matrix", "vector"):
        steps = [TRAINERS[node].step(name, base[name]).double() for node in ("north", "south")]
        expected = base[name].double() + 0.25 * steps[0] + 0.75 * steps[1]
        torch.testing.assert_close(merged[name].double(), expected, atol=1e-6, rtol=0)
    assert torch.equal(merged["ids"], base["ids"])


def test_two_rounds_of_nesterov_follow_the_formula(tmp_path: Path) -> None:
    extra = LOSSLESS + "[outer]\nname = 'nesterov'\nlr = 0.5\nmomentum = 0.8\n[screen]\nweighting = 'equal'\n"
    result = run_simulated(tmp_path, num_rounds=2, extra=extra)
    base, merged = Checkpoint(tmp_path / "base"), Checkpoint(result.model_dir)
    step = sum(TRAINERS[node].step("vector", base["vector"]).double() / 2 for node in ("north", "south"))
    # b1 = d, b2 = 0.8 b1 + d; each round moves by 0.5 (d + 0.8 b).
    expected = base["vector"].double() + 0.5 * (1 + 0.8) * step + 0.5 * (1 + 0.8 * 1.8) * step
    torch.testing.assert_close(merged["vector"].double(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("method", ["fedavg", "dare_ties"])
@pytest.mark.parametrize("codec", ["values = 'bf16'", "values = 'int8'\nsparsify = 'seeded'\ndensity = 0.25"])
def test_folded_and_random_merges_verify_and_replay_bit_for_bit(tmp_path: Path, method: str, codec: str) -> None:
    extra = f"[delta]\n{codec}\ndownlink = 'bf16'\n[merge]\nmethod = '{method}'\n"
    result = run_simulated(tmp_path, num_rounds=2, extra=extra)
    config, _ = make_config(tmp_path, num_rounds=2, extra=extra)
    lineage, history, checks = verify_directory(result.model_dir, coordinator_key(tmp_path))
    assert lineage.model.digest == result.version == model_digest(Checkpoint(result.model_dir))
    assert {check.name for check in checks if check.passed} >= {"signature", "files", "version", "history", "deltas"}
    assert replay(history, Checkpoint(tmp_path / "base"), BlobStore(config.federation.state / "blobs")).passed


def coordinator_key(folder: Path) -> Mapping[str, PublicKey]:
    key = SigningKey.load(folder / "coordinator.key").public
    return {key.key_id: key}


def test_every_byte_of_every_published_file_counts(tmp_path: Path) -> None:
    result = run_simulated(tmp_path)
    keys = coordinator_key(tmp_path)
    for path in sorted(result.model_dir.iterdir()):
        original = path.read_bytes()
        for position in {0, len(original) // 2, len(original) - 1}:
            changed = bytearray(original)
            changed[position] ^= 1
            path.write_bytes(changed)
            with pytest.raises(VerificationError):
                verify_directory(result.model_dir, keys)
        path.write_bytes(original)
    verify_directory(result.model_dir, keys)
    extra = result.model_dir / "extra.txt"
    extra.write_text("not signed")
    with pytest.raises(DigestMismatch, match=r"extra\.txt"):
        verify_directory(result.model_dir, keys)


def test_a_simulation_replays_to_the_same_version(tmp_path: Path) -> None:
    extra = "[delta]\nsparsify = 'seeded'\ndensity = 0.5\n[merge]\nmethod = 'dare_ties'\nseed = 3\n"
    first = run_simulated(tmp_path / "a", num_rounds=2, extra=extra)
    second = run_simulated(tmp_path / "b", num_rounds=2, extra=extra)
    other_seed = run_simulated(tmp_path / "c", num_rounds=2, extra=extra.replace("seed = 3", "seed = 4"))
    assert first.version == second.version != other_seed.version


def test_only_the_last_models_and_deltas_are_kept_and_what_was_signed_of_all(tmp_path: Path) -> None:
    every = run_simulated(tmp_path / "all", num_rounds=4, extra=LOSSLESS)
    last = run_simulated(
        tmp_path / "last", num_rounds=4, extra=LOSSLESS + "[publish]\nkeep_rounds = 2\nadapter_rank = 2\n"
    )
    assert last.version == every.version
    models = last.model_dir.parent
    for number in (1, 2):
        assert {path.name for path in (models / f"round-000{number}").iterdir()} == {"lineage.json", "lineage.sig.json"}
    for number in (3, 4):
        model_dir = models / f"round-000{number}"
        verify_directory(model_dir, coordinator_key(tmp_path / "last"))
        assert model_digest(Checkpoint(model_dir)) == model_digest(Checkpoint(every.model_dir.parent / model_dir.name))
    with pytest.raises(VerificationError):
        verify_directory(models / "round-0002", coordinator_key(tmp_path / "last"))
    nodes = tmp_path / "last" / "nodes"
    for file, rounds in {
        "delta.safetensors": {3, 4},
        "statement.json": {1, 2, 3, 4},
        "receipt.json": {1, 2, 3, 4},
    }.items():
        for name in TRAINERS:
            assert {int(path.parent.name[:4]) for path in nodes.glob(f"{name}/rounds/*/{file}")} == rounds
    assert main(["export", str(tmp_path / "last" / "fedmerge.toml"), "--out", str(tmp_path / "export")]) == 0
    assert len(list((tmp_path / "export" / "publications").iterdir())) == 4


def test_a_round_without_its_quorum_fails_and_says_why(tmp_path: Path) -> None:
    config, _ = make_config(tmp_path, extra="[screen]\nmax_norm_ratio = 2.0\n", min_nodes=3)
    trainers = TRAINERS | {"loud": StepTrainer(3, scale=10.0)}
    with pytest.raises(RoundFailed, match="times the median"):
        simulate(config, tmp_path / "base", trainers)


def test_a_node_whose_delta_is_left_out_is_told_why_with_the_coordinators_signature(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config, _ = make_config(tmp_path, extra="[screen]\nmax_norm_ratio = 2.0\n", min_nodes=2)
    trainers = TRAINERS | {"loud": StepTrainer(3, scale=10.0)}
    events: list[tuple[str, NodeEvent]] = []
    simulate(config, tmp_path / "base", trainers, on_event=lambda name, event: events.append((name, event)))
    (told,) = [(name, event) for name, event in events if event.kind == "excluded"]
    assert told[0] == "loud"
    (kept,) = tmp_path.glob("nodes/*/refused/*.json")
    assert kept.parent.parent.name == "loud"
    record, _ = MergeRecord.open(kept.read_bytes(), coordinator_key(tmp_path), where="record")
    (refused,) = [each for each in record.contributions if not each.accepted]
    key = SigningKey.load(tmp_path / "nodes" / "loud" / "node.key").public
    assert (refused.node_id, refused.reason) == (key.key_id, "NORM")
    base = Checkpoint(tmp_path / "base")
    sent = sum(float(trainers["loud"].step(name, base[name]).square().sum()) for name in ("matrix", "vector")) ** 0.5
    assert refused.norm == pytest.approx(sent, rel=1e-2)
    norms = sorted(each.norm or 0.0 for each in record.contributions)
    assert (refused.value, refused.limit) == (refused.norm, 2 * norms[1])
    assert told[1].values == {"reason": "NORM", "value": refused.norm, "limit": refused.limit}
    against = f"{refused.norm:.6g} against a limit of {refused.limit:.6g}"
    assert f"not merged: NORM, {against}; the signed record of it is in {kept}" in caplog.text
    against = f"{refused.norm:.3g} against a limit of {refused.limit:.3g}"
    assert describe(told[1]) == f"round 1: this site's delta was not merged (NORM, {against})"


@contextlib.contextmanager
def running_nodes(
    folder: Path, server: ServerProcess, names: tuple[str, ...], results: dict[str, Path]
) -> Iterator[dict[str, threading.Thread]]:
    """Run nodes over gRPC, each in a thread, with the keys that a simulation would give them."""
    config, _ = make_config(folder)
    keys = prepare_nodes(config, list(TRAINERS))

    def take_part(name: str) -> None:
        link = GrpcLink(server.address, server.bundle, keys[name], connect_patience_s=30)
        node = Node(link, TRAINERS[name], keys[name], link.coordinator, node_home(config, name))
        results[name] = node.run()
        link.close()

    threads = {name: threading.Thread(target=take_part, args=(name,), daemon=True) for name in names}
    for thread in threads.values():
        thread.start()
    yield threads
    for thread in threads.values():
        thread.join(60)


def test_a_deployed_federation_gives_the_bits_of_a_simulated_one(tmp_path: Path) -> None:
    extra = "[delta]\nsparsify = 'seeded'\ndensity = 0.5\n[outer]\nname = 'nesterov'\nlr = 0.7\n"
    simulated = run_simulated(tmp_path / "simulated", num_rounds=2, extra=extra)
    folder = tmp_path / "deployed"
    config, path = make_config(folder, num_rounds=2, extra=extra)
    prepare_nodes(config, list(TRAINERS))
    server = ServerProcess(path)
    results: dict[str, Path] = {}
    try:
        with running_nodes(folder, server, ("north", "south"), results):
            pass
    finally:
        assert server.stop() == 0
    config, _ = make_config(folder, num_rounds=2, extra=extra)
    assert result_of(config).version == simulated.version
    assert {model_digest(Checkpoint(model_dir)) for model_dir in results.values()} == {simulated.version}
    _, history, _ = verify_directory(result_of(config).model_dir, coordinator_key(folder))
    assert len(history.deltas) == 4


@pytest.mark.parametrize("killed_in", [Phase.MERGING, Phase.PUBLISHING])
def test_a_coordinator_killed_at_any_stage_publishes_what_it_would_have(tmp_path: Path, killed_in: Phase) -> None:
    undisturbed = run_simulated(tmp_path / "undisturbed")
    folder = tmp_path / "killed"
    config, path = make_config(folder)
    prepare_nodes(config, list(TRAINERS))
    server = ServerProcess(path)
    results: dict[str, Path] = {}
    with running_nodes(folder, server, ("north",), results):
        wait_until(folder, lambda ledger: "delta_accepted" in kinds(ledger))
        if killed_in == Phase.OPEN:
            server.kill()
            server = ServerProcess(path, listen=server.address)
            with running_nodes(folder, server, ("south",), results):
                pass
        else:
            # The second delta seals the round; kill as soon as the ledger has got as far as the stage to die in.
            marks = {Phase.SEALED: "round_sealed", Phase.MERGING: "merge_started", Phase.PUBLISHING: "merge_finished"}
            with running_nodes(folder, server, ("south",), results):
                wait_until(folder, lambda ledger: marks[killed_in] in kinds(ledger))
                server.kill()
                server = ServerProcess(path, listen=server.address)
    assert server.stop() == 0
    assert result_of(make_config(folder)[0]).version == undisturbed.version
    assert sorted(results) == ["north", "south"]
    verify_directory(result_of(make_config(folder)[0]).model_dir, coordinator_key(folder))


def kinds(ledger: Ledger) -> list[str]:
    return [entry.event.kind for entry in ledger.entries]


def wait_until(folder: Path, condition: object, timeout_s: float = 60.0) -> None:
    """Wait for something to stand in the ledger, reading the database beside its owner."""
    give_up_s = time.monotonic() + timeout_s
    while time.monotonic() < give_up_s:
        ledger = Ledger(folder / "state" / "ledger.sqlite")
        try:
            if condition(ledger):  # type: ignore[operator]
                return
        finally:
            ledger.close()
        time.sleep(0.01)
    raise AssertionError("the ledger did not get that far")
