"""What few bytes cost over many rounds: a language model trained by four nodes, each on another kind of text.

    FEDMERGE_DATA=DIR python benchmarks/federated.py [--quick] [--json FILE] [--keep DIR]

A byte-level Llama of 836,736 parameters is trained for a moment on all four kinds of text; from there the nodes go on,
each with its own (Shakespeare, Moby Dick, State of the Union addresses, arithmetic word problems). Every run is a
federation in this process, by the coordinator's and the nodes' own code: bytes are those of the files that travel.

1. Rounds: dense deltas with plain averaging and with Nesterov momentum (DiLoCo, arXiv 2311.08105), and top-k of 4096
   with error feedback (SparseLoCo, arXiv 2508.15706), for the same tokens in as many rounds. The outer learning rate of
   a rule with several to choose from is searched on the last twentieth of the nodes' training text with one seed; what
   is printed is the loss on the test text.
2. Refusals: with a fifth of all deltas refused at random, is a residual to be debited when a delta is sent, as nodes
   do, or put back when it is refused?
"""

from __future__ import annotations

import argparse
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from shared import DOMAINS, Kept, at_least, at_most, print_table, report, walk, write_domains
from transformers import LlamaConfig, LlamaForCausalLM

from fedmerge.config import parse_config
from fedmerge.coordinator.coordinator import Coordinator
from fedmerge.delta.codec import Codec
from fedmerge.delta.frame import DeltaFile
from fedmerge.delta.task_vector import delta_schema
from fedmerge.errors import RoundClosed
from fedmerge.node.feedback import RESIDUAL, write_residual
from fedmerge.seeds import derive_seed
from fedmerge.sim import LocalLink, simulate
from fedmerge.tensors import Checkpoint
from fedmerge.training import TrainTask
from fedmerge_client.train.causal_lm import CausalLM
from fedmerge_client.train.huggingface import save_model

NUM_PARAMETERS = 836_736
CONTEXT = 128
BASE_STEPS = 200
EVAL_WINDOWS = 96  # of 128 bytes, per domain
JUDGED = "top 32 of 4096, sign"
SEARCH_SEED = 1
TEST_SEEDS = (1, 2)
REFUSAL_SEEDS = (1, 2)
# What loss a top-k run may have over the best dense run's, and how many times fewer bytes it is to send.
LOSS_GOAL_PERCENT, BYTES_GOAL = 2.0, 150.0

PLAN = """
[federation]
name = "benchmark"
[model]
base = "base"
[rounds]
num_rounds = {num_rounds}
min_nodes = 1
grace_s = 0
[train]
trainer = "causal-lm"
steps = {steps}
batch_size = {batch_size}
context_length = 128
lr = 1e-3
warmup = 0.0
num_threads = 1
[delta]
{delta}
[merge]
method = "{merge}"
seed = {seed}
[screen]
weighting = "equal"
[outer]
name = "{outer}"
lr = {lr}
"""
DENSE = 'values = "fp32"\ndownlink = "fp32"\n'
TOPK = """\
sparsify = "topk"
density = {density}
values = "{values}"
block_size = {block_size}
error_feedback = 0.95
downlink = "int8"
"""


@dataclass(frozen=True)
class Rule:
    """How a federation trains: what travels (`kept` of every 4096, 0 for all), how it is merged and stepped."""

    name: str
    num_rounds: int
    steps: int
    outer: str = "sgd"
    kept: int = 0
    values: str = "sign"
    merge: str = "fedavg"
    batch_size: int = 8
    refused: float = 0.0
    restore: bool = False

    @property
    def fp32_bytes(self) -> int:
        """What a node would send in the same rounds as plain fp32."""
        return 4 * NUM_PARAMETERS * self.num_rounds

    def plan(self, lr: float, seed: int) -> str:
        delta = DENSE
        if self.kept:
            delta = TOPK.format(density=self.kept / 4096, values=self.values, block_size=4096)
        fields = {key: value for key, value in asdict(self).items() if key != "name"}
        return PLAN.format(**fields, delta=delta, lr=lr, seed=seed)


