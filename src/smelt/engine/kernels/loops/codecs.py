"""Elements to float32 and back, and random numbers."""

from __future__ import annotations

from typing import Any

import numpy as np

from smelt.engine.kernels.loops.elements import JIT, mix, widen
from smelt.engine.kernels.loops.elements import to_bfloat16 as rounded


@JIT
def decode(stored: Any, out: Any) -> None:
    for j in range(out.size):
        out[j] = widen(stored[j])


@JIT
def to_bfloat16(values: Any, out: Any) -> None:
    for j in range(out.size):
        out[j] = rounded(values[j])


@JIT
def to_float16(bits: Any, out: Any) -> None:
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
def to_float8(bits: Any, mantissa: int, bias: int, overflow: int, nan: int, out: Any) -> None:
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


@JIT
def any_bfloat16(stored: Any) -> bool:
    worst = np.uint16(0)
    for j in range(stored.size):
        worst = max(worst, np.uint16(stored[j] & np.uint16(0x7FFF)))
    return bool(worst >= np.uint16(0x7F80))


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
