"""The merge methods by name, as plain data: to add one, write a function and list it here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Concatenate, TypeAlias

from torch import Tensor

from fedmerge.merge.average import fedavg, fedavg_coefficients, task_arithmetic, task_arithmetic_coefficients
from fedmerge.merge.dare import dare_linear, dare_ties
from fedmerge.merge.ties import ties

# METHODS[name](deltas, weights, *, base=None, seed=0, **params): a pure function of one parameter's task vectors
# (K, *shape) and their weights (K,) that returns the merged one (*shape,) in fp32, or fp64 if the deltas are fp64.
MergeMethod: TypeAlias = Callable[Concatenate[Tensor, Tensor, ...], Tensor]

METHODS: dict[str, MergeMethod] = {
    "fedavg": fedavg,
    "task_arithmetic": task_arithmetic,
    "ties": ties,
    "dare_linear": dare_linear,
    "dare_ties": dare_ties,
}

# Methods that look at the base: the engine reads it for these only, since base tensors may have to be computed.
NEEDS_BASE: frozenset[str] = frozenset()

# Methods that are sum_i c_i * delta_i, with the function from weights to c_i: the engine folds these delta by delta.
LINEAR: dict[str, Callable[Concatenate[list[float], ...], list[float]]] = {
    "fedavg": fedavg_coefficients,
    "task_arithmetic": task_arithmetic_coefficients,
}
