"""The recipe of a merge: a method and its parameters, or several steps, checked and complete, as plans record it.

A recipe of several steps is a chain: transforms, each of which acts on every task vector by itself; one method, which
makes one of them; and steps over rounds, which act on what is then added to the published model. `dare`, `elect`,
`ema`, say. A method alone is the shortest chain.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice, product
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from fedmerge.errors import ConfigError, did_you_mean
from fedmerge.merge.layers import EACH, Value, at, depths, is_each, leaves, require_fitting, varies
from fedmerge.merge.methods import BY_SHAPE, METHODS, NEEDS_FACTORS, NEEDS_STATISTICS
from fedmerge.merge.methods.trajectory import OVER_ROUNDS, State
from fedmerge.merge.parameters import Parameter, config_key, parameters_of, resolve
from fedmerge.merge.transforms import TRANSFORMS
from fedmerge.seeds import derive_seed

_TRIAL = torch.tensor([[1.0, 2.0], [3.0, -4.0]])
MAX_TRIALS = 100

# By method, what is printed where it is asked for.
CAUTIONS: dict[str, str] = {
    "factor_average": "factor_average multiplies the means of adapters' factors, which is not the mean of the adapters "
    'unless A is frozen (lora_freeze_a); method = "fedavg" is exact',
}

Scope: TypeAlias = Literal["tensor", "model"]
SCOPES: tuple[str, ...] = get_args(Scope)


def parameters(method: str) -> dict[str, Parameter]:
    """Return what `method` can be configured with: `Parameter(type, default, doc)` by Python name, from its signature.

    In configuration files names lose a trailing underscore: `lambda_` is `lambda`. Raises `ConfigError` for an unknown
    method.
    """
    return _parameters("merge method", method, METHODS)


def _parameters(kind: str, name: str, known: Mapping[str, Callable[..., object]]) -> dict[str, Parameter]:
    if name not in known:
        raise ConfigError(f"there is no {kind} {name!r}{did_you_mean(name, known)}", hint=f"one of {', '.join(known)}")
    return parameters_of(known[name], skip=("base", "seed", "statistics", "factors"))


@dataclass(frozen=True)
class Step:
    """A step beside the one that merges: a name and its parameters, checked and completed by the recipe it is in."""

    name: str
    params: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """A merge method and its parameters, and the steps `before` it (transforms) and `after` it (over rounds).

    `params` may be partial and may write `lambda_` as `lambda`; afterwards it holds every parameter by its Python name,
    so that a recipe on record does not change its meaning when a default does. A value may vary over depth and with the
    names of tensors, in a transform also by fine-tune (`fedmerge.merge.layers`).

    `scope` is what steps and method look at, and what densities are shares of: each "tensor" by itself, or the "model"
    flattened into one vector, its tensors in the order of their names, as the authors of TIES, PCB and EMR have it.
    That takes memory for all models at once.

    Raises `ConfigError` when the method, the scope or a parameter is unknown, a value has the wrong type or range, or
    the scope is the model and the method works on matrices or on statistics, or a value varies over the model, or
    there are transforms before a method that takes factors, which they do not act on.

    >>> Recipe("ties", {"lambda": 0.5, "density": {"*.mlp.*": [0.4, 0.2]}}).params["lambda_"]
    0.5
    """

    method: str
    params: Mapping[str, Any] = field(default_factory=dict)
    before: tuple[Step, ...] = ()
    after: tuple[Step, ...] = ()
    scope: Scope = "tensor"

    def __post_init__(self) -> None:
        resolved = resolve(f"merge method {self.method}", parameters(self.method), self.params)
        object.__setattr__(self, "params", resolved)
        object.__setattr__(
            self, "before", tuple(_resolved("step", step, TRANSFORMS, each=True) for step in self.before)
        )
        object.__setattr__(
            self, "after", tuple(_resolved("step over rounds", step, OVER_ROUNDS) for step in self.after)
        )
        self._check_scope()
        method_place([step.name for step in self.steps])
        # Some values make no sense together, and only the method knows: it says so now, not when a round is merged.
        for trial in _trials(resolved):
            METHODS[self.method](_TRIAL, torch.tensor([0.5, 0.5]), base=_TRIAL[0], **trial)
        for step in self.before:
            for trial in _trials(step.params):
                TRANSFORMS[step.name](_TRIAL, **trial)

    def _check_scope(self) -> None:
        if self.scope not in SCOPES:
            raise ConfigError(f"scope: unknown {self.scope!r:.50}", hint=f"one of: {', '.join(SCOPES)}")
        if self.scope == "tensor":
            return
        if self.method in BY_SHAPE:
            raise ConfigError(f'{self.method} works tensor by tensor: it does not go with scope = "model"')
        for step in (*self.before, Step(self.method, self.params)):
            for key, value in step.params.items():
                if any(map(varies, value[EACH] if is_each(value) else [value])):
                    raise ConfigError(f'{step.name}: {config_key(key)} varies, which does not go with scope = "model"')

    @property
    def steps(self) -> tuple[Step, ...]:
        """All steps in their order, the method among them."""
        return (*self.before, Step(self.method, self.params), *self.after)

    @classmethod
    def from_steps(cls, steps: Sequence[tuple[str, Mapping[str, Any]]], scope: Scope = "tensor") -> Recipe:
        """Make a recipe of names with parameters; raise `ConfigError` when they do not make a chain."""
        place = method_place([name for name, _ in steps])
        before, after = (tuple(Step(*step) for step in part) for part in (steps[:place], steps[place + 1 :]))
        return cls(*steps[place], before=before, after=after, scope=scope)

    @property
    def statistics(self) -> str | None:
        """The kind of statistics (of `merge.statistics`) that nodes have to send with their task vectors, if any."""
        return NEEDS_STATISTICS.get(self.method)

    @property
    def caution(self) -> str:
        """What whoever asks for this recipe should know, empty for most."""
        return CAUTIONS.get(self.method, "")

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as JSON types, parameters named as in configuration files."""
        steps = [
            {"method": step.name, "params": {config_key(name): value for name, value in step.params.items()}}
            for step in self.steps
        ]
        recipe: dict[str, Any] = steps[0] if len(steps) == 1 else {"steps": steps}
        return recipe | ({} if self.scope == "tensor" else {"scope": self.scope})

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Recipe:
        """Read what `to_dict` wrote; raise `ConfigError` when it is not a recipe."""
        return _from_json(json.dumps(data, default=repr))


