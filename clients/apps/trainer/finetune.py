"""Somebody's own Trainer script, that takes part in a federation by its callback.

    python clients/apps/trainer/finetune.py BASE DATA.txt HOST:PORT coordinator.pem HOME

BASE is the federation's base model, a byte-level causal language model, and DATA text to train on. The key in
HOME/node.key has to be trusted by the coordinator: make it with fedmerge keys new, and send node.key.pub.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from fedmerge_client.callback import FedMergeCallback

WINDOW = 16


def windows(path: Path) -> list[dict[str, torch.Tensor]]:
    """Return the text as windows of bytes, each of which is to be predicted from those before it."""
    stream = torch.tensor(list(path.read_bytes()))
    cut = stream[: len(stream) // WINDOW * WINDOW].view(-1, WINDOW)
    return [{"input_ids": row, "labels": row} for row in cut]


def main(base: str, data: str, address: str, bundle: str, home: str) -> None:
    """Train for every round of the federation, and print where the final model is."""
    callback = FedMergeCallback(address, Path(bundle), Path(home))
    arguments = TrainingArguments(
        output_dir=f"{home}/trainer",
        max_steps=4,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    model = AutoModelForCausalLM.from_pretrained(base)
    trainer = Trainer(model, arguments, train_dataset=windows(Path(data)), callbacks=[callback])
    for number in callback.rounds():
        trainer.train()
        sys.stdout.write(f"round {number} trained\n")
    sys.stdout.write(f"{callback.model_dir}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
