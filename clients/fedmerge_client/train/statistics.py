"""Statistics of a model on a node's data, for the merge methods that weigh by them: see `fedmerge.merge.statistics`.

Examples go through the model one by one: so there is no padding to be counted, and a gradient is one example's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fedmerge.errors import ConfigError
from fedmerge.merge.statistics import STATISTICS
from fedmerge.tensors import Schema

Inputs: TypeAlias = Mapping[str, Any]

LEAST_MEAN_SQUARE = 1e-30


def diagonal_fisher(model: Any, examples: Iterable[Inputs], seed: int) -> dict[str, Tensor]:
    """Return the mean squared gradient of log p(y|x) by parameter, y drawn from the model's own prediction: fp32.

    The diagonal of the Fisher information (arXiv 2111.09832, section 3.2), from one draw per example, or per position
    where the logits (..., classes) have several: their cross terms vanish in expectation. The true labels in place of
    draws would give the "empirical" one, which goes to zero where a model fits its labels.
    """
    generator = torch.Generator().manual_seed(seed % 2**63)
    parameters = dict(model.named_parameters())
    sums = {name: torch.zeros_like(parameter, dtype=torch.float32) for name, parameter in parameters.items()}
    num_examples = 0
    for inputs in examples:
        logits = model(**inputs).logits
        logits = logits.reshape(-1, logits.shape[-1])
        drawn = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator)[:, 0]
        loss = cross_entropy(logits, drawn.to(logits.device), reduction="sum")
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        for name, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                sums[name] += gradient.float().square()
        num_examples += 1
    return {name: (total / max(1, num_examples)).cpu() for name, total in sums.items()}


def gram_matrices(model: Any, examples: Iterable[Inputs], seed: int) -> dict[str, Tensor]:
    """Return X' X / rows by weight of a `torch.nn.Linear`, X (rows, in) being all inputs that it saw: (in, in), fp32.

    The inner products of RegMean, arXiv 2212.09849, per token rather than in sum, so that how long a node's texts are
    does not matter. `seed` is not used.
    """
    sums: dict[str, Tensor] = {}
    num_rows: dict[str, int] = {}

    def listen_to(name: str) -> Callable[[Any, tuple[Tensor, ...]], None]:
        def add(_: Any, arguments: tuple[Tensor, ...]) -> None:
            rows = arguments[0].detach().reshape(-1, arguments[0].shape[-1]).float()
            product = rows.T @ rows
            sums[name] = sums[name].add_(product) if name in sums else product
            num_rows[name] = num_rows.get(name, 0) + len(rows)

        return add

    _run(model, examples, lambda name, module: module.register_forward_pre_hook(listen_to(f"{name}.weight")))
    return {name: _without_traces((total / num_rows[name]).cpu()) for name, total in sums.items()}


def output_moments(model: Any, examples: Iterable[Inputs], seed: int) -> dict[str, Tensor]:
    """Return mean and standard deviation of each output of a `torch.nn.Linear`, by its weight: (2, out), fp32.

    They are over all tokens of all examples, and what REPAIR (arXiv 2211.08403) compares. `seed` is not used.
    """
    sums: dict[str, Tensor] = {}
    num_rows: dict[str, int] = {}

    def listen_to(name: str) -> Callable[[Any, Any, Tensor], None]:
        def add(_: Any, __: Any, output: Tensor) -> None:
            rows = output.detach().reshape(-1, output.shape[-1]).to(torch.float64)
            pair = torch.stack([rows.sum(0), rows.square().sum(0)])
            sums[name] = sums[name].add_(pair) if name in sums else pair
            num_rows[name] = num_rows.get(name, 0) + len(rows)

        return add

    _run(model, examples, lambda name, module: module.register_forward_hook(listen_to(f"{name}.weight")))
    found = {name: (total / num_rows[name]).cpu() for name, total in sums.items()}
    return {
        name: torch.stack([mean, (square - mean.square()).clamp(min=0).sqrt()]).float()
        for name, (mean, square) in found.items()
    }


def _run(model: Any, examples: Iterable[Inputs], listen: Callable[[str, Any], Any]) -> None:
    """Send `examples` through a model with the hook that `listen(name, module)` puts on each linear layer."""
    hooks = [listen(name, module) for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    try:
        with torch.inference_mode():
            for inputs in examples:
                model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()


def _without_traces(matrix: Tensor) -> Tensor:
    """Return a Gram `matrix` without inputs whose squares are so small that fp32 keeps few of their bits, or none."""
    kept = (matrix.diagonal() > LEAST_MEAN_SQUARE).to(matrix.dtype)
    return matrix * kept * kept[:, None]


# What computes each kind of statistics: (model, examples, seed) -> tensors by parameter.
COLLECTORS: dict[str, Callable[[Any, Iterable[Inputs], int], dict[str, Tensor]]] = {
    "fisher": diagonal_fisher,
    "gram": gram_matrices,
    "moments": output_moments,
}


def collect(kind: str, model: Any, examples: Iterable[Inputs], schema: Schema, *, seed: int) -> dict[str, Tensor]:
    """Return statistics of one `kind` for the parameters in `schema`, the model's as it is saved, that have any.

    Raises `ConfigError` for an unknown kind.
    """
    if kind not in COLLECTORS:
        raise ConfigError(f"there are no {kind!r} statistics", hint=f"one of {', '.join(COLLECTORS)}")
    found = COLLECTORS[kind](model, examples, seed)
    # A layer whose weight is tied to another's is not saved under its own name, and neither are its statistics.
    return {
        name: tensor
        for name, tensor in found.items()
        if name in schema and STATISTICS[kind].shape(schema[name]) == tuple(tensor.shape)
    }


def spread(num_examples: int, most: int) -> Sequence[int]:
    """Return the indices of at most `most` of `num_examples` examples, evenly spread over them."""
    num_taken = min(most, num_examples)
    return [index * num_examples // num_taken for index in range(num_taken)]