@dataclass(frozen=True)
class Outcome:
    """What a run left: losses in nats per byte by domain, bytes per node, and the loss after parts of the rounds."""

    validation: float
    test: dict[str, float]
    up_bytes: float
    down_bytes: float
    tokens: int  # of one node
    curve: list[tuple[int, float]]  # rounds done, mean test loss

    @property
    def loss(self) -> float:
        return mean(self.test.values())


class Texts:
    """The four domains' texts as files, and the model that the federations begin with."""

    def __init__(self, folder: Path, kept: Kept, *, base_steps: int, width: int = 128) -> None:
        self.folder, self.base_steps, self.width = folder, base_steps, width
        write_domains(folder)
        self.base = kept.folder / (f"base-{base_steps}" + (f"-{width}" if width != 128 else ""))
        if not self.base.exists():
            self._train_base()

    def trainer(self, domain: str, split: str | None = None) -> CausalLM:
        return CausalLM(
            data=self.folder / f"{domain}-train.txt",
            test=self.folder / f"{domain}-{split}.txt" if split else None,
            eval_context_length=CONTEXT,
            eval_windows=EVAL_WINDOWS,
        )

    def losses(self, model_dir: Path, split: str) -> dict[str, float]:
        return {domain: self.trainer(domain, split).evaluate(model_dir)["loss"] for domain in DOMAINS}

    def _train_base(self) -> None:
        config = LlamaConfig(
            vocab_size=256,
            hidden_size=self.width,
            intermediate_size=self.width * 11 // 4,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=256,
            tie_word_embeddings=True,
        )
        torch.manual_seed(1)
        scratch = self.folder / "scratch"
        save_model(LlamaForCausalLM(config), None, scratch)
        everything = self.folder / "all.txt"
        everything.write_text("".join((self.folder / f"{domain}-train.txt").read_text() for domain in DOMAINS))
        settings = {"steps": self.base_steps, "batch_size": 32, "context_length": CONTEXT, "lr": 3e-3, "warmup": 0.1}
        result = CausalLM(data=everything).train(TrainTask(scratch, settings, 1, 0, self.folder))
        shutil.copytree(result.model_dir, self.base)


class RefusingLink(LocalLink):
    """Refuses some deltas, as if they came too late; with `restore` their nodes take back what they sent."""

    def __init__(self, coordinator: Coordinator, node_id: str, rule: Rule, seed: int) -> None:
        super().__init__(coordinator, node_id)
        self._rule, self._seed = rule, seed

    def submit(self, envelope: bytes, payload: Path, leaves: list[bytes], sent: Callable[[int], None]) -> bytes:
        if not self._is_refused():
            return super().submit(envelope, payload, leaves, sent)
        if self._rule.restore:
            spec = self._coordinator.journal.spec()
            assert spec is not None
            schema, codec = delta_schema(self._coordinator.schema), Codec.from_dict(spec.codec)
            sent_now, left = DeltaFile(payload, schema, codec, seed=0), Checkpoint(payload.parent / RESIDUAL)
            taken_back = {name: left[name] + sent_now[name] for name in left}
            write_residual(payload.parent, taken_back, self._coordinator.base.shards())
        raise RoundClosed("refused by lot")

    def _is_refused(self) -> bool:
        round_number, node_ids = self.view().round, self._coordinator.trust.keys()
        refused = {
            node_id: derive_seed("refused", self._seed, round_number, node_id) < self._rule.refused * 2**64
            for node_id in node_ids
        }
        return refused[self._node_id] and not all(refused.values())


