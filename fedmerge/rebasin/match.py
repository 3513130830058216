"""Git Re-Basin's weight matching: find the permutations of a model's units that bring its weights closest to another's.

arXiv 2209.04836, algorithm 1: coordinate descent, one group of axes at a time, each a linear assignment problem.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedmerge.draws import uniform
from fedmerge.errors import InputError, MissingExtra, ModelMismatch
from fedmerge.rebasin.groups import Axis, Group
from fedmerge.seeds import derive_seed
from fedmerge.tensors import Computed, TensorMap

MAX_SWEEPS = 100

# A group has to bring more than this, in sums of products of weights, or it stays as it is.
LEAST_GAIN = 1e-12


def weight_matching(
    target: TensorMap, model: TensorMap, groups: Sequence[Group], *, seed: int = 0, num_orders: int = 3
) -> dict[str, Tensor]:
    """Return the permutation of each of `groups` that brings `model` closest to `target`, by name, int64 (num_units,).

    Unit i becomes what unit `permutation[i]` was. What is closest is the largest sum of products of corresponding
    weights. Descent ends in a local optimum that depends on the order in which groups are visited, so the best of
    `num_orders` random ones counts, drawn from `seed`. Computed in fp64. Raises `ModelMismatch` when the two models
    have other tensors, `InputError` for values that are not finite, and `MissingExtra` without scipy.
    """
    for axis in (axis for group in groups for axis in group.axes):
        if axis.tensor not in target or axis.tensor not in model:
            raise ModelMismatch(f"{axis.tensor}: is not in both models")
        if target[axis.tensor].shape != model[axis.tensor].shape:
            raise ModelMismatch(f"{axis.tensor}: has another shape in the two models")
    found = [_descend(target, model, groups, derive_seed(seed, "order", number)) for number in range(num_orders)]
    return max(found, key=lambda permutations: _agreement(target, permuted(model, groups, permutations), groups))


def permuted(model: TensorMap, groups: Sequence[Group], permutations: Mapping[str, Tensor]) -> TensorMap:
    """Return `model` with the units of `groups` permuted, each tensor when it is asked for; it computes the same."""
    axes = _axes_by_tensor(groups)
    return Computed(model, lambda name: _permute(model[name], axes.get(name, ()), permutations))


def _descend(target: TensorMap, model: TensorMap, groups: Sequence[Group], seed: int) -> dict[str, Tensor]:
    """Return a local optimum: no group by itself could be permuted better."""
    permutations = {group.name: torch.arange(group.num_units) for group in groups}
    axes = _axes_by_tensor(groups)
    for sweep in range(MAX_SWEEPS):
        improved = False
        for index in uniform(derive_seed(seed, sweep), len(groups)).argsort(stable=True).tolist():
            group = groups[index]
            gains = torch.zeros(group.num_units, group.num_units, dtype=torch.float64)
            for axis in group.axes:
                others = [(other, at) for other, at in axes[axis.tensor] if at != axis]
                moved = _permute(model[axis.tensor], others, permutations)
                gains += _units(target[axis.tensor], axis, group) @ _units(moved, axis, group).T
            before = permutations[group.name]
            after = _assign(gains)
            rows = torch.arange(group.num_units)
            if gains[rows, after].sum() > gains[rows, before].sum() + LEAST_GAIN:
                permutations[group.name] = after
                improved = True
        if not improved:
            break
    return permutations


def _assign(gains: Tensor) -> Tensor:
    """Return for each row of `gains` (U, U) the column that it is given, so that their sum is the largest."""
    try:
        from scipy.optimize import linear_sum_assignment
    except ModuleNotFoundError as err:
        raise MissingExtra("git_rebasin needs scipy", hint='pip install "fedmerge[rebasin]"') from err
    if not torch.isfinite(gains).all():
        raise InputError(
            "models to be aligned hold NaN or infinite values", hint="fedmerge inspect shows their tensors"
        )
    _, columns = linear_sum_assignment(gains.numpy(), maximize=True)
    return torch.from_numpy(columns).to(torch.int64)


def _axes_by_tensor(groups: Sequence[Group]) -> dict[str, list[tuple[Group, Axis]]]:
    found: dict[str, list[tuple[Group, Axis]]] = {}
    for group in groups:
        for axis in group.axes:
            found.setdefault(axis.tensor, []).append((group, axis))
    return found


def _permute(tensor: Tensor, axes: Sequence[tuple[Group, Axis]], permutations: Mapping[str, Tensor]) -> Tensor:
    """Return `tensor` with the units of each of its `axes` permuted."""
    for group, axis in axes:
        width = tensor.shape[axis.axis] // group.num_units
        starts = permutations[group.name][:, None] * width
        tensor = tensor.index_select(axis.axis, (starts + torch.arange(width)).view(-1))
    return tensor


def _units(tensor: Tensor, axis: Axis, group: Group) -> Tensor:
    """Return `tensor` as a matrix (num_units, rest) in fp64."""
    return tensor.to(torch.float64).movedim(axis.axis, 0).reshape(group.num_units, -1)


def _agreement(target: TensorMap, model: TensorMap, groups: Sequence[Group]) -> float:
    """Return the sum of products of corresponding weights, over the tensors of all groups."""
    names = sorted(_axes_by_tensor(groups))
    return float(sum((target[name].to(torch.float64) * model[name]).sum() for name in names))
