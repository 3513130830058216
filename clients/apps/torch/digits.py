"""Four sites and a small convolutional network on handwritten digits: the `torch` trainer's example.

    python clients/apps/torch/digits.py base          # writes the untrained network into base/
    fedmerge simulate clients/apps/torch/fedmerge.toml

The images, 1,797 of 8 x 8 pixels, come with scikit-learn. A site has mostly images of its own classes, so each one's
own network is good at a part of the test set, which is everybody's.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedmerge.tensors import write_weights
from fedmerge_client.train.torch_function import Work

NUM_TEST = 400
NUM_SITES = 4


def make_model() -> nn.Module:
    """Return the untrained network, the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(128, 10),
        )  # fmt: skip


def load_site(site: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return a site's training images (N, 1, 8, 8) and labels (N,), and the test set."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))
    data, target = torch.tensor(images, dtype=torch.float32)[order].view(-1, 1, 8, 8) / 16, torch.tensor(labels)[order]
    number = torch.arange(len(target))
    # Four of five images go where their class belongs, one anywhere.
    owner = torch.where(number % 5 > 0, target * NUM_SITES // 10, number // 5 % NUM_SITES)
    mine = (owner == site) & (number >= NUM_TEST)
    return data[mine], target[mine], data[:NUM_TEST], target[:NUM_TEST]


def train(model: nn.Module, work: Work) -> tuple[int, dict[str, float]]:
    """Tune in place by the plan's `epochs` and `lr`; return the number of images and the last loss."""
    images, labels, _, _ = load_site(int(work.options["site"]))
    optimizer = torch.optim.SGD(model.parameters(), lr=float(work.settings.get("lr", 0.05)), momentum=0.9)
    epochs, loss = int(work.settings.get("epochs", 2)), torch.tensor(0.0)
    for epoch in range(1, epochs + 1):
        for chosen in torch.randperm(len(labels)).split(32):
            loss = cross_entropy(model(images[chosen]), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        work.progress(epoch, epochs, loss.item())
    return len(labels), {"loss": loss.item()}


def evaluate(model: nn.Module, work: Work) -> dict[str, float]:
    """Return the share of test images that the model labels rightly."""
    _, _, images, labels = load_site(int(work.options["site"]))
    return {"accuracy": (model(images).argmax(1) == labels).float().mean().item()}


if __name__ == "__main__":
    directory = Path(sys.argv[1])
    directory.mkdir(parents=True)
    weights = make_model().state_dict()
    write_weights(weights, directory, {"model.safetensors": list(weights)})
