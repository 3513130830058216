"""Step 10, merge: apply a method to every parameter, streaming, so that no model is ever in memory whole.

Task vectors that lie in memory or in a mapped file are merged block of columns by block of columns where the method has
a compiled form (`fedmerge.merge.fused`); others are stacked, one parameter at a time. Several parameters may be in work
at once. None of this changes a bit of the outcome.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeAlias

import torch
from torch import Tensor

from fedmerge.delta.frame import DeltaFile
from fedmerge.delta.lowrank import Factors, LowRankDelta
from fedmerge.delta.sparsify import Sparse
from fedmerge.delta.task_vector import TaskVector, apply_one, working_dtype
from fedmerge.errors import InputError, ModelMismatch
from fedmerge.merge.flat import MODEL, Flattened, flattened
from fedmerge.merge.flight import Workers, in_order
from fedmerge.merge.fused import BY_LINE, FUSED, MergeBlock, is_compiled
from fedmerge.merge.layers import Value
from fedmerge.merge.methods import LINEAR, METHODS, NEEDS_BASE, NEEDS_FACTORS
from fedmerge.merge.methods.average import fold
from fedmerge.merge.recipe import Plan, Recipe
from fedmerge.merge.rows import NotFinite, Operand, Rows, Update
from fedmerge.merge.stack import require_floats, row_weights
from fedmerge.seeds import derive_seed
from fedmerge.tensors import Schema, TensorMap, is_resident

# write(name, start, values) takes the elements of a merged tensor from index `start` on, in the base's dtype, flat. The
# values may change once it has returned.
Write: TypeAlias = Callable[[str, int, Tensor], None]

ONE_WORKER = Workers()


def merge_deltas(
    deltas: Sequence[TensorMap],
    weights: Sequence[Value],
    recipe: Recipe,
    *,
    base: TensorMap | None = None,
    seed: int = 0,
    scales: Sequence[float] | None = None,
    statistics: Sequence[TensorMap] | None = None,
    workers: Workers = ONE_WORKER,
) -> Iterator[tuple[str, Tensor]]:
    """Yield `(name, merged task vector)` for every parameter, sorted by name, in fp32 (fp64 where a delta is fp64).

    `deltas` are K task vectors with the same names and shapes. Of a map that decodes, each tensor is asked for once,
    one parameter after the other (unless there are several `workers`), and used up before the next is asked for, so it
    may decode lazily and into one buffer. `weights` are K numbers, or values that vary over the model
    (`fedmerge.merge.layers`), `scales` K factors on the deltas (norm clipping), `statistics` K maps of what
    `recipe.statistics` asks for, by the parameters that have any (see `fedmerge.merge.statistics`). Linear methods hold
    one tensor at a time, the others a stack of K at most; with the scope "model" all is held at once. The outcome is
    `METHODS[recipe.method]` on each stack of what the steps before it make of the deltas, with the seed
    `derive_seed(seed, name)`, and depends on the order of the deltas: sort them first. The recipe's steps over rounds
    are not taken: see `Plan.follow`.

    Raises `InputError` when the numbers of deltas, weights, scales and statistics differ, or statistics are missing,
    and `ModelMismatch` when names (at once) or shapes (when reached) do; `ConfigError` when a value varies by a pattern
    that fits no name.
    """
    merge = _Merge(deltas, weights, recipe, base=base, seed=seed, scales=scales, statistics=statistics, workers=workers)
    return in_order(merge.names, merge.task_vector, merge.cost_bytes(whole=True), workers)


def merge_models(
    deltas: Sequence[TensorMap],
    weights: Sequence[Value],
    recipe: Recipe,
    base: TensorMap,
    write: Write,
    *,
    seed: int = 0,
    scales: Sequence[float] | None = None,
    statistics: Sequence[TensorMap] | None = None,
    workers: Workers = ONE_WORKER,
    only: Collection[str] | None = None,
) -> Iterator[str]:
    """Merge as `merge_deltas` does, add to `base`, round once to its dtype, and `write`; yield each name when done.

    Steps over rounds are taken as in a first round. What is written is `UpdatedModel(base, [merged])` to the bit, its
    tensors without a task vector included. Where the deltas are differences of checkpoints, and the method has a
    compiled form, no tensor is held whole. With several workers `write` is called from several threads. With `only`
    other names are left out, which changes nothing in these. Raises as `merge_deltas` does, and `InputError` when a
    merged value is NaN or infinite.
    """
    merge = _Merge(deltas, weights, recipe, base=base, seed=seed, scales=scales, statistics=statistics, workers=workers)
    merged = set(merge.names)

    def work(name: str) -> None:
        if name in merged:
            merge.model_tensor(name, base[name], write)
        else:
            write(name, 0, base[name].reshape(-1))

    names = sorted(base if only is None else base.keys() & only)
    return (name for name, _ in in_order(names, work, merge.cost_bytes(whole=False), workers))


class _Merge:
    """One merge of K task vectors, checked; merges any parameter, in any thread."""

    def __init__(
        self,
        deltas: Sequence[TensorMap],
        weights: Sequence[Value],
        recipe: Recipe,
        *,
        base: TensorMap | None,
        seed: int,
        scales: Sequence[float] | None,
        statistics: Sequence[TensorMap] | None,
        workers: Workers,
    ) -> None:
        self.deltas, self.recipe, self.base, self.seed = deltas, recipe, base, seed
        self.workers = workers
        self.scales = [1.0] * len(deltas) if scales is None else scales
        self.statistics = statistics or ()
        self.compiled = workers.device is None and recipe.method in FUSED
        self.device = torch.device(workers.device or "cpu")
        if not deltas:
            raise InputError("nothing to merge: no task vectors")
        if not len(deltas) == len(weights) == len(self.scales):
            raise InputError(
                f"{len(deltas)} task vectors came with {len(weights)} weights and {len(self.scales)} scales"
            )
        if recipe.statistics is not None and len(self.statistics) != len(deltas):
            raise InputError(
                f"{recipe.method} needs {recipe.statistics} statistics with every task vector",
                hint="compute them with fedmerge statistics, or merge by another method",
            )
        self.names = sorted(deltas[0])
        self.plan, self.given_weights = Plan(recipe, weights, self.names), weights
        for index, delta in enumerate(deltas):
            odd = sorted(set(self.names) ^ set(delta))
            if odd:
                problem = "misses" if odd[0] in self.names else "has unknown"
                raise ModelMismatch(
                    f"task vector {index} {problem} {odd[0]}, unlike task vector 0 ({len(odd)} such names)"
                )
        if base is not None and not base.keys() >= set(self.names):
            raise ModelMismatch(
                f"the base model misses {min(set(self.names) - base.keys())}, which the task vectors have"
            )
        self._local = threading.local()
        self._lock = threading.Lock()
        self._whole: dict[str, Tensor] | None = None

    def cost_bytes(self, *, whole: bool) -> Callable[[str], int]:
        """Return a function from a parameter's name to about how much memory merging it takes, given the result."""
        known = next((one for one in (self.base, *self.deltas) if hasattr(one, "schema")), None)
        schema: Schema = getattr(known, "schema", {})
        by_block = self.compiled and not self.recipe.steps[1:] and all(map(_is_readable, self.deltas))
        stacks = 0 if by_block else 1 if self.recipe.method in LINEAR else 2 * len(self.deltas) + 2

        def cost(name: str) -> int:
            return 4 * schema[name].num_elements * (stacks + whole) if name in schema else 0

        return cost

    def task_vector(self, name: str) -> Tensor:
        """Return the merged task vector of one parameter."""
        if self.recipe.scope == "model":
            return self._merged_whole()[name]
        rows = self._rows(name)
        if rows is None:
            return self._by_torch(name).cpu()
        merged = torch.empty(rows.shape, dtype=torch.float32)
        flat = merged.view(-1).numpy()
        with self._naming_the_delta(name):
            merge_block = self._compiled(name, rows)
            for start, stop in rows.blocks():
                merge_block(start, stop, flat[start:stop])
        return merged

    def model_tensor(self, name: str, before: Tensor, write: Write) -> None:
        """Merge one parameter, add it to the base's tensor `before`, and write it."""
        rows = None if self.recipe.after or self.recipe.scope == "model" else self._rows(name)
        if rows is None or not Operand(before).compiled:
            after = apply_one(before, self.plan.follow(name, self.task_vector(name), {})[0])
            if not after.isfinite().all():
                raise _not_finite(name)
            write(name, 0, after.view(-1))
            return
        update = Update(before, rows.num_columns)
        with self._naming_the_delta(name):
            merge_block = self._compiled(name, rows)
            for start, stop in rows.blocks():
                merge_block(start, stop, update.change[: stop - start])
                if not update.apply(start, stop):
                    raise _not_finite(name)
                write(name, start, update.after[: stop - start])

    def _merged_whole(self) -> dict[str, Tensor]:
        """Return all merged task vectors, which are made together as one."""
        with self._lock:
            if self._whole is None:
                vectors, statistics = flattened(self.deltas, self.given_weights, self.statistics, self.names)
                merge = _Merge(
                    vectors,
                    self.given_weights,
                    replace(self.recipe, scope="tensor", after=()),
                    base=Flattened(self.base, self.names) if self.base is not None else None,
                    seed=self.seed,
                    scales=self.scales,
                    statistics=statistics,
                    workers=self.workers,
                )
                self._whole = vectors[0].split(merge.task_vector(MODEL))
        return self._whole

    def _rows(self, name: str) -> Rows | None:
        """Return the task vectors of a parameter for a compiled method; None where there is none, or none for them."""
        params = self.plan.params(name)
        if not self.compiled or not is_compiled(self.recipe.method, params):
            return None
        if not self.recipe.before and all(map(_is_readable, self.deltas)):
            operands = [_operand(delta, name, scale) for delta, scale in zip(self.deltas, self.scales, strict=True)]
            _require_one_shape(name, [operand.tuned for operand in operands])
        elif self.recipe.method in LINEAR:
            return None
        else:
            operands = [Operand(row) for row in self._stack(name)]
        if params.get("space") == "weights":
            if self.base is None or self.base[name].shape != operands[0].tuned.shape:
                return None  # for the torch form to refuse
            operands.append(Operand(self.base[name]))
        if not all(operand.compiled for operand in operands):
            return None
        shape = operands[0].tuned.shape
        by_line = self.recipe.method in BY_LINE and shape.numel() > 0
        lines = shape[0] if len(shape) > 1 else 1
        return Rows(operands, line_elements=shape.numel() // lines if by_line else 1)

    def _compiled(self, name: str, rows: Rows) -> MergeBlock:
        values = row_weights(self._weights(name), len(self.deltas), torch.float32)
        seed = self.plan.method_seed(derive_seed(self.seed, name))
        return FUSED[self.recipe.method](rows, values, seed=seed, **self.plan.params(name))

    def _by_torch(self, name: str) -> Tensor:
        """Return the merged task vector by the method's torch form, on its device."""
        method, params, weights = self.recipe.method, self.plan.params(name), self._weights(name)
        if method in LINEAR:
            return fold(
                self._terms(name),
                lambda dtype: LINEAR[method](row_weights(weights, len(self.deltas), dtype), **params),
                shape=self._shape(name),
            )
        base = self.base[name].to(self.device) if self.base is not None and method in NEEDS_BASE else None
        seed = self.plan.method_seed(derive_seed(self.seed, name))
        if self.recipe.statistics is not None and name in self.statistics[0]:
            params["statistics"] = torch.stack([found[name] for found in self.statistics]).to(self.device)
        if method in NEEDS_FACTORS:
            params["factors"] = self._factors(name)
        return METHODS[method](self._stack(name), weights, base=base, seed=seed, **params)

    def _factors(self, name: str) -> list[Factors] | None:
        """Return the factors of a parameter by task vector, scaled; None where one of them has none."""
        found = []
        for delta, scale in zip(self.deltas, self.scales, strict=True):
            factors = delta.factors_of(name) if isinstance(delta, LowRankDelta | DeltaFile) else None
            if factors is None:
                return None
            found.append(factors if scale == 1 else factors._replace(left=factors.left * scale))
        return found

    def _weights(self, name: str) -> Tensor:
        return torch.tensor(self.plan.weights(name), dtype=torch.float64)

    def _stack(self, name: str) -> Tensor:
        if not hasattr(self._local, "stack"):
            self._local.stack = _Stack(len(self.deltas), self.device)
        stack: Tensor = self._local.stack.fill(self._thinned(name))
        return stack

    def _shape(self, name: str) -> torch.Size | None:
        """Return the shape of a tensor that all deltas are files of; None where one is something else."""
        shapes = [delta.schema[name].shape for delta in self.deltas if isinstance(delta, DeltaFile)]
        if len(shapes) < len(self.deltas):
            return None
        for index, shape in enumerate(shapes):
            if shape != shapes[0]:
                raise _other_shape(name, index, torch.Size(shape), torch.Size(shapes[0]))
        return torch.Size(shapes[0])

    def _terms(self, name: str) -> Iterator[Tensor | Sparse]:
        """Yield the tensor called `name` of each delta, those that a sparsifier thinned without their zeros."""
        if self.recipe.before or self.device.type != "cpu" or self._shape(name) is None:
            yield from self._thinned(name)
            return
        for delta, scale in zip(self.deltas, self.scales, strict=True):
            sparse = delta.sparse(name) if isinstance(delta, DeltaFile) else None
            if sparse is not None:
                yield sparse if scale == 1 else sparse._replace(values=sparse.values * scale)
            else:
                yield delta[name] if scale == 1 else delta[name] * scale

    def _thinned(self, name: str) -> Iterator[Tensor]:
        """Yield the tensor called `name` of each delta as the steps before the method leave it."""
        return self.plan.transformed(name, self._read(name), derive_seed(self.seed, name))

    def _read(self, name: str) -> Iterator[Tensor]:
        """Yield the tensor called `name` of each delta, checked and scaled, holding none of them."""
        shape: torch.Size | None = None
        for index, (delta, scale) in enumerate(zip(self.deltas, self.scales, strict=True)):
            tensor = delta[name].to(self.device)
            require_floats(tensor)
            shape = tensor.shape if shape is None else shape
            if tensor.shape != shape:
                raise _other_shape(name, index, tensor.shape, shape)
            yield tensor if scale == 1 else tensor.to(working_dtype(tensor)) * scale

    @contextmanager
    def _naming_the_delta(self, name: str) -> Iterator[None]:
        """Have a task vector that is not finite say so itself: it knows its own name, and counts what is wrong."""
        try:
            yield
        except NotFinite as err:
            self.deltas[err.index][name]
            raise


class _Stack:
    """A buffer for K tensors of one parameter, used again for the next: fresh memory costs more than a copy."""

    def __init__(self, num_rows: int, device: torch.device) -> None:
        self.num_rows = num_rows
        self.buffer = torch.empty(0, device=device)

    def fill(self, tensors: Iterator[Tensor]) -> Tensor:
        """Return the stack (K, *shape) in fp32 (or fp64) that is valid until the next call."""
        stack = torch.empty(0)
        for row, tensor in enumerate(tensors):
            if row == 0:
                stack = self._view(tensor.shape, working_dtype(tensor))
            elif working_dtype(tensor, stack) != stack.dtype:
                stack = stack.to(torch.float64)
            stack[row].copy_(tensor)
        return stack

    def _view(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        num_elements = self.num_rows * shape.numel()
        if self.buffer.numel() < num_elements or self.buffer.dtype != dtype:
            self.buffer = torch.empty(num_elements, dtype=dtype, device=self.buffer.device)
        return self.buffer[:num_elements].view(self.num_rows, *shape)


def _is_readable(delta: TensorMap) -> bool:
    """Return whether reading a tensor of `delta`, or its two terms, takes neither time nor memory."""
    if isinstance(delta, TaskVector):
        return is_resident(delta.tuned) and is_resident(delta.base)
    return is_resident(delta)


def _operand(delta: TensorMap, name: str, scale: float) -> Operand:
    if isinstance(delta, TaskVector):
        return Operand(delta.tuned[name], delta.base[name], scale, must_be_finite=True)
    tensor = delta[name]
    require_floats(tensor)
    return Operand(tensor, None, scale)


def _require_one_shape(name: str, tensors: Sequence[Tensor]) -> None:
    for index, tensor in enumerate(tensors):
        if tensor.shape != tensors[0].shape:
            raise _other_shape(name, index, tensor.shape, tensors[0].shape)


def _other_shape(name: str, index: int, found: torch.Size, expected: torch.Size) -> ModelMismatch:
    return ModelMismatch(f"{name} has shape {list(found)} in task vector {index}, not {list(expected)}")


def _not_finite(name: str) -> InputError:
    return InputError(
        f"{name} comes out with NaN or infinite values",
        hint="the weights or a parameter of the method are too large for these models",
    )
