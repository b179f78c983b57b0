"""Trim, drop and elect on stored bytes: the functions of ties and dare, each in one pass over a tile.

A tile is worked on in short runs that stay in the first cache. The operations and their order are those of
`methods.stages`, so the bits are too.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from smelt.engine.given import Given
from smelt.engine.kernels.compiled import JIT, draw, widen
from smelt.engine.kernels.span import elements
from smelt.engine.kernels.sums import count_digits, histograms
from smelt.methods.reducers import LANES
from smelt.methods.stages import TINY, counts_to_keep, divisor

RUN = 512
"""Elements worked on at a time."""
_KEEP_ALL, _TRIM, _DROP = 0, 1, 2


@JIT
def _deltas(stored: Any, base: Any, out: Any) -> None:
    for j in range(out.size):
        out[j] = widen(stored[j]) - widen(base[j])


@JIT
def _magnitude_bits(stored: Any, base: Any, out: Any) -> None:
    for j in range(out.size):
        out[j] = np.float32(widen(stored[j]) - widen(base[j])).view(np.uint32) & np.uint32(0x7FFFFFFF)


@JIT
def _keep(deltas: Any, rule: int, value: Any, share: Any, density: Any, key: Any, start: int, numbers: Any) -> None:
    """Set to zero what is not kept; `numbers` is room for random numbers."""
    if rule == _DROP:
        draw(key[0], key[1], start, numbers)
        for j in range(deltas.size):
            if not np.float64(numbers[j]) < density:
                deltas[j] = np.float32(0.0)
    elif rule == _TRIM:
        equal = 0
        for j in range(deltas.size):
            equal += np.abs(deltas[j]) == value
        if equal and np.float32(0.0) < share < np.float32(1.0):
            draw(key[0], key[1], start, numbers)
            for j in range(deltas.size):
                magnitude = np.abs(deltas[j])
                if not (magnitude > value or (magnitude == value and numbers[j] < share)):
                    deltas[j] = np.float32(0.0)
        else:
            kept = share >= np.float32(1.0)
            for j in range(deltas.size):
                magnitude = np.abs(deltas[j])
                if not (magnitude > value or (kept and magnitude == value)):
                    deltas[j] = np.float32(0.0)


@JIT
def _add_magnitudes(
    stored: Any, base: Any, rule: int, value: Any, share: Any, density: Any, key: Any, start: int, lanes: Any
) -> None:
    """Add abs of what is kept of one model's deltas to the lanes, in the order of `Sum`."""
    deltas = np.empty(RUN, dtype=np.float32)
    numbers = np.empty(RUN, dtype=np.float32)
    for low in range(0, stored.size, RUN):
        high = min(low + RUN, stored.size)
        part = deltas[: high - low]
        _deltas(stored[low:high], base[low:high], part)
        _keep(part, rule, value, share, density, key, start + low, numbers[: high - low])
        whole = part.size // LANES * LANES
        for first in range(0, whole, LANES):
            row = part[first : first + LANES]
            for lane in range(LANES):
                lanes[lane] += np.float64(np.abs(row[lane]))
        for j in range(whole, part.size):
            lanes[j - whole] += np.float64(np.abs(part[j]))


@JIT
def _mix(
    stored: Any,
    base: Any,
    rule: int,
    value: Any,
    share: Any,
    density: Any,
    keys: Any,
    start: int,
    weight: Any,
    scale: Any,
    elected: bool,
    normalize: bool,
    total_weight: float,
    factor: float,
    out: Any,
) -> None:
    """b + λ · mixed of a tile: keep, weigh, elect, normalise; see `methods.stages.combine`."""
    models = len(stored)
    weighted = np.empty((models, RUN), dtype=np.float64)
    totals = np.empty(RUN, dtype=np.float64)
    mixed = np.empty(RUN, dtype=np.float64)
    agreeing = np.empty(RUN, dtype=np.float64)
    deltas = np.empty(RUN, dtype=np.float32)
    numbers = np.empty(RUN, dtype=np.float32)
    for low in range(0, out.size, RUN):
        high = min(low + RUN, out.size)
        count = high - low
        bases = base[low:high]
        total = totals[:count]
        for i in range(models):
            part = deltas[:count]
            _deltas(stored[i][low:high], bases, part)
            _keep(part, rule, value[i], share[i], density[i], keys[i], start + low, numbers[:count])
            row = weighted[i][:count]
            amount = scale[i]
            if i == 0:
                for j in range(count):
                    row[j] = amount * np.float64(part[j])
                    total[j] = row[j]
            else:
                for j in range(count):
                    row[j] = amount * np.float64(part[j])
                    total[j] += row[j]
        result = out[low:high]
        if not elected:
            for j in range(count):
                result[j] = np.float32(np.float64(widen(bases[j])) + factor * (total[j] / total_weight))
            continue
        sums = mixed[:count]
        weights = agreeing[:count]
        sums[:] = 0.0
        weights[:] = 0.0
        for i in range(models):
            row = weighted[i][:count]
            amount = weight[i]
            for j in range(count):
                agrees = row[j] > 0.0 if total[j] >= 0.0 else row[j] < 0.0
                sums[j] = sums[j] + row[j] if agrees else sums[j]
                weights[j] = weights[j] + amount if agrees else weights[j]
        if normalize:
            for j in range(count):
                below = weights[j] if np.abs(weights[j]) >= TINY else 1.0
                sums[j] = sums[j] / below
        for j in range(count):
            result[j] = np.float32(np.float64(widen(bases[j])) + factor * sums[j])


