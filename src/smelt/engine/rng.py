"""Random numbers addressed by (seed, tensor, model, element): the same whatever the order in which they are asked for.

Two 32-bit numbers come from each 64-bit word; word k of a stream is a SplitMix64-style mix of a counter and a 128-bit
key, the XXH3 digest of (seed, tensor name, model). There is no state: any range of a stream can be made by itself.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

_STEP = np.uint64(0x9E3779B97F4A7C15)
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


def key(seed: int, tensor: str, model: int) -> tuple[int, int]:
    """The 128-bit key of a stream, as two 64-bit words."""
    digest = xxhash.xxh3_128_intdigest(f"smelt uniform 1\0{seed}\0{model}\0{tensor}".encode())
    return digest >> 64, digest & 0xFFFFFFFFFFFFFFFF


def uniform(stream: tuple[int, int], start: int, stop: int, out: NDArray[np.float32] | None = None) -> Any:
    """Elements [start, stop) of a stream, float32 in [0, 1), multiples of 2⁻²⁴."""
    first = start // 2
    words = np.arange(first, (stop + 1) // 2, dtype=np.uint64)
    words *= _STEP
    words += np.uint64(stream[0])
    shifted = words >> np.uint64(30)
    words ^= shifted
    words *= _MIX[0]
    words ^= np.uint64(stream[1])
    np.right_shift(words, np.uint64(27), out=shifted)
    words ^= shifted
    words *= _MIX[1]
    np.right_shift(words, np.uint64(31), out=shifted)
    words ^= shifted
    halves = words.astype("<u8", copy=False).view("<u4")[start - 2 * first : stop - 2 * first]
    values = np.empty(stop - start, dtype=np.float32) if out is None else out
    np.multiply(halves >> np.uint32(8), np.float32(2.0**-24), out=values, casting="same_kind")
    return values
