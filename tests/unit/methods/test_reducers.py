"""Reducers against their plain `whole` forms, folded from pieces in any number and (where they may) any order."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from smelt.methods.reducers import Extremes, Gram, Sum, gram
from smelt.methods.selection import Cut, KthLargest, KthLargest64, to_grid

pytestmark = pytest.mark.filterwarnings("error")

SELECTORS = [KthLargest, KthLargest64]


def drive(reducer: Any, pieces: list[Any], *, backwards: bool = False) -> Any:
    """Every round over all pieces, as the engine does it."""
    while not reducer.done:
        total = None
        partials = [reducer.partial(piece) for piece in pieces]
        for partial in partials[::-1] if backwards else partials:
            total = reducer.fold(total, partial)
        reducer.close(total)
    return reducer.finish()


def pieces_of(values: np.ndarray, cuts: list[int]) -> list[np.ndarray]:
    """[n, N] cut along the elements."""
    places = sorted({0, *(cut % (values.shape[1] + 1) for cut in cuts), values.shape[1]})
    return [values[:, low:high] for low, high in itertools.pairwise(places)]


def select(selector: Any, numbers: np.ndarray, counts: Any, *, cuts: list[int], backwards: bool = False) -> Cut:
    counts = np.asarray(counts, dtype=np.int64)
    found = selector(scope="tensor", size=numbers.shape[1])
    return drive(found, [(piece, counts) for piece in pieces_of(numbers, cuts)], backwards=backwards)


def same(one: Cut, other: Cut) -> None:
    for name in Cut.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)


def magnitudes(dtype: type) -> st.SearchStrategy[np.ndarray]:
    """[n, N] numbers >= 0 of every kind: many equal ones, zeros, subnormal, infinite."""
    width = 8 * np.dtype(dtype).itemsize
    few = st.sampled_from([0.0, 1.0, 1.0000001192092896, 2.0, 1e-45, 1.1754943508222875e-38, 3e38, math.inf])
    any_number = st.floats(0.0, width=width, allow_nan=False)
    shapes = st.tuples(st.integers(1, 3), st.integers(1, 40))
    return st.one_of(
        hnp.arrays(dtype, shapes, elements=any_number, fill=st.nothing()),
        hnp.arrays(dtype, shapes, elements=few, fill=st.nothing()),
    )


@pytest.mark.parametrize("selector", SELECTORS)
@settings(deadline=None, max_examples=80)
@given(data=st.data())
def test_selection_is_that_of_sorting(selector: Any, data: st.DataObject) -> None:
    numbers = data.draw(magnitudes(np.float32 if selector is KthLargest else np.float64))
    n, size = numbers.shape
    counts = data.draw(st.lists(st.integers(-1, size + 1), min_size=n, max_size=n))
    cuts = data.draw(st.lists(st.integers(0, 40), max_size=4))
    expected = selector.whole((numbers, np.asarray(counts)))
    same(select(selector, numbers, counts, cuts=cuts), expected)
    same(select(selector, numbers, counts, cuts=cuts[:1], backwards=True), expected)


@pytest.mark.parametrize("selector", SELECTORS)
def test_the_cut_keeps_the_count(selector: Any) -> None:
    """G entries above, and the share of the E equal ones that fills up K: worked out from the definition."""
    rng = np.random.default_rng(0)
    for levels in (3, 50, 10**6):
        numbers = (rng.integers(0, levels, size=(2, 5000)) / 7).astype(np.float32 if selector is KthLargest else float)
        for count in (1, 2, 2500, 4999, 5000):
            cut = select(selector, numbers, [count, count], cuts=[1000, 3000])
            for row in range(2):
                value = np.sort(numbers[row])[-count]
                above, equal = np.sum(numbers[row] > value), np.sum(numbers[row] == value)
                assert cut.value[row, 0] == value
                assert 0 <= cut.share[row, 0] - (count - above) / equal <= 2.0**-24


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("count", [0, -3])
def test_nothing_to_keep(selector: Any, count: int) -> None:
    numbers = np.array([[0.0, 1.0, np.inf]], dtype=np.float32 if selector is KthLargest else np.float64)
    cut = select(selector, numbers, [count], cuts=[])
    assert cut.value[0, 0] == np.inf
    assert cut.share[0, 0] == 0.0
    assert not ((numbers > cut.value) | ((numbers == cut.value) & (cut.share > 0.0))).any()


def test_rows_have_counts_of_their_own() -> None:
    numbers = np.array([[5, 4, 3, 2, 1], [1, 1, 1, 9, 9]], dtype=np.float32)
    cut = select(KthLargest, numbers, [2, 3], cuts=[2])
    assert cut.value.tolist() == [[4.0], [1.0]]
    assert cut.share[0, 0] == 1.0
    assert abs(cut.share[1, 0] - 1 / 3) < 2.0**-24


def test_magnitudes_that_differ_in_the_last_bit_are_told_apart() -> None:
    one = np.float32(0.3)
    numbers = np.array([[one, np.nextafter(one, np.float32(1)), np.nextafter(one, np.float32(0)), one]])
    assert select(KthLargest, numbers, [1], cuts=[]).value[0, 0] == np.nextafter(one, np.float32(1))
    assert select(KthLargest, numbers, [2], cuts=[]).value[0, 0] == one
    assert select(KthLargest, numbers, [2], cuts=[]).share[0, 0] == 0.5
    assert select(KthLargest, numbers, [4], cuts=[]).value[0, 0] == np.nextafter(one, np.float32(0))


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_a_guess_changes_nothing(data: st.DataObject) -> None:
    """Brackets that hold the cut, miss it on either side, are a single number or empty: the cut is that of sorting."""
    numbers = data.draw(magnitudes(np.float32))
    rows, size = numbers.shape
    counts = np.asarray(data.draw(st.lists(st.integers(0, size), min_size=rows, max_size=rows)))[:, None]
    keys = np.sort(numbers.view(np.uint32), axis=1)
    ends = st.one_of(st.sampled_from([*keys.reshape(-1).tolist(), 0, 0xFFFFFFFF]), st.integers(0, 0xFFFFFFFF))
    reducer = KthLargest(scope="tensor", size=size)
    drawn = np.asarray([[sorted((data.draw(ends), data.draw(ends)))] for _ in range(rows)], dtype=np.uint32)
    reducer.brackets = drawn
    cuts = data.draw(st.lists(st.integers(0, 40), max_size=3))
    pieces = [(piece, counts) for piece in pieces_of(numbers, cuts)]
    same(drive(reducer, pieces, backwards=data.draw(st.booleans())), KthLargest.whole((numbers, counts)))


def test_a_sample_places_a_bracket() -> None:
    """Narrow where the sample is like the tensor, wider where its chunks differ, none where too much equals the cut."""
    rng = np.random.default_rng(5)
    numbers = np.abs(rng.standard_normal((2, 1 << 20), dtype=np.float32))
    counts = np.asarray([[1 << 19], [1 << 10]])
    widths = []
    for spread in (np.zeros(16), np.linspace(-0.15, 0.15, 16)):
        reducer = KthLargest(scope="tensor", size=1 << 20)
        chunks = numbers.reshape(2, 16, -1)[:, :, :1024] * np.exp(spread).astype(np.float32)[None, :, None]
        reducer.guess((chunks, counts))
        low, high = reducer.brackets[0, 0].view(np.float32)
        widths.append(float(np.mean((numbers[0] >= low) & (numbers[0] <= high))))
        assert low <= np.median(numbers[0]) <= high
    assert 0.01 < widths[0] < 0.06 < widths[1]
    crowded = KthLargest(scope="tensor", size=1 << 20)
    crowded.guess((np.floor(3 * chunks), counts))
    assert crowded.brackets is None


@pytest.mark.parametrize("share", [0.05, 0.3, 0.65, 0.999])
def test_zeros_take_no_second_pass(share: float) -> None:
    """Of a fine-tune in bfloat16 most entries may be those of the base: cuts at 0, and above it, in one pass."""
    rng = np.random.default_rng(6)
    numbers = np.abs(rng.standard_normal((1, 1 << 18), dtype=np.float32))
    numbers[rng.random(numbers.shape) < share] = 0.0
    for density in (0.02, 0.3, 0.36, 0.9, 1.0):
        reducer = KthLargest(scope="tensor", size=numbers.size)
        counts = np.asarray([[int(density * numbers.size)]])
        reducer.guess((numbers.reshape(1, 16, -1)[:, :, :2048], counts))
        reducer.close(reducer.fold(None, reducer.partial((numbers, counts))))
        assert reducer.done, density
        same(reducer.finish(), KthLargest.whole((numbers, counts)))


def test_a_bracket_too_full_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KthLargest, "MOST_KEPT", 10)
    numbers = np.arange(40, dtype=np.float32)[None]
    reducer = KthLargest(scope="tensor", size=40)
    reducer.brackets = np.asarray([[[0, 0xFFFFFFFF]]], dtype=np.uint32)
    counts = np.asarray([[7]])
    pieces = [(piece, counts) for piece in pieces_of(numbers, [9, 18])]
    same(drive(reducer, pieces), KthLargest.whole((numbers, counts)))


@settings(deadline=None, max_examples=80)
@given(data=st.data())
def test_float64_numbers_of_any_sign(data: st.DataObject) -> None:
    selector = SELECTORS[1]
    shapes = st.tuples(st.integers(1, 2), st.integers(1, 40))
    numbers = data.draw(hnp.arrays(np.float64, shapes, elements=st.floats(allow_nan=False), fill=st.nothing()))
    counts = data.draw(st.lists(st.integers(0, numbers.shape[1]), min_size=len(numbers), max_size=len(numbers)))
    expected = selector.whole((numbers, np.asarray(counts)))
    same(select(selector, numbers, counts, cuts=data.draw(st.lists(st.integers(0, 40), max_size=3))), expected)


@settings(deadline=None, max_examples=60)
@given(numbers=magnitudes(np.float32), counts=st.lists(st.integers(0, 40), min_size=1, max_size=3))
def test_several_counts_in_one_go(numbers: np.ndarray, counts: list[int]) -> None:
    wanted = np.asarray([counts] * len(numbers))
    together = select(KthLargest, numbers, wanted, cuts=[7])
    for place, count in enumerate(counts):
        alone = select(KthLargest, numbers, [count] * len(numbers), cuts=[])
        for name in Cut.__dataclass_fields__:
            assert np.array_equal(getattr(together, name)[:, place], getattr(alone, name)[:, 0]), name


def test_rounding_a_share_up_changes_no_decision() -> None:
    """Random numbers are multiples of 2**-24: they are below the share exactly where they are below the rounded one."""
    rng = np.random.default_rng(1)
    shares = np.concatenate([rng.random(500), rng.random(500) * 1e-6, [0.0, 1.0, 0.5, 2.0**-24, 2.0**-25]])
    for share in shares:
        near = np.unique(np.clip(np.floor(share * 2**24) + np.arange(-3, 4), 0, 2**24 - 1)) * 2.0**-24
        rounded = to_grid(share)
        assert rounded.dtype == np.float32
        assert np.array_equal(near.astype(np.float32) < rounded, near < share)


# Sums


@settings(deadline=None)
@given(
    hnp.arrays(np.float32, st.tuples(st.integers(1, 3), st.integers(1, 60)), elements=st.floats(-1e3, 1e3, width=32)),
    st.lists(st.integers(0, 60), max_size=3),
)
def test_sum(values: np.ndarray, cuts: list[int]) -> None:
    found = drive(Sum(scope="tensor", size=values.shape[1]), pieces_of(values, cuts))
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, Sum.whole(values), rtol=1e-12, atol=1e-9)
    np.testing.assert_allclose(found, [math.fsum(map(float, row)) for row in values], rtol=1e-12, atol=1e-9)


def test_sum_is_taken_in_float64() -> None:
    values = np.full((1, 70_000), 1e35, dtype=np.float32)
    assert drive(Sum(scope="tensor", size=70_000), [values])[0] == pytest.approx(7e39, rel=1e-6)


def test_sum_of_row_tiles_and_of_columns() -> None:
    values = np.arange(24, dtype=np.float32).reshape(2, 4, 3)
    assert drive(Sum(scope="tensor", size=12), [values[:, :2], values[:, 2:]]).tolist() == [66.0, 210.0]
    columns = drive(Sum(scope="column", size=12), [values[:, :2], values[:, 2:]])
    assert columns.tolist() == values.sum(axis=1).tolist()


@settings(deadline=None)
@given(
    hnp.arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 60)), elements=st.floats(-10, 10, width=32)),
    st.lists(st.integers(0, 60), max_size=3),
)
def test_gram(values: np.ndarray, cuts: list[int]) -> None:
    found = drive(Gram(scope="tensor", size=values.shape[1]), pieces_of(values, cuts))
    wide = values.astype(np.float64)
    np.testing.assert_allclose(found, wide @ wide.T, rtol=1e-12, atol=1e-9)
    np.testing.assert_allclose(found, Gram.whole(list(values)), rtol=1e-12, atol=1e-9)
    assert np.array_equal(found, found.T)


def test_gram_of_columns_and_rows() -> None:
    values = np.random.default_rng(2).normal(size=(2, 5, 3)).astype(np.float32)
    columns = drive(Gram(scope="column", size=15), [tuple(values[:, :2]), tuple(values[:, 2:])])
    expected = np.einsum("irc,jrc->ijc", values.astype(np.float64), values.astype(np.float64))
    np.testing.assert_allclose(columns, expected, rtol=1e-12)
    rows = gram(list(values), axis=-1)
    np.testing.assert_allclose(rows, np.einsum("irc,jrc->ijr", values.astype(float), values.astype(float)), rtol=1e-12)


def test_products_do_not_overflow() -> None:
    values = np.full((2, 4), 3e38, dtype=np.float32)
    assert np.isfinite(gram(list(values), axis=None)).all()


@pytest.mark.parametrize("backwards", [False, True])
def test_extremes(backwards: bool) -> None:
    values = np.random.default_rng(2).normal(size=(3, 100))
    got = drive(Extremes(scope="tensor", size=100), pieces_of(values, [17, 60, 61]), backwards=backwards)
    assert np.array_equal(got, [values.min(axis=1), values.max(axis=1)])
    assert np.array_equal(got, Extremes.whole(values))
    values[1, 70] = np.nan
    got = drive(Extremes(scope="tensor", size=100), pieces_of(values, [17, 60, 61]), backwards=backwards)
    assert np.isnan(got).tolist() == [[False, True, False]] * 2
    assert Extremes(scope="tensor", size=100).refuses(values, 2) is None
    assert Extremes(scope="tensor", size=100).refuses((values, values), 2) == (
        "a tuple of 2",
        "give Extremes one array of 2 dimensions, [k, ...] as the tile's",
    )
