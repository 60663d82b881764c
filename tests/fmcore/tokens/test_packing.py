"""Packing: every record once, no bin too full, the same bins every time."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fmcore.tokens.packing import INDEX_TYPE, pack_best_fit, write_plan

CAPACITY = 20
LENGTHS = st.lists(st.integers(1, CAPACITY), max_size=60).map(lambda x: np.array(x, dtype=np.int64))


@settings(deadline=None)
@given(lengths=LENGTHS)
def test_every_record_once_and_no_bin_too_full(lengths: np.ndarray) -> None:
    bins = pack_best_fit(lengths, CAPACITY)
    assert sorted(index for records in bins for index in records) == list(range(len(lengths)))
    assert all(0 < sum(lengths[records]) <= CAPACITY for records in bins)
    assert bins == pack_best_fit(lengths.copy(), CAPACITY)


@settings(deadline=None)
@given(lengths=LENGTHS)
def test_no_two_bins_would_fit_into_one(lengths: np.ndarray) -> None:
    filled = sorted(int(sum(lengths[records])) for records in pack_best_fit(lengths, CAPACITY))
    assert len(filled) < 2 or filled[0] + filled[1] > CAPACITY


@pytest.mark.parametrize(
    ("lengths", "bins"),
    [
        ([10, 10, 10], [[0, 1], [2]]),
        ([5, 12, 15, 8], [[2, 0], [1, 3]]),
        ([12, 15, 5], [[1, 2], [0]]),  # 5 goes where it fits best, not where it fits first
        ([20, 1], [[0], [1]]),
        ([], []),
    ],
)
def test_longest_first_into_the_fullest_bin(lengths: list[int], bins: list[list[int]]) -> None:
    assert pack_best_fit(np.array(lengths, dtype=np.int64), CAPACITY) == bins


def test_a_plan_on_disk(tmp_path: Path) -> None:
    write_plan(tmp_path, [[2, 0], [1]])
    assert np.fromfile(tmp_path / "plan_offsets.bin", INDEX_TYPE).tolist() == [0, 2, 3]
    assert np.fromfile(tmp_path / "plan_records.bin", INDEX_TYPE).tolist() == [2, 0, 1]
