"""Federated LoRA: what is lost by averaging factors, and full fine-tuning for the bytes of an adapter.

    FEDMERGE_DATA=DIR python benchmarks/lora.py [--quick] [--json FILE] [--keep DIR]

A byte-level Llama of 836,736 parameters is trained for a moment on four kinds of text; from there four nodes go on,
each with its own, by the `causal-lm` trainer. After every round their changes are combined as each row says, all nodes
weighing the same, and what comes out is the next round's model. A node's adapters have rank 8 on all linear layers.

- products averaged: the mean of B A, which is what a federation does; or cut back to rank 8 after every round.
- factors averaged: mean B times mean A (FedIT, arXiv 2305.05644), with the same A to begin with at all nodes, which
  suits it, or one for each node; or with A frozen for good (FFA-LoRA, arXiv 2403.12313), when it is exact.
- full fine-tuning: every weight is trained, and the change is sent in about the bytes of an adapter, as its nearest
  factors of rank 8 or in 2 bits an entry; and whole, for comparison.

The learning rates of adapters and of full fine-tuning are searched on the last twentieth of the nodes' training text,
with a seed of its own. Bytes are those of delta files.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from shared import DOMAINS, Kept, at_least, print_table, report, write_domains
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from fedmerge.delta.adapter import open_tuned
from fedmerge.delta.codec import Codec
from fedmerge.delta.frame import DeltaFile, write_delta
from fedmerge.delta.lowrank import Factors, product
from fedmerge.delta.task_vector import UpdatedModel, delta_schema
from fedmerge.merge.methods.factors import factor_average, refactor, stack
from fedmerge.models.versions import write_model
from fedmerge.tensors import Checkpoint
from fedmerge.training import TrainTask
from fedmerge_client.train.causal_lm import CausalLM
from fedmerge_client.train.huggingface import save_model

RANK = 8
CONTEXT = 64
SEARCH_SEED, TEST_SEEDS = 10, (1, 2, 3)
ADAPTER_LRS, FULL_LRS = (5e-3, 1e-2, 2e-2), (2.5e-4, 5e-4, 1e-3, 2e-3)
EXACT = Codec(sparsify="lowrank", rank=RANK)
WHOLE = Codec(values="fp32")
BITS = Codec(values="lloyd2", block_size=256)
# Products are the exact mean, so averaging factors should not come out better with any seed, in nats per byte.
GOAL = 0.0


@dataclass(frozen=True)
class Arm:
    """A row: what is trained, how it travels and how it is combined."""

    name: str
    combine: str  # products, factors, full
    codec: Codec
    cut: bool = False
    shared_a: bool = False
    frozen_a: bool = False


ARMS = (
    Arm("products averaged", "products", EXACT),
    Arm("products averaged, cut to rank 8", "products", EXACT, cut=True),
    Arm("factors averaged, one A to begin with", "factors", EXACT, shared_a=True),
    Arm("factors averaged, an A for each node", "factors", EXACT),
    Arm("A frozen", "factors", EXACT, frozen_a=True),
    Arm("full, cut to rank 8", "full", EXACT),
    Arm("full, 2 bits an entry", "full", BITS),
    Arm("full, whole", "full", WHOLE),
)


@dataclass(frozen=True)
class Length:
    """How long a federation goes on, and how closely it is looked at."""

    num_rounds: int
    steps: int
    base_steps: int
    eval_windows: int


class Texts:
    """The four domains' texts as files, and the model that all begin with."""

    def __init__(self, folder: Path, kept: Kept, length: Length) -> None:
        self.folder, self.length = folder, length
        write_domains(folder)
        self.base = kept.folder / f"base-{length.base_steps}"
        if not self.base.exists():
            self._train_base()

    def trainer(self, domain: str, split: str = "test") -> CausalLM:
        return CausalLM(
            data=self.folder / f"{domain}-train.txt",
            test=self.folder / f"{domain}-{split}.txt",
            eval_context_length=128,
            eval_windows=self.length.eval_windows,
        )

    def loss(self, model_dir: Path, split: str) -> float:
        return mean(self.trainer(domain, split).evaluate(model_dir)["loss"] for domain in DOMAINS)

    def _train_base(self) -> None:
        config = LlamaConfig(
            vocab_size=256,
            hidden_size=128,
            intermediate_size=352,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=256,
            tie_word_embeddings=True,
        )
        torch.manual_seed(1)
        save_model(LlamaForCausalLM(config), None, self.folder / "scratch")
        everything = self.folder / "all.txt"
        everything.write_text("".join((self.folder / f"{domain}-train.txt").read_text() for domain in DOMAINS))
        settings = {"steps": self.length.base_steps, "batch_size": 32, "context_length": CONTEXT, "lr": 3e-3}
        result = CausalLM(data=everything).train(TrainTask(self.folder / "scratch", settings, 1, 0, self.folder))
        result.model_dir.rename(self.base)


