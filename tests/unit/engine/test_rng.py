"""The random numbers: which they are, that any range can be made by itself, and that they look random."""

from __future__ import annotations

import math

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from smelt.engine.rng import key, uniform

MASK = (1 << 64) - 1
LONG_NAME = "model.layers.0.mlp.up_proj.weight"

KEY = (953728054495665926, 9656491370025262719)
FIRST = [4585547, 1504843, 4402970, 7859021, 1599742, 7978826, 10238199, 8151802]
LATER = [4042855, 5001556, 5078102, 12903317, 14962630]


def plain(stream: tuple[int, int], element: int) -> int:
    """One number of a stream, times 2**24, in Python's own integers: the definition."""
    word = ((element // 2) * 0x9E3779B97F4A7C15 + stream[0]) & MASK
    word ^= word >> 30
    word = (word * 0xBF58476D1CE4E5B9) & MASK
    word ^= stream[1]
    word ^= word >> 27
    word = (word * 0x94D049BB133111EB) & MASK
    word ^= word >> 31
    half = word & 0xFFFFFFFF if element % 2 == 0 else word >> 32
    return half >> 8


def scaled(numbers: np.ndarray) -> list[int]:
    return [int(v) for v in numbers * np.float32(2**24)]


def test_known_answers() -> None:
    """Pinned: a change here changes the outputs of every published recipe that uses chance."""
    assert key(0, "w", 0) == KEY
    assert scaled(uniform(key(0, "w", 0), 0, 8)) == FIRST
    assert scaled(uniform(key(7, LONG_NAME, 3), 10**12 + 1, 10**12 + 6)) == LATER


def test_the_key_is_a_digest() -> None:
    digest = xxhash.xxh3_128_digest(f"smelt uniform 1\0{7}\0{3}\0{LONG_NAME}".encode())
    assert key(7, LONG_NAME, 3) == (int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:], "big"))


@given(st.integers(0, MASK), st.integers(0, MASK), st.integers(0, 1 << 50), st.integers(0, 9))
def test_every_number_is_what_the_definition_says(high: int, low: int, start: int, count: int) -> None:
    numbers = uniform((high, low), start, start + count)
    assert numbers.dtype == np.float32
    assert scaled(numbers) == [plain((high, low), start + i) for i in range(count)]


@given(st.integers(0, 300), st.integers(0, 300), st.integers(0, 1000))
def test_any_range_is_a_part_of_the_whole(start: int, count: int, seed: int) -> None:
    stream = key(seed, "a", 1)
    whole = uniform(stream, 0, 700)
    assert np.array_equal(uniform(stream, start, start + count), whole[start : start + count])


@pytest.mark.parametrize("start", [0, 1, 2, 3, 65535, 65536])
@pytest.mark.parametrize("count", [0, 1, 2, 5, 64])
def test_into_a_buffer(start: int, count: int) -> None:
    stream = key(1, "b", 0)
    buffer = np.full(count + 2, -1.0, dtype=np.float32)
    given_back = uniform(stream, start, start + count, out=buffer[1:-1])
    assert np.array_equal(given_back, uniform(stream, start, start + count))
    assert np.array_equal(buffer[1:-1], given_back)
    assert buffer[0] == buffer[-1] == -1.0


def test_range() -> None:
    numbers = uniform(key(0, "c", 0), 0, 1 << 20)
    assert numbers.min() >= 0.0
    assert numbers.max() < 1.0
    assert np.array_equal(numbers * 2**24, np.round(numbers * 2**24))


def chi_square(counts: np.ndarray) -> float:
    """How many standard deviations the statistic lies from what chance gives, with equal expectations."""
    expected = counts.sum() / counts.size
    statistic = float(((counts - expected) ** 2 / expected).sum())
    freedom = counts.size - 1
    return (statistic - freedom) / math.sqrt(2.0 * freedom)


@pytest.mark.parametrize("seed", range(4))
def test_uniform(seed: int) -> None:
    numbers = uniform(key(seed, "model.embed_tokens.weight", seed % 3), 0, 1 << 19)
    assert abs(chi_square(np.bincount((numbers * 1000).astype(np.int64), minlength=1000))) < 5.0
    low_bits = (numbers * 2**24).astype(np.int64) % 256
    assert abs(chi_square(np.bincount(low_bits, minlength=256))) < 5.0
    assert abs(float(numbers.mean(dtype=np.float64)) - 0.5) < 5.0 / math.sqrt(12 << 19)


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ((0, "w", 0), (0, "w", 1)),
        ((0, "w", 0), (1, "w", 0)),
        ((0, "layers.1.w", 0), (0, "layers.2.w", 0)),
        ((1, "w", 0), (0, "w", 1)),
    ],
)
def test_streams_are_independent(one: tuple[int, str, int], two: tuple[int, str, int]) -> None:
    """Pairs of numbers at the same element fill the square evenly."""
    a, b = (uniform(key(*stream), 0, 1 << 18) for stream in (one, two))
    cells = (a * 24).astype(np.int64) * 24 + (b * 24).astype(np.int64)
    assert abs(chi_square(np.bincount(cells, minlength=576))) < 5.0
    assert abs(float(np.corrcoef(a, b)[0, 1])) < 5.0 / math.sqrt(1 << 18)


@pytest.mark.parametrize("lag", [1, 2, 3, 64, 4096])
def test_neighbours_are_independent(lag: int) -> None:
    numbers = uniform(key(5, "w", 0), 0, (1 << 18) + lag)
    cells = (numbers[:-lag] * 24).astype(np.int64) * 24 + (numbers[lag:] * 24).astype(np.int64)
    assert abs(chi_square(np.bincount(cells, minlength=576))) < 5.0


def test_names_are_not_confused() -> None:
    """Seed, model and name cannot run into each other."""
    keys = {
        key(seed, name, model) for seed in (0, 1, 11) for model in (0, 1, 11) for name in ("", "1", "11", "1\0", "é")
    }
    assert len(keys) == 45
