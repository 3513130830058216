"""Federations whose merge weighs by statistics of the nodes' data, which travel, and are signed, with the deltas."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fedmerge.cli.app import main
from fedmerge.config import Config
from fedmerge.errors import ConfigError, DigestMismatch, InputError, RoundFailed
from fedmerge.sim import FederationResult, simulate
from fedmerge.statements import Rejection
from fedmerge.store.blobs import BlobStore
from fedmerge.tensors import Checkpoint
from fedmerge.training import Trainer, TrainResult, TrainTask
from fedmerge.trust.sign import SigningKey
from fedmerge.verify import replay, verify_directory
from tests.conftest import StepTrainer, make_config

NUM_INPUTS, NUM_OUTPUTS = 12, 5
LOSSLESS = "[delta]\nvalues = 'fp32'\ndownlink = 'fp32'\n[merge]\nmethod = '{method}'\n"


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# What every node would learn if it saw all inputs.
TRUTH = normal(NUM_OUTPUTS, NUM_INPUTS, seed=0)


@dataclass
class Regression:
    """Fits `weight` to outputs of TRUTH by least squares, on inputs of its own that vary along few directions."""

    seed: int
    num_directions: int = 7

    def check(self) -> None:
        """Accept anything."""

    def inputs(self) -> Tensor:
        directions = normal(self.num_directions, NUM_INPUTS, seed=self.seed)
        return normal(80, self.num_directions, seed=self.seed + 100) @ directions

    def train(self, task: TrainTask) -> TrainResult:
        before = Checkpoint(task.model_dir)["weight"].double()
        x = self.inputs()
        tuned = before + (torch.linalg.pinv(x) @ (x @ (TRUTH - before).T)).T
        out = task.workspace / "tuned"
        out.mkdir(exist_ok=True)
        save_file({"weight": tuned.float(), "bias": torch.zeros(NUM_OUTPUTS)}, out / "model.safetensors")
        return TrainResult(out, len(x))

    def evaluate(self, model_dir: Path) -> dict[str, float]:
        return {}

    def statistics(self, model_dir: Path, kind: str) -> Mapping[str, Tensor]:
        x = self.inputs()
        assert Checkpoint(model_dir)["weight"].any()  # it is the fine-tune that is looked at
        if kind == "gram":
            return {"weight": (x.T @ x / len(x)).float()}
        # Of the squared error: the same for every output, and for each weight the mean square of its input.
        return {
            "weight": x.square().mean(0).expand(NUM_OUTPUTS, -1).float(),
            "bias": torch.ones(NUM_OUTPUTS),
        }


NODES: dict[str, Trainer] = {"north": Regression(1), "south": Regression(2)}


def federate(
    folder: Path, extra: str, nodes: Mapping[str, Trainer] = NODES, num_rounds: int = 1
) -> tuple[FederationResult, Config]:
    (folder / "base").mkdir(parents=True, exist_ok=True)
    tensors = {"weight": torch.zeros(NUM_OUTPUTS, NUM_INPUTS), "bias": torch.zeros(NUM_OUTPUTS)}
    save_file(tensors, folder / "base" / "model.safetensors")
    config, _ = make_config(folder, num_rounds=num_rounds, extra=extra)
    return simulate(config, folder / "base", nodes), config


def error(folder: Path, method: str) -> float:
    """Return how far the merged model is from the truth, on the inputs of all nodes, relative to the base."""
    result, _ = federate(folder / method, LOSSLESS.format(method=method))
    merged = Checkpoint(result.model_dir)["weight"].double()
    x = torch.cat([node.inputs() for node in NODES.values() if isinstance(node, Regression)])
    return float((x @ (merged - TRUTH).T).norm() / (x @ TRUTH.T).norm())


def test_regmean_finds_what_each_node_knows_a_part_of(tmp_path: Path) -> None:
    # Each node has learned the truth along its own directions, together all of them.
    exact = LOSSLESS.format(method="regmean") + "off_diagonal = 1.0\n"
    result, _ = federate(tmp_path, exact)
    torch.testing.assert_close(Checkpoint(result.model_dir)["weight"].double(), TRUTH, rtol=0, atol=1e-3)
    assert error(tmp_path, "regmean") < 0.8 * error(tmp_path, "fedavg")


CODECS = [
    "values = 'fp32'",
    "values = 'int8'\nsparsify = 'seeded'\ndensity = 0.25",
    "values = 'sign'\nsparsify = 'topk'\ndensity = 0.1\nerror_feedback = 0.9",
]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("method", ["fisher", "regmean"])
def test_rounds_with_statistics_verify_and_replay_bit_for_bit(tmp_path: Path, method: str, codec: str) -> None:
    extra = f"[delta]\n{codec}\n[merge]\nmethod = '{method}'\n[screen]\nmax_norm_ratio = 2.0\n"
    result, config = federate(tmp_path, extra, num_rounds=2)
    key = SigningKey.load(tmp_path / "coordinator.key").public
    _, history, _ = verify_directory(result.model_dir, {key.key_id: key})
    blobs, base = BlobStore(config.federation.state / "blobs"), Checkpoint(tmp_path / "base")
    assert replay(history, base, blobs).passed
    # The statistics are part of what was signed: one that is changed is not the one that was delivered.
    payload = blobs.path(history.records[0].contributions[0].payload_root)
    changed = bytearray(payload.read_bytes())
    changed[-1] ^= 1
    payload.chmod(0o600)
    payload.write_bytes(changed)
    with pytest.raises(DigestMismatch, match="changed"):
        replay(history, base, blobs)


@pytest.mark.parametrize("method", ["fisher", "regmean"])
def test_the_order_in_which_nodes_arrive_does_not_matter(tmp_path: Path, method: str) -> None:
    nodes = {**NODES, "west": Regression(3)}
    extra = LOSSLESS.format(method=method)
    there, _ = federate(tmp_path / "there", extra, nodes)
    back, _ = federate(tmp_path / "back", extra, dict(reversed(nodes.items())))
    assert there.version == back.version


def test_a_trainer_without_statistics_is_told_before_it_trains(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="fisher needs fisher statistics, which this node's trainer does not compute"):
        federate(tmp_path, LOSSLESS.format(method="fisher"), {"north": StepTrainer(1), "south": StepTrainer(2)})
    assert not list((tmp_path / "nodes").rglob("tuned"))


@dataclass
class Liar(Regression):
    """Sends numbers that can't be statistics."""

    number: float = -1.0

    def statistics(self, model_dir: Path, kind: str) -> Mapping[str, Tensor]:
        found = {name: tensor.clone() for name, tensor in super().statistics(model_dir, kind).items()}
        found["weight"][0, 0] = self.number
        return found


