"""Fused CPU kernels (numba). A kernel never adds meaning: each has an array definition whose bits it reproduces.

Three kinds: element codecs and random numbers, partial results of reducers, and whole functions of methods that work
on the stored bytes. Without numba everything works, by the definitions.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from smelt import dtypes
from smelt.engine.rng import uniform


@dataclass(frozen=True, slots=True)
class Kernels:
    """What the engine calls for a tile.

    `partials` maps a reducer's class to (reducer, values, block) -> its partial results, one for each block of so many
    elements where it is ordered. `functions` maps (method, "tile") to (method, given, out) -> whether a number that it
    wrote to `out` is not finite, and (method, reductions of one pass...) to (method, given, reducers...) -> their
    partial results; None where the kernel does not apply, and the method's own function is called. `out` holds stored
    elements where `elements` names a type for them, else float32.
    """

    decode: Callable[[Any, dtypes.DType, Any], None] = dtypes.decode
    encode: Callable[[Any, dtypes.DType, Any], None] = dtypes.encode
    uniform: Callable[[tuple[int, int], int, int, Any], Any] = uniform
    any_nonfinite: Callable[[Any, dtypes.DType], bool] = dtypes.any_nonfinite
    partials: Mapping[type, Callable[[Any, Any], Any]] = field(default_factory=dict)
    functions: Mapping[tuple[str, ...], Callable[..., Any]] = field(default_factory=dict)
    elements: Mapping[str, Any] = field(default_factory=dict)


STREAMED = frozenset(
    {
        *("linear", "task_arithmetic", "slerp", "nuslerp", "multislerp", "karcher", "model_stock", "passthrough"),
        *("sma", "wma", "ema", "expo", "geometric_median", "ties", "dare_linear", "dare_ties"),
        *("breadcrumbs", "breadcrumbs_ties", "della", "della_linear"),
        *("nearswap", "ram", "ramplus_tl", "sce", "arcee_fusion", "consensus", "localize", "pcb"),
    }
)
"""The methods whose tiles have a kernel: one that reads by itself, piece by piece, where the models lie in files."""

DEFINITIONS = Kernels()
"""No kernel at all: NumPy arrays and the methods' own functions."""


@cache
def fused() -> Kernels:
    """The kernels, compiled when first called and cached on disk; the definitions where numba is not installed."""
    if importlib.util.find_spec("numba") is None:
        return DEFINITIONS
    from smelt.engine.kernels import codecs, competition, entries, feeding, fusion, ranks, span, sums, task_vectors

    return Kernels(
        decode=codecs.decode,
        encode=codecs.encode,
        uniform=codecs.uniform,
        any_nonfinite=codecs.any_nonfinite,
        partials=sums.PARTIALS,
        functions=dict(
            entry
            for one in (span, sums, task_vectors, ranks, entries, fusion, competition)
            for entry in one.FUNCTIONS.items()
        ),
        elements=feeding.ELEMENTS,
    )