@lru_cache(maxsize=32)  # every delta of a round comes with the same one, and to check it takes a trial of the method
def _from_json(text: str) -> Recipe:
    data = json.loads(text)
    rest = {key: value for key, value in data.items() if key != "scope"}
    scope = data.get("scope", "tensor")
    if rest.keys() == {"steps"} and isinstance(rest["steps"], list):
        return Recipe.from_steps([_step(one) for one in rest["steps"]], scope)
    return Recipe(*_step(rest), scope=scope)


def _step(data: Any) -> tuple[str, Mapping[str, Any]]:
    if isinstance(data, Mapping) and data.keys() <= {"method", "params"}:
        name, params = data.get("method"), data.get("params", {})
        if isinstance(name, str) and isinstance(params, Mapping):
            return name, params
    raise ConfigError(f"not a merge recipe: {data!r}", hint='expected {"method": NAME, "params": {...}}')


def method_place(names: Sequence[str]) -> int:
    """Return which of the steps `names` is the method; raise `ConfigError` when they do not make a chain."""
    for name in names:
        if name not in TRANSFORMS and name not in METHODS and name not in OVER_ROUNDS:
            known = (*TRANSFORMS, *METHODS, *OVER_ROUNDS)
            raise ConfigError(
                f"there is no step {name!r}{did_you_mean(name, known)}",
                hint=f"before a method: {', '.join(TRANSFORMS)}; after it: {', '.join(OVER_ROUNDS)}",
            )
    place = next((index for index, name in enumerate(names) if name not in TRANSFORMS), None)
    if place is None or names[place] not in METHODS:
        raise ConfigError(
            f"no step merges: {', '.join(names) or 'there is none'}",
            hint="put a method behind the transforms, such as elect, task_arithmetic or fedavg",
        )
    if place and names[place] in NEEDS_FACTORS:
        raise ConfigError(
            f"{names[place]} takes adapters' factors, and {names[0]} acts on their products",
            hint=f"leave out what comes before {names[place]}",
        )
    for name in names[place + 1 :]:
        if name in TRANSFORMS:
            raise ConfigError(f"{name} acts on each task vector: it goes before {names[place]}")
        if name not in OVER_ROUNDS:
            raise ConfigError(
                f"{names[place]} has merged already, so {name} finds nothing to merge",
                hint=f"after a method: {', '.join(OVER_ROUNDS)}",
            )
    return place


