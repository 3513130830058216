"""The task: 8x8 digits that come with scikit-learn, at sites that each see mostly two of the ten classes."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

NUM_TEST = 400


def make_model() -> nn.Module:
    """Return the untrained network, the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def load_site(partition_id: int, num_partitions: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return a site's training images (N, 64) and labels (N,), and the test set that all sites share.

    Eight of ten training images come from the classes that are the site's own, two from anywhere.
    """
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))
    data, target = torch.tensor(images, dtype=torch.float32)[order] / 16, torch.tensor(labels)[order]
    test, train = slice(0, NUM_TEST), slice(NUM_TEST, None)
    owner = torch.where(
        torch.arange(len(target[train])) % 10 < 8,
        target[train] * num_partitions // 10,
        torch.arange(len(target[train])) // 10 % num_partitions,
    )
    mine = owner == partition_id
    return data[train][mine], target[train][mine], data[test], target[test]


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int, lr: float) -> float:
    """Train in place with SGD, and return the loss of the last epoch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    loss = torch.tensor(0.0)
    for _ in range(epochs):
        for chosen in torch.randperm(len(labels)).split(32):
            loss = nn.functional.cross_entropy(model(images[chosen]), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return loss.item()


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the share of images that the model labels rightly."""
    with torch.no_grad():
        return (model(images).argmax(1) == labels).float().mean().item()
