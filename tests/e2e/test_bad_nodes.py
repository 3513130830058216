"""Simulated bad nodes: they send what the attacks' papers say, everywhere the same, and good federations stand them."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedmerge.config import Config
from fedmerge.errors import ConfigError, InputError
from fedmerge.sim import FederationResult, outcome_of, simulate, simulate_processes, sweep, with_virtual_nodes
from fedmerge.sim.page import page
from fedmerge.tensors import Checkpoint
from tests.conftest import StepTrainer, make_config

NODES = {f"node-{number}": StepTrainer(number) for number in range(10)}
# So that the models are what was trained, to a few bits of fp32.
EXACT = "[delta]\nvalues = 'fp32'\ndownlink = 'fp32'\n[merge]\nmethod = 'fedavg'\n[screen]\nmax_norm_ratio = 1e6\n"
NORTH_AND_SOUTH = "[[nodes]]\nname = 'north'\n[[nodes]]\nname = 'south'\n"


def run(folder: Path, simulated: str, settings: str = EXACT, **more: object) -> tuple[FederationResult, Config]:
    config, _ = make_config(folder, extra=f"{settings}\n[simulate]\n{simulated}\n", **more)  # type: ignore[arg-type]
    return simulate(config, folder / "base", NODES), config


def bad(result: FederationResult) -> list[str]:
    return [node.name for node in result.nodes if node.is_bad]


def update(name: str) -> Tensor:
    return NODES[name].step("matrix", torch.empty(300, 2000)).double()


def sent_by_bad(folder: Path, result: FederationResult) -> list[Tensor]:
    """Return what bad nodes sent, in all, of the mean that was published."""
    before, after = (Checkpoint(path)["matrix"].double() for path in (folder / "base", result.model_dir))
    return (after - before) * len(NODES) - sum(update(name) for name in NODES if name not in bad(result))


def apart(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize(("attack", "strength", "factor"), [
    ("sign_flip", None, -1.0), ("sign_flip", 3.0, -3.0), ("scale", None, 10.0), ("scale", 4.0, 4.0),
])  # fmt: skip
def test_each_sends_a_multiple_of_its_own_update(
    tmp_path: Path, attack: str, strength: float | None, factor: float
) -> None:
    more = "" if strength is None else f"attack_strength = {strength}"
    result, _ = run(tmp_path, f"bad_nodes = 3\nattack = '{attack}'\n{more}")
    assert len(bad(result)) == 3
    expected = factor * sum(update(name) for name in bad(result))
    assert apart(sent_by_bad(tmp_path, result), expected) < 1e-3


def test_together_they_send_what_the_papers_say(tmp_path: Path) -> None:
    """Inner product manipulation, -e times the mean (1903.03936), and mean - z deviations (1902.06156)."""
    for attack, strength in (("inner_product", 0.5), ("little", 1.5)):
        result, _ = run(tmp_path / attack, f"bad_nodes = 3\nattack = '{attack}'")
        updates = torch.stack([update(name) for name in bad(result)])
        mean = updates.mean(0)
        deviation = ((updates - mean).square().sum(0) / 2).sqrt()
        expected = 3 * (-strength * mean if attack == "inner_product" else mean - strength * deviation)
        # Each adds a hundredth of noise.
        assert 0.002 < apart(sent_by_bad(tmp_path / attack, result), expected) < 0.02
        assert all(node.num_merged == node.num_deltas == 1 for node in result.nodes), "known as copies"
        assert not (tmp_path / attack / "accomplices").exists()


def test_noise_is_as_long_as_it_says_and_in_no_direction(tmp_path: Path) -> None:
    result, _ = run(tmp_path, "bad_nodes = 2\nattack = 'noise'\nattack_strength = 5.0")
    sent = sent_by_bad(tmp_path, result)
    lengths = torch.stack([5 * update(name).norm() for name in bad(result)])
    assert float(sent.norm()) == pytest.approx(float(lengths.norm()), rel=0.01)
    for name in bad(result):
        assert abs(float(torch.cosine_similarity(sent.flatten(), update(name).flatten(), dim=0))) < 0.01


def test_the_same_nodes_are_bad_and_one_more(tmp_path: Path) -> None:
    known: set[str] = set()
    for number in range(4):
        result, _ = run(tmp_path / str(number), f"bad_nodes = {number}", num_rounds=1)
        assert len(bad(result)) == number
        assert known <= set(bad(result))
        known = set(bad(result))
    result, _ = run(tmp_path / "other", "bad_nodes = 3\nseed = 1")
    assert set(bad(result)) != known


def test_screening_and_a_robust_rule_stand_them(tmp_path: Path) -> None:
    """The default configuration: what is ten times as long is left out, and the rest does not turn the model."""
    good = run(tmp_path / "good", "", "", num_rounds=2, min_nodes=5)[0]
    direction = Checkpoint(good.model_dir)["matrix"] - Checkpoint(tmp_path / "good" / "base")["matrix"]
    for attack, strength in (("scale", 30.0), ("sign_flip", 5.0)):
        folder = tmp_path / attack
        result, _ = run(
            folder, f"bad_nodes = 2\nattack = '{attack}'\nattack_strength = {strength}", "", num_rounds=2, min_nodes=5
        )
        moved = Checkpoint(result.model_dir)["matrix"] - Checkpoint(folder / "base")["matrix"]
        assert torch.cosine_similarity(moved.flatten(), direction.flatten(), dim=0) > 0.7
        told = Counter({node.is_bad: 0 for node in result.nodes})
        for node in result.nodes:
            assert node.num_deltas == 2
            told[node.is_bad] += node.num_merged
        assert told[False] == 16
        assert told[True] == (0 if attack == "scale" else 4)
        assert [each.num_merged for each in result.rounds] == ([8, 8] if attack == "scale" else [10, 10])
        row = outcome_of(result)
        assert (row["merged"], row["bad_merged"], row["bad_deltas"]) == (sum(told.values()), told[True], 4)
        assert f"2 of the nodes are bad: {told[True]} of their 4 deltas were merged" in page(result, "federation")


def with_data(folder: Path, simulated: str) -> Config:
    """Return a configuration of three nodes whose rows have labels."""
    nodes = []
    for name in ("a", "b", "c"):
        rows = [{"text": f"{name} {number}", "label": "xyzvw"[number % 5]} for number in range(20)]
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        nodes.append(f"[[nodes]]\nname = '{name}'\ndata = '{name}.jsonl'")
    sections = "\n".join(["[simulate]", simulated, *nodes])
    return make_config(folder, extra=sections)[0]


def rows_of(path: Path | None) -> Iterator[dict[str, str]]:
    assert path is not None
    return map(json.loads, path.read_text().strip().split("\n"))


def test_flipped_labels_are_others_one_to_one(tmp_path: Path) -> None:
    before = with_data(tmp_path, "bad_nodes = 1\nattack = 'label_flip'")
    after = with_virtual_nodes(before)
    changed = [pair for pair in zip(before.nodes, after.nodes, strict=True) if pair[0].data != pair[1].data]
    assert len(changed) == 1
    pairs = set()
    for old, new in zip(rows_of(changed[0][0].data), rows_of(changed[0][1].data), strict=True):
        assert old["text"] == new["text"]
        pairs.add((old["label"], new["label"]))
    # Sorted, v w x y z: two further on.
    assert with_virtual_nodes(after) == after
    assert pairs == {("v", "x"), ("w", "y"), ("x", "z"), ("y", "v"), ("z", "w")}
    assert next(rows_of(before.nodes[0].data))["label"] == "x"


def test_flipped_labels_of_made_up_nodes(tmp_path: Path) -> None:
    # With what only looks like the end of a line.
    rows = "".join(f"{number} \u2028,{number % 2}\n" for number in range(40))
    (tmp_path / "all.csv").write_text(f"text,label\n{rows}")
    simulated = "nodes = 4\ndata = 'all.csv'\nbad_nodes = 2\nattack = 'label_flip'"
    config = with_virtual_nodes(make_config(tmp_path, extra=f"[simulate]\n{simulated}\n")[0])
    flipped = 0
    for node in config.nodes:
        right = {(int(row["text"]) % 2 == int(row["label"])) for row in rows_of(node.data)}
        assert len(right) == 1
        flipped += right == {False}
    assert flipped == 2


def test_what_can_not_be_simulated_is_said_before_it_begins(tmp_path: Path) -> None:
    wrong = {
        "bad_nodes = 10": "leaves none of the 10 nodes good",
        "bad_nodes = 1\nattack = 'little'": "needs two bad nodes",
        "bad_nodes = 1\nattack = 'label_flip'": "changes data files",
    }
    for number, (simulated, said) in enumerate(wrong.items()):
        with pytest.raises(ConfigError, match=said):
            run(tmp_path / str(number), simulated)
        assert not (tmp_path / str(number) / "state").exists()
    for number, (section, said) in enumerate(
        [("[streaming]\nfragments = 2\n", r"\[streaming\]"), ("", "rounds.dynamic_steps")]
    ):
        rounds = "grace_s = 60" if section else "async_buffer = 2\nmax_staleness = 3\ndynamic_steps = 0.5"
        with pytest.raises(ConfigError, match=said):
            run(tmp_path / f"s{number}", "bad_nodes = 2\nattack = 'little'", f"steps = 8\n{section}", rounds=rounds)
    swept = make_config(tmp_path / "swept", extra=f"[simulate]\nattack = 'little'\n{NORTH_AND_SOUTH}")[1]
    with pytest.raises(ConfigError, match="needs two bad nodes"):
        sweep(swept, {"simulate.bad_nodes": [0, 1]}, pytest.fail)
    config = with_data(tmp_path / "p", "bad_nodes = 1")
    with pytest.raises(ConfigError, match="processes of their own"):
        simulate_processes(config, tmp_path / "p" / "fedmerge.toml")
    config = with_data(tmp_path / "q", "bad_nodes = 1\nattack = 'label_flip'\nby = 'kind'")
    with pytest.raises(InputError, match=re.escape("a row without a label in 'kind'")):
        with_virtual_nodes(config)
    config = with_data(tmp_path / "r", "bad_nodes = 1\nattack = 'label_flip'\nby = 'text'")
    for node in config.nodes:
        assert node.data is not None
        node.data.write_text('{"text": "the same"}\n')
    with pytest.raises(InputError, match="two values of 'text'"):
        with_virtual_nodes(config)
