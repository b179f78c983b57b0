"""Narrow floats to float32 and back by integer arithmetic, and random numbers: one pass each.

The FNUZ types and float64 are left to the definitions, and so is the search for what is not finite in types other than
bfloat16: NumPy does it at the speed of memory.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from smelt import dtypes
from smelt.dtypes import BF16, F16, LAYOUTS, DType
from smelt.engine.kernels.feeding import STORED
from smelt.engine.kernels.loading import Loop

_DECODE = Loop("codecs", "decode")
_TO_BFLOAT16 = Loop("codecs", "to_bfloat16")
_TO_FLOAT16 = Loop("codecs", "to_float16")
_TO_FLOAT8 = Loop("codecs", "to_float8")
_ANY_BFLOAT16 = Loop("codecs", "any_bfloat16")
_DRAW = Loop("codecs", "draw")


def decode(raw: Any, dtype: DType, out: Any) -> None:
    """As `smelt.dtypes.decode`."""
    if dtype.code in STORED:
        _DECODE(raw.view(STORED[dtype.code]), out)
    else:
        dtypes.decode(raw, dtype, out)


def encode(values: Any, dtype: DType, raw: Any) -> None:
    """As `smelt.dtypes.encode`."""
    if dtype is BF16:
        _TO_BFLOAT16(values, raw.view(np.uint16))
    elif dtype is F16:
        _TO_FLOAT16(values.view(np.uint32), raw.view(np.uint16))
    elif dtype.code in LAYOUTS and dtype.code in STORED:
        layout = LAYOUTS[dtype.code]
        _TO_FLOAT8(values.view(np.uint32), layout.mantissa, layout.bias, layout.overflow, layout.nan, raw)
    else:
        dtypes.encode(values, dtype, raw)


def any_nonfinite(raw: Any, dtype: DType) -> bool:
    """As `smelt.dtypes.any_nonfinite`."""
    return bool(_ANY_BFLOAT16(raw.view(np.uint16))) if dtype is BF16 else dtypes.any_nonfinite(raw, dtype)


def uniform(stream: tuple[int, int], start: int, stop: int, out: Any) -> Any:
    """As `smelt.engine.rng.uniform`."""
    _DRAW(np.uint64(stream[0]), np.uint64(stream[1]), start, out)
    return out
