"""Between steps 9 and 10: robust rules, which hold a round against nodes that lie, by the geometry of whole deltas.

Every rule here needs the inner products of the task vectors alone, and answers with a *mixing*: which combinations of
them the merge gets in their place. So a rule costs one pass over the deltas, rules chain, and any merge method may
follow; `spectral`, then `trimmed_mean` is the chain to beat.

    n  task vectors      f  how many of them may be bad      m  task vectors after a rule
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from threading import Lock
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from torch import Tensor

from fedmerge.delta.task_vector import working_dtype
from fedmerge.errors import ConfigError, did_you_mean
from fedmerge.merge.gram import inner_products
from fedmerge.tensors import TensorMap

Matrix: TypeAlias = npt.NDArray[np.float64]


class Rule(NamedTuple):
    """A robust rule: `mixing(gram, f)` returns the mixing (m, n) for inner products (n, n), both fp64.

    `min_nodes(f)` is the least n for which the rule's guarantee holds, and below which it is refused. A rule that
    `needs_root` gets the inner products with a root of trust as well, (n + 1, n + 1), its own last.
    """

    mixing: Callable[[Matrix, int], Matrix]
    min_nodes: Callable[[int], int]
    needs_root: bool = False


def gram_of(deltas: Sequence[TensorMap]) -> Matrix:
    """Return the inner products (n, n) in fp64 of whole task vectors, read tensor by tensor in the order of names."""
    total = np.zeros((len(deltas), len(deltas)))
    for name in sorted(deltas[0]):
        rows = [delta[name].reshape(1, -1) for delta in deltas]
        total += inner_products(rows)[0].numpy()
    return total


def squared_distances(gram: Matrix) -> Matrix:
    """Return the squared distances (n, n) that inner products stand for."""
    squares = np.diagonal(gram)
    return np.maximum(squares[:, None] + squares[None, :] - 2 * gram, 0.0)


def arc(gram: Matrix, f: int) -> Matrix:
    """Clip the floor(2 (f / n) (n - f)) longest to the length of the next one.

    Adaptive robust clipping, arXiv 2405.14432.
    """
    n = len(gram)
    lengths = np.sqrt(np.diagonal(gram))
    num_clipped = 2 * f * (n - f) // n
    limit = np.sort(lengths)[n - num_clipped - 1]
    return np.diag(np.where(lengths > limit, limit / np.where(lengths > 0, lengths, 1.0), 1.0))


def nnm(gram: Matrix, f: int) -> Matrix:
    """Replace each by the mean of its n - f nearest, itself included. Nearest-neighbour mixing, arXiv 2302.01772."""
    n = len(gram)
    nearest = np.argsort(squared_distances(gram), axis=1, kind="stable")[:, : n - f]
    mixing = np.zeros((n, n))
    np.put_along_axis(mixing, nearest, 1.0 / (n - f), axis=1)
    return mixing


def krum(gram: Matrix, f: int) -> Matrix:
    """Keep the one whose n - f - 2 nearest others are nearest. Krum, arXiv 1703.02757."""
    return _selection(gram, [_krum_order(gram, f)[0]])


def multi_krum(gram: Matrix, f: int) -> Matrix:
    """Keep the n - f with the lowest scores of `krum`. Multi-Krum, arXiv 1703.02757."""
    return _selection(gram, sorted(_krum_order(gram, f)[: len(gram) - f]))


def bulyan(gram: Matrix, f: int) -> Matrix:
    """Keep n - 2 f, chosen by `krum` one after the other from those left. Bulyan's first half, arXiv 1802.07927.

    Its second half is the merge method `mean_around_median`, with `trimmed` f / (n - 2 f).
    """
    left = list(range(len(gram)))
    chosen: list[int] = []
    while len(chosen) < len(gram) - 2 * f:
        best = _krum_order(gram[np.ix_(left, left)], f)[0]
        chosen.append(left.pop(best))
    return _selection(gram, sorted(chosen))


def spectral(gram: Matrix, f: int) -> Matrix:
    """Leave out the f that stick out most along the directions in which all differ most, where those who pull together
    show.

    The quantum entropy score of differences z from the mean, z exp(4 C / |C|) z where C is their covariance: arXiv
    1906.11366. Short ones are scored at the median length, as next to zero they would be near everybody; those that
    are kept mix as they are.
    """
    n = len(gram)
    lengths = np.sqrt(np.diagonal(gram))
    raised = np.maximum(1.0, np.median(lengths) / np.where(lengths > 0, lengths, np.inf))
    center = np.eye(n) - 1.0 / n
    spread, directions = np.linalg.eigh(center @ (raised[:, None] * gram * raised) @ center)
    spread = np.maximum(spread / max(spread[-1], np.finfo(np.float64).tiny), 0.0)
    # Rounded, so that of two that are the same the first one stays.
    scores = (directions**2 @ (spread * np.exp(4 * spread))).round(9)
    return _selection(gram, sorted(np.argsort(scores, kind="stable")[: n - f]))


def centered_clip(gram: Matrix, f: int) -> Matrix:
    """Combine all into v, by v <- v + mean(clip(x - v)) five times from 0. Centered clipping, arXiv 2012.10333.

    Differences that are longer than their median are clipped to it.
    """
    n = len(gram)
    center = np.zeros(n)
    for _ in range(5):
        differences = np.eye(n) - center
        lengths = np.sqrt(np.maximum(np.einsum("ij,jk,ik->i", differences, gram, differences), 0.0))
        radius = float(np.median(lengths))
        scales = np.where(lengths > radius, radius / np.where(lengths > 0, lengths, 1.0), 1.0)
        center = center + (scales[:, None] * differences).mean(axis=0)
    return center[None, :]


def geometric_median(gram: Matrix, f: int) -> Matrix:
    """Combine all into the point with the least sum of distances, by 100 Weiszfeld steps. RFA, arXiv 1912.13445."""
    n = len(gram)
    squares = np.diagonal(gram)
    nearest = 1e-6 * np.sqrt(squares.max())
    point = np.full(n, 1.0 / n)
    if nearest == 0:
        return point[None, :]
    for _ in range(100):
        toward = gram @ point
        distances = np.sqrt(np.maximum(squares - 2 * toward + point @ toward, 0.0))
        pull = 1.0 / np.maximum(distances, nearest)
        point = pull / pull.sum()
    return point[None, :]


def fltrust(gram: Matrix, f: int) -> Matrix:
    """Combine all, at the root's length and weighed by how far they point its way, ReLU(cosine). FLTrust, arXiv
    2012.13995.

    Where none does, the answer is zero. It holds against any number of bad ones, if the root is good.
    """
    lengths = np.sqrt(np.diagonal(gram))
    others, root = lengths[:-1], lengths[-1]
    scale = np.where(others > 0, 1.0 / np.where(others > 0, others, 1.0), 0.0)
    toward = np.maximum(gram[:-1, -1] * scale, 0.0)
    trust = toward / toward.sum() if toward.any() else toward
    combined: Matrix = (trust * scale * root)[None, :]
    return combined


RULES: dict[str, Rule] = {
    "arc": Rule(arc, lambda f: 2 * f + 1),
    "nnm": Rule(nnm, lambda f: 2 * f + 1),
    # So many that f of those left are a minority for the rules that follow, even if all f that went were good.
    "spectral": Rule(spectral, lambda f: 3 * f + 1),
    "krum": Rule(krum, lambda f: 2 * f + 3),
    "multi_krum": Rule(multi_krum, lambda f: 2 * f + 3),
    "bulyan": Rule(bulyan, lambda f: 4 * f + 3),
    "centered_clip": Rule(centered_clip, lambda f: 2 * f + 1),
    "geometric_median": Rule(geometric_median, lambda f: 2 * f + 1),
    "fltrust": Rule(fltrust, lambda f: 1, needs_root=True),
}


def require_rules(names: Sequence[str], num_bad: int, num_nodes: int, *, has_root: bool) -> None:
    """Raise `ConfigError` unless all rules exist and hold against `num_bad` of `num_nodes` nodes beside the root."""
    for name in names:
        if name not in RULES:
            raise ConfigError(
                f"there is no robust rule {name!r}{did_you_mean(name, RULES)}", hint=f"one of {', '.join(RULES)}"
            )
        if RULES[name].needs_root and not has_root:
            raise ConfigError(
                f"{name} needs a root of trust", hint="set screen.root to the name of a node with data of your own"
            )
        least = RULES[name].min_nodes(num_bad)
        if num_nodes < least:
            raise ConfigError(
                f"{name} against {num_bad} bad nodes needs at least {least} nodes, not {num_nodes}",
                hint="lower max_bad, raise min_nodes, or take a rule that needs fewer nodes",
            )


def mixing_of(gram: Matrix, names: Sequence[str], num_bad: int, *, has_root: bool = False) -> Matrix:
    """Return the mixing (m, n) of the rules `names`, one after the other, for inner products (n, n).

    With a root of trust they are (n + 1, n + 1), its own last; it is in no combination.
    """
    num_deltas = len(gram) - has_root
    mixing = np.eye(num_deltas)
    for name in names:
        rule = RULES[name]
        seen = mixing @ gram[:num_deltas, :num_deltas] @ mixing.T
        if rule.needs_root:
            toward = mixing @ gram[:num_deltas, -1]
            seen = np.block([[seen, toward[:, None]], [toward[None, :], gram[-1:, -1:]]])
        # Rounded, so that last bits in which processors differ do not reach what is published.
        mixing = rule.mixing(seen, num_bad).astype(np.float32).astype(np.float64) @ mixing
    return mixing


class Inputs(NamedTuple):
    """What a merge gets: task vectors, their weights, which sum to 1, and factors to multiply them by."""

    deltas: Sequence[TensorMap]
    weights: Sequence[float]
    scales: Sequence[float]


def harden(inputs: Inputs, rules: Sequence[str], num_bad: int, *, root: TensorMap | None = None) -> Inputs:
    """Return `inputs` after the robust `rules`, one after the other, against `num_bad` bad ones; as they are without.

    `root` is the task vector of a root of trust. Raises `ConfigError` when there are too few for a rule to hold, or
    there is no root for one that needs it.
    """
    if not rules:
        return inputs
    require_rules(rules, num_bad, len(inputs.deltas), has_root=root is not None)
    known = [] if root is None else [root]
    scales = np.asarray([*inputs.scales, *(1.0 for _ in known)], dtype=np.float64)
    gram = scales[:, None] * gram_of([*inputs.deltas, *known]) * scales
    mixing = mixing_of(gram, rules, num_bad, has_root=root is not None)
    weights = mixed_weights(inputs.weights, mixing)
    return Inputs(mix(inputs.deltas, mixing * scales[: len(inputs.deltas)]), weights, [1.0] * len(mixing))


def mix(deltas: Sequence[TensorMap], mixing: Matrix) -> list[TensorMap]:
    """Return the m combinations of n `deltas` that `mixing` (m, n) asks for, in fp32 (or fp64), computed when read.

    All combinations of a tensor share one reading of the deltas, if they are asked for one name after the other.
    """
    source = _Source(deltas, len(mixing))
    return [_Mixed(source, row) for row in mixing]


def mixed_weights(weights: Sequence[float], mixing: Matrix) -> list[float]:
    """Return the weight of each combination, the mean weight of what is in it; they sum to 1."""
    parts = np.abs(mixing)
    totals = parts.sum(axis=1, keepdims=True)
    # A combination of nothing, where a rule trusts nobody, is zero whatever it weighs.
    mixed = np.where(totals > 0, parts, 1.0) / np.where(totals > 0, totals, len(weights)) @ np.asarray(weights)
    return [float(weight) for weight in mixed / mixed.sum()]


class _Source:
    """The tensors of all deltas under one name, kept until each combination was made of them."""

    def __init__(self, deltas: Sequence[TensorMap], num_readers: int) -> None:
        self.deltas = deltas
        self._num_readers = num_readers
        self._kept: dict[str, tuple[list[Tensor], int]] = {}
        self._lock = Lock()

    def read(self, name: str) -> list[Tensor]:
        with self._lock:
            if name not in self._kept:
                self._kept[name] = ([delta[name] for delta in self.deltas], self._num_readers)
            tensors, num_left = self._kept.pop(name)
            if num_left > 1:
                self._kept[name] = (tensors, num_left - 1)
            return tensors


class _Mixed(Mapping[str, Tensor]):
    def __init__(self, source: _Source, row: Matrix) -> None:
        self._source = source
        self._row = [float(share) for share in row]

    def __getitem__(self, name: str) -> Tensor:
        tensors = self._source.read(name)
        total = tensors[0].new_zeros(tensors[0].shape, dtype=working_dtype(*tensors))
        for tensor, share in zip(tensors, self._row, strict=True):
            if share:
                total += tensor.to(total.dtype) * share
        return total

    def __iter__(self) -> Iterator[str]:
        return iter(self._source.deltas[0])

    def __len__(self) -> int:
        return len(self._source.deltas[0])


def _krum_order(gram: Matrix, f: int) -> list[int]:
    """Return all by the sum of squared distances to their n - f - 2 nearest others, or to the nearest, least first.

    Two that are each other's nearest may tie: then the distances to all decide.
    """
    others = np.sort(squared_distances(gram) + np.diag(np.full(len(gram), np.inf)), axis=1)[:, :-1]
    scores = others[:, : max(1, len(gram) - f - 2)].sum(axis=1)
    return [int(index) for index in np.lexsort((others.sum(axis=1), scores))]


def _selection(gram: Matrix, kept: list[int]) -> Matrix:
    return np.eye(len(gram))[kept]
