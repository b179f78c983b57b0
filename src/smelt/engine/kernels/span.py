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


def _terms(stored: Any, coefficients: Any, j: Any) -> Any:
    """Σ_i c_i · stored_i[j], in float64, in the order of the models."""
    raise NotImplementedError


def _delta_terms(stored: Any, base: Any, coefficients: Any, j: Any) -> Any:
    """Σ_i c_i · (stored_i[j] − base), the difference in float32, in the order of the models."""
    raise NotImplementedError


@overload(_terms, inline="always")
def _unrolled_terms(stored, coefficients, j):
    terms = [f"coefficients[{i}] * np.float64(widen(stored[{i}][j]))" for i in range(len(stored))]
    return _function("stored, coefficients, j", " + ".join(terms))


@overload(_delta_terms, inline="always")
def _unrolled_delta_terms(stored, base, coefficients, j):
    terms = [f"coefficients[{i}] * np.float64(widen(stored[{i}][j]) - base)" for i in range(len(stored))]
    return _function("stored, base, coefficients, j", " + ".join(terms))


def _function(arguments: str, expression: str) -> Any:
    """A function of one expression, written out for a number of models."""
    space: dict[str, Any] = {"np": np, "widen": widen}
    exec(f"def written({arguments}): return {expression}", space)
    return space["written"]


@JIT
def _sum(stored: Any, coefficients: Any, out: Any) -> None:
    for j in range(out.size):
        out[j] = np.float32(_terms(stored, coefficients, j))


@JIT
def _sum_of_deltas(stored: Any, base: Any, coefficients: Any, out: Any) -> None:
    for j in range(out.size):
        b = widen(base[j])
        out[j] = np.float32(_delta_terms(stored, b, coefficients, j) + np.float64(b))


def elements(given: Given) -> tuple[Any, ...] | None:
    """The stored arrays of a tile as kernels take them: uint16 for bfloat16, float32; None for other types."""
    kinds = {BF16.code: np.uint16, F32.code: np.float32}
    types = {dtype.code for _, dtype in given.stored}
    if len(types) != 1 or not types <= set(kinds) or len(given.stored) > MOST_MODELS:
        return None
    (code,) = types
    return tuple(raw.view(kinds[code]) for raw, _ in given.stored)


def span_tile(method: Any, given: Given) -> Any:
    """The tile of a method that gives b + Σ c_i d_i (with a base) or Σ c_i x_i, where `coefficients` is [n]."""
    coefficients = given["coefficients"]
    stored = elements(given)
    if stored is None or coefficients is None or np.ndim(coefficients) != 1:
        return None
    out = given.scratch.array("values", (given.count,), np.float32)
    weights = np.ascontiguousarray(coefficients, dtype=np.float64)
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
    _sum((stored[-1], stored[0]), np.asarray(given["coefficients"], dtype=np.float64), out)
    return out


FUNCTIONS: Any = {
    ("slerp", "tile"): slerp_tile,
    **{
        (name, "tile"): span_tile
        for name in ("linear", "task_arithmetic", "nuslerp", "multislerp", "karcher", "model_stock", "passthrough")
    },
}
"""(method, function) -> kernel."""
