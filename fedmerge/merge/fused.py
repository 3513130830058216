"""Methods in compiled form: the same bits as their torch forms, in few passes and little memory.

What the element-wise methods do to each task vector, *thinning* it, concerns one entry and a few numbers found
beforehand (a threshold, a ratio, the seed of a mask); what follows, *folding* or *electing*, concerns the entries of
one column. Methods that go by angles need the inner products beforehand. So a parameter is merged block of columns by
block of columns, whatever its size.

FUSED[name](rows, weights, seed=..., **params) makes the passes that find those numbers and returns what merges a block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Concatenate, TypeAlias

import numpy as np
import torch

from fedmerge.draws import mask_threshold
from fedmerge.merge import kernels
from fedmerge.merge.gram import MakeAngles, no_products
from fedmerge.merge.kernels import LOW_BITS, NUM_HIGH, NUM_LOW
from fedmerge.merge.methods import BY_ANGLES
from fedmerge.merge.methods.average import fedavg_coefficients, task_arithmetic_coefficients
from fedmerge.merge.methods.della import probabilities_by_rank
from fedmerge.merge.ranking import Cut, count, num_middle
from fedmerge.merge.rows import Array, Rows, fp32
from fedmerge.merge.stack import BLOCK_ELEMENTS
from fedmerge.philox import draws, room_for
from fedmerge.seeds import derive_seed

# merge_block(start, stop, out) sets `out`, float32, to the merged columns from `start` to `stop`.
MergeBlock: TypeAlias = Callable[[int, int, Array], None]

# thin(index, start, values) works in place on `values`, the entries of one row from column `start` on.
Thin: TypeAlias = Callable[[int, int, Array], None]

FusedMethod: TypeAlias = Callable[Concatenate[Rows, list[float], ...], MergeBlock]


def fedavg(rows: Rows, weights: list[float], *, seed: int) -> MergeBlock:
    """Compile `average.fedavg`."""
    return _fold(rows, fedavg_coefficients(weights))


def task_arithmetic(rows: Rows, weights: list[float], *, seed: int, **params: Any) -> MergeBlock:
    """Compile `average.task_arithmetic`."""
    return _fold(rows, task_arithmetic_coefficients(weights, **params))


def ties(rows: Rows, weights: list[float], *, seed: int, density: float, trim: str, **rules: Any) -> MergeBlock:
    """Compile `ties.ties`."""
    authors, num_elements = trim == "authors", rows.num_elements
    k = math.floor(density * num_elements) + 1 if authors else count(density, num_elements)
    cuts = [largest(rows, index, [k], ties=authors)[0] for index in range(rows.num_rows)]

    def thin(index: int, start: int, values: Array) -> None:
        _cut(kernels.keep_largest, values, cuts[index], start)

    return _elect(rows, weights, thin, **rules)


def breadcrumbs(
    rows: Rows, weights: list[float], *, seed: int, density: float, outliers: float, **params: Any
) -> MergeBlock:
    """Compile `breadcrumbs.breadcrumbs`."""
    return _fold(rows, task_arithmetic_coefficients(weights, **params), _keep_middle(rows, density, outliers))


def breadcrumbs_ties(
    rows: Rows, weights: list[float], *, seed: int, density: float, outliers: float, **rules: Any
) -> MergeBlock:
    """Compile `breadcrumbs.breadcrumbs_ties`."""
    return _elect(rows, weights, _keep_middle(rows, density, outliers), **rules)


def dare_linear(
    rows: Rows, weights: list[float], *, seed: int, density: float, rescale: str, **params: Any
) -> MergeBlock:
    """Compile `dare.dare_linear`."""
    return _fold(rows, task_arithmetic_coefficients(weights, **params), _drop(rows, seed, density, rescale))


def dare_ties(rows: Rows, weights: list[float], *, seed: int, density: float, rescale: str, **rules: Any) -> MergeBlock:
    """Compile `dare.dare_ties`."""
    return _elect(rows, weights, _drop(rows, seed, density, rescale), **rules)


def della_linear(
    rows: Rows, weights: list[float], *, seed: int, density: float, epsilon: float, rescale: str, **params: Any
) -> MergeBlock:
    """Compile `della.della_linear`."""
    thin = _drop_by_rank(rows, seed, density, epsilon, rescale)
    return _fold(rows, task_arithmetic_coefficients(weights, **params), thin)


def della(
    rows: Rows, weights: list[float], *, seed: int, density: float, epsilon: float, rescale: str, **rules: Any
) -> MergeBlock:
    """Compile `della.della`."""
    return _elect(rows, weights, _drop_by_rank(rows, seed, density, epsilon, rescale), **rules)


def by_angles(make: MakeAngles, rows: Rows, weights: list[float], *, seed: int, **params: Any) -> MergeBlock:
    """Compile `gram.merge_by_angles`. With space="weights" the last of the rows is the base."""
    lanes = no_products(1, rows.num_rows)
    for start, stop in rows.blocks():
        kernels.add_products(rows.read(start, stop)[:, None], lanes)
    products = torch.empty(lanes.shape[:3], dtype=torch.float64)
    kernels.sum_lanes(lanes, products.numpy())
    coefficients = make(weights, **params).coefficients(products, torch.float32)[0].numpy()

    def merge_block(start: int, stop: int, out: Array) -> None:
        kernels.combine(rows.read(start, stop), coefficients, out)

    return merge_block


FUSED: dict[str, FusedMethod] = {
    "fedavg": fedavg,
    "linear": fedavg,
    "task_arithmetic": task_arithmetic,
    "ties": ties,
    "dare_linear": dare_linear,
    "dare_ties": dare_ties,
    "della": della,
    "della_linear": della_linear,
    "breadcrumbs": breadcrumbs,
    "breadcrumbs_ties": breadcrumbs_ties,
    **{name: partial(by_angles, make) for name, make in BY_ANGLES.items()},
}

# Methods that rank the entries of a line: their blocks are whole lines.
BY_LINE = frozenset({"della", "della_linear"})


def is_compiled(method: str, params: Mapping[str, Any]) -> bool:
    """Return whether `method` has a compiled form with these `params`: not where parts of a tensor have own angles."""
    return method in FUSED and params.get("axis", "tensor") == "tensor" and not params.get("filter_wise", False)


# --- folding and electing


def _fold(rows: Rows, coefficients: Sequence[float], thin: Thin | None = None) -> MergeBlock:
    """Merge to the sum of coefficient * row, added in the rows' order."""
    factors = [fp32(coefficient) for coefficient in coefficients]

    def merge_block(start: int, stop: int, out: Array) -> None:
        if thin is None:
            rows.fold(factors, start, stop, out=out)
            return
        for index, factor in enumerate(factors):
            values = rows.read_row(index, start, stop)
            thin(index, start, values)
            kernels.add_scaled(values, None, factor, index == 0, out)

    return merge_block


