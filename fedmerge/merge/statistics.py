"""Statistics of a node's data that some merge methods need beside its task vector: what they are, and how they travel.

A node's delta file carries them as further tensors, called KIND:NAME after the parameter NAME that they are about, so
that whatever covers the file, statement, root, receipt and replay, covers them. They are never thinned, and nothing
else that looks at task vectors sees them. What a node has no statistics for travels as zeros, which cost no bytes.

They say more of a node's data than its task vector does: second moments of inputs, or which parameters matter to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fedmerge.errors import InputError, ModelMismatch
from fedmerge.tensors import DTYPES, Computed, Schema, TensorMap, TensorSpec

SEPARATOR = ":"

# Gram matrices of more inputs than this are not asked for: they would be larger than the models they help to merge.
MAX_INPUTS = 16384

# Share of the diagonal that a Gram matrix may lack to be positive semidefinite: what rounding to fp32 takes, and more.
INDEFINITE = 1e-4


@dataclass(frozen=True)
class Statistic:
    """One kind: the shape that a method takes it in and the one that it travels in, and what it must be.

    `shape` and `packed` return those shapes for a parameter, None for one that has no such statistic; `pack` and
    `unpack` go from the one to the other, and `dtype` is what travels. `problem` says what is wrong with an unpacked
    tensor, or returns None.
    """

    dtype: str
    shape: Callable[[TensorSpec], tuple[int, ...] | None]
    packed: Callable[[TensorSpec], tuple[int, ...] | None]
    pack: Callable[[Tensor], Tensor]
    unpack: Callable[[Tensor], Tensor]
    problem: Callable[[Tensor], str | None]


def _gram_shape(spec: TensorSpec) -> tuple[int, ...] | None:
    """Return (in, in) for what may be the weight (out, in) of a linear layer."""
    return (spec.shape[1],) * 2 if len(spec.shape) == 2 and 0 < spec.shape[1] <= MAX_INPUTS else None


def _triangle_shape(spec: TensorSpec) -> tuple[int, ...] | None:
    shape = _gram_shape(spec)
    return shape and (shape[0] * (shape[0] + 1) // 2,)


def _upper_triangle(matrix: Tensor) -> Tensor:
    rows, columns = torch.triu_indices(*matrix.shape)
    return matrix[rows, columns]


def _symmetric(triangle: Tensor) -> Tensor:
    size = (math.isqrt(8 * triangle.numel() + 1) - 1) // 2
    rows, columns = torch.triu_indices(size, size)
    matrix = triangle.new_empty(size, size)
    matrix[rows, columns] = triangle
    matrix[columns, rows] = triangle
    return matrix


def _fisher_problem(information: Tensor) -> str | None:
    num_bad = int((~((information >= 0) & (information < torch.inf))).sum())
    return f"{num_bad} values are negative or not finite" if num_bad else None


def _gram_problem(matrix: Tensor) -> str | None:
    matrix = matrix.to(torch.float64)
    diagonal = matrix.diagonal()
    if not torch.isfinite(matrix).all() or (diagonal < 0).any():
        return "the matrix has values that are not finite, or negative ones on its diagonal"
    if matrix[diagonal == 0].any():
        return "an input that is always zero goes with others"
    scale = torch.where(diagonal > 0, diagonal, 1).rsqrt()
    unit = matrix * scale[:, None] * scale
    unit.diagonal().copy_(torch.full_like(diagonal, 1 + INDEFINITE))
    _, failed = torch.linalg.cholesky_ex(unit)
    return "the matrix is not positive semidefinite" if failed else None


def _moments_shape(spec: TensorSpec) -> tuple[int, ...] | None:
    """Return (2, out) for what may be the weight (out, in) of a linear layer."""
    return (2, spec.shape[0]) if len(spec.shape) == 2 else None


def _moments_problem(moments: Tensor) -> str | None:
    return None if torch.isfinite(moments).all() and (moments[1] >= 0).all() else "not means and standard deviations"


# fisher: the diagonal of the Fisher information at the fine-tune, per example. Its last bits mean nothing: bf16.
# gram: X' X / rows for the inputs X of a linear layer. A rounded one may stop being positive semidefinite, so it
# travels in fp32, as its upper triangle.
# moments: mean and standard deviation of the outputs of a linear layer, for `fedmerge.rebasin.repair`.
STATISTICS: dict[str, Statistic] = {
    "fisher": Statistic(
        dtype="BF16",
        shape=lambda spec: spec.shape,
        packed=lambda spec: spec.shape,
        pack=lambda information: information,
        unpack=lambda information: information,
        problem=_fisher_problem,
    ),
    "gram": Statistic(
        dtype="F32",
        shape=_gram_shape,
        packed=_triangle_shape,
        pack=_upper_triangle,
        unpack=_symmetric,
        problem=_gram_problem,
    ),
    "moments": Statistic(
        dtype="F32",
        shape=_moments_shape,
        packed=_moments_shape,
        pack=lambda moments: moments,
        unpack=lambda moments: moments,
        problem=_moments_problem,
    ),
}


def statistics_schema(kind: str | None, schema: Schema) -> Schema:
    """Return the tensors that travel beside a task vector of a model of this `schema`: KIND:NAME, sorted by name.

    Empty without a `kind`. Raises `ModelMismatch` when the model itself has tensors of such names.
    """
    if kind is None:
        return {}
    taken = next((name for name in schema if name.startswith(kind + SEPARATOR)), None)
    if taken is not None:
        raise ModelMismatch(f"{taken}: the model's own tensor has a name that {kind} statistics travel under")
    statistic = STATISTICS[kind]
    shapes = {name: statistic.packed(spec) for name, spec in sorted(schema.items()) if spec.is_float}
    return {
        f"{kind}{SEPARATOR}{name}": TensorSpec(shape, statistic.dtype)
        for name, shape in shapes.items()
        if shape is not None
    }


def side_tensors(found: TensorMap, kind: str, schema: Schema) -> TensorMap:
    """Return the statistics `found` as they travel: packed, and under their own names.

    `found` has them by parameter, unpacked; what it lacks is zero. Raises `ModelMismatch` when it has unknown names or
    other shapes, and `InputError`, naming the parameter, for values that are no such statistics.
    """
    statistic, side = STATISTICS[kind], statistics_schema(kind, schema)
    for name, tensor in found.items():
        shape = statistic.shape(schema[name]) if f"{kind}{SEPARATOR}{name}" in side else None
        if shape is None:
            raise ModelMismatch(f"{kind} statistics of {name}: the model has no such parameter, or it takes none")
        if tensor.shape != shape:
            raise ModelMismatch(f"{kind} statistics of {name} have shape {list(tensor.shape)}, not {list(shape)}")
    problem = first_problem(found, kind)
    if problem is not None:
        raise InputError(problem)

    def compute(name: str) -> Tensor:
        parameter = name.removeprefix(kind + SEPARATOR)
        tensor = statistic.pack(found[parameter]) if parameter in found else torch.zeros(side[name].shape)
        return tensor.to(DTYPES[side[name].dtype])

    return Computed(side, compute)


def task_vector_of(sent: TensorMap, kind: str | None) -> TensorMap:
    """Return what was `sent` without the statistics of this `kind`: the task vector."""
    if kind is None:
        return sent
    return Computed([name for name in sent if not name.startswith(kind + SEPARATOR)], sent.__getitem__)


def statistics_of(sent: TensorMap, kind: str) -> TensorMap:
    """Return the statistics of this `kind` among what was `sent`, by parameter, each unpacked when it is asked for."""
    names = [name.removeprefix(kind + SEPARATOR) for name in sent if name.startswith(kind + SEPARATOR)]
    return Computed(names, lambda name: STATISTICS[kind].unpack(sent[f"{kind}{SEPARATOR}{name}"]))


def first_problem(found: TensorMap, kind: str) -> str | None:
    """Return what is wrong with the first statistics, unpacked and by parameter, that can't be what they should be."""
    for name, tensor in found.items():
        problem = STATISTICS[kind].problem(tensor)
        if problem is not None:
            return f"{kind} statistics of {name}: {problem}"
    return None


