"""The recipe of a merge: a method and its parameters, checked and complete, as they stand in plans and lineage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from fedmerge.errors import ConfigError, did_you_mean
from fedmerge.merge.methods import METHODS
from fedmerge.merge.parameters import Parameter, config_key, parameters_of, resolve

_TRIAL = torch.tensor([[1.0, 2.0], [3.0, -4.0]])


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
    so that a recipe on record does not change its meaning when a default does. Raises `ConfigError` when the method or
    a parameter is unknown, or a value has the wrong type or range.

    >>> Recipe("ties", {"lambda": 0.5}).params["lambda_"]
    0.5
    """

    method: str
    params: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        resolved = resolve(f"merge method {self.method}", parameters(self.method), self.params)
        object.__setattr__(self, "params", resolved)
        # Some values make no sense together, and only the method knows: it says so now, not when a round is merged.
        METHODS[self.method](_TRIAL, torch.tensor([0.5, 0.5]), base=_TRIAL[0], **resolved)

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
