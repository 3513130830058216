"""Federations with nodes that do not do what they should: what becomes of each, on record and computed again."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fedmerge.errors import ConfigError, RoundFailed
from fedmerge.events import DeltasScreened
from fedmerge.rounds.overview import overview
from fedmerge.sim import prepare_nodes, simulate
from fedmerge.statements import Contribution, MergeRecord
from fedmerge.store.blobs import BlobStore
from fedmerge.store.ledger import Ledger
from fedmerge.tensors import Checkpoint
from fedmerge.training import Trainer, TrainResult, TrainTask
from fedmerge.trust.keys import TrustStore
from fedmerge.trust.sign import PublicKey, SigningKey
from fedmerge.verify import replay, verify_directory
from tests.conftest import StepTrainer, make_config

EXACT = "[delta]\nvalues = 'fp32'\ndownlink = 'fp32'\n"


class Lazy(StepTrainer):
    """Sends the model back as it came."""

    def train(self, task: TrainTask) -> TrainResult:
        before = Checkpoint(task.model_dir)
        out = task.workspace / "same"
        out.mkdir(exist_ok=True)
        save_file({name: before[name] for name in before}, out / "model.safetensors")
        return TrainResult(out, self.num_examples)


class Push(StepTrainer):
    """Adds `scale` to every entry."""

    def step(self, name: str, like: torch.Tensor) -> torch.Tensor:
        return torch.full(like.shape, self.scale)


def federate(
    folder: Path, nodes: Mapping[str, Trainer], extra: str, **settings: object
) -> tuple[Path, list[MergeRecord]]:
    """Run a federation, check what it published with all deltas merged again, and return it with its records."""
    config, _ = make_config(folder, extra=EXACT + extra, **settings)  # type: ignore[arg-type]
    result = simulate(config, folder / "base", nodes)
    _, history, _ = verify_directory(result.model_dir, coordinator_key(folder))
    assert replay(history, Checkpoint(folder / "base"), BlobStore(config.federation.state / "blobs")).passed
    return result.model_dir, history.records


def coordinator_key(folder: Path) -> dict[str, PublicKey]:
    key = SigningKey.load(folder / "coordinator.key").public
    return {key.key_id: key}


def by_name(folder: Path, record: MergeRecord) -> dict[str, Contribution]:
    names = TrustStore(folder / "trusted").names()
    return {names[each.node_id]: each for each in record.contributions}


def test_each_that_is_left_out_is_told_why(tmp_path: Path) -> None:
    nodes = {f"n{seed}": StepTrainer(seed) for seed in range(3)}
    nodes |= {"lazy": Lazy(0), "loud": StepTrainer(7, scale=0.2), "twin-1": StepTrainer(8), "twin-2": StepTrainer(8)}
    nodes["noisy-twin"] = StepTrainer(8, scale=0.011)
    screen = "[screen]\nmax_unchanged = 0.5\nmax_overlap = 0.9\n[merge]\nmethod = 'fedavg'\n"
    _, (record,) = federate(tmp_path, nodes, screen)
    found = by_name(tmp_path, record)
    assert {name: each.reason for name, each in found.items() if name in {"lazy", "loud", "n0", "n1", "n2"}} == {
        "lazy": "UNCHANGED", "loud": "NORM", "n0": "", "n1": "", "n2": "",
    }  # fmt: skip
    assert (found["lazy"].value, found["lazy"].limit) == (1.0, 0.5)
    # Of the three that are alike one counts, whoever has the first key.
    twins = sorted((found[name] for name in ("twin-1", "twin-2", "noisy-twin")), key=lambda each: each.node_id)
    assert [each.accepted for each in twins] == [True, False, False]
    assert {each.reason for each in twins[1:]} <= {"DUPLICATE", "COPYCAT"}

    ledger = Ledger(tmp_path / "state" / "ledger.sqlite")
    (event,) = (entry.event for entry in ledger.entries if isinstance(entry.event, DeltasScreened))
    told = {verdict.node_id: (verdict.reason, verdict.value, verdict.limit) for verdict in event.verdicts}
    assert told == {each.node_id: (each.reason, each.value, each.limit) for each in record.contributions}
    (row,) = overview(ledger.entries, {}).rounds
    assert len(row.refused) == 4
    assert row.refused[found["lazy"].node_id] == "the delta leaves 100.0% unchanged, over the limit of 50.0%"
    ledger.close()


def test_verdicts_are_on_record_where_the_round_fails(tmp_path: Path) -> None:
    with pytest.raises(RoundFailed, match="only 1 of 2 nodes passed screening"):
        federate(tmp_path, {"n": StepTrainer(1), "lazy": Lazy(0)}, "[screen]\nmax_unchanged = 0.5\n")
    ledger = Ledger(tmp_path / "state" / "ledger.sqlite")
    (row,) = overview(ledger.entries, {}).rounds
    assert (row.phase, len(row.refused)) == ("failed", 1)
    ledger.close()


def test_an_organisation_has_its_share_and_no_more(tmp_path: Path) -> None:
    nodes: dict[str, Trainer] = {name: StepTrainer(seed, 100) for seed, name in enumerate(("big-1", "big-2", "small"))}
    caps = "[screen]\nmax_weight_org = 0.5\n"
    config, _ = make_config(tmp_path, extra=EXACT + caps)
    prepare_nodes(config, list(nodes))
    for name in ("big-1", "big-2"):
        path = config.federation.trusted / f"{name}.pem"
        path.write_text(path.read_text().replace(f"organisation: {name}", "organisation: Big"))
    model_dir, (record,) = federate(tmp_path, nodes, caps)
    found = by_name(tmp_path, record)
    assert {name: (each.organisation, each.weight) for name, each in found.items()} == {
        "big-1": ("Big", 0.25), "big-2": ("Big", 0.25), "small": ("small", 0.5),
    }  # fmt: skip
    base, merged = Checkpoint(tmp_path / "base"), Checkpoint(model_dir)
    steps = [StepTrainer(seed).step("vector", base["vector"]).double() for seed in range(3)]
    expected = base["vector"].double() + 0.25 * steps[0] + 0.25 * steps[1] + 0.5 * steps[2]
    torch.testing.assert_close(merged["vector"].double(), expected, atol=1e-6, rtol=0)


def test_the_clipping_norm_goes_on_from_the_last_round(tmp_path: Path) -> None:
    nodes = {f"n{seed}": StepTrainer(seed, scale=0.01 * (seed + 1)) for seed in range(3)}
    _, records = federate(tmp_path, nodes, "[screen]\nclip_quantile = 0.3\n", num_rounds=3)
    norms = sorted(each.norm or 0.0 for each in records[0].contributions)
    clip = [record.clip_norm or 0.0 for record in records]
    assert clip[0] == norms[0]
    share = sum(norm <= clip[0] for norm in norms) / 3
    assert clip[1] == pytest.approx(clip[0] * math.exp(-0.2 * (share - 0.3)), rel=1e-6)
    for record, limit in zip(records, clip, strict=True):
        assert [each.scale for each in record.contributions] == pytest.approx(
            [min(1.0, limit / (each.norm or 0.0)) for each in record.contributions]
        )


def test_a_root_of_trust_outweighs_a_majority_of_liars(tmp_path: Path) -> None:
    rules = "[screen]\nrobust = ['fltrust']\nroot = 'root'\n"
    with pytest.raises(ConfigError, match=r"screen\.root: no trusted node is called 'root'"):
        federate(tmp_path / "without", {"n": StepTrainer(1)}, rules)
    nodes = {"root": StepTrainer(1), "n": StepTrainer(1, scale=0.02)}
    nodes |= {f"liar-{number}": StepTrainer(1, scale=-0.01 * number) for number in (1, 2, 3)}
    model_dir, (record,) = federate(tmp_path, nodes, rules, min_nodes=4)
    found = by_name(tmp_path, record)
    assert found["root"].accepted
    assert found["root"].weight == 0
    base, merged = Checkpoint(tmp_path / "base"), Checkpoint(model_dir)
    # Of those that point its way, there is one, and it is brought to the root's length.
    expected = base["vector"] + nodes["root"].step("vector", base["vector"])
    torch.testing.assert_close(merged["vector"], expected, atol=1e-5, rtol=0)


SCORE = """
import json, sys, pathlib
from safetensors.numpy import load_file
directory, calls = map(pathlib.Path, sys.argv[1:])
(calls / str(len(list(calls.iterdir())))).touch()
print("scoring")
print(json.dumps({"height": float(load_file(directory / "model.safetensors")["vector"].astype("float64").mean())}))
"""


def test_the_coordinators_probe_scores_each_delta_alone(tmp_path: Path) -> None:
    (tmp_path / "score.py").write_text(SCORE)
    (tmp_path / "calls").mkdir()
    command = f"{sys.executable} {tmp_path / 'score.py'} {{model}} {tmp_path / 'calls'}"
    screen = f"[screen]\nprobe = {json.dumps(command)}\nprobe_metric = 'height'\nmin_gain = -0.01\n"
    nodes = {"up": Push(1, scale=0.03), "flat": Push(2, scale=-0.005), "down": Push(3, scale=-0.02), "lazy": Lazy(4)}
    model_dir, (record,) = federate(tmp_path, nodes, screen + "max_unchanged = 0.9\n")
    found = by_name(tmp_path, record)
    gains = {name: each.gain for name, each in found.items()}
    # Whom another check refused is not scored.
    assert gains == {
        "up": pytest.approx(0.03),
        "flat": pytest.approx(-0.005),
        "down": pytest.approx(-0.02),
        "lazy": None,
    }
    assert (found["down"].reason, found["down"].value, found["down"].limit) == ("GAIN", gains["down"], -0.01)
    base, merged = Checkpoint(tmp_path / "base")["vector"], Checkpoint(model_dir)["vector"]
    torch.testing.assert_close(merged, base + (0.03 - 0.005) / 2, atol=1e-6, rtol=0)
    (check,) = (each for each in verify_directory(model_dir, coordinator_key(tmp_path))[2] if each.name == "probe")
    assert check.passed is None
    # Once for the model as it was and once for each of the three; computing the merge again did not ask.
    assert len(list((tmp_path / "calls").iterdir())) == 4


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("python score.py", r"screen\.probe: python score\.py: has no \{model\}"),
        ("python 'score.py {model}", r"screen\.probe: No closing quotation"),
    ],
)
def test_a_probe_that_can_not_be_one(tmp_path: Path, command: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make_config(tmp_path, extra=f"[screen]\nprobe = {json.dumps(command)}\n")


def test_a_probe_that_fails_fails_the_round(tmp_path: Path) -> None:
    command = json.dumps(f"{sys.executable} -c 'print({{}})' {{model}}")
    with pytest.raises(RoundFailed, match="the probe gave no metrics, not auto"):
        federate(tmp_path, {"a": Push(1), "b": Push(2)}, f"[screen]\nprobe = {command}\nduplicates = 'accept'\n")
