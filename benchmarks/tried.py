"""Part 5 of `results.py`: adapters of a language model of some size, trained on four domains and merged."""

from __future__ import annotations

import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from peft import PeftModel
from shared import DOMAINS, UNFINISHED, Runs, Sections, markdown, toml, write_domains
from transformers import AutoModelForCausalLM

from fedmerge.config import parse_config
from fedmerge.delta.adapter import open_tuned
from fedmerge.models.versions import write_model
from fedmerge.sim import simulate
from fedmerge.tensors import Checkpoint
from fedmerge.training import TrainTask
from fedmerge_client.train.causal_lm import CausalLM
from fedmerge_client.train.huggingface import quiet_transformers

NUM_ROUNDS, STEPS, RANK = 3, 4, 8
LLM_TRAIN = {
    "batch_size": 4,
    "context_length": 64,
    "lr": 2e-3,
    "warmup": 0.0,
    "precision": "bf16",
    "lora_rank": RANK,
    "num_threads": 1,
}
NOTE = """\
{num_parameters:,} parameters; a node sent {sent:.1f} MB of adapters in {num_rounds} rounds of {steps} steps, where
whole models in fp32 would have been {whole:,.0f} MB. The published adapter on the base, opened by PEFT, and the
published model, opened by transformers, give logits that differ by {difference:.1e} at most (the largest is
{largest:.0f})."""


def language_model(base: Path, runs: Runs) -> str:
    """Tune adapters of the causal language model in `base` on four domains, alone and in a federation."""
    print("5. a language model")
    asked = {"llm": base.name, "train": LLM_TRAIN, "rounds": [NUM_ROUNDS, STEPS]}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_domains(folder)
        nodes = {
            domain: CausalLM(
                data=folder / f"{domain}-train.txt",
                test=folder / f"{domain}-test.txt",
                eval_context_length=128,
                eval_windows=16,
            )
            for domain in DOMAINS
        }
        federation = runs.get("adapters of four nodes", asked, lambda: _federation(base, folder / "run", nodes))
        if federation is None:
            return UNFINISHED
        own = {}
        for domain, node in nodes.items():

            def work(domain: str = domain, node: CausalLM = node) -> dict[str, Any]:
                workspace = folder / f"own-{domain}"
                workspace.mkdir()
                settings = {**LLM_TRAIN, "steps": NUM_ROUNDS * STEPS}
                adapter = node.train(TrainTask(base, settings, 1, 0, workspace)).model_dir
                tuned, _ = open_tuned(adapter, Checkpoint(base))
                write_model(tuned, Checkpoint(base), workspace / "whole")
                return node.evaluate(workspace / "whole")

            own[domain] = runs.get(f"{domain} alone", {**asked, "alone": domain}, work)
    rows = []
    for title, losses in (
        ("before", federation["base"]),
        ("own adapter", {domain: found["loss"] for domain, found in own.items() if found}),
        ("merged", federation["merged"]),
    ):
        cells = [f"{losses[domain]:.3f}" if domain in losses else UNFINISHED for domain in DOMAINS]
        rows.append([title, *cells, f"{mean(losses.values()):.3f}" if len(losses) == len(DOMAINS) else ""])
    table = markdown(["nats per token", *DOMAINS, "mean"], rows)
    return (
        table
        + "\n\n"
        + NOTE.format(
            num_parameters=federation["dense_bytes"] // 4,
            sent=federation["up_bytes"] / 1e6,
            whole=NUM_ROUNDS * federation["dense_bytes"] / 1e6,
            num_rounds=NUM_ROUNDS,
            steps=STEPS,
            difference=federation["difference"],
            largest=federation["largest"],
        )
    )


def _federation(base: Path, folder: Path, nodes: dict[str, CausalLM]) -> dict[str, Any]:
    """Run the federation; return what it came to, and how far the published adapter is from the published model."""
    folder.mkdir()
    plan: Sections = {
        "federation": {"name": "benchmark"},
        "model": {"base": str(base)},
        "rounds": {"num_rounds": NUM_ROUNDS, "min_nodes": 1, "grace_s": 3600},
        "train": {"trainer": "causal-lm", "steps": STEPS, **LLM_TRAIN},
        "delta": {"codec": "auto", "downlink": "fp32"},
        "screen": {"weighting": "equal"},
        "publish": {"adapter_rank": NUM_ROUNDS * RANK * len(nodes)},
    }
    result = simulate(parse_config(toml(plan), folder=folder, where="plan"), base, nodes)
    tokens = torch.arange(64)[None] + 100
    with torch.inference_mode(), quiet_transformers():
        whole: Any = AutoModelForCausalLM.from_pretrained(result.model_dir, dtype=torch.float32).eval()
        expected = whole(tokens).logits
        adapted: Any = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(result.model_dir / "adapter")
        ).eval()
        difference = float((adapted(tokens).logits - expected).abs().max())
    return {
        "base": {node.name: node.base["loss"] for node in result.nodes},
        "merged": {node.name: node.merged["loss"] for node in result.nodes},
        "up_bytes": mean(node.sent_bytes for node in result.nodes),
        "dense_bytes": result.dense_bytes,
        "difference": difference,
        "largest": float(expected.abs().max()),
    }
