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


Beta1: TypeAlias = Annotated[float, Field(ge=0, lt=1, description="Decay of the mean of pseudo-gradients.")]
Beta2: TypeAlias = Annotated[float, Field(ge=0, lt=1, description="Decay of the mean of their squares.")]
Tau: TypeAlias = Annotated[
    float,
    Field(gt=0, allow_inf_nan=False, description="Added to the root of the squares: the larger, the less adaptive."),
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
    velocity = _own(state, "momentum", gradient) * momentum + gradient
    return (velocity * momentum + gradient) * -lr, {"momentum": velocity}


def _momentum(
    pseudo_gradient: Tensor, state: State, *, lr: LearningRate = 1.0, momentum: Momentum = 0.9
) -> tuple[Tensor, State]:
    """Step by SGD with momentum, `b <- momentum * b + g; step = -lr * b`: FedAvgM, arXiv 1909.06335."""
    gradient = pseudo_gradient.to(working_dtype(pseudo_gradient))
    velocity = _own(state, "momentum", gradient) * momentum + gradient
    return velocity * -lr, {"momentum": velocity}


# How the adaptive optimizers of arXiv 2003.00295 move their second moment: (it, new squares) -> its next value.
_SecondMoment: TypeAlias = Callable[[Tensor, Tensor], Tensor]


def _adaptive(
    pseudo_gradient: Tensor, state: State, rule: _SecondMoment, *, lr: float, beta1: float, tau: float
) -> tuple[Tensor, State]:
    """Step as algorithm 2 of arXiv 2003.00295 does, from m = 0 and v = tau^2 and without bias correction.

    Flower's optimizers of these names differ: they start from v = 0, and its FedAdam corrects the bias.
    """
    gradient = pseudo_gradient.to(working_dtype(pseudo_gradient))
    if not state:
        state = {"mean": torch.zeros_like(gradient), "squares": torch.full_like(gradient, tau**2)}
    mean = _own(state, "mean", gradient) * beta1 + gradient * (1 - beta1)
    squares = rule(_own(state, "squares", gradient), gradient * gradient)
    return mean * -lr / (squares.sqrt() + tau), {"mean": mean, "squares": squares}


def _adam(
    pseudo_gradient: Tensor,
    state: State,
    *,
    lr: LearningRate = 0.01,
    beta1: Beta1 = 0.9,
    beta2: Beta2 = 0.99,
    tau: Tau = 1e-3,
) -> tuple[Tensor, State]:
    """Step by FedAdam, arXiv 2003.00295: squares decay by `beta2`."""

    def rule(squares: Tensor, new: Tensor) -> Tensor:
        return squares * beta2 + new * (1 - beta2)

    return _adaptive(pseudo_gradient, state, rule, lr=lr, beta1=beta1, tau=tau)


def _yogi(
    pseudo_gradient: Tensor,
    state: State,
    *,
    lr: LearningRate = 0.01,
    beta1: Beta1 = 0.9,
    beta2: Beta2 = 0.99,
    tau: Tau = 1e-3,
) -> tuple[Tensor, State]:
    """Step by FedYogi, arXiv 2003.00295: squares move towards the new ones by a share of those, up or down."""

    def rule(squares: Tensor, new: Tensor) -> Tensor:
        return squares - new * torch.sign(squares - new) * (1 - beta2)

    return _adaptive(pseudo_gradient, state, rule, lr=lr, beta1=beta1, tau=tau)


def _adagrad(
    pseudo_gradient: Tensor, state: State, *, lr: LearningRate = 0.01, beta1: Beta1 = 0.0, tau: Tau = 1e-3
) -> tuple[Tensor, State]:
    """Step by FedAdagrad, arXiv 2003.00295: squares add up."""
    return _adaptive(pseudo_gradient, state, torch.add, lr=lr, beta1=beta1, tau=tau)


def _own(state: State, kind: str, like: Tensor) -> Tensor:
    """Return one tensor of a parameter's state; raise `InputError` when it is not there or is another parameter's."""
    found = state.get(kind)
    if found is None or found.shape != like.shape:
        raise InputError(f"outer optimizer: the state does not hold this parameter's {kind}")
    return found


OUTER: dict[str, OuterOptimizer] = {
    "sgd": OuterOptimizer(_init_nothing, _sgd),
    "momentum": OuterOptimizer(_init_momentum, _momentum),
    "nesterov": OuterOptimizer(_init_momentum, _nesterov),
    "adam": OuterOptimizer(_init_nothing, _adam),
    "yogi": OuterOptimizer(_init_nothing, _yogi),
    "adagrad": OuterOptimizer(_init_nothing, _adagrad),
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
