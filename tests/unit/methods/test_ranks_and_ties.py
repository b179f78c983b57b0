"""Steps of the pruning methods where numbers are equal: random numbers at a share, ranks, bands, elections."""

from __future__ import annotations

import numpy as np
import pytest

from smelt.methods.della import mean_ranks, prune_by_rank
from smelt.methods.selection import Cut, KthLargest
from smelt.methods.stages import (
    TINY,
    above_cut,
    add_to_base,
    band,
    band_counts,
    combine,
    counts_to_keep,
    divisor,
    drop,
    l1_factors,
    rescale_factors,
    weighted_sum,
)

pytestmark = pytest.mark.filterwarnings("error")


def f32(*rows: list[float]) -> np.ndarray:
    return np.array(rows, dtype=np.float32)


def column(*numbers: float) -> np.ndarray:
    return np.array(numbers, dtype=np.float64)[:, None]


def deep(*numbers: float) -> np.ndarray:
    return np.array(numbers, dtype=np.float64)[:, None, None]


# Random numbers that equal a share are not below it


def test_a_random_number_that_equals_the_share_is_not_kept() -> None:
    uniform = f32([0.25, 0.5, 0.75])
    assert drop(f32([1, 2, 3]), column(0.5), uniform).tolist() == [[1, 0, 0]]
    numbers = f32([7, 7, 7])
    cut = Cut(f32([7]), f32([0.5]), np.array([[2]]), np.array([[0]]), np.array([[3]]))
    assert above_cut(numbers, cut, uniform).tolist() == [[True, False, False]]
    assert above_cut(numbers + 1, cut, uniform).all()
    assert not above_cut(numbers - 1, cut, uniform).any()


def banded(deltas: np.ndarray, density: float, gamma: float, uniform: np.ndarray) -> list[float]:
    counts = band_counts(column(density), column(gamma), deltas.shape[1])
    cut = KthLargest.whole((abs(deltas), counts))
    return band(deltas, cut, uniform)[0].tolist()  # type: ignore[no-any-return]


def test_a_band_between_two_cuts() -> None:
    deltas = f32([8, -7, 6, -5, 4, -3, 2, -1])
    always, never = np.zeros_like(deltas), np.full_like(deltas, 1 - 2.0**-24)
    for uniform in (always, never):
        assert banded(deltas, 0.5, 0.25, uniform) == [0, 0, 6, -5, 4, -3, 0, 0]
        assert banded(deltas, 0.5, 0.0, uniform) == [8, -7, 6, -5, 0, 0, 0, 0]
        assert banded(deltas, 0.5, 0.9, uniform) == [0, 0, 0, 0, 4, -3, 2, -1], "where both overlap, gamma yields"
        assert banded(deltas, 0.0, 0.25, uniform) == [0] * 8
        assert banded(deltas, 1.0, 0.25, uniform) == deltas[0].tolist()
    assert band(deltas, None, always) is deltas


def test_a_band_of_equal_entries() -> None:
    """One top entry and two of the band among four equal ones: the same half of them at both ends."""
    deltas = f32([3, -3, 3, -3])
    uniform = f32([0.0, 0.5, 0.49, 0.9])
    assert banded(deltas, 0.5, 0.25, uniform) == [3, 0, 3, 0]


def test_a_band_that_begins_among_equal_entries() -> None:
    deltas = f32([3, 3, 2, 1, 1])
    assert banded(deltas, 0.6, 0.2, f32([0.4, 0.5, 0.9, 0.4, 0.5])) == [3, 0, 2, 1, 0]


@pytest.mark.parametrize(
    ("density", "gamma", "counts"),
    [
        (0.5, 0.2, [2, 7]),
        (0.59, 0.19, [1, 6]),
        (0.05, 0.2, [2, 2]),
        (0.9, 0.2, [1, 10]),
        (0.5, 1.0, [5, 10]),
        (1.0, 0.2, [0, 10]),
        (1.5, 0.2, [0, 10]),
        (0.0, 0.2, [2, 2]),
        (-1.0, 1.5, [10, 10]),
    ],
)
def test_counts_of_a_band(density: float, gamma: float, counts: list[int]) -> None:
    found = band_counts(column(density), column(gamma), 10)
    assert found.tolist() == [counts]
    assert found.dtype == np.int64


def test_counts_belong_to_their_models() -> None:
    assert counts_to_keep(column(0.5, 0.01, 0.0, 2.0), 10).tolist() == [5, 1, 0, 10]
    assert counts_to_keep(deep(0.5, 0.1), 10).tolist() == [5, 1]
    assert band_counts(column(0.5, 0.9), column(0.2, 0.2), 10).tolist() == [[2, 7], [1, 10]]
    assert counts_to_keep(column(0.5), 0).tolist() == [1], "the reducer clips it to the entries there are"


# Factors and divisors


def test_norms_count_from_1e_7_on() -> None:
    assert l1_factors(np.array([3e-7, 3e-7, 1e-7, 9e-8]), np.array([1e-7, 9e-8, 1e-7, 2e-7])).tolist() == pytest.approx(
        [3.0, 1.0, 1.0, 1.0]
    )
    assert l1_factors(np.array([1e-7, 9e-8]), np.array([2e-7, 2e-7])).tolist() == [0.5, 1.0]
    assert l1_factors(np.array([4.0, 0.0]), np.array([0.0, 0.0])).tolist() == [1.0, 1.0]


def test_divided_by_the_density_between_zero_and_one() -> None:
    found = rescale_factors("density", column(0.25, 1.0, 0.0, -0.5, 1.5), np.zeros(5), np.zeros(5))
    assert found is not None
    assert found.tolist() == [[4.0], [1.0], [1.0], [1.0], [1.0]]
    assert rescale_factors(True, deep(0.5, 0.5), np.array([6.0, 3.0]), np.array([3.0, 1.0])).shape == (2, 1, 1)  # type: ignore[union-attr]


