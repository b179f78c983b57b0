"""Compiled codecs against the array definitions, to the bit: all codes, and float32 of every kind."""

from __future__ import annotations

import numpy as np
import pytest
from numba import njit

from smelt import dtypes
from smelt.dtypes import BF16, BY_NAME, F16, F32, F64, DType
from smelt.engine.kernels.codecs import any_nonfinite, decode, encode
from smelt.engine.kernels.loops.elements import widen

EIGHT = [BY_NAME[name] for name in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")]
TYPES = [BF16, F16, *EIGHT, F32, F64]
every = pytest.mark.parametrize("dtype", TYPES, ids=str)


def codes(dtype: DType) -> np.ndarray:
    """The bytes of all codes of a type of 8 or 16 bits; of a wider one, of many."""
    if dtype.bits > 16:
        return np.random.default_rng(1).integers(0, 256, 1 << 16, dtype=np.uint8)
    return np.arange(1 << dtype.bits, dtype=f"<u{dtype.bits // 8}").view(np.uint8)


def numbers() -> np.ndarray:
    """float32: every upper half with lower halves at, beside and between the ties of the narrow types; random bits."""
    low = [0, 1, 0x0FFF, 0x1000, 0x1001, 0x1FFF, 0x2000, 0x2FFF, 0x3000, 0x3001, 0x7FFF, 0x8000, 0x8001, 0xFFFF]
    grid = (np.arange(1 << 16, dtype=np.uint32)[:, None] << 16 | np.array(low, dtype=np.uint32)).reshape(-1)
    drawn = np.random.default_rng(0).integers(0, 1 << 32, 1 << 20, dtype=np.uint32)
    return np.concatenate([grid, drawn]).view(np.float32)


@every
def test_decoding(dtype: DType) -> None:
    raw = codes(dtype)
    one, two = (np.empty(raw.size * 8 // dtype.bits, dtype=np.float32) for _ in range(2))
    decode(raw, dtype, one)
    dtypes.decode(raw, dtype, two)
    assert one.tobytes() == two.tobytes()


@every
def test_encoding(dtype: DType) -> None:
    values = numbers()
    one, two = (np.zeros(dtype.nbytes(values.size), dtype=np.uint8) for _ in range(2))
    encode(values, dtype, one)
    dtypes.encode(values, dtype, two)
    assert one.tobytes() == two.tobytes()


@every
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 31, 33])
def test_few_elements(dtype: DType, count: int) -> None:
    """Vectorised loops have a part of their own for what is left over."""
    values = numbers()[100_000 : 100_000 + count]
    one, two = (np.zeros(dtype.nbytes(count), dtype=np.uint8) for _ in range(2))
    encode(values, dtype, one)
    dtypes.encode(values, dtype, two)
    assert one.tobytes() == two.tobytes()
    here, there = (np.zeros(count, dtype=np.float32) for _ in range(2))
    decode(one, dtype, here)
    dtypes.decode(one, dtype, there)
    assert here.tobytes() == there.tobytes()


@every
def test_what_is_not_finite(dtype: DType) -> None:
    width = dtype.bits // 8
    raw = codes(dtype)[: width << 10]
    for first in range(0, raw.size, width):
        piece = raw[first : first + width]
        assert any_nonfinite(piece, dtype) == dtypes.any_nonfinite(piece, dtype)


@pytest.mark.parametrize(
    ("dtype", "kind"), [(BF16, "u2"), (F16, "i2"), (EIGHT[0], "u1"), (EIGHT[1], "i1"), (F32, "f4")], ids=str
)
def test_the_kind_of_integer_says_the_type(dtype: DType, kind: str) -> None:
    raw = codes(dtype)

    @njit
    def widened(stored, out):  # type: ignore[no-untyped-def]
        for j in range(out.size):
            out[j] = widen(stored[j])

    one, two = (np.empty(raw.size * 8 // dtype.bits, dtype=np.float32) for _ in range(2))
    widened(raw.view(kind), one)
    dtypes.decode(raw, dtype, two)
    assert one.tobytes() == two.tobytes()
