"""The shared steps on numbers small enough for paper."""

from __future__ import annotations

import numpy as np
import pytest

from smelt.methods.selection import KthLargest
from smelt.methods.stages import (
    add_to_base,
    combine,
    counts_to_keep,
    cut_rows,
    divisor,
    drop,
    l1_factors,
    rescale_factors,
    trim,
    weighted_sum,
)

pytestmark = pytest.mark.filterwarnings("error")


def f32(*rows: list[float]) -> np.ndarray:
    return np.array(rows, dtype=np.float32)


def column(*numbers: float) -> np.ndarray:
    return np.array(numbers, dtype=np.float64)[:, None]


def test_weighted_sum_rounds_once() -> None:
    vectors = f32([1.0], [2.0**-24], [2.0**-24])
    assert weighted_sum(vectors, column(1, 1, 1))[0] == np.float32(1 + 2.0**-23)
    assert weighted_sum(vectors[:1], column(1), start=f32([0.5])[0])[0] == 1.5
    assert weighted_sum(vectors, column(1, 1, 1)).dtype == np.float32


def test_divisors_near_zero_count_as_one() -> None:
    assert divisor(column(0.25, 0.5)) == 0.75
    assert divisor(column(1.0, -1.0)) == 1.0
    assert divisor(column(9e-9)) == 1.0
    assert divisor(column(-2e-8)) == -2e-8


@pytest.mark.parametrize(
    ("density", "size", "count"),
    [(0.5, 10, 5), (0.59, 10, 5), (0.01, 10, 1), (1.0, 10, 10), (1.5, 10, 10), (0.0, 10, 0), (-1.0, 10, 0)],
)
def test_counts(density: float, size: int, count: int) -> None:
    assert counts_to_keep(column(density), size).tolist() == [count]


def test_trim_keeps_the_largest() -> None:
    deltas = f32([3, -1, 0, 2], [1, 1, -1, 1])
    cut = KthLargest.whole((abs(deltas), np.array([2, 2])))
    uniform = f32([0, 0, 0, 0], [0.1, 0.9, 0.4, 0.6])
    assert trim(deltas, cut, uniform).tolist() == [[3, 0, 0, 2], [1, 0, -1, 0]]
    assert trim(deltas, None, uniform) is deltas


def test_a_random_number_equal_to_the_share_drops() -> None:
    """Numbers lie in [0, 1): a share of 0 keeps none, a share of 1/2 those below it."""
    deltas = f32([1, -1, 1, 1])
    cut = KthLargest.whole((abs(deltas), np.array([2])))
    assert trim(deltas, cut, f32([0.5, 0.5 - 2.0**-24, 0.0, 0.5 + 2.0**-24])).tolist() == [[0, -1, 1, 0]]
    assert drop(deltas, column(0.5), f32([0.5, 0.5 - 2.0**-24, 0.0, 1.0 - 2.0**-24])).tolist() == [[0, -1, 1, 0]]


def test_drop() -> None:
    deltas, uniform = f32([1, 2, 3]), f32([0.0, 0.5, 0.49])
    assert drop(deltas, column(0.5), uniform).tolist() == [[1, 0, 3]]
    assert drop(deltas, column(0.0), uniform).tolist() == [[0, 0, 0]]
    assert drop(deltas, column(1.0), uniform).tolist() == [[1, 2, 3]]


def test_l1_factors() -> None:
    whole, kept = np.array([6.0, 6.0, 9e-8, 6.0]), np.array([4.0, 0.0, 5e-8, 6.0])
    assert l1_factors(whole, kept).tolist() == [1.5, 1.0, 1.0, 1.0]


def test_rescale_factors() -> None:
    whole, kept = np.array([6.0, 6.0]), np.array([4.0, 3.0])
    assert rescale_factors(False, column(0.5, 0.5), whole, kept) is None
    assert rescale_factors(True, column(0.5, 0.5), whole, kept).tolist() == [[1.5], [2.0]]
    assert rescale_factors("density", column(0.5, 1.5), whole, kept).tolist() == [[2.0], [1.0]]
    assert rescale_factors("density", column(0.0, 1.0), whole, kept).tolist() == [[1.0], [1.0]]


def test_a_weighted_sum_is_combined() -> None:
    vectors = f32([1, 2], [3, -4])
    assert combine(vectors, column(1, 2), factors=None, elected=False, normalize=False).tolist() == [7, -6]
    assert combine(vectors, column(1, 3), factors=None, elected=False, normalize=True).tolist() == [2.5, -2.5]
    assert combine(vectors, column(1, -1), factors=None, elected=False, normalize=True).tolist() == [-2, 6]
    assert combine(vectors, column(1, 1), factors=column(2, 0.5), elected=False, normalize=False).tolist() == [3.5, 2]


def test_election() -> None:
    vectors = f32([1, 2, 1, 0, 0], [3, -4, -1, 0, -2])
    whole = combine(vectors, column(1, 1), factors=None, elected=True, normalize=False)
    assert whole.tolist() == [4, -4, 1, 0, -2], "a tie elects +; zeros agree with neither"
    mean = combine(vectors, column(1, 3), factors=None, elected=True, normalize=True)
    assert mean.tolist() == [2.5, -4, -1, 0, -2]
    negative = combine(vectors, column(1, -1), factors=None, elected=True, normalize=True)
    assert negative.tolist() == [3, 6, 2, 0, -2], "weights that cancel divide by 1"


def test_what_is_added_to_the_base_is_rounded_once() -> None:
    base = f32([1.0])[0]
    assert add_to_base(base, np.array([2.0**-24 + 2.0**-40]), 1.0)[0] == np.float32(1 + 2.0**-23)
    assert add_to_base(base, np.array([0.5]), 0.5).dtype == np.float32


def test_a_cut_in_each_row_is_that_of_the_row_as_a_tensor() -> None:
    numbers = np.abs(np.random.default_rng(0).integers(-4, 5, (2, 6, 9)).astype(np.float32))
    for counts in ([0, 9], [1, 4], [3, 12], [8, 0]):
        got = cut_rows(numbers, np.array(counts))
        for row in range(6):
            want = KthLargest.whole((numbers[:, row], np.array(counts)))
            for name in ("value", "share", "count", "above", "equal"):
                assert np.array_equal(getattr(got, name)[:, row], getattr(want, name)), (counts, row, name)
    numbers[1, 2, 3] = np.nan
    assert cut_rows(numbers, np.array([2, 2])).above[1, 2] == 1, "a NaN is above any cut"