def packed(found: TensorMap, kind: str, schema: Schema) -> dict[str, Tensor]:
    """Return the statistics `found` by their travelling names, shapes and dtypes, as a file of them holds them.

    Raises what `side_tensors` raises.
    """
    side = side_tensors(found, kind, schema)
    return {name: side[name].contiguous() for name in (f"{kind}{SEPARATOR}{parameter}" for parameter in found)}


def read_statistics(path: Path, kind: str, schema: Schema) -> TensorMap:
    """Return what a file holds that `packed` was saved to, by parameter, unpacked; what it lacks is zero.

    Raises `InputError` when it is no such file, and `ModelMismatch` when it is of another model or kind.
    """
    side = statistics_schema(kind, schema)
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as err:
        raise InputError(f"{path}: not a readable safetensors file ({err})") from err
    for name, tensor in tensors.items():
        if name not in side or tuple(tensor.shape) != side[name].shape or not tensor.is_floating_point():
            raise ModelMismatch(
                f"{path}: {name} {list(tensor.shape)} is not one of this model's {kind} statistics",
                hint="fedmerge statistics computes them, for the method and from the fine-tune that you merge",
            )
    found = statistics_of(
        Computed(side, lambda name: tensors[name] if name in tensors else torch.zeros(side[name].shape)), kind
    )
    problem = first_problem(found, kind)
    if problem is not None:
        raise InputError(f"{path}: {problem}")
    return found