def test_divisors_from_1e_8_on() -> None:
    assert TINY == 1e-8
    assert divisor(column(1e-8)) == 1e-8
    assert divisor(column(-1e-8)) == -1e-8
    assert divisor(column(0.99e-8)) == 1.0
    assert divisor(column(0.5, -2.0, 0.25)) == -1.25


@pytest.mark.parametrize(
    ("weight", "divided_by"), [(1e-8, 1e-8), (-1e-8, -1e-8), (0.5e-8, 1.0), (2.0, 2.0), (-2.0, -2.0)]
)
def test_elected_entries_are_divided_by_their_weights(weight: float, divided_by: float) -> None:
    found = combine(f32([3, -5]), column(weight), factors=None, elected=True, normalize=True)
    assert found.tolist() == pytest.approx([3 * weight / divided_by, -5 * weight / divided_by])


def test_sums_over_three_models() -> None:
    vectors = f32([1, -1], [10, 10], [100, -100])
    weight = column(1, 2, 3)
    assert weighted_sum(vectors, weight).tolist() == [321, -281]
    assert weighted_sum(vectors, weight, start=f32([1, 2])[0]).tolist() == [322, -279]
    assert combine(vectors, weight, factors=None, elected=False, normalize=False).tolist() == [321, -281]
    assert combine(vectors, weight, factors=column(2, 1, 1), elected=True, normalize=False).tolist() == [322, -302]
    agreed = combine(vectors, weight, factors=column(2, 1, 1), elected=True, normalize=True)
    assert agreed.tolist() == pytest.approx([322 / 6, -302 / 4])


def test_lambda_is_a_factor_on_what_is_added() -> None:
    assert add_to_base(f32([1, 2])[0], np.array([4.0, -4.0]), 0.5).tolist() == [3.0, 0.0]


# Ranks


def test_equal_numbers_share_the_mean_of_their_ranks() -> None:
    ordered = f32([1, 2, 2, 3, 3, 3], [1, 2, 3, 4, 5, 6], [0, 0, 0, 0, 0, 0])
    assert mean_ranks(ordered).tolist() == [[0, 1.5, 1.5, 4, 4, 4], [0, 1, 2, 3, 4, 5], [2.5] * 6]
    assert mean_ranks(ordered[1:2]).tolist() == [[0, 1, 2, 3, 4, 5]]
    assert mean_ranks(ordered).dtype == mean_ranks(ordered[1:2]).dtype == np.float64
    assert mean_ranks(f32([1, 2], [2, 3])).tolist() == [[0, 1], [0, 1]], "a row ends where the next one begins"
    assert mean_ranks(f32([1, 1], [1, 2], [2, 2])).tolist() == [[0.5, 0.5], [0, 1], [0.5, 0.5]]


def pruned(deltas: np.ndarray, density: float, epsilon: float, uniform: float) -> list[list[float]]:
    found = prune_by_rank(deltas[None], deep(density), deep(epsilon), np.full_like(deltas[None], uniform))
    return found[0].tolist()  # type: ignore[no-any-return]


def test_larger_entries_are_kept_with_a_higher_probability() -> None:
    """0.25, 0.375, 0.5, 0.625 and 0.75 for the ranks, in each row."""
    deltas = f32([-5, 1, 3, -2, 4], [10, 20, 30, 40, 50])
    for uniform, kept in (
        (0.2, 5),
        (0.25, 4),
        (0.37, 4),
        (0.375, 3),
        (0.5, 2),
        (0.62, 2),
        (0.625, 1),
        (0.74, 1),
        (0.75, 0),
    ):
        found = pruned(deltas, 0.5, 0.25, uniform)
        for row, whole in zip(found, deltas.tolist(), strict=True):
            largest = sorted(map(abs, whole), reverse=True)[:kept]
            assert row == [value if abs(value) in largest else 0 for value in whole], uniform


def test_equal_entries_are_kept_alike() -> None:
    deltas = f32([2, 2, -2, 2, 9])
    assert pruned(deltas, 0.5, 0.25, 0.43) == [[2, 2, -2, 2, 9]], "rank 1.5 of 4: 0.4375"
    assert pruned(deltas, 0.5, 0.25, 0.44) == [[0, 0, 0, 0, 9]]


def test_every_entry_has_a_random_number_of_its_own() -> None:
    deltas = f32([3, 1, 2], [4, 6, 5])
    uniform = f32([0.7, 0.2, 0.6], [0.3, 0.7, 0.4])  # probabilities 0.75, 0.25, 0.5 and 0.25, 0.75, 0.5
    found = prune_by_rank(deltas[None], deep(0.5), deep(0.25), uniform[None])[0]
    assert found.tolist() == [[3, 1, 0], [0, 6, 5]]


def test_densities_at_the_ends_and_rows_of_one_entry() -> None:
    deltas = f32([1, -2], [3, -4])
    for density in (1.0, 1.5):
        assert pruned(deltas, density, 0.9, 0.99) == deltas.tolist()
    for density in (0.0, -0.5):
        assert pruned(deltas, density, 0.9, 0.0) == [[0, 0], [0, 0]]
    assert pruned(f32([1], [-2]), 0.5, 0.4, 0.49) == [[1], [-2]]
    assert pruned(f32([1], [-2]), 0.5, 0.4, 0.5) == [[0], [0]]
    both = prune_by_rank(np.stack([deltas, deltas]), deep(1.0, 0.0), deep(0.1, 0.1), np.zeros((2, 2, 2), np.float32))
    assert both.tolist() == [deltas.tolist(), [[0, 0], [0, 0]]]
