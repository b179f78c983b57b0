"""Parameter competition balancing around its exponentials, which are NumPy's: what goes into them, what comes of them.

A chunk is worked on at a time, of which all stays in the second cache: first the exponents, in rows of `parts`, float64
[n + n (n + 1) / 2, chunk], n of the models' own squares and one for each pair; then what their powers are for. The
operations and their order are those of `methods.pcb`, so the bits are too.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from smelt.engine.kernels.loops.elements import (
    JIT,
    drawn_at,
    infinity,
    least,
    magnitude,
    narrow,
    ordered_key,
    rooms,
    widen,
)
from smelt.engine.kernels.loops.fetch import cut, fetch
from smelt.engine.kernels.sizes import MOST_MODELS, RUN
from smelt.engine.tiles import PIECE
from smelt.methods.reducers import LANES


@JIT
def _subtract(stored: Any, base: Any, out: Any) -> None:
    for j in range(base.size):
        out[j] = widen(stored[j]) - widen(base[j])


@JIT
def product_ranges(files: Any, stored: Any, size: int, ranges: Any) -> None:
    """The least and the largest d_i · d_k of each pair, [pairs, 2]; NaN where there is one."""
    room = rooms(MOST_MODELS, RUN, np.float32)
    for low in range(0, size, PIECE):
        high = min(low + PIECE, size)
        at = fetch(files, stored, low, high)
        for start in range(at, at + high - low, RUN):
            part = cut(stored, start, min(start + RUN, at + high - low))
            count = part[-1].size
            for i in range(len(part) - 1):
                _subtract(part[i], part[-1], room[i])
            pair = 0
            for i in range(len(part) - 1):
                for k in range(i, len(part) - 1):
                    smallest, largest, odd = np.inf, -np.inf, 0
                    for j in range(count):
                        product = np.float64(room[i, j]) * np.float64(room[k, j])
                        smallest = product if product < smallest else smallest
                        largest = product if product > largest else largest
                        odd |= product != product
                    if odd:
                        ranges[pair] = np.nan
                    if smallest < ranges[pair, 0]:  # never where NaN stands
                        ranges[pair, 0] = smallest
                    if largest > ranges[pair, 1]:
                        ranges[pair, 1] = largest
                    pair += 1


@JIT
def exponents(
    files: Any, stored: Any, low: int, high: int, ranges: Any, usable: Any, parts: Any, deltas: Any, bases: Any
) -> None:
    """The exponents of elements [low, high), their d_i and b.

    Ranges are [pairs, (least, width)]; a pair that is not `usable` has the same share everywhere.
    """
    at = fetch(files, stored, low, high)
    part = cut(stored, at, at + high - low)
    count, models = high - low, len(part) - 1
    for j in range(count):
        bases[j] = widen(part[-1][j])
    for i in range(models):
        _subtract(part[i], part[-1], deltas[i])
    pair = 0
    for i in range(models):
        for k in range(i, models):
            row = parts[models + pair]
            lowest, width = ranges[pair, 0], ranges[pair, 1]
            if usable[pair]:
                for j in range(count):
                    row[j] = (np.float64(deltas[i, j]) * np.float64(deltas[k, j]) - lowest) / width - 1.0
            else:
                for j in range(count):
                    row[j] = -1.0
            if i == k:
                for j in range(count):
                    parts[i, j] = models * row[j]
            pair += 1


@JIT
def add_parts(parts: Any, lanes: Any) -> None:
    """lanes[p, l] += parts[p, l], parts[p, l + 256], ..."""
    count = parts.shape[1]
    for p in range(len(parts)):
        row, sums = parts[p], lanes[p]
        for first in range(0, count // LANES * LANES, LANES):
            some = row[first : first + LANES]
            for lane in range(LANES):
                sums[lane] += some[lane]
        for j in range(count // LANES * LANES, count):
            sums[j % LANES] += row[j]


@JIT
def _divide(parts: Any, sums: Any) -> None:
    """The shares, in place of the parts."""
    for p in range(len(parts)):
        row, total = parts[p], sums[p]
        for j in range(row.size):
            row[j] = row[j] / total


@JIT
def _score(shares: Any, models: int, i: int, low: int, high: int, out: Any) -> None:
    """β_i of elements [low, high) of a chunk."""
    for j in range(high - low):
        out[j] = 0.0
    for k in range(models):
        first, last = min(i, k), max(i, k)
        row = shares[models + first * models - first * (first - 1) // 2 + last - first][low:high]
        for j in range(row.size):
            out[j] += row[j]
    own = shares[i][low:high]
    for j in range(own.size):
        out[j] = own[j] * out[j]


@JIT
def count_scores(parts: Any, sums: Any, models: int, digit: int, prefixes: Any, first: bool, histograms: Any) -> None:
    """Histograms of 16 bits, from bit `digit` on, of the β_i's keys that begin with prefixes[i] (`first`: of all)."""
    run = rooms(1, RUN, np.float64)[0]
    _divide(parts, sums)
    for low in range(0, parts.shape[1], RUN):
        high = min(low + RUN, parts.shape[1])
        for i in range(models):
            _score(parts, models, i, low, high, run)
            for j in range(high - low):
                place = np.uint64(ordered_key(run[j]) >> np.uint64(digit))
                if first or np.uint64(place >> np.uint64(16)) == prefixes[i]:
                    histograms[i, place & np.uint64(0xFFFF)] += 1


