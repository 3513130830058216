"""A model as one vector, for methods that rank and weigh over all tensors together (`Recipe.scope` "model")."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from fedmerge.errors import InputError, ModelMismatch
from fedmerge.merge.layers import Value, varies
from fedmerge.tensors import Schema, TensorMap, schema_of

MODEL = "model"


class Flattened(Mapping[str, Tensor]):
    """A tensor map with one tensor, `MODEL`: those of another called `names`, flattened, one after the other.

    It is fp32, or fp64 where one of them is. `names` have to be in the map.
    """

    def __init__(self, tensors: TensorMap, names: Sequence[str]) -> None:
        self._tensors = tensors
        schema = schema_of(tensors)
        self.parts: Schema = {name: schema[name] for name in names}

    def __getitem__(self, name: str) -> Tensor:
        if name != MODEL:
            raise KeyError(name)
        is_wide = any(spec.dtype == "F64" for spec in self.parts.values())
        num_elements = sum(spec.num_elements for spec in self.parts.values())
        flat = torch.empty(num_elements, dtype=torch.float64 if is_wide else torch.float32)
        # One by one: what decodes does so into one buffer.
        for part, place in self.split(flat).items():
            place.copy_(self._tensors[part])
        return flat

    def __iter__(self) -> Iterator[str]:
        return iter((MODEL,))

    def __len__(self) -> int:
        return 1

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """Return the parts of a vector, by name, as views of it in their shapes."""
        sizes = [spec.num_elements for spec in self.parts.values()]
        views = zip(self.parts.items(), torch.split(flat, sizes), strict=True)
        return {name: view.view(spec.shape) for (name, spec), view in views}


def flattened(
    deltas: Sequence[TensorMap], weights: Sequence[Value], statistics: Sequence[TensorMap], names: Sequence[str]
) -> tuple[list[Flattened], list[Flattened]]:
    """Return task vectors and their statistics, if any, as vectors of the tensors `names`.

    Raises `InputError` when a weight varies over the model, or statistics lack a tensor, and `ModelMismatch` when
    shapes differ.
    """
    for index, weight in enumerate(weights):
        if varies(weight):
            raise InputError(f'weight of fine-tune {index} varies, which does not go with scope = "model"')
    for index, known in enumerate(statistics):
        if missing := sorted(set(names) - set(known)):
            raise InputError(
                f'statistics {index} have no {missing[0]}, which scope = "model" needs ({len(missing)} such names)'
            )
    vectors = [Flattened(delta, names) for delta in deltas]
    for index, vector in enumerate(vectors):
        for name, spec in vector.parts.items():
            if spec.shape != vectors[0].parts[name].shape:
                expected = list(vectors[0].parts[name].shape)
                raise ModelMismatch(f"{name} has shape {list(spec.shape)} in task vector {index}, not {expected}")
    return vectors, [Flattened(known, names) for known in statistics]
