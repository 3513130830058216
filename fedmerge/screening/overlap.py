"""How much of one task vector is in another: which entries they share, and with which sign."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from fedmerge.tensors import TensorMap

# Counts over so many entries are exact in fp32, so that no order of additions shows.
BLOCK_ELEMENTS = 1 << 16


def overlaps(deltas: Sequence[TensorMap]) -> npt.NDArray[np.float64]:
    """Return, for each pair of task vectors, the share of entries in which they agree: (n, n) fp64, from 0 to 1.

    Two agree in an entry that neither has zero, with one sign; the share is of the entries of the sparser one. So it
    falls with the indices that they do not have in common as well as with signs that differ, and neither scaling nor
    noise that flips few signs hides a copy. Independent dense ones come to one half. Tensors are read one after the
    other, in the order of names; the counts are whole numbers, the same on every processor.
    """
    signed = np.zeros((len(deltas), len(deltas)))
    common = np.zeros_like(signed)
    for name in sorted(deltas[0]):
        rows = [delta[name].reshape(-1) for delta in deltas]
        for start in range(0, len(rows[0]), BLOCK_ELEMENTS):
            block = torch.stack([row[start : start + BLOCK_ELEMENTS].sign().to(torch.float32) for row in rows]).numpy()
            present = np.abs(block)
            signed += block @ block.T
            common += present @ present.T
    sizes = np.diagonal(common)
    return (common + signed) / 2 / np.maximum(np.minimum(sizes[:, None], sizes[None, :]), 1)


def are_equal(one: TensorMap, other: TensorMap) -> bool:
    """Return whether two task vectors with the same names are the same, entry for entry."""
    return all(torch.equal(one[name], other[name]) for name in sorted(one))
