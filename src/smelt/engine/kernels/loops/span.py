"""Fixed combinations of the inputs; the sum is unrolled when it is compiled, once for each number of models."""

from __future__ import annotations

from typing import Any

from numba.extending import overload

from smelt.engine.kernels.loops.elements import JIT
from smelt.engine.kernels.loops.fetch import cut, fetch
from smelt.engine.kernels.loops.output import made
from smelt.engine.tiles import PIECE


def _loop(stored: Any, coefficients: Any, out: Any) -> bool:
    """out = Σ_i c_i · stored_i, in float64, in the order of the models; whether a number of it is not finite."""
    raise NotImplementedError


def _delta_loop(stored: Any, base: Any, coefficients: Any, out: Any) -> bool:
    """out = base + Σ_i c_i · (stored_i − base), the differences in float32, in the order of the models."""
    raise NotImplementedError


@overload(_loop)
def _unrolled_loop(stored, coefficients, out):
    terms = [f"c{i} * np.float64(widen(s{i}[j]))" for i in range(len(stored))]
    return _written("stored, coefficients, out", len(stored), [], " + ".join(terms), out)


@overload(_delta_loop)
def _unrolled_delta_loop(stored, base, coefficients, out):
    terms = [f"c{i} * np.float64(widen(s{i}[j]) - b)" for i in range(len(stored))]
    value = f"({' + '.join(terms)}) + np.float64(b)"
    return _written("stored, base, coefficients, out", len(stored), ["        b = widen(base[j])"], value, out)


def _written(arguments: str, models: int, body: list[str], value: str, out: Any) -> Any:
    """The loop written out for a number of models: arrays and coefficients in names of their own.

    An array taken from a tuple inside the loop would be counted as referenced there, and nothing vectorised.
    """
    head = [f"def loop({arguments}):", *(f"    s{i} = stored[{i}]; c{i} = coefficients[{i}]" for i in range(models))]
    return made(head, body, value, out)


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
