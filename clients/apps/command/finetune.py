"""An ordinary training script: a causal language model that reads bytes is tuned on a text, and scored.

    python finetune.py train MODEL TEXT OUT [--steps 20] [--lr 1e-3] [--window 128] [--batch 8] [--seed 0]
    python finetune.py score MODEL TEXT [--window 128]

`score` prints the loss in nats per byte, of at most 64 windows that are spread over the text.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

NUM_SCORED = 64


def windows(text: Path, window: int) -> Tensor:
    """Return the text's bytes as rows (N, window)."""
    stream = torch.tensor(list(text.read_bytes()))
    return stream[: len(stream) // window * window].view(-1, window)


def train(model: Any, rows: Tensor, arguments: argparse.Namespace) -> None:
    """Tune with AdamW, and save the model where it is wanted."""
    torch.manual_seed(arguments.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.lr)
    for _ in range(arguments.steps):
        chosen = rows[torch.randint(len(rows), (arguments.batch,))]
        loss = model(input_ids=chosen, labels=chosen).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(arguments.out)


def score(model: Any, rows: Tensor) -> float:
    """Return the mean loss."""
    chosen = rows[:: -(-len(rows) // NUM_SCORED)]
    with torch.inference_mode():
        return float(model(input_ids=chosen, labels=chosen).loss)


def main() -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser()
    parser.add_argument("task", choices=("train", "score"))
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("out", nargs="?")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(arguments.model)
    rows = windows(arguments.text, arguments.window)
    if arguments.task == "train":
        train(model, rows, arguments)
    else:
        sys.stdout.write(json.dumps({"loss": score(model, rows)}) + "\n")


if __name__ == "__main__":
    main()
