"""Decoding and encoding, bit for bit against ml_dtypes and NumPy."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smelt.dtypes import BF16, BY_CODE, BY_NAME, F16, F32, F64, OUTPUT_NAMES, DType, decode, encode, nonfinite, promote

TYPES = {"BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype("<f2"), "F32": np.dtype("<f4"), "F64": np.dtype("<f8")}
ALL_CODES = np.arange(1 << 16, dtype="<u2")


def decoded(raw: np.ndarray, dtype: DType) -> np.ndarray:
    out = np.empty(raw.nbytes * 8 // dtype.bits, dtype=np.float32)
    decode(raw.view(np.uint8), dtype, out)
    return out


def encoded(values: np.ndarray, dtype: DType) -> np.ndarray:
    raw = np.zeros(values.size * dtype.bits // 8, dtype=np.uint8)
    encode(values, dtype, raw)
    return raw


def random_bits() -> np.ndarray:
    """float32 of every kind: all exponents, subnormal, NaN with payloads, infinities, halfway cases of bfloat16."""
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 1 << 32, size=1 << 20, dtype=np.uint32)
    bits[: 1 << 18] &= np.uint32(0xFFFF0000)
    bits[: 1 << 18] |= rng.choice([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], size=1 << 18).astype(np.uint32)
    special = [0, 1 << 31, 0x7F800000, 0xFF800000, 0x7F800001, 0xFF800001, 0x7FC00000, 0x7FFFFFFF, 0xFFFFFFFF]
    special += [0x7F7FFFFF, 0x7F7F7FFF, 0x7F7F8000, 0x007FFFFF, 0x00800000, 1, 0x7FFF, 0x8000, 0x7F80FFFF]
    return np.concatenate([bits, np.array(special, dtype=np.uint32)]).view(np.float32)


def test_every_bfloat16_decodes() -> None:
    expected = ALL_CODES.view(TYPES["BF16"]).astype(np.float32)
    assert np.array_equal(decoded(ALL_CODES, BF16).view(np.uint32), ALL_CODES.astype(np.uint32) << 16)
    assert np.array_equal(decoded(ALL_CODES, BF16), expected, equal_nan=True)


def test_every_float16_decodes() -> None:
    expected = ALL_CODES.view(np.float16).astype(np.float32)
    assert np.array_equal(decoded(ALL_CODES, F16).view(np.uint32), expected.view(np.uint32))


def test_every_two_byte_number_survives() -> None:
    """Decoded and encoded again: the same bits; of a NaN the sign and all but the quiet bit."""
    for dtype, quiet in ((BF16, 0x40), (F16, 0x200)):
        nan = np.isnan(decoded(ALL_CODES, dtype))
        back = encoded(decoded(ALL_CODES, dtype), dtype).view("<u2")
        assert np.array_equal(back[~nan], ALL_CODES[~nan])
        assert np.array_equal(back[nan] | quiet, ALL_CODES[nan] | quiet)


def test_bfloat16_encodes_as_ml_dtypes_does() -> None:
    values = random_bits()
    got = encoded(values, BF16).view("<u2")
    with np.errstate(all="ignore"):
        expected = values.astype(TYPES["BF16"]).view("<u2")
    numbers = ~np.isnan(values)
    assert np.array_equal(got[numbers], expected[numbers])
    assert np.isnan(got[~numbers].view(TYPES["BF16"])).all()
    kept = (values[~numbers].view(np.uint32) >> 16).astype(np.uint16) | 0x40
    assert np.array_equal(got[~numbers], kept), "sign and upper payload of a NaN are kept"


def test_float16_encodes_as_numpy_does() -> None:
    values = random_bits()
    values = np.concatenate([values, np.linspace(-70000, 70000, 100_001, dtype=np.float32)])
    with np.errstate(all="ignore"):
        expected = values.astype(np.float16)
    got = encoded(values, F16).view(np.float16)
    assert np.array_equal(got, expected, equal_nan=True)
    assert np.array_equal(np.signbit(got), np.signbit(expected))


@pytest.mark.parametrize("dtype", [BF16, F16, F32, F64], ids=str)
def test_no_warnings(dtype: DType, recwarn: pytest.WarningsRecorder) -> None:
    values = random_bits()
    encoded(values, dtype)
    decoded(encoded(values, dtype), dtype)
    if dtype is F64:
        decoded(np.array([1e300, -1e300, 1e-320]), F64)
    assert not recwarn.list


def test_float64() -> None:
    given = np.array([1.0, 0.1, 1e300, -1e300, 1e-50, np.nan, -np.inf])
    with np.errstate(all="ignore"):
        expected = given.astype(np.float32)
    assert np.array_equal(decoded(given, F64), expected, equal_nan=True)
    values = np.array([0.1, -0.0, np.inf, 1e-45], dtype=np.float32)
    assert np.array_equal(encoded(values, F64).view(np.float64), values.astype(np.float64))


@given(st.lists(st.floats(width=32), max_size=20))
def test_one_rounding_to_nearest_even(numbers: list[float]) -> None:
    values = np.array(numbers, dtype=np.float32)
    with np.errstate(all="ignore"):
        expected = values.astype(TYPES["BF16"]).astype(np.float32)
    assert np.array_equal(decoded(encoded(values, BF16), BF16), expected, equal_nan=True)


@pytest.mark.parametrize("code", TYPES)
def test_what_is_not_finite(code: str) -> None:
    numbers = np.array([0, 1, -1, np.inf, -np.inf, np.nan, -np.nan, 1e-45, 65504, 3e38], dtype=np.float64)
    with np.errstate(all="ignore"):
        stored = numbers.astype(TYPES[code])
    found = nonfinite(stored.view(np.uint8), BY_CODE[code])
    assert np.array_equal(found, ~np.isfinite(stored.astype(np.float64)))


@pytest.mark.parametrize("code", ["BF16", "F16"])
def test_what_is_not_finite_of_all_codes(code: str) -> None:
    found = nonfinite(ALL_CODES.view(np.uint8), BY_CODE[code])
    assert np.array_equal(found, ~np.isfinite(ALL_CODES.view(TYPES[code]).astype(np.float32)))


@pytest.mark.parametrize("code", TYPES)
def test_the_table_knows_the_largest_number(code: str) -> None:
    largest = ml_dtypes.finfo(TYPES[code]).max
    assert BY_CODE[code].finite_max == float(largest)
    assert BY_CODE[code].bits == TYPES[code].itemsize * 8


def test_promotion() -> None:
    assert promote([BF16, BF16]) is BF16
    assert promote([BF16, F16]) is F32
    assert promote([F16, F32, F16]) is F32
    assert promote([F32, F64]) is F64
    assert promote([F64, BF16]) is F64


def test_bytes() -> None:
    assert BF16.nbytes(3) == 6
    assert BY_CODE["F4"].nbytes(4) == 2
    with pytest.raises(ValueError, match="whole bytes"):
        BY_CODE["F4"].nbytes(3)
    assert set(OUTPUT_NAMES) >= {"float32", "float16", "bfloat16"}
    assert all(BY_NAME[dtype.name] is dtype for dtype in OUTPUT_NAMES.values())
