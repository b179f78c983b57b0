"""How kernels are compiled, and the small functions that they share.

Sums and shifts of 32-bit integers are cast back at every step: otherwise they are made in 64 bits, at half the speed.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numba
import numpy as np
import xxhash
from numba.extending import intrinsic, overload

from smelt.storage import files

_HERE = Path(__file__).parent
_SOURCES = (
    *sorted(_HERE.glob("*.py")),
    _HERE.parent / "tiles.py",
    *(_HERE.parents[1] / "methods" / name for name in ("reducers.py", "stages.py")),
)
"""What compiled code is made of, constants of other modules included."""
_SOURCE_LIMIT = 1 << 20


_njit: Any = numba.njit


@cache
def _cache_folder() -> str:
    """The folder of the compiled code of these very sources.

    Numba looks at the file of a function alone: of one that was inlined from another file it would keep an old copy.
    """
    digest = xxhash.xxh3_128_hexdigest(b"\0".join(files.read_bytes(path, limit=_SOURCE_LIMIT) for path in _SOURCES))
    if asked := os.environ.get("NUMBA_CACHE_DIR"):
        return os.path.join(asked, digest)
    if os.access(_HERE, os.W_OK):
        return str(_HERE / "__pycache__" / digest)
    return os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "smelt", digest)


def JIT(function: Callable[..., Any]) -> Any:  # noqa: N802
    """Compile when first called, cache on disk, run without the interpreter lock. Never fastmath, never parallel."""
    settings = {"nogil": True, "error_model": "numpy"}
    config: Any = numba.config
    before, config.CACHE_DIR = config.CACHE_DIR, _cache_folder()
    try:
        return _njit(cache=True, **settings)(function)
    except RuntimeError:  # no folder that can be written: compiled anew in each process
        return _njit(**settings)(function)
    finally:
        config.CACHE_DIR = before


RUN = 1024
"""Elements worked on at a time: what is made of them stays in the first cache."""
COLUMNS = RUN // 8
"""Bytes that hold one bit for each element of a run."""
GRID = 1 << 24
"""Random numbers are whole multiples of 1 / GRID."""


def widen(stored: Any) -> Any:
    """A stored element as float32; its kind of integer says what it is.

    uint16 is a bfloat16, int16 a float16, uint8 a float8_e4m3fn, int8 a float8_e5m2; a float32 is itself.
    """
    raise NotImplementedError


@overload(widen, inline="always")
def _widen(stored):
    if stored in _WIDENED:
        function = _WIDENED[stored]
        return lambda stored: function(stored)
    return lambda stored: np.float32(stored)


@numba.njit(inline="always")
def to_bfloat16(value: Any) -> Any:
    """A float32 rounded to bfloat16, nearest and ties to even, as uint16; a NaN stays one."""
    x = np.float32(value).view(np.uint32)
    even = np.uint32(np.uint32(x >> np.uint32(16)) & np.uint32(1))
    rounded = np.uint32(np.uint32(np.uint32(x + np.uint32(0x7FFF)) + even) >> np.uint32(16))
    quiet = np.uint32(np.uint32(x >> np.uint32(16)) | np.uint32(0x40))
    return np.uint16(quiet if np.uint32(x & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000) else rounded)


def narrow(value: Any, out: Any) -> Any:
    """A float32 as an element of the stored array `out`: bfloat16 for uint16, itself for float32."""
    raise NotImplementedError


@overload(narrow, inline="always")
def _narrow(value, out):
    if isinstance(out.dtype, numba.types.Integer):
        return lambda value, out: to_bfloat16(value)
    return lambda value, out: np.float32(value)


def magnitude(stored: Any) -> Any:
    """The bits of an element of the output without its sign, in its own width: it is finite if below `infinity`."""
    raise NotImplementedError


@overload(magnitude, inline="always")
def _magnitude(stored):
    if isinstance(stored, numba.types.Integer):
        return lambda stored: np.uint16(stored & np.uint16(0x7FFF))
    return lambda stored: np.uint32(np.float32(stored).view(np.uint32) & np.uint32(0x7FFFFFFF))


def infinity(out: Any) -> Any:
    """The bits of infinity in the type of the stored array `out`."""
    raise NotImplementedError


@overload(infinity, inline="always")
def _infinity(out):
    if isinstance(out.dtype, numba.types.Integer):
        return lambda out: np.uint16(0x7F80)
    return lambda out: np.uint32(0x7F800000)


def least(out: Any) -> Any:
    """No bits at all, in the same type: any sum or difference of two would be an integer of 64 bits."""
    raise NotImplementedError


@overload(least, inline="always")
def _least(out):
    if isinstance(out.dtype, numba.types.Integer):
        return lambda out: np.uint16(0)
    return lambda out: np.uint32(0)


@numba.njit(inline="always")
def from_bfloat16(stored: Any) -> Any:
    """The float32 of a bfloat16's bits."""
    return np.uint32(np.uint32(stored) << np.uint32(16)).view(np.float32)


@numba.njit(inline="always")
def _all_if(condition: Any) -> Any:
    """32 bits that are set where the condition holds: choices without branches."""
    return np.uint32(np.uint32(0) - np.uint32(condition))


