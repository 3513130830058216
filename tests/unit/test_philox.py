"""The compiled generator gives numpy's stream, from any place on."""

import numpy as np
import pytest

from fedmerge.philox import draws, room_for

SEEDS = [0, 1, 2**63, 2**64 - 1]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("num_draws", [0, 1, 7, 8, 1001])
def test_is_the_stream_of_numpy(seed: int, num_draws: int) -> None:
    words = np.random.Philox(key=seed).random_raw(600).view(np.uint32)
    assert np.array_equal(draws(seed, 0, num_draws), words[:num_draws])
    for start in (160, 163):
        assert np.array_equal(draws(seed, start, num_draws), words[start : start + num_draws])


def test_fills_what_it_is_given() -> None:
    buffer = np.empty(room_for(50), dtype=np.uint32)
    found = draws(3, 15, 50, out=buffer)
    assert np.shares_memory(found, buffer)
    assert np.array_equal(found, draws(3, 0, 65)[15:])