def chain_parameters(names: Sequence[str]) -> list[dict[str, Parameter]]:
    """Return what each of the steps `names` can be configured with; raise `ConfigError` when they make no chain."""
    place = method_place(names)
    kinds = [TRANSFORMS] * place + [METHODS] + [OVER_ROUNDS] * (len(names) - place - 1)
    return [_parameters("step", name, kind) for name, kind in zip(names, kinds, strict=True)]


def step_names(recipe: Mapping[str, Any]) -> list[str]:
    """Return the names of the steps, once each, of a recipe, or of slices with recipes, as they are recorded."""
    recipes = [part["merge"] for part in recipe["slices"]] if "slices" in recipe else [recipe]
    return list(dict.fromkeys(str(step["method"]) for one in recipes for step in one.get("steps", [one])))


def _resolved(kind: str, step: Step, known: Mapping[str, Callable[..., object]], *, each: bool = False) -> Step:
    params = _parameters(kind, step.name, known)
    return Step(step.name, resolve(f"{kind} {step.name}", params, step.params, each=each))


def _trials(params: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield combinations of the scalars that the values of `params` hold."""
    choices = [sorted(set(leaves(value)), key=str) for value in params.values()]
    for values in islice(product(*choices), MAX_TRIALS):
        yield dict(zip(params, values, strict=True))


class Plan:
    """A recipe for the tensors `names` of certain fine-tunes: what each step is called with for each tensor.

    `weights` are one for each fine-tune, and may vary as parameters may. Raises `ConfigError` when a value varies by a
    pattern that fits no tensor, or between fine-tunes of another number.
    """

    def __init__(self, recipe: Recipe, weights: Sequence[Value], names: Iterable[str]) -> None:
        self.recipe = recipe
        self._weights = weights
        self._depths = depths(names)
        for step in recipe.steps:
            for key, value in step.params.items():
                where = f"{step.name}: {config_key(key)}"
                require_fitting(value, self._depths, where=where)
                if is_each(value) and len(value[EACH]) != len(weights):
                    raise ConfigError(f"{where}: has {len(value[EACH])} values for {len(weights)} fine-tunes")
        for index, weight in enumerate(weights):
            require_fitting(weight, self._depths, where=f"weight of fine-tune {index}")

    def transformed(self, name: str, deltas: Iterable[Tensor], seed: int) -> Iterator[Tensor]:
        """Yield the tensor `name` of each fine-tune's delta as the steps before the method leave it."""
        for index, delta in enumerate(deltas):
            for step, step_seed in zip(self.recipe.before, self._seeds(seed), strict=False):
                delta = TRANSFORMS[step.name](  # noqa: PLW2901
                    delta, seed=derive_seed(step_seed, index), **self._scalars(step.params, name, index)
                )
            yield delta

    def method_seed(self, seed: int) -> int:
        """Return the seed of the method, where that of the first step is `seed`."""
        return next(islice(self._seeds(seed), len(self.recipe.before), None))

    def params(self, name: str) -> dict[str, Any]:
        """Return the method's parameters for the tensor `name`, all of them scalars."""
        return self._scalars(self.recipe.params, name)

    def weights(self, name: str) -> list[float]:
        """Return the weights of the fine-tunes for the tensor `name`."""
        return [self._at(weight, name) for weight in self._weights]

    def follow(self, name: str, step: Tensor, state: State) -> tuple[Tensor, State]:
        """Return what to add to the tensor `name` of the published model instead of `step`, and the state after it.

        These are the recipe's steps over rounds; `state` is what they returned in the round before, or empty.
        """
        kept: State = {}
        for index, after in enumerate(self.recipe.after):
            prefix = f"{index}.{after.name}."
            own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
            step, own = OVER_ROUNDS[after.name](step, own, **self._scalars(after.params, name))
            kept |= {prefix + key: value for key, value in own.items()}
        return step, kept

    def _scalars(self, params: Mapping[str, Any], name: str, fine_tune: int = 0) -> dict[str, Any]:
        return {key: self._at(value, name, fine_tune) for key, value in params.items()}

    def _at(self, value: Value, name: str, fine_tune: int = 0) -> Any:
        return at(value, name, self._depths[name], fine_tune) if varies(value) else value

    @staticmethod
    def _seeds(seed: int) -> Iterator[int]:
        """Yield the seeds of steps in their order: each derives from the one before."""
        while True:
            yield seed
            seed = derive_seed(seed, "next step")
