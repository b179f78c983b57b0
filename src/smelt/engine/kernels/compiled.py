"""How kernels are compiled, and the small functions that they share."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba.extending import overload

JIT: Any = numba.njit(nogil=True, cache=True, error_model="numpy")
"""Compile when first called, cache on disk, run without the interpreter lock. Never fastmath, never parallel."""


def widen(stored: Any) -> Any:
    """A stored element as float32: a uint16 holds a bfloat16, a float32 is itself."""
    raise NotImplementedError


@overload(widen, inline="always")
def _widen(stored):
    if isinstance(stored, numba.types.Integer):
        return lambda stored: np.uint32(np.uint32(stored) << np.uint32(16)).view(np.float32)
    return lambda stored: np.float32(stored)


@numba.njit(inline="always")
def mix(word: Any, low: Any, high: Any) -> Any:
    """Word `word` of a random stream with key (low, high): `smelt.engine.rng` in integers of 64 bits."""
    z = np.uint64(low) + np.uint64(word) * np.uint64(0x9E3779B97F4A7C15)
    z ^= z >> np.uint64(30)
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= np.uint64(high)
    z ^= z >> np.uint64(27)
    z *= np.uint64(0x94D049BB133111EB)
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
