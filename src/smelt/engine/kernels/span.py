"""Methods whose result is a fixed combination of their inputs: stored bytes to weighted sum in one pass.

The sum over models is unrolled when it is compiled, once for each number of models.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba.extending import overload

from smelt.dtypes import BF16, F32
from smelt.engine.given import Given
from smelt.engine.kernels.compiled import JIT, widen

MOST_MODELS = 12
"""Above this many models a method's own function is called."""


def _loop(stored: Any, coefficients: Any, out: Any) -> None:
    """out = Σ_i c_i · stored_i, in float64, in the order of the models."""
    raise NotImplementedError


def _delta_loop(stored: Any, base: Any, coefficients: Any, out: Any) -> None:
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
    lines += ["    for j in range(out.size):", f"        {first}", f"        out[j] = np.float32({value})"]
    space: dict[str, Any] = {"np": np, "widen": widen}
    exec("\n".join(lines), space)
    return space["loop"]


@JIT
def _sum(stored: Any, coefficients: Any, out: Any) -> None:
    _loop(stored, coefficients, out)


@JIT
def _sum_of_deltas(stored: Any, base: Any, coefficients: Any, out: Any) -> None:
    _delta_loop(stored, base, coefficients, out)


def elements(given: Given) -> tuple[Any, ...] | None:
    """The stored arrays of a tile as kernels take them: uint16 for bfloat16, float32; None for other types."""
    kinds = {BF16.code: np.uint16, F32.code: np.float32}
    types = {dtype.code for _, dtype in given.stored}
    if len(types) != 1 or not types <= set(kinds) or len(given.stored) > MOST_MODELS:
        return None
    (code,) = types
    return tuple(raw.view(kinds[code]) for raw, _ in given.stored)


def _plain(coefficients: Any) -> tuple[float, ...]:
    """Coefficients as a tuple: numbers in registers, which no store into the output can change."""
    return tuple(float(c) for c in coefficients)


def span_tile(method: Any, given: Given) -> Any:
    """The tile of a method that gives b + Σ c_i d_i (with a base) or Σ c_i x_i, where `coefficients` is [n]."""
    coefficients = given["coefficients"]
    stored = elements(given)
    if stored is None or coefficients is None or np.ndim(coefficients) != 1:
        return None
    out = given.scratch.array("values", (given.count,), np.float32)
    weights = _plain(coefficients)
    if given.has_base:
        _sum_of_deltas(stored[:-1], stored[-1], weights, out)
    else:
        _sum(stored, weights, out)
    return out


def slerp_tile(method: Any, given: Given) -> Any:
    """The tile of slerp: c_0 b + c_1 x."""
    stored = elements(given)
    if stored is None:
        return None
    out = given.scratch.array("values", (given.count,), np.float32)
    _sum((stored[-1], stored[0]), _plain(given["coefficients"]), out)
    return out


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
