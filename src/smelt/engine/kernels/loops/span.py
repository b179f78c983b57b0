"""Fixed combinations of the inputs; the sum is unrolled when it is compiled, once for each number of models."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba.extending import overload

from smelt.engine.kernels.loops.elements import JIT, infinity, least, magnitude, narrow, rounded_bfloat16, widen
from smelt.engine.kernels.loops.fetch import cut, fetch
from smelt.engine.tiles import PIECE

_ROUNDED_TO_INFINITY = 0x7F7F8000
"""The bits of the least float32 that is infinite as a bfloat16."""


def _loop(stored: Any, coefficients: Any, out: Any) -> bool:
    """out = Σ_i c_i · stored_i, in float64, in the order of the models; whether a number of it is not finite."""
    raise NotImplementedError


def _delta_loop(stored: Any, base: Any, coefficients: Any, out: Any) -> bool:
    """out = base + Σ_i c_i · (stored_i − base), the differences in float32, in the order of the models."""
    raise NotImplementedError


@overload(_loop)
def _unrolled_loop(stored, coefficients, out):
    terms = [f"c{i} * np.float64(widen(s{i}[j]))" for i in range(len(stored))]
    return _written("stored, coefficients, out", len(stored), "", " + ".join(terms), out)


@overload(_delta_loop)
def _unrolled_delta_loop(stored, base, coefficients, out):
    terms = [f"c{i} * np.float64(widen(s{i}[j]) - b)" for i in range(len(stored))]
    value = f"({' + '.join(terms)}) + np.float64(b)"
    return _written("stored, base, coefficients, out", len(stored), "b = widen(base[j])", value, out)


def _written(arguments: str, models: int, first: str, value: str, out: Any) -> Any:
    """The loop written out for a number of models: arrays and coefficients in names of their own.

    An array taken from a tuple inside the loop would be counted as referenced there, and nothing vectorised. A bfloat16
    is first rounded as if there were no NaN, and all of them once more with care where one is not finite.
    """
    lines = [f"def loop({arguments}):"]
    lines += [f"    s{i} = stored[{i}]; c{i} = coefficients[{i}]" for i in range(models)]
    if isinstance(out.dtype, numba.types.Integer):
        lines += ["    largest = np.uint32(0)", "    for j in range(out.size):", f"        {first}"]
        lines += [f"        x = np.float32({value}).view(np.uint32)", "        out[j] = rounded_bfloat16(x)"]
        lines += ["        largest = max(largest, np.uint32(x & np.uint32(0x7FFFFFFF)))"]
        lines += [f"    if largest < np.uint32({_ROUNDED_TO_INFINITY}):", "        return False"]
    lines += ["    worst = least(out)", "    for j in range(out.size):", f"        {first}"]
    lines += [f"        y = narrow({value}, out)", "        out[j] = y", "        worst = max(worst, magnitude(y))"]
    lines += ["    return worst >= infinity(out)"]
    space: dict[str, Any] = {"np": np, "widen": widen, "narrow": narrow, "magnitude": magnitude}
    space |= {"infinity": infinity, "least": least, "rounded_bfloat16": rounded_bfloat16}
    exec("\n".join(lines), space)
    return space["loop"]


@JIT
def weighted_sum(files: Any, stored: Any, coefficients: Any, out: Any) -> bool:
    found = False
    for low in range(0, out.size, PIECE):
        high = min(low + PIECE, out.size)
        at = fetch(files, stored, low, high)
        found |= _loop(cut(stored, at, at + high - low), coefficients, out[low:high])
    return found


@JIT
def sum_of_deltas(files: Any, stored: Any, coefficients: Any, out: Any) -> bool:
    found = False
    for low in range(0, out.size, PIECE):
        high = min(low + PIECE, out.size)
        at = fetch(files, stored, low, high)
        part = cut(stored, at, at + high - low)
        found |= _delta_loop(part[:-1], part[-1], coefficients, out[low:high])
    return found
