"""The small functions that loops share: elements as they are stored, random numbers, room.

Sums and shifts of 32-bit integers are cast back at every step: otherwise they are made in 64 bits, at half the speed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.extending import intrinsic, overload

_njit: Any = numba.njit


def JIT(function: Callable[..., Any]) -> Any:  # noqa: N802
    """A function that loops are made of. Never fastmath, never parallel."""
    return _njit(nogil=True, error_model="numpy")(function)


_PAGE = 4096
"""Where rooms begin: vectors stored across the border of two pages take many times as long, wherever the stack is."""


@intrinsic(prefer_literal=True)
def _room(typing_context, rows, columns, element):
    """Uninitialised memory of the function that asks, [rows, columns]; both numbers are known when it is compiled."""
    kind = numba.types.Array(element.dtype, 2, "C")
    shape = (rows.literal_value, columns.literal_value)

    def generate(context: Any, builder: Any, signature: Any, arguments: Sequence[Any]) -> Any:
        item = context.get_data_type(kind.dtype)
        with builder.goto_entry_block():
            memory = builder.alloca(ir.ArrayType(item, shape[0] * shape[1]))
            memory.align = _PAGE
        array = context.make_array(kind)(context, builder)
        size = context.get_abi_sizeof(item)
        word = context.get_value_type(numba.types.intp)
        context.populate_array(
            array,
            data=builder.bitcast(memory, array.data.type),
            shape=[ir.Constant(word, number) for number in shape],
            strides=[ir.Constant(word, size * shape[1]), ir.Constant(word, size)],
            itemsize=ir.Constant(word, size),
            meminfo=None,
        )
        return array._getvalue()

    return kind(rows, columns, element), generate


rooms: Any = _room
"""(rows, columns, type) -> room of the calling function for so many elements; what lies in it is not known."""


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
def _rounded(x: Any) -> Any:
    """The bits of a float32 that is no NaN, rounded to the upper half of them, nearest and ties to even."""
    even = np.uint32(np.uint32(x >> np.uint32(16)) & np.uint32(1))
    return np.uint32(np.uint32(np.uint32(x + np.uint32(0x7FFF)) + even) >> np.uint32(16))


@numba.njit(inline="always")
def rounded_bfloat16(x: Any) -> Any:
    """The bits of a float32 that is no NaN rounded to bfloat16, as uint16."""
    return np.uint16(_rounded(x))


@numba.njit(inline="always")
def to_bfloat16(value: Any) -> Any:
    """A float32 rounded to bfloat16, nearest and ties to even, as uint16; a NaN stays one."""
    x = np.float32(value).view(np.uint32)
    quiet = np.uint32(np.uint32(x >> np.uint32(16)) | np.uint32(0x40))
    return np.uint16(quiet if np.uint32(x & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000) else _rounded(x))


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


@numba.njit(inline="always")
def drawn_at(place: Any, key: Any) -> Any:
    """The random number of one element of a stream, times GRID."""
    at = np.uint64(place)
    word = mix(at >> np.uint64(1), key[0], key[1]) >> (np.uint64(32) * (at & np.uint64(1)))
    return (word & np.uint64(0xFFFFFFFF)) >> np.uint64(8)


@numba.njit(inline="always")
def ordered_key(number: Any) -> Any:
    """A float64 as a uint64 in the order of `KthLargest64`: −0 is 0, and NaN above all."""
    value = np.float64(np.nan) if number != number else number + 0.0
    bits = np.uint64(np.float64(value).view(np.uint64))
    return np.uint64(~bits) if value < 0.0 else np.uint64(bits | np.uint64(1 << 63))


@intrinsic
def _trailing_zeros(typing_context, word):

    def generate(context, builder, signature, arguments):
        true = context.get_constant(numba.types.boolean, True)
        return builder.cttz(arguments[0], true)

    return numba.types.uint64(numba.types.uint64), generate


trailing_zeros: Any = _trailing_zeros
"""The number of the lowest bit that is set in a uint64, which must not be 0."""


@intrinsic
def _fused(typing_context, x, y, z):

    def generate(context, builder, signature, arguments):
        return builder.fma(*arguments)

    double = numba.types.float64
    return double(double, double, double), generate


multiply_add: Any = _fused
"""(x, y, z) -> x · y + z, rounded once: that is no other number where the product is exact."""
