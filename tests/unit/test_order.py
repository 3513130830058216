"""The compiled order statistics against numpy's, and the network against the zero-one principle."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedmerge.merge.order import mean_of_middle


def expected(rows: np.ndarray, num_trimmed: int) -> np.ndarray:
    ordered = np.sort(rows, axis=0)[num_trimmed : len(rows) - num_trimmed]
    total = ordered[0].copy()
    for values in ordered[1:]:
        total += values
    return total / np.float32(len(ordered))


@pytest.mark.parametrize("num_rows", range(1, 13))
def test_zeros_and_ones_are_sorted_in_every_arrangement(num_rows: int) -> None:
    # Knuth, TAOCP 3, 5.3.4, theorem Z: a network that sorts these sorts everything.
    columns = np.array(list(itertools.product([0.0, 1.0], repeat=num_rows)), dtype=np.float32).T.copy()
    for num_trimmed in range((num_rows - 1) // 2 + 1):
        assert np.array_equal(mean_of_middle(columns, num_trimmed), expected(columns, num_trimmed))


@given(st.data(), st.integers(1, 40), st.integers(1, 3000))
def test_the_mean_of_the_middle_has_numpys_bits(data: st.DataObject, num_rows: int, num_columns: int) -> None:
    rows = data.draw(arrays(np.float32, (num_rows, num_columns), elements=st.floats(-(2.0**90), 2.0**90, width=32)))
    num_trimmed = data.draw(st.integers(0, (num_rows - 1) // 2))
    found = mean_of_middle(rows, num_trimmed)
    assert np.array_equal(found, expected(rows, num_trimmed))
    shuffled = rows[data.draw(st.permutations(range(num_rows)))]
    assert mean_of_middle(shuffled, num_trimmed).tobytes() == found.tobytes()


def test_what_is_not_a_number_or_infinite_is_at_the_ends() -> None:
    wild = np.array([[1, 2, 3, np.nan, np.inf], [1, 2, 3, -np.nan, -np.inf]], dtype=np.float32)
    assert mean_of_middle(wild.T.copy(), 2).tolist() == [3.0, 2.0]
    assert np.isnan(mean_of_middle(wild.T.copy(), 0)).tolist() == [True, True]