@pytest.mark.parametrize("method", ["fisher", "regmean"])
@pytest.mark.parametrize("number", [-1.0, torch.nan, torch.inf])
def test_a_node_does_not_send_what_can_not_be(tmp_path: Path, method: str, number: float) -> None:
    with pytest.raises(InputError, match=r"statistics of weight: .* finite"):
        federate(tmp_path, LOSSLESS.format(method=method), {**NODES, "liar": Liar(3, number=number)})


class TwoFaced(dict[str, Tensor]):
    """Shows one thing when it is looked through, as a check does, and another when a tensor is asked for."""

    def __getitem__(self, name: str) -> Tensor:
        return -super().__getitem__(name)


class Cheat(Regression):
    """Gets false statistics past its own node's checks."""

    def statistics(self, model_dir: Path, kind: str) -> Mapping[str, Tensor]:
        return TwoFaced(super().statistics(model_dir, kind))


@pytest.mark.parametrize(("method", "kind"), [("fisher", "fisher"), ("regmean", "gram")])
def test_admission_refuses_what_can_not_be_and_says_so_signed(
    tmp_path: Path, method: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    result, config = federate(tmp_path, LOSSLESS.format(method=method), {"cheat": Cheat(3), **NODES})
    # The round goes on without it. The node keeps what it was told, under the coordinator's signature.
    (kept,) = tmp_path.glob("nodes/*/refused/*-rejection.json")
    assert kept.parent.parent.name == "cheat"
    public = SigningKey.load(config.federation.key).public
    rejection, _ = Rejection.open(kept.read_bytes(), {public.key_id: public}, where="rejection")
    assert re.search(rf"^node [0-9a-f]{{12}}: {kind} statistics of \w+: .* negative", rejection.detail)
    assert (rejection.round, rejection.reason) == (1, "INVALID_DELTA")
    # So can everybody read it who checks what was published, or asks for the rounds.
    _, history, checks = verify_directory(result.model_dir, {public.key_id: public})
    assert history.rejections == [rejection]
    assert rejection.node_id not in {each.node_id for each in history.records[0].contributions}
    (shown,) = [check for check in checks if check.name == "rejected"]
    assert shown.passed is None
    assert rejection.detail in shown.detail
    assert main(["rounds", str(tmp_path / "fedmerge.toml")]) == 0
    said = f"round 1: delta of node {rejection.node_id[:12]} was refused: {rejection.detail}"
    assert said in capsys.readouterr().out


def test_a_round_that_fails_for_want_of_deltas_says_that_some_could_not_be_decoded(tmp_path: Path) -> None:
    with pytest.raises(RoundFailed, match=r"1 of at least 2 nodes .*; the deltas of 1 more could not be decoded"):
        federate(tmp_path, LOSSLESS.format(method="regmean"), {"cheat": Cheat(3), "north": NODES["north"]})


def test_robust_rules_that_combine_deltas_are_refused_when_the_plan_is_read(tmp_path: Path) -> None:
    extra = LOSSLESS.format(method="regmean") + "[screen]\nrobust = ['arc']\n"
    with pytest.raises(ConfigError, match=r'screen\.robust: do not go with .* "regmean"'):
        make_config(tmp_path, min_nodes=5, extra=extra)
