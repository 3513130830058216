"""The recipe of a merge: a method and its parameters, checked and complete, as they stand in plans and lineage."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, product
from typing import Any

import torch

from fedmerge.errors import ConfigError, did_you_mean
from fedmerge.merge.layers import Value, at, depths, leaves, require_fitting, varies
from fedmerge.merge.methods import METHODS
from fedmerge.merge.parameters import Parameter, config_key, parameters_of, resolve

_TRIAL = torch.tensor([[1.0, 2.0], [3.0, -4.0]])
MAX_TRIALS = 100


def parameters(method: str) -> dict[str, Parameter]:
    """Return what `method` can be configured with: `Parameter(type, default, doc)` by Python name, from its signature.

    In configuration files names lose a trailing underscore: `lambda_` is `lambda`. Raises `ConfigError` for an unknown
    method.
    """
    if method not in METHODS:
        raise ConfigError(
            f"there is no merge method {method!r}{did_you_mean(method, METHODS)}", hint=f"one of {', '.join(METHODS)}"
        )
    return parameters_of(METHODS[method], skip=("base", "seed"))


@dataclass(frozen=True)
class Recipe:
    """A merge method and its parameters.

    `params` may be partial and may write `lambda_` as `lambda`; afterwards it holds every parameter by its Python name,
    so that a recipe on record does not change its meaning when a default does. A value may vary over depth and with the
    names of tensors (`fedmerge.merge.layers`). Raises `ConfigError` when the method or a parameter is unknown, or a
    value has the wrong type or range.

    >>> Recipe("ties", {"lambda": 0.5, "density": {"*.mlp.*": [0.4, 0.2]}}).params["lambda_"]
    0.5
    """

    method: str
    params: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        resolved = resolve(f"merge method {self.method}", parameters(self.method), self.params)
        object.__setattr__(self, "params", resolved)
        # Some values make no sense together, and only the method knows: it says so now, not when a round is merged.
        choices = [sorted(set(leaves(value)), key=str) for value in resolved.values()]
        for values in islice(product(*choices), MAX_TRIALS):
            trial = dict(zip(resolved, values, strict=True))
            METHODS[self.method](_TRIAL, torch.tensor([0.5, 0.5]), base=_TRIAL[0], **trial)

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as JSON types, parameters named as in configuration files."""
        return {"method": self.method, "params": {config_key(name): value for name, value in self.params.items()}}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """Read what `to_dict` wrote; raise `ConfigError` when it is not a recipe."""
        method, params = data.get("method"), data.get("params", {})
        if not isinstance(method, str) or not isinstance(params, Mapping) or not data.keys() <= {"method", "params"}:
            raise ConfigError(f"not a merge recipe: {dict(data)!r}", hint='expected {"method": NAME, "params": {...}}')
        return cls(method, params)


class Plan:
    """A recipe for the tensors `names` of certain fine-tunes: the numbers that a method is called with for each.

    `weights` are one for each fine-tune, and may vary as parameters may. Raises `ConfigError` when a value varies by a
    pattern that fits no tensor.
    """

    def __init__(self, recipe: Recipe, weights: Sequence[Value], names: Iterable[str]) -> None:
        self._recipe = recipe
        self._weights = weights
        self._depths = depths(names)
        for key, value in recipe.params.items():
            require_fitting(value, self._depths, where=f"{recipe.method}: {config_key(key)}")
        for index, weight in enumerate(weights):
            require_fitting(weight, self._depths, where=f"weight of fine-tune {index}")

    def params(self, name: str) -> dict[str, Any]:
        """Return the method's parameters for the tensor `name`, all of them scalars."""
        return {key: self._at(value, name) for key, value in self._recipe.params.items()}

    def weights(self, name: str) -> list[float]:
        """Return the weights of the fine-tunes for the tensor `name`."""
        return [self._at(weight, name) for weight in self._weights]

    def _at(self, value: Value, name: str) -> Any:
        return at(value, name, self._depths[name]) if varies(value) else value