def _rule(method: Any, given: Given, *, random: bool) -> tuple[Any, ...]:
    """How a method keeps entries: the rule, and per model the cut's value and share, and the density."""
    density = np.ascontiguousarray(method.density.reshape(-1))
    zeros = np.zeros(given.models, dtype=np.float32)
    if random:
        return _DROP, zeros, zeros, density
    cut = given["cut"]
    if cut is None:
        return _KEEP_ALL, zeros, zeros, density
    return _TRIM, np.ascontiguousarray(cut.value[:, 0]), np.ascontiguousarray(cut.share[:, 0]), density


def _keys(given: Given) -> Any:
    return np.array(given.streams, dtype=np.uint64).reshape(-1, 2)


def tile(method: Any, given: Given, *, random: bool, elected: bool) -> Any:
    """The tile of a method that keeps, weighs and mixes deltas: float32 [t]."""
    stored = elements(given)
    if stored is None:
        return None
    weight = np.ascontiguousarray(method.weight.reshape(-1))
    factors = given["factors"]
    scale = weight if factors is None else np.ascontiguousarray((method.weight * factors).reshape(-1))
    total_weight = divisor(weight) if method.normalize and not elected else 1.0
    out = given.scratch.array("values", (given.count,), np.float32)
    rule, value, share, density = _rule(method, given, random=random)
    keys = _keys(given)
    settings = (weight, scale, elected, bool(method.normalize), total_weight, float(method.lambda_))
    _mix(stored[:-1], stored[-1], rule, value, share, density, keys, given.start, *settings, out)
    return out


def magnitudes(method: Any, given: Given, *, kept: bool, random: bool) -> Any:
    """Partial results of Σ abs(d_i), of all entries or of those kept, for one block: lanes [n, 256]."""
    stored = elements(given)
    if stored is None:
        return None
    lanes = np.zeros((given.models, LANES))
    rule, value, share, density = _rule(method, given, random=random) if kept else _nothing_dropped(given)
    keys = _keys(given)
    for i in range(given.models):
        key = keys[i]
        _add_magnitudes(stored[i], stored[-1], rule, value[i], share[i], density[i], key, given.start, lanes[i])
    return lanes


def _nothing_dropped(given: Given) -> tuple[Any, ...]:
    zeros = np.zeros(given.models, dtype=np.float32)
    return _KEEP_ALL, zeros, zeros, np.zeros(given.models)


def cut(method: Any, given: Given, reducer: Any) -> Any:
    """The partial result of KthLargest over abs(d_i), for a tile."""
    stored = elements(given)
    if stored is None:
        return None
    histogram = histograms(reducer, given.models)
    bits = given.scratch.array("bits", (given.count,), np.uint32)
    prefixes = reducer.prefixes(given.models)
    for i in range(given.models):
        _magnitude_bits(stored[i], stored[-1], bits)
        count_digits(bits, prefixes[i], histogram[i])
    return counts_to_keep(method.density, given["size"]).reshape(given.models, -1), histogram


FUNCTIONS: dict[tuple[str, str], Any] = {
    ("ties", "cut"): cut,
    ("ties", "whole"): lambda method, given, reducer: magnitudes(method, given, kept=False, random=False),
    ("ties", "kept"): lambda method, given, reducer: magnitudes(method, given, kept=True, random=False),
    ("ties", "tile"): lambda method, given: tile(method, given, random=False, elected=True),
    ("dare_linear", "whole"): lambda method, given, reducer: magnitudes(method, given, kept=False, random=True),
    ("dare_linear", "kept"): lambda method, given, reducer: magnitudes(method, given, kept=True, random=True),
    ("dare_linear", "tile"): lambda method, given: tile(method, given, random=True, elected=False),
    ("dare_ties", "whole"): lambda method, given, reducer: magnitudes(method, given, kept=False, random=True),
    ("dare_ties", "kept"): lambda method, given, reducer: magnitudes(method, given, kept=True, random=True),
    ("dare_ties", "tile"): lambda method, given: tile(method, given, random=True, elected=True),
}
"""(method, function) -> kernel. Those of sums are given one block at a time."""