def run(arm: Arm, lr: float, seed: int, texts: Texts) -> dict[str, float]:
    """Train and combine for all rounds; return the losses and the bytes that a node has sent."""
    num_bytes = 0
    length = texts.length
    with tempfile.TemporaryDirectory() as name:
        folder, model_dir = Path(name), texts.base
        states: dict[str, Path | None] = dict.fromkeys(DOMAINS)
        for number in range(1, length.num_rounds + 1):
            model = Checkpoint(model_dir)
            schema = delta_schema(model.schema)
            sent = []
            for index, domain in enumerate(DOMAINS):
                workspace = folder / f"{number}-{domain}"
                workspace.mkdir()
                settings: dict[str, Any] = {"steps": length.steps, "batch_size": 8, "context_length": CONTEXT, "lr": lr}
                settings |= {"warmup": 0.0, "num_threads": 1}
                if arm.combine != "full":
                    settings |= {"lora_rank": RANK, "lora_freeze_a": arm.frozen_a, "lora_seed": seed}
                task = TrainTask(
                    model_dir,
                    settings,
                    number,
                    seed=seed if arm.shared_a else 100 * seed + index,
                    workspace=workspace,
                    num_rounds=length.num_rounds,
                    previous_state=states[domain],
                )
                tuned_dir = texts.trainer(domain).train(task).model_dir
                states[domain] = workspace / "trainer-state"
                _, delta = open_tuned(tuned_dir, model)
                path = workspace / "delta"
                stats = write_delta(path, delta, schema, arm.codec, seed=0)
                num_bytes += stats.payload_bytes / len(DOMAINS)
                arrived = DeltaFile(path, schema, arm.codec, seed=0)
                sent.append((arrived, getattr(delta, "factors", {})))
            change = {n: combine(arm, n, sent) for n in schema}
            target = folder / f"model-{number}"
            write_model(UpdatedModel(model, [change]), model, target)
            model_dir = target
        return {
            "validation": texts.loss(model_dir, "validation"),
            "test": texts.loss(model_dir, "test"),
            "kB": num_bytes / 1e3,
        }


def combine(arm: Arm, name: str, sent: Sequence[tuple[DeltaFile, dict[str, Factors]]]) -> Tensor:
    """Return the change of one tensor."""
    weights = [1 / len(sent)] * len(sent)
    factors = [known[name] for _, known in sent if name in known]
    if arm.combine == "factors" and factors:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is not the mean of products is what is measured
            return product(factor_average(factors, weights))
    if arm.cut and factors:
        return product(refactor(stack(factors, weights), RANK)[0])
    return torch.stack([delta[name] for delta, _ in sent]).mean(0)


class Bench:
    """Runs that are done once."""

    def __init__(self, texts: Texts, kept: Kept) -> None:
        self.texts, self.kept = texts, kept

    def run(self, arm: Arm, lr: float, seed: int) -> dict[str, float]:
        asked = {**asdict(arm), "name": "", "lr": lr, "seed": seed, **asdict(self.texts.length)}
        found = self.kept.get(asked, lambda: dict(run(arm, lr, seed, self.texts)))
        print(f"  {arm.name}, lr {lr:g}, seed {seed}: {found['test']:.4f}", flush=True)
        return found

    def best_lr(self, arm: Arm, lrs: Sequence[float]) -> float:
        """Return the learning rate with the least validation loss."""
        return min(lrs, key=lambda lr: self.run(arm, lr, SEARCH_SEED)["validation"])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one seed, short rounds, no search; about a minute")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the targets and all figures to FILE")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep the finished runs in DIR, and take those there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    quick = arguments.quick
    length = Length(2, 5, 60, 16) if quick else Length(3, 10, 100, 32)
    with tempfile.TemporaryDirectory() as scratch:
        kept = Kept(arguments.keep or Path(scratch) / "kept")
        folder = Path(scratch) / "texts"
        folder.mkdir()
        bench = Bench(Texts(folder, kept, length), kept)
        adapter_lr = 4e-3 if quick else bench.best_lr(ARMS[0], ADAPTER_LRS)
        full_lr = 1e-3 if quick else bench.best_lr(ARMS[-1], FULL_LRS)
        seeds = TEST_SEEDS[:1] if quick else TEST_SEEDS
        runs = {
            arm.name: [bench.run(arm, full_lr if arm.combine == "full" else adapter_lr, seed) for seed in seeds]
            for arm in ARMS
        }
        base = bench.texts.loss(bench.texts.base, "test")
    rows = [["the model they start from", f"{base:.4f}", "", "", ""]]
    for name, found in runs.items():
        losses = [one["test"] for one in found]
        spread = f"{stdev(losses) / len(losses) ** 0.5:.4f}" if len(losses) > 1 else ""
        gain = mean(base - loss for loss in losses)
        rows.append([name, f"{mean(losses):.4f}", spread, f"{gain:.4f}", f"{found[0]['kB']:,.0f}"])
    print(f"\nlearning rates: adapters {adapter_lr:g}, full {full_lr:g}\n")
    print_table(["nats per byte on test text", "loss", "+-", "gain", "kB up"], rows)
    if quick:
        print("\nRuns this short can't be judged: no targets.")
        targets = []
    else:
        by_seed = {name: [one["test"] for one in found] for name, found in runs.items()}
        exact = by_seed["products averaged"]

        def least(other: str) -> float:
            return min(theirs - ours for theirs, ours in zip(by_seed[other], exact, strict=True))

        targets = [
            at_least(GOAL, f"least gap over the seeds, {other}, to products averaged", least(other))
            for other in ("factors averaged, one A to begin with", "factors averaged, an A for each node")
        ]
    report(targets, {"base": base, "lr": {"adapters": adapter_lr, "full": full_lr}, "runs": runs}, arguments.json)


if __name__ == "__main__":
    main()
