"""bfloat16 to float32 and back by integer arithmetic, and random numbers: one pass each."""

from __future__ import annotations

from typing import Any

import numpy as np

from smelt import dtypes
from smelt.dtypes import BF16, DType
from smelt.engine.kernels.compiled import JIT, draw, to_bfloat16


@JIT
def _from_bfloat16(stored: Any, out: Any) -> None:
    for j in range(out.size):
        out[j] = np.uint32(np.uint32(stored[j]) << np.uint32(16))


@JIT
def _to_bfloat16(values: Any, out: Any) -> None:
    for j in range(out.size):
        out[j] = to_bfloat16(values[j])


def decode(raw: Any, dtype: DType, out: Any) -> None:
    """As `smelt.dtypes.decode`."""
    if dtype is BF16:
        _from_bfloat16(raw.view(np.uint16), out.view(np.uint32))
    else:
        dtypes.decode(raw, dtype, out)


def encode(values: Any, dtype: DType, raw: Any) -> None:
    """As `smelt.dtypes.encode`."""
    if dtype is BF16:
        _to_bfloat16(values, raw.view(np.uint16))
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
