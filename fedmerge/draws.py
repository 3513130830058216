"""What is drawn for a seed: masks, and the numbers behind them, from a counter-based generator (`fedmerge.philox`)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fedmerge.philox import draws


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
