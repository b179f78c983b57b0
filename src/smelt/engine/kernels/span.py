"""Methods whose result is a fixed combination of their inputs: stored bytes to stored bytes in one pass.

The sum over models is unrolled when it is compiled, once for each number of models.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba.extending import overload

from smelt.dtypes import BF16, F8_E4M3, F8_E5M2, F16, F32
from smelt.engine.given import Given
from smelt.engine.kernels.compiled import JIT, infinity, least, magnitude, narrow, widen

MOST_MODELS = 12
"""Above this many models a method's own function is called."""
STORED: dict[str, Any] = {
    BF16.code: np.uint16,
    F16.code: np.int16,
    F8_E4M3.code: np.uint8,
    F8_E5M2.code: np.int8,
    F32.code: np.float32,
}
"""How kernels see stored elements of their inputs: `widen` knows each type by its kind of integer."""
ELEMENTS = {BF16.code: np.uint16, F32.code: np.float32}
"""How they see those of their output; other types are encoded from float32."""


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
def _sum(stored: Any, coefficients: Any, out: Any) -> bool:
    return _loop(stored, coefficients, out)


@JIT
def _sum_of_deltas(stored: Any, base: Any, coefficients: Any, out: Any) -> bool:
    return _delta_loop(stored, base, coefficients, out)


def elements(given: Given) -> tuple[Any, ...] | None:
    """The stored arrays of a tile as kernels take them; None where their types differ or have no kernel."""
    first = given.stored[0][1]
    kind = STORED.get(first.code)
    if kind is None or len(given.stored) > MOST_MODELS or any(dtype is not first for _, dtype in given.stored):
        return None
    return tuple([raw.view(kind) for raw, _ in given.stored])


def plain(coefficients: Any, kind: Any = float) -> tuple[Any, ...]:
    """Coefficients as a tuple: numbers in registers, which no store into the output can change."""
    return tuple([kind(c) for c in coefficients])


def span_tile(method: Any, given: Given, out: Any) -> bool | None:
    """The tile of a method that gives b + Σ c_i d_i (with a base) or Σ c_i x_i, where `coefficients` is [n]."""
    stored = elements(given)
    weights = given.once("coefficients of the tile", lambda: _of_models(given["coefficients"]))
    if stored is None or weights is None:
        return None
    if given.has_base:
        return bool(_sum_of_deltas(stored[:-1], stored[-1], weights, out))
    return bool(_sum(stored, weights, out))


def _of_models(coefficients: Any) -> tuple[float, ...] | None:
    """One number per model; None where there are more, one for each column or row."""
    return None if coefficients is None or np.ndim(coefficients) != 1 else plain(coefficients)


def slerp_tile(method: Any, given: Given, out: Any) -> bool | None:
    """The tile of slerp: c_0 b + c_1 x."""
    stored = elements(given)
    if stored is None:
        return None
    weights = given.once("coefficients of the tile", lambda: plain(given["coefficients"]))
    return bool(_sum((stored[1], stored[0]), weights, out))


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
