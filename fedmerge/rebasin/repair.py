"""REPAIR: give the hidden units of a merged model the means and spreads that the models it was merged from have.

Averages of models that were trained apart have units that hardly vary, even when they are aligned: what the models
disagree in cancels out. arXiv 2211.08403 rescales and shifts every pre-activation so that its mean and its standard
deviation over some data are the averages of the models' own; here layer after layer, each measured behind those that
are corrected already.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from fedmerge.errors import InputError
from fedmerge.rebasin.groups import Group
from fedmerge.rebasin.match import permuted
from fedmerge.tensors import Schema, TensorMap

# Moments of the outputs of linear layers, by the name of the weight: mean and standard deviation, (2, out).
Moments = Mapping[str, Tensor]

# Added to a standard deviation before it divides, as in the authors' code.
EPSILON = 1e-5


def repaired_layers(schema: Schema, groups: Sequence[Group]) -> list[list[str]]:
    """Return the names, without ".weight", of the linear layers whose outputs `groups` permute, in forward order.

    Layers that read the same input are together. The residual stream is a sum of many outputs and none of them, and a
    layer needs a bias to be shifted. Raises `InputError` when there is none.
    """
    stages: dict[tuple[float, str], list[str]] = {}
    for group in groups:
        if group.name == "residual":
            continue
        axes = {axis.tensor for axis in group.axes if axis.axis == 0}
        found = [name.removesuffix(".bias") for name in sorted(axes) if name.endswith(".bias")]
        layers = [layer for layer in found if f"{layer}.weight" in axes and len(schema[f"{layer}.weight"].shape) == 2]
        if layers:
            number = re.search(r"\d+", group.name)
            # Attention's heads come before the hidden units of the same layer, as their names do.
            stages[float(number[0]) if number else float("inf"), group.name] = layers
    if not stages:
        raise InputError("no layer can be repaired: none of those whose units were aligned has a bias")
    return [layers for _, layers in sorted(stages.items())]


def goal_moments(
    moments: Sequence[Moments],
    weights: Sequence[float],
    permutations: Sequence[Mapping[str, Tensor]],
    groups: Sequence[Group],
) -> dict[str, Tensor]:
    """Return the weighted mean of the models' moments, their units permuted as the models were: by layer, (2, out).

    `permutations` are empty for a model that was not permuted. Raises `InputError` when the weights sum to nothing.
    """
    total = sum(weights)
    if not total > 0:
        raise InputError(f"REPAIR needs weights with a positive sum, which {total:g} is not")
    goals: dict[str, Tensor] = {}
    for found, weight, permutation in zip(moments, weights, permutations, strict=True):
        for name, pair in found.items():
            layer = name.removesuffix(".weight")
            # As a bias, which has the layer's outputs as its only axis.
            moved = [permuted({f"{layer}.bias": row}, groups, permutation) if permutation else None for row in pair]
            rows = [row if one is None else one[f"{layer}.bias"] for one, row in zip(moved, pair, strict=True)]
            share = torch.stack(rows).to(torch.float64) * (weight / total)
            goals[layer] = goals[layer] + share if layer in goals else share
    return goals


def repair(
    model: TensorMap,
    goals: Mapping[str, Tensor],
    stages: Sequence[Sequence[str]],
    measure: Callable[[Mapping[str, Tensor]], Moments],
) -> dict[str, Tensor]:
    """Return weights and biases of `model` by name, in its dtypes, with which its layers have the moments `goals`.

    `measure(changed)` returns the moments of the model with the tensors `changed` so far in place of its own.
    """
    changed: dict[str, Tensor] = {}
    for layers in stages:
        found = measure(changed)
        for layer in layers:
            if f"{layer}.weight" not in found or layer not in goals:
                continue  # what no data goes through
            mean, spread = found[f"{layer}.weight"].to(torch.float64)
            goal_mean, goal_spread = goals[layer]
            factor = goal_spread / (spread + EPSILON)
            weight, bias = model[f"{layer}.weight"], model[f"{layer}.bias"]
            changed[f"{layer}.weight"] = (weight.to(torch.float64) * factor[:, None]).to(weight.dtype)
            changed[f"{layer}.bias"] = (goal_mean + (bias.to(torch.float64) - mean) * factor).to(bias.dtype)
    return changed
