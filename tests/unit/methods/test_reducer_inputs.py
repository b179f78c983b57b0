"""What reducers take and refuse, how often they are run, and their odd ends: columns, lanes, empty rows, no counts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from smelt.methods.reducers import LANES, Gram, Sum, described, gram
from smelt.methods.selection import Cut, KthLargest, KthLargest64, band_shares, to_grid

pytestmark = pytest.mark.filterwarnings("error")

SELECTORS = [KthLargest, KthLargest64]
TILE = np.zeros((2, 5), dtype=np.float32)
COUNTS = np.array([1, 2])


def drive(reducer: Any, pieces: list[Any]) -> Any:
    """Every round over all pieces, as the engine does it."""
    for _ in range(reducer.rounds):
        total = None
        for piece in pieces:
            total = reducer.fold(total, reducer.partial(piece))
        reducer.close(total)
    return reducer.finish()


def test_rounds() -> None:
    """Each is one more time that a tensor is read."""
    assert (Sum.rounds, Gram.rounds, KthLargest.rounds, KthLargest64.rounds) == (1, 1, 2, 4)
    assert (Sum.ordered, Gram.ordered, KthLargest.ordered, KthLargest64.ordered) == (True, True, False, False)


# What is refused


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (TILE, "float32 [2, 5]"),
        (np.float64(1.0), "float64 []"),
        (memoryview(TILE), "a memoryview"),
        ((1, 2, 3), "a tuple of 3"),
        ([1], "a list of 1"),
        (None, "None"),
        (1.5, "a float"),
    ],
)
def test_values_in_words(value: Any, words: str) -> None:
    assert described(value) == words


@pytest.mark.parametrize("scope", ["tensor", "column"])
def test_sums_take_one_array(scope: str) -> None:
    total = Sum(scope=scope, size=5)
    assert total.refuses(TILE, 2) is None
    assert total.refuses(TILE[:, :, None], 3) is None
    for wrong in (None, 1.0, [1.0], (TILE,), TILE[0], TILE[None], memoryview(TILE), np.dtype("int8")):
        said = total.refuses(wrong, 2)
        assert said is not None
        assert said[0] == described(wrong)
        assert "2 dimensions" in said[1]


@pytest.mark.parametrize("scope", ["tensor", "column"])
def test_inner_products_take_an_array_or_a_tuple_of_arrays(scope: str) -> None:
    products = Gram(scope=scope, size=5)
    assert products.refuses(TILE, 2) is None
    assert products.refuses((TILE[0], TILE[1], TILE[0]), 2) is None
    for wrong in (None, TILE[0], TILE[None], [TILE[0]]):
        assert products.refuses(wrong, 2) is not None
        assert products.refuses(wrong, 2)[0] == described(wrong)  # type: ignore[index]
    assert products.refuses((TILE[0], TILE, None), 2)[0] == "a tuple with float32 [2, 5]"  # type: ignore[index]


@pytest.mark.parametrize("selector", SELECTORS)
def test_selections_take_numbers_and_counts(selector: Any) -> None:
    select = selector(scope="tensor", size=5)
    kind, other = ("float32", "float64") if selector is KthLargest else ("float64", "float32")
    tile = TILE.astype(kind)
    for counts in (COUNTS, [1, 2], COUNTS[:, None], np.array([[1, 2, 3], [1, 2, 3]], dtype=np.uint8)):
        assert select.refuses((tile, counts), 2) is None
    for wrong in (None, tile, [tile, COUNTS], (tile,), (tile, COUNTS, COUNTS)):
        assert select.refuses(wrong, 2)[0] == described(wrong)
    for magnitudes in (None, tile[0], tile[None], [1.0], tile.astype(other), tile.astype(int)):
        assert select.refuses((magnitudes, COUNTS), 2)[0] == f"magnitudes that are {described(magnitudes)}"
    for counts in (
        np.array([1.0, 2.0]),
        np.array([1, 2, 3]),
        np.array([1]),
        np.array(1),
        np.ones((2, 1, 1), int),
        [0.5],
    ):
        assert select.refuses((tile, counts), 2)[0] == f"counts that are {described(counts)}"
    five = np.zeros((5, 5), dtype=kind)
    assert select.refuses((five[:2], np.arange(5)), 2) is not None, "one for each row, not for each entry"


# Sums


def test_columns_are_summed_in_float64() -> None:
    values = np.full((1, 3, 2), 3e38, dtype=np.float32)
    found = drive(Sum(scope="column", size=6), [values])
    assert found.dtype == np.float64
    assert found.tolist() == [[3 * float(np.float32(3e38))] * 2]
    assert drive(Sum(scope="column", size=12), [values, values]).tolist() == [[6 * float(np.float32(3e38))] * 2]


@pytest.mark.parametrize("count", [0, 1, LANES - 1, LANES, LANES + 1, 3 * LANES + 7])
def test_lanes_lose_no_element(count: int) -> None:
    values = np.arange(2 * count, dtype=np.float32).reshape(2, count)
    assert drive(Sum(scope="tensor", size=count), [values]).tolist() == values.sum(axis=1, dtype=float).tolist()
    products = drive(Gram(scope="tensor", size=count), [tuple(values)])
    assert products.tolist() == gram(list(values), axis=None).tolist()
    assert Sum.whole(values).tolist() == values.sum(axis=1, dtype=float).tolist()


def test_lanes_are_filled_in_turn() -> None:
    """Element j goes to lane j mod 256: what a kernel must do as well."""
    values = np.zeros((1, 2 * LANES + 3), dtype=np.float32)
    values[0, [0, LANES, 2 * LANES]] = [1.0, 2.0, 4.0]
    values[0, [2, 2 * LANES + 2]] = [8.0, 16.0]
    lanes = Sum(scope="tensor", size=values.size).partial(values)
    assert lanes.shape == (1, LANES)
    assert LANES == 256
    assert lanes[0, :4].tolist() == [7.0, 0.0, 24.0, 0.0]
    assert not lanes[0, 4:].any()


def test_whole_sums_are_taken_in_float64() -> None:
    values = np.full((2, 3), 3e38, dtype=np.float32)
    assert Sum.whole(values).tolist() == [3 * float(np.float32(3e38))] * 2


def test_inner_products_of_three_and_of_tiles() -> None:
    values = np.arange(24, dtype=np.float32).reshape(3, 2, 4)
    flat = values.reshape(3, -1).astype(float)
    assert drive(Gram(scope="tensor", size=8), [values[:, :1], values[:, 1:]]).tolist() == (flat @ flat.T).tolist()
    columns = drive(Gram(scope="column", size=8), [values[:, :1], values[:, 1:]])
    assert columns.shape == (3, 3, 4)
    assert columns[0, 2].tolist() == (values[0] * values[2]).sum(axis=0).tolist()


# Selection


@pytest.mark.parametrize("selector", SELECTORS)
def test_a_selection_is_told_what_to_look_at_next(selector: Any) -> None:
    """Nothing in the first round; then the leading bits of the cut, and only these entries are counted."""
    numbers = np.array([[1.0, 2.0, 2.0000002, 5.0], [0.0, 0.0, 3.0, 7.0]], dtype=np.float32)
    numbers = numbers.astype(np.float32 if selector is KthLargest else np.float64)
    select = selector(scope="tensor", size=4)
    assert select.prefixes(2).shape == (2, 0)
    assert select.prefixes(2).dtype == np.uint64
    pair = (numbers, np.array([[2, 1], [1, 4]]))
    for number in range(selector.rounds):
        if number:
            bits = 16 * (selector.rounds - number)
            keys = selector._keys(np.array([[numbers[0, 2], 5.0], [7.0, 0.0]], dtype=numbers.dtype))
            assert select.prefixes(2).tolist() == [[int(key) >> bits for key in row] for row in keys]
        counts, histogram = select.partial(pair)
        assert counts.tolist() == [[2, 1], [1, 4]]
        assert histogram.shape == (2, 1 if number == 0 else 2, 1 << 16)
        select.close((counts, histogram))
    cut = select.finish()
    assert cut.value.dtype == selector.whole(pair).value.dtype == numbers.dtype
    assert cut.value.tolist() == [[numbers[0, 2], 5.0], [7.0, 0.0]]
    assert cut.above.tolist() == [[1, 0], [0, 2]]
    assert cut.equal.tolist() == [[1, 1], [1, 2]]
    assert cut.share.tolist() == [[1.0, 1.0], [1.0, 1.0]]


@pytest.mark.parametrize("selector", SELECTORS)
def test_nothing_asked_for_and_everything(selector: Any) -> None:
    numbers = np.array([[4.0, 4.0, 1.0]], dtype=np.float32 if selector is KthLargest else np.float64)
    counts = np.array([[-1, 0, 1, 3, 9]])
    for cut in (drive(selector(scope="tensor", size=3), [(numbers, counts)]), selector.whole((numbers, counts))):
        assert cut.value.tolist() == [[np.inf, np.inf, 4.0, 1.0, 1.0]]
        assert cut.count.tolist() == [[0, 0, 1, 3, 3]]
        assert cut.above.tolist() == [[0, 0, 0, 2, 2]]
        assert cut.equal.tolist() == [[0, 0, 2, 1, 1]]
        assert cut.share.tolist() == [[0.0, 0.0, 0.5, 1.0, 1.0]]


@pytest.mark.parametrize("selector", SELECTORS)
def test_empty_rows(selector: Any) -> None:
    numbers = np.zeros((2, 0), dtype=np.float32 if selector is KthLargest else np.float64)
    for cut in (
        drive(selector(scope="tensor", size=0), [(numbers, np.array([1, 0]))]),
        selector.whole((numbers, np.array([1, 0]))),
    ):
        assert cut.value.tolist() == [[np.inf], [np.inf]]
        assert cut.count.tolist() == cut.above.tolist() == cut.equal.tolist() == [[0], [0]]


def test_float64_numbers_in_order() -> None:
    numbers = np.array([[-np.inf, -2.0, -0.0, 0.0, 1e-300, 2.0, np.inf, np.nan]])
    counts = np.arange(1, 9)[None, :]
    cut = drive(KthLargest64(scope="tensor", size=8), [(numbers, counts)])
    assert np.isnan(cut.value[0, 0])
    assert cut.value[0, 1:].tolist() == [np.inf, 2.0, 1e-300, 0.0, 0.0, -2.0, -np.inf]
    assert cut.equal[0].tolist() == [1, 1, 1, 1, 2, 2, 1, 1]
    assert not np.signbit(cut.value[0, 4])


def test_shares_are_rounded_up_to_the_grid_of_random_numbers() -> None:
    step = 2.0**-24
    for share, rounded in ((0.0, 0.0), (1.0, 1.0), (0.5, 0.5), (step, step), (step / 3, step), (step * 1.01, 2 * step)):
        assert to_grid(share) == rounded
    assert to_grid([0.25, 0.75]).dtype == np.float32


def cut_of(*, above: list[int], equal: list[int], count: list[int]) -> Cut:
    zero = np.zeros((1, 2), dtype=np.float32)
    return Cut(zero, zero, np.array([count]), np.array([above]), np.array([equal]))


@pytest.mark.parametrize(
    ("above", "equal", "count", "shares"),
    [
        ([1, 5], [4, 4], [3, 7], [0.5, 0.5]),  # ranks 3, 4 of 1..4 and 5, 6 of 5..8
        ([0, 3], [2, 2], [0, 4], [1.0, 0.5]),  # nothing cut off above
        ([1, 1], [4, 4], [2, 4], [0.5, 0.5]),  # both cuts on one magnitude: ranks 2, 3 of 1..4
        ([1, 4], [2, 2], [3, 6], [0.0, 1.0]),  # a top that ends with the equal ones, a band that does
        ([0, 0], [0, 0], [0, 0], [1.0, 0.0]),  # nothing asked for
        ([0, 0], [6, 6], [1, 2], [1 / 6, 1 / 6]),
    ],
)
def test_shares_of_a_band(above: list[int], equal: list[int], count: list[int], shares: list[float]) -> None:
    found = band_shares(cut_of(above=above, equal=equal, count=count))
    assert found.dtype == np.float32
    assert found.shape == (1, 2)
    assert found[0].tolist() == [float(to_grid(share)) for share in shares]


def test_bands_of_several_models() -> None:
    zero = np.zeros((2, 2), dtype=np.float32)
    counts = np.array([[0, 4], [3, 7]])
    cut = Cut(zero, zero, counts, np.array([[0, 3], [1, 5]]), np.array([[2, 2], [4, 4]]))
    assert band_shares(cut).tolist() == [[1.0, 0.5], [0.5, 0.5]]
