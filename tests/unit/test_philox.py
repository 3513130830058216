"""The compiled generator gives numpy's stream, from any place on."""

import numpy as np
import pytest

from fedmerge.philox import draws

SEEDS = [0, 1, 2**63, 2**64 - 1]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("num_draws", [0, 1, 7, 8, 1001])
def test_is_the_stream_of_numpy(seed: int, num_draws: int) -> None:
    words = np.random.Philox(key=seed).random_raw(600).view(np.uint32)
    assert np.array_equal(draws(seed, 0, num_draws), words[:num_draws])
    assert np.array_equal(draws(seed, 160, num_draws), words[160 : 160 + num_draws])


def test_fills_what_it_is_given() -> None:
    buffer = np.empty(64, dtype=np.uint32)
    found = draws(3, 8, 50, out=buffer)
    assert np.shares_memory(found, buffer)
    assert np.array_equal(found, draws(3, 0, 58)[8:])
