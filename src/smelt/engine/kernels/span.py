"""Methods whose result is a fixed combination of their inputs: stored bytes to stored bytes in one pass."""

from __future__ import annotations

from typing import Any

import numpy as np

from smelt.engine.given import Given
from smelt.engine.kernels.feeding import feed, plain
from smelt.engine.kernels.loading import Loop

_SUM = Loop("span", "weighted_sum")
_SUM_OF_DELTAS = Loop("span", "sum_of_deltas")


def span_tile(method: Any, given: Given, out: Any) -> bool | None:
    """The tile of a method that gives b + Σ c_i d_i (with a base) or Σ c_i x_i, where `coefficients` is [n]."""
    fed = feed(given)
    weights = given.once("coefficients of the tile", lambda: _of_models(given["coefficients"]))
    if fed is None or weights is None:
        return None
    return bool((_SUM_OF_DELTAS if given.has_base else _SUM)(*fed, weights, out))


def _of_models(coefficients: Any) -> tuple[float, ...] | None:
    """One number per model; None where there are more, one for each column or row."""
    return None if coefficients is None or np.ndim(coefficients) != 1 else plain(coefficients)


def slerp_tile(method: Any, given: Given, out: Any) -> bool | None:
    """The tile of slerp: c_0 b + c_1 x, of which the base comes last in what is stored."""
    fed = feed(given)
    weights = given.once("coefficients of the tile", lambda: plain(given["coefficients"])[::-1])
    return None if fed is None else bool(_SUM(*fed, weights, out))


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