def run(rule: Rule, lr: float, seed: int, texts: Texts, *, num_points: int = 4) -> Outcome:
    """Run one federation to its end and score what it published."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = parse_config(rule.plan(lr, seed), folder=folder, where="plan")
        result = simulate(
            config,
            texts.base,
            {domain: texts.trainer(domain) for domain in DOMAINS},
            connect=lambda coordinator, node_id: RefusingLink(coordinator, node_id, rule, seed),
        )
        models = config.federation.state / "models"
        rounds = sorted({math.ceil(rule.num_rounds * point / num_points) for point in range(1, num_points + 1)})
        losses = {r: texts.losses(models / f"round-{r:04d}", "test") for r in rounds}
        return Outcome(
            validation=mean(texts.losses(result.model_dir, "validation").values()),
            test=losses[rounds[-1]],
            up_bytes=mean(node.sent_bytes for node in result.nodes),
            down_bytes=result.fetched_bytes,
            tokens=rule.num_rounds * rule.steps * rule.batch_size * CONTEXT,
            curve=[(r, mean(found.values())) for r, found in losses.items()],
        )


class Bench:
    """Runs that are done once, and searches for outer learning rates among them."""

    def __init__(self, texts: Texts, kept: Kept) -> None:
        self.texts, self.kept = texts, kept

    def run(self, rule: Rule, lr: float, seed: int) -> Outcome:
        asked = {**asdict(rule), "name": "", "lr": lr, "seed": seed, "base_steps": self.texts.base_steps}
        start = time.process_time()
        found = self.kept.get(asked, lambda: asdict(run(rule, lr, seed, self.texts)))
        outcome = Outcome(**found)
        took = time.process_time() - start
        print(f"  {rule.name}, lr {lr:g}, seed {seed}: {outcome.loss:.4f} ({took:.0f} CPU s)", flush=True)
        return outcome

    def best_lr(self, rule: Rule, lrs: Sequence[float]) -> float:
        """Return the learning rate with the least validation loss: up or down from the middle one while it falls."""
        if len(lrs) == 1:
            return lrs[0]
        best = walk(lrs, lambda lr: self.run(rule, lr, SEARCH_SEED).validation, start=len(lrs) // 2)
        assert best is not None
        return best


def rounds_table(
    bench: Bench, rules: dict[Rule, Sequence[float]], seeds: Sequence[int]
) -> dict[str, tuple[float, list[Outcome]]]:
    """Print what each rule came to, and return its outer learning rate and its outcomes by name."""
    print("\n1. rounds")
    found: dict[str, tuple[float, list[Outcome]]] = {}
    for rule, lrs in rules.items():
        lr = bench.best_lr(rule, lrs)
        found[rule.name] = lr, [bench.run(rule, lr, seed) for seed in seeds]
    base = bench.texts.losses(bench.texts.base, "test")
    headings = ["nats per byte on test text", "R x H", "lr", *DOMAINS, "mean", "by seed", "kB up", "x fp32", "kB down"]
    rows = [["the model they start from", "-", "-", *(f"{base[d]:.3f}" for d in DOMAINS), f"{mean(base.values()):.4f}"]]
    rows[0] += ["", "", "", ""]
    for rule in rules:
        lr, outcomes = found[rule.name]
        by_domain = [f"{mean(one.test[domain] for one in outcomes):.3f}" for domain in DOMAINS]
        rows.append([rule.name, f"{rule.num_rounds} x {rule.steps}", f"{lr:g}", *by_domain])
        rows[-1] += [f"{mean(one.loss for one in outcomes):.4f}", " ".join(f"{one.loss:.3f}" for one in outcomes)]
        times_fewer = rule.fp32_bytes / outcomes[0].up_bytes
        rows[-1] += [f"{outcomes[0].up_bytes / 1e3:,.0f}", f"{times_fewer:.1f}", f"{outcomes[0].down_bytes / 1e3:,.0f}"]
    print()
    print_table(headings, rows)
    print("\nloss after a quarter, a half, three quarters and all of the rounds; kB that a node has sent by then")
    for rule in rules:
        _, outcomes = found[rule.name]
        points = zip(*(one.curve for one in outcomes), strict=True)
        shown = [
            f"{mean(loss for _, loss in point):.4f} ({outcomes[0].up_bytes * point[0][0] / rule.num_rounds / 1e3:,.0f})"
            for point in points
        ]
        print(f"  {rule.name:<40} {'  '.join(shown)}")
    return found


def refusals_table(bench: Bench, rule: Rule, lr: float, seeds: Sequence[int]) -> dict[str, list[float]]:
    """Print the loss with no refusals, and with refused deltas debited and restored."""
    print("\n2. a fifth of all deltas refused")
    variants = {
        "none refused": rule,
        "refused, residual stays debited": replace(rule, refused=0.2),
        "refused, residual restored": replace(rule, refused=0.2, restore=True),
    }
    losses = {
        name: [bench.run(replace(variant, name=name), lr, seed).loss for seed in seeds]
        for name, variant in variants.items()
    }
    print()
    print_table(
        ["nats per byte on test text", *(f"seed {seed}" for seed in seeds), "mean"],
        [[name, *(f"{loss:.4f}" for loss in of), f"{mean(of):.4f}"] for name, of in losses.items()],
    )
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="short runs, no search, no refusals; about a minute")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the targets and all figures to FILE")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep the finished runs in DIR, and take those there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        kept = Kept(arguments.keep or Path(scratch) / "kept")
        folder = Path(scratch) / "texts"
        folder.mkdir()
        bench = Bench(Texts(folder, kept, base_steps=60 if arguments.quick else BASE_STEPS), kept)
        targets, figures = (quick if arguments.quick else full)(bench)
    report(targets, figures, arguments.json)


def full(bench: Bench) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """All rules with their searches, and the refusals."""
    short: dict[str, Any] = {"num_rounds": 32, "steps": 5, "batch_size": 8}
    sparse: dict[str, Any] = {**short, "merge": "contributor_mean"}
    rules: dict[Rule, Sequence[float]] = {
        Rule("dense, averaged", **short): [0.7, 1.0, 1.5],
        Rule("dense, Nesterov 0.9", outer="nesterov", **short): [0.2, 0.35, 0.5],
        Rule(JUDGED, kept=32, **sparse): [1.0, 1.5, 2.0],
        Rule("top 32 of 4096, sign, plain mean", kept=32, **short): [6.0],
    }
    found = rounds_table(bench, rules, TEST_SEEDS)
    means = {name: mean(one.loss for one in outcomes) for name, (_, outcomes) in found.items()}
    judged = next(rule for rule in rules if rule.name == JUDGED)
    best = min((name for name in ("dense, averaged", "dense, Nesterov 0.9")), key=means.__getitem__)
    sent = {name: outcomes[0].up_bytes for name, (_, outcomes) in found.items()}
    excess = 100 * (means[JUDGED] / means[best] - 1)
    targets = [
        at_most(LOSS_GOAL_PERCENT, f"{JUDGED}: loss over that of {best}, percent", excess),
        at_least(BYTES_GOAL, f"{JUDGED}: times fewer bytes up than {best}", sent[best] / sent[JUDGED]),
    ]
    lr, _ = found[JUDGED]
    refused = refusals_table(bench, replace(judged, num_rounds=16), lr, REFUSAL_SEEDS)
    figures = {name: {"lr": lr, "runs": [asdict(one) for one in outcomes]} for name, (lr, outcomes) in found.items()}
    return targets, {"rounds": figures, "refusals": refused}


def quick(bench: Bench) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Four short rounds, with learning rates that the full run found: too little to judge a goal by."""
    common: dict[str, Any] = {"num_rounds": 4, "steps": 5, "batch_size": 8}
    rules: dict[Rule, Sequence[float]] = {
        Rule("dense, averaged", **common): [1.5],
        Rule("dense, Nesterov 0.9", outer="nesterov", **common): [0.4],
        Rule("top 64 of 4096, sign", kept=64, merge="contributor_mean", **common): [1.0],
    }
    found = rounds_table(bench, rules, [2])
    print("\nRuns this short can't be judged: no targets.")
    return [], {"rounds": {name: [asdict(one) for one in outcomes] for name, (_, outcomes) in found.items()}}


if __name__ == "__main__":
    main()
