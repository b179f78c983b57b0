"""Narrow floats to float32 and back by integer arithmetic, and random numbers: one pass each.

The FNUZ types and float64 are left to the definitions, and so is the search for what is not finite in types other than
bfloat16: NumPy does it at the speed of memory.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from smelt import dtypes
from smelt.dtypes import BF16, F16, LAYOUTS, DType
from smelt.engine.kernels.compiled import JIT, draw, to_bfloat16, widen
from smelt.engine.kernels.fetch import STORED


@JIT
def _decode(stored: Any, out: Any) -> None:
    for j in range(out.size):
        out[j] = widen(stored[j])


@JIT
def _to_bfloat16(values: Any, out: Any) -> None:
    for j in range(out.size):
        out[j] = to_bfloat16(values[j])


@JIT
def _to_float16(bits: Any, out: Any) -> None:
    """A number below 2^-14 is added to 0.5, whose last bit is the smallest float16: the sum rounds as it should."""
    for j in range(out.size):
        x = np.uint32(bits[j])
        size = np.uint32(x & np.uint32(0x7FFFFFFF))
        odd = (size >> np.uint32(13)) & np.uint32(1)
        code = min((size + np.uint32(0x0FFF) + odd - np.uint32(0x38000000)) >> np.uint32(13), np.uint32(0x7C00))
        tiny = np.float32(size.view(np.float32) + np.float32(0.5)).view(np.uint32) - np.uint32(0x3F000000)
        if size < np.uint32(0x38800000):
            code = tiny
        payload = (size >> np.uint32(13)) & np.uint32(0x03FF)
        if size > np.uint32(0x7F800000):
            code = np.uint32(0x7C00) + payload + np.uint32(payload == 0)
        out[j] = code | ((x >> np.uint32(16)) & np.uint32(0x8000))


@JIT
def _to_float8(bits: Any, mantissa: int, bias: int, overflow: int, nan: int, out: Any) -> None:
    """Numbers below the smallest normal one are added to a power of two, as for float16."""
    shift = np.uint32(23 - mantissa)
    half = np.uint32((1 << (22 - mantissa)) - 1)
    rebase = np.uint32((127 - bias) << 23)
    smallest = np.uint32((128 - bias) << 23)
    base = np.uint32((127 + 24 - bias - mantissa) << 23)
    for j in range(out.size):
        x = np.uint32(bits[j])
        size = np.uint32(x & np.uint32(0x7FFFFFFF))
        odd = (size >> shift) & np.uint32(1)
        code = min((size + half + odd - rebase) >> shift, np.uint32(overflow))
        tiny = np.float32(size.view(np.float32) + base.view(np.float32)).view(np.uint32) - base
        if size < smallest:
            code = tiny
        if size > np.uint32(0x7F800000):
            code = np.uint32(nan)
        out[j] = code | ((x >> np.uint32(24)) & np.uint32(0x80))


def decode(raw: Any, dtype: DType, out: Any) -> None:
    """As `smelt.dtypes.decode`."""
    if dtype.code in STORED:
        _decode(raw.view(STORED[dtype.code]), out)
    else:
        dtypes.decode(raw, dtype, out)


def encode(values: Any, dtype: DType, raw: Any) -> None:
    """As `smelt.dtypes.encode`."""
    if dtype is BF16:
        _to_bfloat16(values, raw.view(np.uint16))
    elif dtype is F16:
        _to_float16(values.view(np.uint32), raw.view(np.uint16))
    elif dtype.code in LAYOUTS and dtype.code in STORED:
        layout = LAYOUTS[dtype.code]
        _to_float8(values.view(np.uint32), layout.mantissa, layout.bias, layout.overflow, layout.nan, raw)
    else:
        dtypes.encode(values, dtype, raw)


@JIT
def _any_bfloat16(stored: Any) -> bool:
    worst = np.uint16(0)
    for j in range(stored.size):
        worst = max(worst, np.uint16(stored[j] & np.uint16(0x7FFF)))
    return bool(worst >= np.uint16(0x7F80))


def any_nonfinite(raw: Any, dtype: DType) -> bool:
    """As `smelt.dtypes.any_nonfinite`."""
    return bool(_any_bfloat16(raw.view(np.uint16))) if dtype is BF16 else dtypes.any_nonfinite(raw, dtype)


def uniform(stream: tuple[int, int], start: int, stop: int, out: Any) -> Any:
    """As `smelt.engine.rng.uniform`."""
    draw(np.uint64(stream[0]), np.uint64(stream[1]), start, out)
    return out
