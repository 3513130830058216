"""Randomness that replays: every seed is derived from names, every mask from a counter-based generator.

A seed is a 64-bit integer derived by SHA-256 from what it is for, so that two parties who know the names
know the seed. Masks come from the raw output of a counter-based generator (`fedmerge.philox`).
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

from fedmerge.philox import draws


def derive_seed(*parts: str | int) -> int:
    """Return the 64-bit seed for the given `parts`, for example `derive_seed(nonce, node_id, "encoder.weight")`.

    Parts are length-prefixed before hashing, so ("ab", "c") and ("a", "bc") differ.
    """
    digest = hashlib.sha256(b"fedmerge.seed.v1")
    for part in parts:
        data = str(part).encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return int.from_bytes(digest.digest()[:8], "little")


def bernoulli_mask(seed: int, num_elements: int, density: float) -> Tensor:
    """Return a bool tensor of `num_elements`, each True with probability `density`, determined by `seed`.

    Element i depends only on `seed` and i. Probabilities are exact to 2^-32. `density >= 1` keeps everything,
    `density <= 0` nothing.
    """
    if density >= 1.0:
        return torch.ones(num_elements, dtype=torch.bool)
    return torch.from_numpy(draws(seed, 0, num_elements) < mask_threshold(density))


def mask_threshold(density: float) -> np.uint32:
    """Return the 32-bit draw below which an element is kept in a mask of `density` under 1."""
    return np.uint32(min(max(0, round(density * 2**32)), 2**32 - 1))


def uniform(seed: int, num_elements: int) -> Tensor:
    """Return `num_elements` numbers in [0, 1), multiples of 2^-32 in fp64, determined by `seed`.

    Element i depends only on `seed` and i. These are the draws behind `bernoulli_mask`, for masks in which every
    element has a probability of its own: it is kept where its draw is below that.
    """
    return torch.from_numpy(draws(seed, 0, num_elements) * 2.0**-32)
