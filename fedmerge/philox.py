"""Philox-4x64-10, compiled: the random words behind every mask, any stretch of a stream at any time.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011. The stream of a seed is
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
    """Return the 32-bit words `start` to `start + num_draws` of the stream of a 64-bit `seed`.

    They lie in `out` if it is given, which then has room for `room_for(num_draws)`.
    """
    first, offset = divmod(start, DRAWS_PER_COUNTER)
    num_words = -(-(offset + num_draws) // DRAWS_PER_COUNTER) * DRAWS_PER_COUNTER
    out = np.empty(num_words, dtype=np.uint32) if out is None else out[:num_words]
    _fill(np.uint64(seed & (2**64 - 1)), np.uint64(first), out.view(np.uint64))
    return out[offset : offset + num_draws]


def room_for(num_draws: int) -> int:
    """Return how many words a buffer for `num_draws` needs, since counters give eight at a time."""
    return num_draws + 2 * DRAWS_PER_COUNTER


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