def _elect(
    rows: Rows,
    weights: list[float],
    thin: Thin,
    *,
    lambda_: float,
    normalize: bool,
    election: str,
    zero_sum: str,
    normalizer: str,
    aggregation: str,
) -> MergeBlock:
    """Merge to the disjoint mean or sum of those that agree with the elected sign."""
    weight, code = np.array(weights, dtype=np.float32), kernels.ELECTIONS[election]

    def thinned(start: int, stop: int) -> Array:
        stack = rows.read(start, stop)
        for index, values in enumerate(stack):
            thin(index, start, values)
        return stack

    draw = 1.0
    if zero_sum == "majority":
        votes = sum(kernels.count_votes(thinned(start, stop), weight, code) for start, stop in rows.blocks())
        draw = -1.0 if votes < 0 else 1.0

    def merge_block(start: int, stop: int, out: Array) -> None:
        kernels.elect_and_merge(
            thinned(start, stop),
            weight,
            code,
            np.float32(draw),
            normalize,
            normalizer == "weights",
            aggregation == "max",
            fp32(lambda_),
            out,
        )

    return merge_block


# --- thinning


def largest(rows: Rows, index: int, num_kept: Sequence[int], *, ties: bool = False) -> list[Cut]:
    """Return for each of `num_kept` the cut that `ranking.largest` finds through the row at `index`.

    Three passes at most, and no copy of the row: magnitudes are counted by their upper bits, those that share the
    threshold's by their lower bits, and only where the cut goes through equal magnitudes is the last one looked for.
    """
    num_elements = rows.num_elements
    inside = [k for k in num_kept if 0 < k < num_elements]
    high = np.zeros(NUM_HIGH, dtype=np.int64)
    if inside:
        for start, stop in rows.blocks():
            kernels.count_high(rows.read_row(index, start, stop), high)
    cuts = []
    for k in num_kept:
        if k not in inside:
            limit = math.inf if k <= 0 else 0.0
            cuts.append(Cut(limit, limit, num_elements))
            continue
        upper, above = kernels.find_from_above(high, k)
        low = np.zeros(NUM_LOW, dtype=np.int64)
        for start, stop in rows.blocks():
            kernels.count_low(rows.read_row(index, start, stop), upper, low)
        lower, above_here = kernels.find_from_above(low, k - above)
        threshold = np.array([upper << LOW_BITS | lower], dtype=np.uint32).view(np.float32)[0]
        num_tied = k - above - above_here
        split = num_elements
        if not ties and threshold > 0 and num_tied < low[lower]:
            split = _end_of_ties(rows, index, threshold, num_tied)
        cuts.append(Cut(np.nextafter(threshold, np.float32(0)).item(), threshold.item(), split))
    return cuts