@numba.njit(inline="always")
def from_float16(stored: Any) -> Any:
    """The float32 of a float16's bits; the payload of a NaN stays."""
    bits = np.uint32(np.uint16(stored))
    code = np.uint32(bits & np.uint32(0x7FFF))
    tiny = np.float32(np.float32(np.int32(code)) * np.float32(2.0**-24)).view(np.uint32)
    normal = np.uint32(np.uint32(code << np.uint32(13)) + np.uint32(0x38000000))
    beyond = np.uint32(np.uint32(0x38000000) & _all_if(code >= np.uint32(0x7C00)))
    small = _all_if(code < np.uint32(0x0400))
    number = np.uint32((tiny & small) | (np.uint32(normal + beyond) & np.uint32(~small)))
    return np.uint32(number | np.uint32(np.uint32(bits & np.uint32(0x8000)) << np.uint32(16))).view(np.float32)


@numba.njit(inline="always")
def from_float8_e4m3fn(stored: Any) -> Any:
    """The float32 of a float8_e4m3fn's code."""
    bits = np.uint32(np.uint8(stored))
    code = np.uint32(bits & np.uint32(0x7F))
    tiny = np.float32(np.float32(np.int32(code)) * np.float32(2.0**-9)).view(np.uint32)
    normal = np.uint32(np.uint32(code << np.uint32(20)) + np.uint32(120 << 23))
    large = _all_if(code == np.uint32(0x7F))
    small = _all_if(code < np.uint32(0x08))
    number = np.uint32((tiny & small) | (normal & np.uint32(~(small | large))) | (np.uint32(0x7FC00000) & large))
    return np.uint32(number | np.uint32(np.uint32(bits & np.uint32(0x80)) << np.uint32(24))).view(np.float32)


@numba.njit(inline="always")
def from_float8_e5m2(stored: Any) -> Any:
    """The float32 of a float8_e5m2's code."""
    bits = np.uint32(np.uint8(stored))
    code = np.uint32(bits & np.uint32(0x7F))
    tiny = np.float32(np.float32(np.int32(code)) * np.float32(2.0**-16)).view(np.uint32)
    normal = np.uint32(np.uint32(code << np.uint32(21)) + np.uint32(112 << 23))
    large = _all_if(code >= np.uint32(0x7C))
    special = np.uint32(np.uint32(0x7F800000) | np.uint32(np.uint32(0x00400000) & _all_if(code > np.uint32(0x7C))))
    small = _all_if(code < np.uint32(0x04))
    number = np.uint32((tiny & small) | (normal & np.uint32(~(small | large))) | (special & large))
    return np.uint32(number | np.uint32(np.uint32(bits & np.uint32(0x80)) << np.uint32(24))).view(np.float32)


_WIDENED = {
    numba.types.uint16: from_bfloat16,
    numba.types.int16: from_float16,
    numba.types.uint8: from_float8_e4m3fn,
    numba.types.int8: from_float8_e5m2,
}
"""How each kind of stored integer is read."""


MIX = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
"""The step and the factors of the random streams: those of `smelt.engine.rng`."""


@numba.njit(inline="always")
def mix(word: Any, low: Any, high: Any) -> Any:
    """Word `word` of a random stream with key (low, high): `smelt.engine.rng` in integers of 64 bits."""
    z = np.uint64(low) + np.uint64(word) * np.uint64(MIX[0])
    z ^= z >> np.uint64(30)
    z *= np.uint64(MIX[1])
    z ^= np.uint64(high)
    z ^= z >> np.uint64(27)
    z *= np.uint64(MIX[2])
    z ^= z >> np.uint64(31)
    return z


@JIT
def draw(low: Any, high: Any, start: int, out: Any) -> None:
    """Elements [start, start + len(out)) of a stream, float32 in [0, 1)."""
    count = out.size
    if count == 0:
        return
    first = start & 1
    if first:
        out[0] = np.float32(mix(start >> 1, low, high) >> np.uint64(40)) * np.float32(2.0**-24)
    pairs = (count - first) // 2
    word = (start + first) >> 1
    even = out[first : first + 2 * pairs]
    for k in range(pairs):
        z = mix(word + k, low, high)
        even[2 * k] = np.float32((z & np.uint64(0xFFFFFFFF)) >> np.uint64(8)) * np.float32(2.0**-24)
        even[2 * k + 1] = np.float32(z >> np.uint64(40)) * np.float32(2.0**-24)
    if first + 2 * pairs < count:
        z = mix(word + pairs, low, high)
        out[count - 1] = np.float32((z & np.uint64(0xFFFFFFFF)) >> np.uint64(8)) * np.float32(2.0**-24)


@intrinsic
def _trailing_zeros(typing_context, word):

    def generate(context, builder, signature, arguments):
        true = context.get_constant(numba.types.boolean, True)
        return builder.cttz(arguments[0], true)

    return numba.types.uint64(numba.types.uint64), generate


trailing_zeros: Any = _trailing_zeros
"""The number of the lowest bit that is set in a uint64, which must not be 0."""
