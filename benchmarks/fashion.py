"""A convolutional network on pictures of clothes: a site's own code, run by the `torch` trainer in `trainers.py`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedmerge_client.train.torch_function import Work

BATCH_SIZE = 32


def make_model() -> nn.Module:
    """Return the untrained network, the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(1568, 10),
        )  # fmt: skip


def load_site(path: Path, part: str, site: int, num_sites: int) -> tuple[Tensor, Tensor]:
    """Return a site's images (N, 1, 28, 28) and labels (N,) of the part "train" or "test".

    Four of five images go where their class belongs, one anywhere.
    """
    with np.load(path) as arrays:
        images, labels = torch.tensor(arrays[f"x_{part}"]), torch.tensor(arrays[f"y_{part}"]).long()
    number = torch.arange(len(labels))
    owner = torch.where(number % 5 > 0, labels % num_sites, number // 5 % num_sites)
    mine = owner == site
    return images[mine].unsqueeze(1) / 255, labels[mine]


def train(model: nn.Module, work: Work) -> int:
    """Take the plan's `steps` of SGD; return the number of images."""
    assert work.data is not None
    images, labels = load_site(work.data, "train", int(work.options["site"]), int(work.options["num_sites"]))
    optimizer = torch.optim.SGD(model.parameters(), lr=float(work.settings["lr"]), momentum=0.9)
    for _ in range(int(work.settings["steps"])):
        chosen = torch.randint(len(labels), (BATCH_SIZE,))
        loss = cross_entropy(model(images[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return len(labels)


def evaluate(model: nn.Module, work: Work) -> dict[str, float]:
    """Return the share of the site's test images that the model labels rightly."""
    assert work.data is not None
    images, labels = load_site(work.data, "test", int(work.options["site"]), int(work.options["num_sites"]))
    return {"accuracy": (model(images).argmax(1) == labels).float().mean().item()}
