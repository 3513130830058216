"""Step 11, step: the outer optimizer turns the merged task vector into the global update.

It sees the pseudo-gradient, old minus new, that is minus the merged task vector, and returns the step that is *added*
to the parameters. Optimizers are pure init/update pairs on one tensor: state goes in and comes out, so that it can be
published beside the model and a standby or an auditor can go on from there.

    state = OUTER["nesterov"].init(parameter)
    step, state = OUTER["nesterov"].update(-merged, state, lr=0.7, momentum=0.9)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, NamedTuple, TypeAlias

import torch
from pydantic import Field
from torch import Tensor

from fedmerge.delta import working_dtype
from fedmerge.errors import ConfigError, InputError, did_you_mean
from fedmerge.merge.parameters import Parameter, parameters_of

State: TypeAlias = dict[str, Tensor]

LearningRate: TypeAlias = Annotated[
    float, Field(gt=0, allow_inf_nan=False, description="Outer learning rate: the length of a step.")
]
Momentum: TypeAlias = Annotated[
    float, Field(ge=0, lt=1, description="Share of the previous round's momentum that is carried on.")
]


class OuterOptimizer(NamedTuple):
    """An optimizer as two pure functions of one parameter's tensors.

    `init(parameter) -> state` makes the state before the first round; `update(pseudo_gradient, state, **parameters) ->
    (step, state)` returns what to add to the parameter, in fp32 (fp64 if the pseudo-gradient is), and the next state.
    """

    init: Callable[[Tensor], State]
    update: Callable[..., tuple[Tensor, State]]


def _init_nothing(parameter: Tensor) -> State:
    return {}


def _init_momentum(parameter: Tensor) -> State:
    return {"momentum": torch.zeros_like(parameter, dtype=working_dtype(parameter))}


def _sgd(pseudo_gradient: Tensor, state: State, *, lr: LearningRate = 1.0) -> tuple[Tensor, State]:
    """Step by `-lr * pseudo_gradient`. With lr 1 the new model is base + merged task vector, as in FedAvg."""
    return pseudo_gradient.to(working_dtype(pseudo_gradient)) * -lr, state


def _nesterov(
    pseudo_gradient: Tensor, state: State, *, lr: LearningRate = 0.7, momentum: Momentum = 0.9
) -> tuple[Tensor, State]:
    """Step by SGD with Nesterov momentum in PyTorch's form, `b <- momentum * b + g; step = -lr * (g + momentum * b)`.

    DiLoCo's outer optimizer and its defaults, arXiv 2311.08105. The first step is lr * (1 + momentum) times the merged
    task vector, and a constant one accumulates to lr / (1 - momentum) times.
    """
    gradient = pseudo_gradient.to(working_dtype(pseudo_gradient))
    previous = state.get("momentum")
    if previous is None or previous.shape != gradient.shape:
        raise InputError("outer optimizer: the state does not hold this parameter's momentum")
    velocity = previous * momentum + gradient
    return (velocity * momentum + gradient) * -lr, {"momentum": velocity}


OUTER: dict[str, OuterOptimizer] = {
    "sgd": OuterOptimizer(_init_nothing, _sgd),
    "nesterov": OuterOptimizer(_init_momentum, _nesterov),
}


def parameters(optimizer: str) -> dict[str, Parameter]:
    """Return what `optimizer` can be configured with: `Parameter(type, default, doc)` by name, from its signature.

    Raises `ConfigError` for an unknown optimizer.
    """
    if optimizer not in OUTER:
        raise ConfigError(
            f"there is no outer optimizer {optimizer!r}{did_you_mean(optimizer, OUTER)}",
            hint=f"one of {', '.join(OUTER)}",
        )
    return parameters_of(OUTER[optimizer].update)
