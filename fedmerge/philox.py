"""Philox-4x64-10, compiled: the random words behind every mask, any stretch of a stream at any time.

J. Salmon, M. Moraes, R. Dror and D. Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011. The stream of a seed is
the one of `numpy.random.Philox(key=seed).random_raw()`, which numpy keeps stable.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fedmerge.jit import kernel, multiply_high

M0, M1 = np.uint64(0xD2E7470EE14C6C93), np.uint64(0xCA5A826395121157)
W0, W1 = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBB67AE8584CAA73B)
NUM_ROUNDS = 10

# A counter gives four words of 64 bits, that is so many 32-bit draws.
DRAWS_PER_COUNTER = 8


def draws(seed: int, start: int, num_draws: int, *, out: npt.NDArray[np.uint32] | None = None) -> npt.NDArray[Any]:
    """Return the 32-bit words `start` to `start + num_draws` of the stream of a 64-bit `seed`, in `out` if it is given.

    `out` holds at least `num_draws` rounded up to a multiple of 8; `start` is a multiple of 8.
    """
    num_counters = -(-num_draws // DRAWS_PER_COUNTER)
    if out is None:
        out = np.empty(num_counters * DRAWS_PER_COUNTER, dtype=np.uint32)
    words = out[: num_counters * DRAWS_PER_COUNTER].view(np.uint64)
    _fill(np.uint64(seed & (2**64 - 1)), np.uint64(start // DRAWS_PER_COUNTER), words)
    return out[:num_draws]


@kernel
def _fill(key: np.uint64, start: np.uint64, words: npt.NDArray[np.uint64]) -> None:
    """Set `words` to what the counters from `start` on give; numpy counts up before it draws, so the first is 1."""
    for i in range(words.size // 4):
        a, b, c, d = start + np.uint64(i) + np.uint64(1), np.uint64(0), np.uint64(0), np.uint64(0)
        key0, key1 = key, np.uint64(0)
        for _ in range(NUM_ROUNDS):
            high0, high1 = multiply_high(M0, a), multiply_high(M1, c)
            a, b, c, d = high1 ^ b ^ key0, M1 * c, high0 ^ d ^ key1, M0 * a
            key0, key1 = key0 + W0, key1 + W1
        words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3] = a, b, c, d