def _end_of_ties(rows: Rows, index: int, threshold: Any, num_tied: int) -> int:
    """Return the index behind the `num_tied`-th entry of the row whose magnitude is `threshold`."""
    for start, stop in rows.blocks():
        place, found = kernels.find_tied(rows.read_row(index, start, stop), threshold, num_tied)
        if place >= 0:
            return start + place + 1
        num_tied -= found
    raise AssertionError("counted more ties than there are")


def _cut(function: Callable[[Array, Any, Any, int], None], values: Array, cut: Cut, start: int) -> None:
    function(values, np.float32(cut.low), np.float32(cut.high), max(0, cut.split - start))


def _keep_middle(rows: Rows, density: float, outliers: float) -> Thin:
    """Keep what `breadcrumbs.middle` keeps."""
    num_upper, num_top = num_middle(rows.num_elements, density, outliers)
    cuts = [largest(rows, index, [num_upper, num_top]) for index in range(rows.num_rows)]

    def thin(index: int, start: int, values: Array) -> None:
        upper, top = cuts[index]
        _cut(kernels.keep_largest, values, upper, start)
        _cut(kernels.drop_largest, values, top, start)

    return thin


def _drop(rows: Rows, seed: int, density: float, rescale: str) -> Thin:
    """Drop as `dare.drop` does."""
    seeds = [derive_seed(seed, index) for index in range(rows.num_rows)]
    words = np.empty(room_for(rows.num_columns), dtype=np.uint32)

    def drop(index: int, start: int, values: Array) -> None:
        if density < 1:
            kernels.drop(values, draws(seeds[index], start, values.size, out=words), mask_threshold(density))

    if rescale == "paper":
        return _scaled(drop, [1 / density] * rows.num_rows)
    return _scaled(drop, _l1_ratios(rows, drop)) if rescale == "l1" else drop


def _drop_by_rank(rows: Rows, seed: int, density: float, epsilon: float, rescale: str) -> Thin:
    """Drop as `della.sample` does."""
    num_lines = rows.shape[0] if len(rows.shape) > 1 else 1
    num_columns = max(1, rows.num_elements // max(1, num_lines))
    probabilities = probabilities_by_rank(num_columns, density=density, epsilon=epsilon).numpy()
    factors = 1 / probabilities if rescale == "paper" else np.ones_like(probabilities)
    seeds = [derive_seed(seed, index) for index in range(rows.num_rows)]
    words = np.empty(room_for(rows.num_columns), dtype=np.uint32)
    scratch, counts = np.empty((2, num_columns), dtype=np.uint64), np.empty((4, 256), dtype=np.int64)

    def drop(index: int, start: int, values: Array) -> None:
        drawn = draws(seeds[index], start, values.size, out=words)
        kernels.drop_by_rank(values, drawn, probabilities, factors, scratch, counts)

    return _scaled(drop, _l1_ratios(rows, drop)) if rescale == "l1" else drop


def _scaled(thin: Thin, factors: Sequence[float]) -> Thin:
    def thin_and_scale(index: int, start: int, values: Array) -> None:
        thin(index, start, values)
        values *= fp32(factors[index])

    return thin_and_scale


def _l1_ratios(rows: Rows, thin: Thin) -> list[float]:
    """Return for each row its sum of magnitudes over the one that `thin` leaves, 1 where it leaves nothing.

    Added as `stack.l1_norm` does: within blocks of a fixed length by numpy, whatever the blocks of these rows.
    """
    ratios = []
    for index in range(rows.num_rows):
        before, after = _Sum(), _Sum()
        for start, stop in rows.blocks():
            values = rows.read_row(index, start, stop)
            before.add(values)
            thin(index, start, values)
            after.add(values)
        kept = after.total()
        ratios.append(before.total() / kept if kept > 0 else 1.0)
    return ratios


class _Sum:
    """The sum of magnitudes of values that come piece by piece, in fp64."""

    def __init__(self) -> None:
        self._held = np.empty(BLOCK_ELEMENTS, dtype=np.float64)
        self._num_held = 0
        self._sums: list[float] = []

    def add(self, values: Array) -> None:
        while values.size:
            part, values = np.split(values, [BLOCK_ELEMENTS - self._num_held])
            np.abs(part, out=self._held[self._num_held : self._num_held + part.size], dtype=np.float64)
            self._num_held += part.size
            if self._num_held == BLOCK_ELEMENTS:
                self._flush()

    def total(self) -> float:
        self._flush()
        return math.fsum(self._sums)

    def _flush(self) -> None:
        self._sums.append(float(self._held[: self._num_held].sum()))
        self._num_held = 0
