"""Step 11, step: the outer optimizer turns the merged task vector into the global update.

It sees the pseudo-gradient, old minus new, that is minus the merged task vector, and returns the step that is *added*
to the parameters. Optimizers are pure init/update pairs on one tensor: state goes in and comes out, so that it can be
published beside the model and a standby or an auditor can go on from there.

    state = OUTER["nesterov"].init(parameter)
    step, state = OUTER["nesterov"].update(-merged, state, lr=0.7, momentum=0.9)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, NamedTuple, TypeAlias

import torch
from pydantic import Field
from torch import Tensor

from fedmerge.delta.task_vector import working_dtype
from fedmerge.errors import ConfigError, InputError, did_you_mean
from fedmerge.merge.parameters import Parameter, parameters_of

State: TypeAlias = dict[str, Tensor]

LearningRate: TypeAlias = Annotated[
    float, Field(gt=0, allow_inf_nan=False, description="Outer learning rate: the length of a step.")
]
Momentum: TypeAlias = Annotated[
    float, Field(ge=0, lt=1, description="Share of the previous round's momentum that is carried on.")
]
Delay: TypeAlias = Annotated[
    int,
    Field(ge=1, description="Rounds between two moves of the momentum; the number of nodes, if each round is of one."),
]
Activation: TypeAlias = Annotated[
    float, Field(ge=0, le=1, description="Momentum's share of the steps in between, as a part of an even share.")
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


def _init_delayed(parameter: Tensor) -> State:
    dtype = working_dtype(parameter)
    zeros = torch.zeros_like(parameter, dtype=dtype)
    return {"momentum": zeros, "gathered": zeros, "count": torch.zeros((), dtype=dtype)}


def _delayed_nesterov(
    pseudo_gradient: Tensor,
    state: State,
    *,
    lr: LearningRate = 0.7,
    momentum: Momentum = 0.9,
    delay: Delay = 4,
    activation: Activation = 0.0,
) -> tuple[Tensor, State]:
    """Step by delayed Nesterov, algorithm 3 of arXiv 2401.09135, for rounds that wait for nobody.

    Each of N = `delay` rounds steps by `-lr * g / N` at once, and the last by momentum as well, to which their mean was
    added: so momentum moves once for N deltas, however late each is. With c = activation / N the momentum's share of
    every step is c, and 1 - cN + c in the last. A delay of 1 is `nesterov`.
    """
    gradient = pseudo_gradient.to(working_dtype(pseudo_gradient))
    velocity, gathered = _own(state, "momentum", gradient), _own(state, "gathered", gradient) + gradient
    count = _count(state) + 1
    share = activation / delay
    if count >= delay:
        velocity, gathered = velocity * momentum + gathered / delay, torch.zeros_like(gathered)
        count, share = 0, 1 - activation + share
    step = (velocity * (share * momentum) + gradient / delay) * -lr
    return step, {"momentum": velocity, "gathered": gathered, "count": gradient.new_tensor(float(count))}


# How the adaptive optimizers of arXiv 2003.00295 move their second moment: (it, new squares) -> its next value.
_SecondMoment: TypeAlias = Callable[[Tensor, Tensor], Tensor]


def _decaying(beta2: float) -> _SecondMoment:
    return lambda squares, new: squares * beta2 + new * (1 - beta2)


def _approaching(beta2: float) -> _SecondMoment:
    return lambda squares, new: squares - new * torch.sign(squares - new) * (1 - beta2)


def _adaptive(
    pseudo_gradient: Tensor,
    state: State,
    rule: _SecondMoment,
    *,
    lr: float,
    beta1: float,
    tau: float,
    first_squares: float,
) -> tuple[Tensor, State]:
    """Step as algorithm 2 of arXiv 2003.00295 does, from m = 0 and v = `first_squares`, without bias correction."""
    gradient = pseudo_gradient.to(working_dtype(pseudo_gradient))
    if not state:
        state = {"mean": torch.zeros_like(gradient), "squares": torch.full_like(gradient, first_squares)}
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
    """Step by FedAdam, arXiv 2003.00295, from v = tau^2: squares decay by `beta2`."""
    return _adaptive(pseudo_gradient, state, _decaying(beta2), lr=lr, beta1=beta1, tau=tau, first_squares=tau**2)


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
    return _adaptive(pseudo_gradient, state, _approaching(beta2), lr=lr, beta1=beta1, tau=tau, first_squares=tau**2)


def _adagrad(
    pseudo_gradient: Tensor, state: State, *, lr: LearningRate = 0.01, beta1: Beta1 = 0.0, tau: Tau = 1e-3
) -> tuple[Tensor, State]:
    """Step by FedAdagrad, arXiv 2003.00295: squares add up."""
    return _adaptive(pseudo_gradient, state, torch.add, lr=lr, beta1=beta1, tau=tau, first_squares=tau**2)


def _flower_adam(
    pseudo_gradient: Tensor,
    state: State,
    *,
    lr: LearningRate = 0.1,
    beta1: Beta1 = 0.9,
    beta2: Beta2 = 0.99,
    tau: Tau = 1e-3,
) -> tuple[Tensor, State]:
    """Step as Flower's FedAdam does: from v = 0, and with a bias correction that is one round ahead.

    Its learning rate in round t is lr * sqrt(1 - beta2^(t + 1)) / (1 - beta1^(t + 1)), so the first step is 0.74 times
    the one that Adam's own correction gives, by the usual betas.
    """
    ahead = _count(state) + 2
    corrected = lr * math.sqrt(1 - beta2**ahead) / (1 - beta1**ahead)
    moments = {kind: tensor for kind, tensor in state.items() if kind != "count"}
    step, moments = _adaptive(
        pseudo_gradient, moments, _decaying(beta2), lr=corrected, beta1=beta1, tau=tau, first_squares=0.0
    )
    return step, {**moments, "count": step.new_tensor(ahead - 1.0)}


def _flower_yogi(
    pseudo_gradient: Tensor,
    state: State,
    *,
    lr: LearningRate = 0.01,
    beta1: Beta1 = 0.9,
    beta2: Beta2 = 0.99,
    tau: Tau = 1e-3,
) -> tuple[Tensor, State]:
    """Step as Flower's FedYogi does: as the paper's, but from v = 0."""
    return _adaptive(pseudo_gradient, state, _approaching(beta2), lr=lr, beta1=beta1, tau=tau, first_squares=0.0)


def _flower_adagrad(
    pseudo_gradient: Tensor, state: State, *, lr: LearningRate = 0.1, tau: Tau = 1e-3
) -> tuple[Tensor, State]:
    """Step as Flower's FedAdagrad does: as the paper's, but from v = 0."""
    return _adaptive(pseudo_gradient, state, torch.add, lr=lr, beta1=0.0, tau=tau, first_squares=0.0)


def _count(state: State) -> int:
    """Return how many updates a state counted; 0 where there is none yet."""
    return int(state["count"]) if "count" in state else 0


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
    "delayed_nesterov": OuterOptimizer(_init_delayed, _delayed_nesterov),
    "adam": OuterOptimizer(_init_nothing, _adam),
    "yogi": OuterOptimizer(_init_nothing, _yogi),
    "adagrad": OuterOptimizer(_init_nothing, _adagrad),
    "flower_adam": OuterOptimizer(_init_nothing, _flower_adam),
    "flower_yogi": OuterOptimizer(_init_nothing, _flower_yogi),
    "flower_adagrad": OuterOptimizer(_init_nothing, _flower_adagrad),
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
