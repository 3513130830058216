"""Values that vary over a model: by depth, by the names of tensors, and by fine-tune.

    0.2                                              everywhere
    [0.2, 0.6, 0.4]                                  over depth: spread evenly from the first layer to the last, and
                                                     linear in between
    {"*.mlp.*" = 0.4, "*.bias" = [1, 0], default = 0.2}   of the first pattern that fits a tensor's name; patterns are
                                                     those of file names, and fit whole names
    {each = [0.2, 0.5]}                              of each fine-tune, in their order

The layer of a tensor is the first number after a part of its name that is "h" or ends in "layer", "layers", "block" or
"blocks": 3 in `model.layers.3.mlp.up_proj.weight`. Layers count among those with the same beginning, so an encoder and
a decoder have depths of their own. A tensor outside all layers (embedding, head, last norm) has a list's first value,
one of a stack that has a single layer the last.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from fractions import Fraction
from typing import Any, TypeAlias

from fedmerge.errors import ConfigError, did_you_mean

DEFAULT = "default"
EACH = "each"

_LAYER = re.compile(r"((?:.*?\.)??(?:h|[^.]*(?:layer|block)s?))\.([0-9]{1,9})(?=\.|$)")

# Any of the forms above, around numbers, booleans or words; plain data, as TOML, JSON and YAML hold it.
Value: TypeAlias = Any
KeyPath: TypeAlias = tuple[str | int, ...]


def layer_of(name: str) -> tuple[str, int] | None:
    """Return a tensor's stack of layers and the number of its layer, or None where it is outside all layers.

    >>> layer_of("bert.encoder.layer.11.output.dense.weight"), layer_of("lm_head.weight")
    (('bert.encoder.layer', 11), None)
    """
    found = _LAYER.match(name)
    return (found[1], int(found[2])) if found else None


def depths(names: Iterable[str]) -> dict[str, Fraction]:
    """Return how deep each tensor stands: from 0 for those of the first layer of their stack to 1 for the last."""
    layers = {name: layer_of(name) for name in names}
    stacks: dict[str, set[int]] = {}
    for layer in layers.values():
        if layer is not None:
            stacks.setdefault(layer[0], set()).add(layer[1])
    places = {stack: {number: place for place, number in enumerate(sorted(found))} for stack, found in stacks.items()}

    def depth(layer: tuple[str, int] | None) -> Fraction:
        if layer is None:
            return Fraction(0)
        stack, number = layer
        last = len(places[stack]) - 1
        return Fraction(places[stack][number], last) if last else Fraction(1)

    return {name: depth(layer) for name, layer in layers.items()}


def at(value: Value, name: str, depth: Fraction, fine_tune: int = 0) -> Any:
    """Return what `value` is for the tensor `name`, `depth` deep, of a fine-tune; None where no pattern fits."""
    if is_each(value):
        value = value[EACH][fine_tune]
    if isinstance(value, Mapping):
        fitting = (item for pattern, item in value.items() if pattern != DEFAULT and fnmatchcase(name, pattern))
        value = next(fitting, value.get(DEFAULT))
    if not isinstance(value, list):
        return value
    place = depth * (len(value) - 1)
    below = min(math.floor(place), len(value) - 1)
    above, share = min(below + 1, len(value) - 1), float(place - below)
    return (1 - share) * value[below] + share * value[above]


def is_each(value: Value) -> bool:
    """Whether `value` differs between fine-tunes."""
    return isinstance(value, Mapping) and value.keys() == {EACH} and isinstance(value[EACH], list)


def varies(value: Value) -> bool:
    """Whether `value` is more than one number, boolean or word."""
    return isinstance(value, (Mapping, list))


def map_leaves(value: Value, leaf: Callable[[Any, KeyPath], Any], *, default: Any = None, lists: bool = True) -> Value:
    """Return `value` with `leaf(scalar, where)` for each scalar, and `default` in tables that have none.

    What stands where only a scalar can, such as a list without `lists`, goes to `leaf` too, which has to refuse it.
    """

    def inner(value: Value, path: KeyPath, *, tables: bool) -> Value:
        if lists and isinstance(value, list) and value:
            return [leaf(item, (*path, index)) for index, item in enumerate(value)]
        if tables and isinstance(value, Mapping) and value and all(isinstance(key, str) for key in value):
            found = {key: inner(item, (*path, key), tables=False) for key, item in value.items()}
            return found if DEFAULT in found or default is None else found | {DEFAULT: default}
        return leaf(value, path)

    if is_each(value) and value[EACH]:
        return {EACH: [inner(item, (EACH, index), tables=True) for index, item in enumerate(value[EACH])]}
    return inner(value, (), tables=True)


def leaves(value: Value) -> list[Any]:
    """Return the scalars in `value`."""
    found: list[Any] = []
    map_leaves(value, lambda scalar, path: found.append(scalar))
    return found


def require_fitting(value: Value, names: Iterable[str], *, where: str) -> None:
    """Raise `ConfigError`, beginning with `where`, when a pattern in `value` fits none of the tensors `names`."""
    known = list(names)
    for pattern in _patterns(value):
        if not any(fnmatchcase(name, pattern) for name in known):
            parts = {part for name in known for part in name.split(".") if not part.isdecimal()}
            strange = [word for word in re.findall(r"[A-Za-z_]\w*", pattern) if not any(word in part for part in parts)]
            raise ConfigError(
                f"{where}: the pattern {pattern!r} fits no tensor{did_you_mean(strange[0], parts) if strange else ''}",
                hint=f"tensors have names such as {known[len(known) // 2]}; '*' stands for any part of one"
                if known
                else None,
            )


def restrict(value: Value, names: Iterable[str]) -> Value:
    """Return `value` without the patterns that fit none of the tensors `names`."""
    known = list(names)
    if is_each(value):
        return {EACH: [restrict(item, known) for item in value[EACH]]}
    if not isinstance(value, Mapping):
        return value
    return {
        pattern: item
        for pattern, item in value.items()
        if pattern == DEFAULT or any(fnmatchcase(name, pattern) for name in known)
    }


def _patterns(value: Value) -> Iterator[str]:
    for item in value[EACH] if is_each(value) else [value]:
        if isinstance(item, Mapping):
            yield from (pattern for pattern in item if pattern != DEFAULT)
