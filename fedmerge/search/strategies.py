"""Ways to search for a merge, as plain data: to add one, write a generator and list it here.

A strategy yields generations of candidates and is sent the `Board` with the answers. It draws no random number but from
its seed and reads nothing but the board, so that the same answers lead to the same candidates again: a search that was
stopped goes on by telling it what was answered so far.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, TypeAlias

from fedmerge.errors import ConfigError, MissingExtra, did_you_mean
from fedmerge.merge import Recipe
from fedmerge.merge.layers import Value, is_each, map_leaves
from fedmerge.merge.parameters import config_key
from fedmerge.search.board import Answers, Board

# Candidates go on record in decimal: this many digits are far below what any score can tell apart.
DIGITS = 6
WORST = 1e300


# One number, or several that are spread over the model's depth as `fedmerge.merge.layers` has it.
Factor: TypeAlias = float | tuple[float, ...]


@dataclass(frozen=True)
class Candidate:
    """One merge to try: a factor on each model's weight, 0 leaving it out, and values of the method's parameters."""

    factors: tuple[Factor, ...]
    params: Mapping[str, float] = field(default_factory=dict)

    def recipe(self, plain: Recipe) -> Recipe:
        """Return the recipe with this candidate's parameters."""
        return replace(plain, params={**plain.params, **self.params})

    def weights(self, plain: Sequence[Value]) -> list[Value]:
        """Return the weights with this candidate's factors on them; they may vary over depth if its factors do not."""
        return [_times(factor, weight) for factor, weight in zip(self.factors, plain, strict=True)]

    def to_dict(self) -> dict[str, Any]:
        """Return the candidate as JSON types."""
        factors = [list(factor) if isinstance(factor, tuple) else factor for factor in self.factors]
        return {"factors": factors, "params": dict(self.params)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Candidate:
        """Read what `to_dict` wrote."""
        factors = (tuple(factor) if isinstance(factor, list) else factor for factor in data["factors"])
        return cls(tuple(factors), data["params"])


def _times(factor: Factor, weight: Value) -> Value:
    if isinstance(factor, tuple):
        return [part * weight for part in factor]
    return map_leaves(weight, lambda scalar, path: factor * scalar)


@dataclass(frozen=True)
class SearchSettings:
    """How to search.

    `vary` maps parameters of the merge method, named as in configuration files, to the (lowest, highest) value to try.
    No generation begins once `evaluations` candidates were scored. CMA-ES alone has `layers` (factors for each model,
    spread over its depth), `population` (0: 4 + 3 ln D) and `step` (the first spread, as a share of each range).
    `metric` is as in `score_of`; `deadline_s` is for one generation in a federation, for one candidate locally. Raises
    `ConfigError` when a value makes no sense.
    """

    strategy: str
    evaluations: int = 50
    layers: int = 1
    population: int = 0
    step: float = 0.1667
    vary: Mapping[str, Sequence[float]] = field(default_factory=dict)
    metric: str = "auto"
    deadline_s: float = 3600.0

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            problem = f"there is no search strategy {self.strategy!r}{did_you_mean(self.strategy, STRATEGIES)}"
            raise ConfigError(problem, hint=f"one of {', '.join(STRATEGIES)}")
        if self.vary and self.strategy == "greedy_soup":
            raise ConfigError("search: greedy_soup has nothing to vary", hint='take strategy = "cma_es"')
        if self.layers > 1 and self.strategy == "greedy_soup":
            raise ConfigError("search: greedy_soup has one factor for each model", hint='take strategy = "cma_es"')
        counts = min(self.layers, self.evaluations) >= 1 and self.population >= 0 and self.population != 1
        if not counts or not 0 < self.step <= 1:
            raise ConfigError("search: layers and evaluations should be 1 or more, population 2 or more, step 0 to 1")

    def check(self, recipe: Recipe) -> None:
        """Raise `ConfigError` unless `recipe` has the parameters to vary, and takes both ends of their ranges."""
        if any(is_each(value) for step in recipe.before for value in step.params.values()):
            raise ConfigError("search: leaves models out, so no value can be given for each of them")
        for name, ends in self.vary.items():
            if len(ends) != 2 or not ends[0] < ends[1]:
                raise ConfigError(f"search: vary.{name} should be two numbers, the lower one first")
            for end in ends:
                replace(recipe, params={**recipe.params, name: end})
            start = {config_key(known): value for known, value in recipe.params.items()}.get(name)
            if not isinstance(start, float) or not ends[0] <= start <= ends[1]:
                raise ConfigError(f"search: vary.{name} should be a range around its start, {start}")

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON types."""
        return asdict(self) | {"vary": {name: list(ends) for name, ends in self.vary.items()}}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SearchSettings:
        """Read what `to_dict` wrote; raise `ConfigError` when it is not that."""
        known = [each.name for each in fields(cls)]
        for name in data:
            if name not in known:
                raise ConfigError(f"search: unknown key {name!r}{did_you_mean(name, known)}")
        try:
            return cls(**data)
        except TypeError as err:
            raise ConfigError(f"search: not settings: {dict(data)!r}") from err


class Search:
    """A search under way. `generation` is what to score next, and empty once it has ended.

    `recipe` is the merge without a search, `num_models` how many models it merges. Raises `MissingExtra` when the
    strategy's library is not installed, and `ConfigError` as `SearchSettings.check` does.

    >>> search = Search(SearchSettings("greedy_soup"), Recipe("fedavg"), num_models=2, seed=0)
    >>> [candidate.factors for candidate in search.generation]
    [(1.0, 0.0), (0.0, 1.0)]
    >>> search.tell([{"me": 0.5}, {"me": 0.7}])
    >>> [candidate.factors for candidate in search.generation]
    [(1.0, 1.0)]
    """

    def __init__(self, settings: SearchSettings, recipe: Recipe, num_models: int, seed: int) -> None:
        settings.check(recipe)
        self.settings = settings
        self.board = Board()
        self.candidates: list[Candidate] = []
        self._steps = STRATEGIES[settings.strategy](settings, recipe, num_models, seed)
        self.generation = next(self._steps)

    def tell(self, answers: Sequence[Answers]) -> None:
        """Take the answers to the generation, in its order, and make the next one.

        Raises `InputError` when no judge is left who scored every candidate.
        """
        if len(answers) != len(self.generation):
            raise ValueError(f"{len(answers)} answers to {len(self.generation)} candidates")
        self.board.add(answers)
        self.candidates += self.generation
        self.generation = []
        if len(self.candidates) < self.settings.evaluations:
            with suppress(StopIteration):
                self.generation = self._steps.send(self.board)

    def best(self) -> Candidate:
        """Return the candidate with the highest mean score; of equals the last."""
        return self.candidates[self.board.best()]


Steps: TypeAlias = Generator[list[Candidate], Board, None]


def greedy_soup(settings: SearchSettings, recipe: Recipe, num_models: int, seed: int) -> Steps:
    """Order models by their own score, then add each in turn to the soup unless that makes it worse.

    Of equal scores the last model comes first, and a soup that is as good with one more model takes it. 2K - 1
    candidates for K models. "Model soups" (arXiv 2203.05482, recipe 1).
    """

    def soup_of(members: Sequence[int]) -> Candidate:
        return Candidate(tuple(float(model in members) for model in range(num_models)))

    board = yield [soup_of([model]) for model in range(num_models)]
    first, *others = sorted(range(num_models), key=lambda model: (-board.mean(model), -model))
    soup, number = [first], first
    for model in others:
        board = yield [soup_of([*soup, model])]
        if board.mean(-1) >= board.mean(number):
            soup, number = [*soup, model], len(board.rows) - 1


def cma_es(settings: SearchSettings, recipe: Recipe, num_models: int, seed: int) -> Steps:
    """Evolve the factors on the models' weights and the parameters to vary, by CMA-ES, beginning with the plain merge.

    Factors range from 0 to the number of models (2 at least): with weights 1/K the coefficient of a task vector from 0
    to 1, and starts at 1/K with spread 1/6, as in "Evolutionary optimization of model merging recipes" (arXiv
    2403.13187). The optimizer is "The CMA evolution strategy: a tutorial" (arXiv 1604.00772), from the library cmaes.
    """
    try:
        import cmaes
        import numpy as np
    except ModuleNotFoundError as err:
        raise MissingExtra("the cma_es search needs cmaes", hint='pip install "fedmerge[search]"') from err
    plain = {config_key(name): value for name, value in recipe.params.items()}
    names = list(settings.vary)
    num_factors = num_models * settings.layers
    start = [1.0] * num_factors + [plain[name] for name in names]
    ranges = [(0.0, max(2.0, num_models))] * num_factors + [(low, high) for low, high in settings.vary.values()]

    def of_numbers(numbers: Sequence[float]) -> Candidate:
        flat = numbers[:num_factors]
        parts = [tuple(flat[first : first + settings.layers]) for first in range(0, num_factors, settings.layers)]
        factors = tuple(part if settings.layers > 1 else part[0] for part in parts)
        return Candidate(factors, dict(zip(names, numbers[num_factors:], strict=True)))

    if len(start) < 2:
        yield [of_numbers(start)]
        return

    def candidate(point: Any) -> Candidate:
        values = [
            round(min(max(low + float(share) * (high - low), low), high), DIGITS)
            for share, (low, high) in zip(point, ranges, strict=True)
        ]
        # A merge of nothing is no merge; the box's corner is the one point where it happens.
        return of_numbers(values if any(values[:num_factors]) else start)

    optimizer = cmaes.CMA(
        mean=np.array([(value - low) / (high - low) for value, (low, high) in zip(start, ranges, strict=True)]),
        sigma=settings.step,
        bounds=np.array([[0.0, 1.0]] * len(start)),
        population_size=settings.population or 4 + math.floor(3 * math.log(len(start))),
        seed=seed % (1 << 32),
    )
    extra = [of_numbers(start)]
    while not optimizer.should_stop():
        points = [optimizer.ask() for _ in range(optimizer.population_size)]
        board = yield extra + [candidate(point) for point in points]
        means = [board.mean(number - len(points)) for number in range(len(points))]
        optimizer.tell([(point, min(-mean, WORST)) for point, mean in zip(points, means, strict=True)])
        extra = []


Strategy: TypeAlias = Callable[[SearchSettings, Recipe, int, int], Steps]

STRATEGIES: dict[str, Strategy] = {"greedy_soup": greedy_soup, "cma_es": cma_es}

# Strategies that propose the same candidates on every machine, to the last bit.
EXACT: frozenset[str] = frozenset({"greedy_soup"})
