"""Floats of 8 bits, bit for bit against torch and ml_dtypes: all codes, and float32 of every kind."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smelt.dtypes import (
    BF16,
    BY_NAME,
    F16,
    F32,
    F64,
    LAYOUTS,
    OUTPUT_NAMES,
    DType,
    any_nonfinite,
    decode,
    encode,
    nonfinite,
    promote,
    saturated,
)

E4M3, E5M2 = BY_NAME["float8_e4m3fn"], BY_NAME["float8_e5m2"]
FNUZ = [BY_NAME["float8_e4m3fnuz"], BY_NAME["float8_e5m2fnuz"]]
ALL = [E4M3, E5M2, *FNUZ]
CODES = np.arange(256, dtype=np.uint8)
every = pytest.mark.parametrize("dtype", ALL, ids=str)


def decoded(raw: np.ndarray, dtype: DType) -> np.ndarray:
    out = np.empty(raw.size, dtype=np.float32)
    decode(raw, dtype, out)
    return out


def encoded(values: np.ndarray, dtype: DType) -> np.ndarray:
    raw = np.zeros(values.size, dtype=np.uint8)
    encode(np.ascontiguousarray(values, dtype=np.float32), dtype, raw)
    return raw


def by_torch(values: np.ndarray, dtype: DType) -> np.ndarray:
    numbers = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
    return numbers.to(getattr(torch, dtype.name)).view(torch.uint8).numpy()


def by_ml_dtypes(values: np.ndarray, dtype: DType) -> np.ndarray:
    with np.errstate(all="ignore"):
        return values.astype(np.float32).astype(getattr(ml_dtypes, dtype.name)).view(np.uint8)


def every_kind() -> np.ndarray:
    """float32: all upper halves with lower halves at and beside their ends, and random bits."""
    low = np.array([0, 1, 2, 0x7FFF, 0x8000, 0x8001, 0xFFFE, 0xFFFF], dtype=np.uint32)
    grid = (np.arange(1 << 16, dtype=np.uint32)[:, None] << 16 | low).reshape(-1)
    drawn = np.random.default_rng(0).integers(0, 1 << 32, 1 << 20, dtype=np.uint32)
    return np.concatenate([grid, drawn]).view(np.float32)


def near_ties(dtype: DType) -> np.ndarray:
    """Every value, everything halfway between two neighbours, and the float32 on either side of each."""
    values = decoded(CODES, dtype)
    known = np.unique(values[np.isfinite(values)].astype(np.float64))
    ends = known[-1] + (known[-1] - known[-2]) * np.array([0.5, 1.0, 2.0])
    exact = np.concatenate([known, (known[1:] + known[:-1]) / 2, ends, -ends]).astype(np.float32)
    around = [exact, np.nextafter(exact, np.float32(np.inf)), np.nextafter(exact, np.float32(-np.inf))]
    return np.concatenate([*around, -np.concatenate(around)])


@every
def test_every_code_decodes(dtype: DType) -> None:
    values = decoded(CODES, dtype)
    theirs = torch.from_numpy(CODES.copy()).view(getattr(torch, dtype.name)).float().numpy()
    number = ~np.isnan(values)
    assert np.array_equal(values[number].view(np.uint32), theirs[number].view(np.uint32))
    assert np.array_equal(np.isnan(theirs), ~number)
    assert np.array_equal(values, CODES.view(getattr(ml_dtypes, dtype.name)).astype(np.float32), equal_nan=True)
    assert set(values[~number].view(np.uint32).tolist()) <= {0x7FC00000, 0xFFC00000}
    assert np.array_equal(np.signbit(values), np.signbit(theirs))


@every
def test_every_code_survives(dtype: DType) -> None:
    values = decoded(CODES, dtype)
    number = ~np.isnan(values)
    back = encoded(values, dtype)
    assert np.array_equal(back[number], CODES[number])
    assert np.isnan(decoded(back[~number], dtype)).all()


@every
def test_encodes_as_torch_does(dtype: DType) -> None:
    """All numbers, infinities and NaNs (with their signs) to the bit."""
    for values in (every_kind(), near_ties(dtype)):
        assert np.array_equal(encoded(values, dtype), by_torch(values, dtype))


@every
def test_encodes_as_ml_dtypes_does(dtype: DType) -> None:
    """They differ in one thing: beyond the range of float8_e4m3fn, ml_dtypes gives a NaN."""
    for values in (every_kind(), near_ties(dtype)):
        ours, theirs = encoded(values, dtype), by_ml_dtypes(values, dtype)
        cut = np.zeros(values.size, dtype=bool)
        cut[saturated(values, dtype)] = True
        nan = np.isnan(values)
        assert np.array_equal(ours[~cut & ~nan], theirs[~cut & ~nan])
        assert np.isnan(decoded(ours[nan], dtype)).all()
        assert np.isnan(decoded(theirs[cut], dtype)).all()
        assert cut.any() == (dtype is E4M3)


@every
def test_every_bfloat16(dtype: DType) -> None:
    codes = np.arange(1 << 16, dtype="<u2")
    values = codes.view(ml_dtypes.bfloat16).astype(np.float32)
    assert np.array_equal(encoded(values, dtype), by_torch(values, dtype))


@given(st.sampled_from(ALL), st.lists(st.floats(width=32), max_size=20))
def test_any_numbers(dtype: DType, numbers: list[float]) -> None:
    values = np.array(numbers, dtype=np.float32)
    assert np.array_equal(encoded(values, dtype), by_torch(values, dtype))


@given(st.sampled_from(ALL), st.floats(width=32, min_value=-60000, max_value=60000))
def test_nothing_is_nearer(dtype: DType, number: float) -> None:
    """Said without another library: no value of the type is nearer, and of two as near the code is the even one."""
    values = decoded(CODES, dtype).astype(np.float64)
    finite = np.isfinite(values)
    (code,) = encoded(np.array([number]), dtype)
    if abs(number) > dtype.finite_max:
        return
    distance = np.abs(values[finite] - np.float64(np.float32(number)))
    mine = abs(values[code] - np.float64(np.float32(number)))
    assert mine == distance.min()
    if len(set(values[finite][distance == mine].tolist())) > 1:
        assert code % 2 == 0


def test_beyond_the_range() -> None:
    values = np.array([448, 464, np.nextafter(np.float32(464), np.float32(500)), 1e9, np.inf, -465, -np.inf, np.nan])
    assert encoded(values, E4M3).tolist() == [0x7E, 0x7E, 0x7E, 0x7E, 0x7E, 0xFE, 0xFE, 0x7F]
    assert saturated(values.astype(np.float32), E4M3).tolist() == [2, 3, 4, 5, 6]
    values = np.array([57344, 61439, 61440, 1e9, np.inf, -np.inf, np.nan])
    assert encoded(values, E5M2).tolist() == [0x7B, 0x7B, 0x7C, 0x7C, 0x7C, 0xFC, 0x7F]
    for dtype in FNUZ:
        assert encoded(np.array([1e9, -np.inf, np.nan, -0.0, -1e-30]), dtype).tolist() == [0x80, 0x80, 0x80, 0, 0]
    for dtype in [*ALL[1:], F16, BF16]:
        assert saturated(np.array([1e38, np.inf, np.nan], np.float32), dtype).size == 0


@every
def test_what_is_not_finite(dtype: DType) -> None:
    expected = ~np.isfinite(decoded(CODES, dtype))
    assert np.array_equal(nonfinite(CODES, dtype), expected)
    assert [any_nonfinite(CODES[i : i + 1], dtype) for i in range(256)] == expected.tolist()


@every
def test_the_table_knows_the_largest_number(dtype: DType) -> None:
    assert dtype.finite_max == float(ml_dtypes.finfo(getattr(ml_dtypes, dtype.name)).max)
    assert dtype.floating
    assert dtype.code in LAYOUTS


@every
def test_no_warnings(dtype: DType, recwarn: pytest.WarningsRecorder) -> None:
    from smelt import dtypes

    dtypes.table_of_values.cache_clear()
    dtypes._table_of_codes.cache_clear()
    decoded(encoded(every_kind(), dtype), dtype)
    assert not recwarn.list


def test_promotion() -> None:
    """The wider type holds all values of the narrower one, so nothing is lost."""
    assert promote([E4M3, E4M3]) is E4M3
    assert promote([E4M3, E5M2]) is BF16
    assert promote(FNUZ) is BF16
    assert promote([E4M3, F16]) is F16
    assert promote([E5M2, BF16, E4M3]) is BF16
    assert promote([E5M2, BF16, F16]) is F32
    assert promote([F64, E5M2]) is F64
    for dtype in ALL:
        values = decoded(CODES, dtype)
        for wide, name in ((BF16, ml_dtypes.bfloat16), (F16, np.float16)):
            held = values.astype(name).astype(np.float32)
            assert np.array_equal(held, values, equal_nan=True), (dtype, wide)


def test_the_words_of_recipes() -> None:
    assert OUTPUT_NAMES["float8_e4m3fn"] is E4M3
    assert OUTPUT_NAMES["float8_e5m2"] is E5M2
