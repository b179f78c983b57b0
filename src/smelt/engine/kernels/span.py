"""Methods whose result is a fixed combination of their inputs: stored bytes to stored bytes in one pass.

The sum over models is unrolled when it is compiled, once for each number of models.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba.extending import overload

from smelt.dtypes import BF16, F32
from smelt.engine.given import Given
from smelt.engine.kernels.compiled import JIT, infinity, least, magnitude, narrow, widen
from smelt.engine.kernels.fetch import cut, feed, fetch
from smelt.engine.tiles import PIECE

ELEMENTS = {BF16.code: np.uint16, F32.code: np.float32}
"""How kernels see stored elements of their output; other types are encoded from float32."""


def _loop(stored: Any, coefficients: Any, out: Any) -> bool:
    """out = Σ_i c_i · stored_i, in float64, in the order of the models; whether a number of it is not finite."""
    raise NotImplementedError


def _delta_loop(stored: Any, base: Any, coefficients: Any, out: Any) -> bool:
    """out = base + Σ_i c_i · (stored_i − base), the differences in float32, in the order of the models."""
    raise NotImplementedError


@overload(_loop)
def _unrolled_loop(stored, coefficients, out):
    terms = [f"c{i} * np.float64(widen(s{i}[j]))" for i in range(len(stored))]
    return _written("stored, coefficients, out", len(stored), "", " + ".join(terms))


@overload(_delta_loop)
def _unrolled_delta_loop(stored, base, coefficients, out):
    terms = [f"c{i} * np.float64(widen(s{i}[j]) - b)" for i in range(len(stored))]
    value = f"({' + '.join(terms)}) + np.float64(b)"
    return _written("stored, base, coefficients, out", len(stored), "b = widen(base[j])", value)


def _written(arguments: str, models: int, first: str, value: str) -> Any:
    """The loop written out for a number of models: arrays and coefficients in names of their own.

    An array taken from a tuple inside the loop would be counted as referenced there, and nothing vectorised.
    """
    lines = [f"def loop({arguments}):"]
    lines += [f"    s{i} = stored[{i}]; c{i} = coefficients[{i}]" for i in range(models)]
    lines += ["    worst = least(out)", "    for j in range(out.size):", f"        {first}"]
    lines += [f"        y = narrow({value}, out)", "        out[j] = y", "        worst = max(worst, magnitude(y))"]
    lines += ["    return worst >= infinity(out)"]
    space: dict[str, Any] = {"np": np, "widen": widen, "narrow": narrow, "magnitude": magnitude}
    space |= {"infinity": infinity, "least": least}
    exec("\n".join(lines), space)
    return space["loop"]


@JIT
def _sum(files: Any, stored: Any, coefficients: Any, out: Any) -> bool:
    found = False
    for low in range(0, out.size, PIECE):
        high = min(low + PIECE, out.size)
        at = fetch(files, stored, low, high)
        found |= _loop(cut(stored, at, at + high - low), coefficients, out[low:high])
    return found


@JIT
def _sum_of_deltas(files: Any, stored: Any, coefficients: Any, out: Any) -> bool:
    found = False
    for low in range(0, out.size, PIECE):
        high = min(low + PIECE, out.size)
        at = fetch(files, stored, low, high)
        part = cut(stored, at, at + high - low)
        found |= _delta_loop(part[:-1], part[-1], coefficients, out[low:high])
    return found


def plain(coefficients: Any, kind: Any = float) -> tuple[Any, ...]:
    """Coefficients as a tuple: numbers in registers, which no store into the output can change."""
    return tuple([kind(c) for c in coefficients])


def span_tile(method: Any, given: Given, out: Any) -> bool | None:
    """The tile of a method that gives b + Σ c_i d_i (with a base) or Σ c_i x_i, where `coefficients` is [n]."""
    fed = feed(given)
    weights = given.once("coefficients of the tile", lambda: _of_models(given["coefficients"]))
    if fed is None or weights is None:
        return None
    return bool((_sum_of_deltas if given.has_base else _sum)(*fed, weights, out))


def _of_models(coefficients: Any) -> tuple[float, ...] | None:
    """One number per model; None where there are more, one for each column or row."""
    return None if coefficients is None or np.ndim(coefficients) != 1 else plain(coefficients)


def slerp_tile(method: Any, given: Given, out: Any) -> bool | None:
    """The tile of slerp: c_0 b + c_1 x, of which the base comes last in what is stored."""
    fed = feed(given)
    weights = given.once("coefficients of the tile", lambda: plain(given["coefficients"])[::-1])
    return None if fed is None else bool(_sum(*fed, weights, out))


FUNCTIONS: Any = {
    ("slerp", "tile"): slerp_tile,
    **{
        (name, "tile"): span_tile
        for name in (
            *("linear", "task_arithmetic", "nuslerp", "multislerp", "karcher", "model_stock", "passthrough"),
            *("sma", "wma", "ema", "expo", "geometric_median"),
        )
    },
}
"""(method, function) -> kernel."""
