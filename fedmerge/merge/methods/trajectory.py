"""Averages over time: of the checkpoints of one training run, and, as last steps of a recipe, of a federation's rounds.

Over checkpoints they are methods, linear ones: the task vectors come in order of time. Over rounds they are updates

    step, state = OVER_ROUNDS["ema"](step, state, decay=0.9)

of what is to be added to one parameter of the published model, in fp32 (or fp64). The published model is then the
average of all rounds' models up to this one, a round's model being the base plus all steps that went in. State, empty
at first, goes in and comes out as an outer optimizer's does, so that it can be published beside the model. Both ways
come to the same: `ema` of the checkpoints w1, w2, w3 is what is published after three rounds that led to them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Concatenate, TypeAlias

import torch
from pydantic import Field
from torch import Tensor

from fedmerge.merge.methods.average import fold
from fedmerge.merge.parameters import Lambda
from fedmerge.merge.stack import row_weights, shares

State: TypeAlias = dict[str, Tensor]

Decay: TypeAlias = Annotated[
    float, Field(ge=0, lt=1, description="What a version weighs, relative to the one that came after it.")
]
Latest: TypeAlias = Annotated[int, Field(ge=1, le=100, description="How many of the latest versions are averaged.")]
Start: TypeAlias = Annotated[int, Field(ge=1, description="The first version that is averaged, from 1.")]
Alpha: TypeAlias = Annotated[
    float, Field(ge=0, le=1, description="Where between the base (0) and the merged model (1) the result is.")
]


# --- over the checkpoints of one run


def ema(deltas: Tensor, weights: Tensor, *, base: Tensor | None = None, seed: int = 0, decay: Decay = 0.9) -> Tensor:
    """Return the mean of `deltas` (K, *shape), each counting `decay` times the next: (*shape,) in fp32 (or fp64).

    The exponential moving average of a run's checkpoints, in order of time, with the usual correction for its start:
    one checkpoint is its own average. The weights (K,) are factors on that. Raises `InputError` as `fedavg` does.
    """
    return fold(deltas, lambda dtype: ema_coefficients(row_weights(weights, len(deltas), dtype), decay=decay))


def lawa(deltas: Tensor, weights: Tensor, *, base: Tensor | None = None, seed: int = 0, latest: Latest = 5) -> Tensor:
    """Return the mean of the `latest` of `deltas` (K, *shape) by `weights` (K,): (*shape,) in fp32 (or fp64).

    LAWA, arXiv 2209.14981: the last checkpoints of a run, in order of time. Raises `InputError` as `fedavg` does.
    """
    return fold(deltas, lambda dtype: lawa_coefficients(row_weights(weights, len(deltas), dtype), latest=latest))


def swa(deltas: Tensor, weights: Tensor, *, base: Tensor | None = None, seed: int = 0, start: Start = 1) -> Tensor:
    """Return the mean of `deltas` (K, *shape) from number `start` on by `weights` (K,): (*shape,) in fp32 (or fp64).

    Stochastic weight averaging, arXiv 1803.05407, of a run's checkpoints in order of time; the last of them where none
    is left. Raises `InputError` as `fedavg` does.
    """
    return fold(deltas, lambda dtype: swa_coefficients(row_weights(weights, len(deltas), dtype), start=start))


def wise_ft(
    deltas: Tensor, weights: Tensor, *, base: Tensor | None = None, seed: int = 0, alpha: Alpha = 0.5
) -> Tensor:
    """Return `alpha` times the mean of `deltas` (K, *shape) by `weights` (K,): (*shape,) in fp32 (or fp64).

    WiSE-FT, arXiv 2109.01903: interpolation between the base and a fine-tune, here the mean of several. Raises
    `InputError` as `fedavg` does.
    """
    return fold(deltas, lambda dtype: wise_ft_coefficients(row_weights(weights, len(deltas), dtype), alpha=alpha))


def ema_coefficients(weights: list[float], *, decay: float) -> list[float]:
    """Return the coefficient of each checkpoint in `ema`."""
    return shares([weight * decay**age for age, weight in enumerate(reversed(weights))])[::-1]


def lawa_coefficients(weights: list[float], *, latest: int) -> list[float]:
    """Return the coefficient of each checkpoint in `lawa`."""
    return [0.0] * (len(weights) - latest) + shares(weights[-latest:])


def swa_coefficients(weights: list[float], *, start: int) -> list[float]:
    """Return the coefficient of each checkpoint in `swa`."""
    return lawa_coefficients(weights, latest=max(1, len(weights) + 1 - start))


def wise_ft_coefficients(weights: list[float], *, alpha: float) -> list[float]:
    """Return the coefficient of each fine-tune in `wise_ft`."""
    return [alpha * share for share in shares(weights)]


# --- over the rounds of a federation


def _ema(step: Tensor, state: State, *, decay: Decay = 0.9) -> tuple[Tensor, State]:
    """Publish the mean of the rounds' models, each counting `decay` times the next."""
    return _average(step, state, decay * _number(state, "count") + 1)


def _swa(step: Tensor, state: State, *, start: Start = 1) -> tuple[Tensor, State]:
    """Publish the mean of the rounds' models from round `start` on (arXiv 1803.05407); until then, the last one."""
    round_number = _number(state, "round") + 1
    moved, after = _average(step, state, max(1.0, round_number - start + 1))
    return moved, after | {"round": _scalar(round_number)}


def _lawa(step: Tensor, state: State, *, latest: Latest = 5) -> tuple[Tensor, State]:
    """Publish the mean of the `latest` rounds' models (arXiv 2209.14981)."""
    # Where the models to average stand, seen from the published one, the newest last.
    recent = state.get("recent", step.new_zeros(0, *step.shape))
    newest = step if len(recent) == 0 else recent[-1] + step
    recent = torch.cat([recent, newest.unsqueeze(0)])[-latest:]
    moved = fold(recent, lambda dtype: [1 / len(recent)] * len(recent))
    return moved, {"recent": recent - moved}


def _wise_ft(step: Tensor, state: State, *, alpha: Alpha = 0.5) -> tuple[Tensor, State]:
    """Publish what is `alpha` of the way from the federation's base to what this round led to (arXiv 2109.01903)."""
    before = state.get("moved", torch.zeros_like(step))
    after = (before + step) * alpha
    return after - before, {"moved": after}


def _scale(step: Tensor, state: State, *, factor: Lambda = 1.0) -> tuple[Tensor, State]:
    """Take `factor` times the step."""
    return step * factor, state


def _average(step: Tensor, state: State, count: float) -> tuple[Tensor, State]:
    """Go from one running mean to the next, in which the newest model is one of `count`."""
    lead = state.get("lead", torch.zeros_like(step)) + step  # of the newest model over the published one
    moved = lead / count
    return moved, {"lead": lead - moved, "count": _scalar(count)}


def _number(state: State, key: str) -> float:
    return float(state[key]) if key in state else 0.0


def _scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


OVER_ROUNDS: dict[str, Callable[Concatenate[Tensor, State, ...], tuple[Tensor, State]]] = {
    "ema": _ema,
    "lawa": _lawa,
    "swa": _swa,
    "wise_ft": _wise_ft,
    "scale": _scale,
}