@JIT
def _choose(weights: Any, deltas: Any, value: float, limit: Any, key: Any, start: int, count: int) -> None:
    """Weights become 0 but where they are above the cut, or drawn among those that equal it, or d is not finite."""
    kept = rooms(1, RUN, np.uint8)[0]
    for j in range(count):
        kept[j] = np.uint8(0 if weights[j] <= value and np.abs(deltas[j]) < np.inf else 1)
    if limit > 0:
        for j in range(count):
            if weights[j] == value and drawn_at(start + j, key) < limit:
                kept[j] = np.uint8(1)
    for j in range(count):
        weights[j] = weights[j] if kept[j] else 0.0


@JIT
def _finish(bases: Any, total: Any, divisor: Any, factor: float, out: Any) -> bool:
    worst = least(out)
    for j in range(out.size):
        mixed = total[j] / (divisor[j] if divisor[j] > 0.0 else 1.0)
        y = narrow(np.float32(np.float64(bases[j]) + factor * mixed), out)
        out[j] = y
        worst = max(worst, magnitude(y))
    return bool(worst >= infinity(out))


@JIT
def balance(
    parts: Any,
    sums: Any,
    deltas: Any,
    bases: Any,
    chooses: bool,
    values: Any,
    limits: Any,
    keys: Any,
    start: int,
    factor: float,
    out: Any,
) -> bool:
    """b + λ · Σ β_i d_i / Σ β_i of a chunk; whether a number of it is not finite."""
    weights, total, divisor = rooms(1, RUN, np.float64)[0], rooms(1, RUN, np.float64)[0], rooms(1, RUN, np.float64)[0]
    _divide(parts, sums)
    found = False
    for low in range(0, out.size, RUN):
        high = min(low + RUN, out.size)
        count = high - low
        for j in range(count):
            total[j] = divisor[j] = 0.0
        for i in range(len(deltas)):
            delta = deltas[i][low:high]
            _score(parts, len(deltas), i, low, high, weights)
            if chooses:
                _choose(weights, delta, values[i], limits[i], keys[i], start + low, count)
            for j in range(count):
                more = total[j] + weights[j] * np.float64(delta[j])
                total[j] = more if weights[j] > 0.0 else total[j]
                divisor[j] += weights[j]
        found |= _finish(bases[low:high], total, divisor, factor, out[low:high])
    return found
