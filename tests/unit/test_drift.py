"""FedProx and SCAFFOLD: the trainers' rounds against a few lines of plain torch."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from fedmerge.config import parse_config
from fedmerge.errors import ConfigError, InputError
from fedmerge.sim import simulate
from fedmerge.tensors import Checkpoint
from fedmerge.training import STATE, Trainer
from fedmerge_client.train.causal_lm import CausalLM
from fedmerge_client.train.huggingface import save_model
from fedmerge_client.train.text_classification import TextClassification
from tests.conftest import make_config
from tests.unit import test_causal_lm as language
from tests.unit import test_text_classification as classification

WORDS = dict(
    zip(classification.LABELS, (classification.FRUIT, classification.TOOLS, classification.ANIMALS), strict=True)
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    encoder = classification.make_encoder(folder / "encoder")
    classification.build_classifier(encoder, classification.LABELS, folder / "base", num_probes=200)
    return folder / "base"


def site(folder: Path, labels: list[str]) -> TextClassification:
    folder.mkdir(exist_ok=True)
    return TextClassification(
        data=classification.write_rows(folder / "rows.jsonl", {label: WORDS[label] for label in labels}, ["{}"])
    )


class Plain:
    """A site's model and gradients by transformers alone, on all of its data at once."""

    def __init__(self, base: Path, labels: list[str]) -> None:
        self.model: Any = AutoModelForSequenceClassification.from_pretrained(base).eval()
        tokenizer: Any = AutoTokenizer.from_pretrained(base)
        words = [(word, label) for label in labels for word in WORDS[label]]
        self.inputs = tokenizer([word for word, _ in words], padding=True, return_tensors="pt")
        self.targets = torch.tensor([self.model.config.label2id[label] for _, label in words])

    def gradients(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(weights[name])
        loss = cross_entropy(self.model(**self.inputs).logits, self.targets)
        named = dict(self.model.named_parameters())
        return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


SGD: dict[str, Any] = {"optimizer": "sgd", "steps": 3, "batch_size": 100, "lr": 0.05, "warmup": 0.0}


def weights_of(model_dir: Path) -> dict[str, Tensor]:
    checkpoint = Checkpoint(model_dir)
    return {name: checkpoint[name].clone() for name in checkpoint if checkpoint[name].is_floating_point()}


def test_fedprox_is_gradient_descent_with_a_pull(base: Path, tmp_path: Path) -> None:
    labels, mu = classification.LABELS[:2], 0.7
    work = classification.task(base, tmp_path / "work", **(SGD | {"fedprox_mu": mu}))
    found = weights_of(site(tmp_path / "site", labels).train(work).model_dir)
    plain, start = Plain(base, labels), weights_of(base)
    weights = dict(start)
    for step in range(3):
        lr = 0.05 * (3 - step) / 3
        gradients = plain.gradients(weights)
        weights = {name: w - lr * (gradients[name] + mu * (w - start[name])) for name, w in weights.items()}
    for name, expected in weights.items():
        torch.testing.assert_close(found[name], expected, atol=1e-6, rtol=0)
    free = weights_of(site(tmp_path / "free", labels).train(classification.task(base, tmp_path / "w", **SGD)).model_dir)
    assert math.dist(found[name].flatten().tolist(), start[name].flatten().tolist()) < math.dist(
        free[name].flatten().tolist(), start[name].flatten().tolist()
    )


def test_language_models_are_pulled_as_well_and_resume_to_the_same_bits(tmp_path: Path) -> None:
    model, data = language.make_llama(tmp_path / "base"), tmp_path / "train.txt"
    data.write_text(language.TEXT[:32])  # two windows of 16: a batch is all of them
    settings = {"steps": 2, "batch_size": 2, "lr": 1e-3, "warmup": 0, "weight_decay": 0.0, "max_grad_norm": 0.0}
    settings |= {"schedule": "constant", "fedprox_mu": 3.0}
    trainer = CausalLM(data=data, checkpoint_steps=1)
    found = Checkpoint(trainer.train(language.task(model, tmp_path / "whole", **settings)).model_dir)
    plain: Any = AutoModelForCausalLM.from_pretrained(model).eval()
    start = {name: parameter.detach().clone() for name, parameter in plain.named_parameters()}
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    stream = list(b"\n" + language.TEXT[:32].encode())
    windows = torch.tensor([stream[first : first + 17] for first in (0, 16)])
    for _ in range(2):
        optimizer.zero_grad()
        loss = cross_entropy(plain(input_ids=windows[:, :-1]).logits.flatten(0, 1), windows[:, 1:].flatten())
        pull = sum(((parameter - start[name]) ** 2).sum() for name, parameter in plain.named_parameters())
        torch.autograd.backward(loss + 1.5 * pull)
        optimizer.step()
    # AdamW divides by the size of a gradient, so where that is next to nothing rounding decides: look at the others.
    for name, parameter in plain.named_parameters():
        close = (found[name] - parameter.detach()).abs() < 1e-6
        assert close.float().mean() > 0.98, name
    stopped = language.task(model, tmp_path / "stopped", **settings)
    with pytest.raises(language.Stop):
        trainer.train(replace(stopped, progress=language.stopping_at(1)))
    again = Checkpoint(trainer.train(stopped).model_dir)
    assert all(torch.equal(again[name], found[name]) for name in found)


def test_language_models_take_control_variates(tmp_path: Path) -> None:
    model, data = language.make_llama(tmp_path / "base"), tmp_path / "train.txt"
    data.write_text(language.TEXT[:32])
    settings = {"steps": 2, "batch_size": 2, "lr": 0.1, "warmup": 0, "max_grad_norm": 0.0, "schedule": "constant"}
    settings |= {"optimizer": "sgd", "scaffold": True}
    trainer = CausalLM(data=data, checkpoint_steps=1)
    first = trainer.train(language.task(model, tmp_path / "first", **settings)).model_dir
    # What all nodes came to in round 1 is not what this one did.
    published: Any = AutoModelForCausalLM.from_pretrained(model).eval()
    c = {name: torch.randn_like(parameter) for name, parameter in published.named_parameters()}
    start = {name: parameter.detach().clone() for name, parameter in published.named_parameters()}
    own = {name: (start[name] - Checkpoint(first)[name]) / 0.2 for name in start}
    with torch.no_grad():
        for name, parameter in published.named_parameters():
            parameter.copy_(start[name] - 0.2 * c[name])
    save_model(published, None, tmp_path / "second-base")
    work = language.task(tmp_path / "second-base", tmp_path / "second", number=2, **settings)
    work = replace(work, previous_state=tmp_path / "first" / STATE)
    with pytest.raises(language.Stop):
        trainer.train(replace(work, progress=language.stopping_at(1)))
    found = Checkpoint(trainer.train(work).model_dir)
    stream = list(b"\n" + language.TEXT[:32].encode())
    windows = torch.tensor([stream[first : first + 17] for first in (0, 16)])
    for _ in range(2):
        loss = cross_entropy(published(input_ids=windows[:, :-1]).logits.flatten(0, 1), windows[:, 1:].flatten())
        named = dict(published.named_parameters())
        gradients = torch.autograd.grad(loss, list(named.values()))
        with torch.no_grad():
            for (name, parameter), gradient in zip(named.items(), gradients, strict=True):
                parameter.sub_(0.1 * (gradient - own[name] + c[name]))
    for name, parameter in published.named_parameters():
        torch.testing.assert_close(found[name], parameter.detach(), atol=1e-5, rtol=0)


def by_algorithm_1(base: Path, sites: list[list[str]], weights_of_sites: list[float], num_rounds: int) -> list[Any]:
    """SCAFFOLD's server and clients, option II, as the paper writes them; return the model after each round."""
    x, plains = weights_of(base), [Plain(base, labels) for labels in sites]
    zeros = {name: torch.zeros_like(tensor) for name, tensor in x.items()}
    c, own, models = dict(zeros), [dict(zeros) for _ in sites], []
    for _ in range(num_rounds):
        tuned, lrs = [], [0.05 * (3 - step) / 3 for step in range(3)]
        for i, plain in enumerate(plains):
            y = dict(x)
            for lr in lrs:
                g = plain.gradients(y)
                y = {name: y[name] - lr * (g[name] - own[i][name] + c[name]) for name in y}
            tuned.append(y)
        new = [
            {name: own[i][name] - c[name] + (x[name] - y[name]) / sum(lrs) for name in x} for i, y in enumerate(tuned)
        ]
        c = {
            name: c[name] + sum(w * (a[name] - b[name]) for w, a, b in zip(weights_of_sites, new, own, strict=True))
            for name in x
        }
        x = {name: sum(w * y[name] for w, y in zip(weights_of_sites, tuned, strict=True)) for name in x}  # type: ignore[misc]
        own = new
        models.append(x)
    return models


def federate(folder: Path, base: Path, sites: list[list[str]], *, train: str, num_rounds: int) -> Path:
    base_copy = folder / "base"
    base_copy.symlink_to(base)
    _, path = make_config(folder, num_rounds=num_rounds, extra="[delta]\nvalues = 'fp32'\ndownlink = 'fp32'\n")
    plan = 'trainer = "text-classification"\noptimizer = "sgd"\nsteps = 3\nbatch_size = 100\nlr = 0.05\nwarmup = 0.0\n'
    text = path.read_text().replace('trainer = "text-classification"\n', plan + train)
    config = parse_config(text, folder=folder, where="fedmerge.toml")
    trainers: dict[str, Trainer] = {f"site{i}": site(folder / f"data{i}", labels) for i, labels in enumerate(sites)}
    return simulate(config, base_copy, trainers).model_dir


def test_a_federation_with_scaffold_is_the_papers_algorithm(base: Path, tmp_path: Path) -> None:
    # Each site has labels that the other has not, so their gradients differ; and one has twice as many examples.
    sites = [classification.LABELS[:1], classification.LABELS[1:]]
    found = weights_of(federate(tmp_path, base, sites, train="scaffold = true\n", num_rounds=3))
    expected = by_algorithm_1(base, sites, [1 / 3, 2 / 3], 3)[-1]
    (tmp_path / "plain").mkdir()
    other = weights_of(federate(tmp_path / "plain", base, sites, train="", num_rounds=3))

    def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
        return math.sqrt(sum(float((a[name].double() - b[name].double()).square().sum()) for name in a))

    # c is a difference of fp32 weights over a sum of rates of 0.1, so their rounding shows tenfold.
    assert distance(found, expected) < 1e-3 * distance(found, other)
    assert distance(found, expected) < 1e-4 * distance(found, weights_of(base))


def test_a_site_that_was_away_takes_the_mean_of_the_rounds(base: Path, tmp_path: Path) -> None:
    trainer = site(tmp_path / "site", classification.LABELS[:1])
    settings = SGD | {"scaffold": True, "steps": 1}
    first = trainer.train(classification.task(base, tmp_path / "1", **settings))
    moved, start = weights_of(first.model_dir), weights_of(base)
    plain = Plain(base, classification.LABELS[:1])
    work = classification.task(first.model_dir, tmp_path / "3", number=3, **settings)
    again = replace(work, previous_state=tmp_path / "1" / STATE)
    found = weights_of(trainer.train(again).model_dir)
    g = plain.gradients(moved)
    for name, weight in moved.items():
        own = (start[name] - weight) / 0.05  # of round 1, when all c were zero
        c = (start[name] - weight) / (2 * 0.05)
        torch.testing.assert_close(found[name], weight - 0.05 * (g[name] - own + c), atol=1e-6, rtol=0)
    (tmp_path / "1" / STATE / "scaffold.safetensors").write_bytes(b"x")
    with pytest.raises(InputError, match=r"scaffold\.safetensors: can't be read"):
        trainer.train(again)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scaffold": True}, 'scaffold: .*goes with optimizer = "sgd" alone'),
        ({"lora_rank": 2, "fedprox_mu": 0.1}, "fedprox_mu does not go with lora_rank"),
        ({"lora_rank": 2, "optimizer": "sgd", "scaffold": True}, "scaffold does not go with lora_rank"),
        ({"fedprox_mu": -1}, "fedprox_mu"),
    ],
)
def test_what_does_not_go_together_is_refused(
    base: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        site(tmp_path / "site", classification.LABELS).train(classification.task(base, tmp_path / "w", **settings))


@pytest.mark.parametrize("section", ["[outer]\nname = 'nesterov'", "[outer]\nlr = 0.5", "[merge]\nmethod = 'ties'"])
def test_scaffold_needs_the_plain_mean(tmp_path: Path, section: str) -> None:
    _, path = make_config(tmp_path, extra=section)
    text = path.read_text().replace('trainer = "text-classification"\n', 'optimizer = "sgd"\nscaffold = true\n')
    with pytest.raises(ConfigError, match=r"train\.scaffold: needs the plain mean"):
        parse_config(text, folder=tmp_path, where="fedmerge.toml")
