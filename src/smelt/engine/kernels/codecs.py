"""bfloat16 to float32 and back by integer arithmetic, and random numbers: one pass each."""

from __future__ import annotations

from typing import Any

import numpy as np

from smelt import dtypes
from smelt.dtypes import BF16, DType
from smelt.engine.kernels.compiled import JIT, draw


@JIT
def _from_bfloat16(stored: Any, out: Any) -> None:
    for j in range(out.size):
        out[j] = np.uint32(stored[j]) << np.uint32(16)


@JIT
def _to_bfloat16(bits: Any, out: Any) -> None:
    for j in range(out.size):
        x = bits[j]
        rounded = (x + np.uint32(0x7FFF) + ((x >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        if (x & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000):
            rounded = (x >> np.uint32(16)) | np.uint32(0x40)
        out[j] = rounded


def decode(raw: Any, dtype: DType, out: Any) -> None:
    """As `smelt.dtypes.decode`."""
    if dtype is BF16:
        _from_bfloat16(raw.view(np.uint16), out.view(np.uint32))
    else:
        dtypes.decode(raw, dtype, out)


def encode(values: Any, dtype: DType, raw: Any) -> None:
    """As `smelt.dtypes.encode`."""
    if dtype is BF16:
        _to_bfloat16(values.view(np.uint32), raw.view(np.uint16))
    else:
        dtypes.encode(values, dtype, raw)


@JIT
def _any_bfloat16(stored: Any) -> bool:
    found = np.uint16(0)
    for j in range(stored.size):
        found |= np.uint16((stored[j] & np.uint16(0x7F80)) == np.uint16(0x7F80))
    return bool(found)


def any_nonfinite(raw: Any, dtype: DType) -> bool:
    """As `smelt.dtypes.any_nonfinite`."""
    return bool(_any_bfloat16(raw.view(np.uint16))) if dtype is BF16 else dtypes.any_nonfinite(raw, dtype)


def uniform(stream: tuple[int, int], start: int, stop: int, out: Any) -> Any:
    """As `smelt.engine.rng.uniform`."""
    draw(np.uint64(stream[0]), np.uint64(stream[1]), start, out)
    return out
