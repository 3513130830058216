"""Somebody's own Trainer script, that takes part in a federation by its callback.

    python clients/apps/trainer/finetune.py BASE DATA.txt HOST:PORT coordinator.pem HOME [--steps 4] [--lr 1e-2]
                                            [--window 16]

BASE is the federation's base model, a byte-level causal language model, and DATA text to train on. The key in
HOME/node.key has to be trusted by the coordinator: make it with fedmerge keys new, and send node.key.pub.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from fedmerge_client.callback import FedMergeCallback


def windows(path: Path, window: int) -> list[dict[str, torch.Tensor]]:
    """Return the text as windows of bytes, each of which is to be predicted from those before it."""
    stream = torch.tensor(list(path.read_bytes()))
    cut = stream[: len(stream) // window * window].view(-1, window)
    return [{"input_ids": row, "labels": row} for row in cut]


def main() -> None:
    """Train for every round of the federation, and print where the final model is."""
    parser = argparse.ArgumentParser()
    for name in ("base", "data", "address", "bundle", "home"):
        parser.add_argument(name)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--window", type=int, default=16)
    chosen = parser.parse_args()
    callback = FedMergeCallback(chosen.address, Path(chosen.bundle), Path(chosen.home))
    arguments = TrainingArguments(
        output_dir=f"{chosen.home}/trainer",
        max_steps=chosen.steps,
        per_device_train_batch_size=8,
        learning_rate=chosen.lr,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    model = AutoModelForCausalLM.from_pretrained(chosen.base)
    data = windows(Path(chosen.data), chosen.window)
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=[callback])
    for number in callback.rounds():
        trainer.train()
        sys.stdout.write(f"round {number} trained\n")
    sys.stdout.write(f"{callback.model_dir}\n")


if __name__ == "__main__":
    main()
