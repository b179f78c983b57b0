"""Partial results of reducers: sums and inner products by lanes, entries around the k-th largest, their digits."""

from __future__ import annotations

from typing import Any

import numpy as np

from smelt.engine.kernels.loops.elements import JIT, multiply_add, rooms, widen
from smelt.engine.kernels.loops.fetch import cut, fetch
from smelt.engine.kernels.loops.picking import count_above, keys_between, multiply_two
from smelt.engine.kernels.sizes import MOST_MODELS, PLACES, RUN
from smelt.engine.tiles import BLOCK, PIECE
from smelt.methods.reducers import LANES


@JIT
def add_run(run: Any, count: int, lanes: Any) -> None:
    """lanes[l] += run[l], run[l + 256], ... for the first `count` elements of a run, in this order."""
    whole = count // (2 * LANES) * (2 * LANES)
    for first in range(0, whole, 2 * LANES):
        one, two = run[first : first + LANES], run[first + LANES : first + 2 * LANES]
        for lane in range(LANES):
            lanes[lane] = (lanes[lane] + np.float64(one[lane])) + np.float64(two[lane])
    for j in range(whole, count):
        lanes[j % LANES] += np.float64(run[j])


@JIT
def multiply_run(x: Any, y: Any, count: int, lanes: Any) -> None:
    """As `add_run`, of x · y: products of float32 numbers, which are exact in float64."""
    whole = count // (2 * LANES) * (2 * LANES)
    for first in range(0, whole, 2 * LANES):
        one, two = x[first : first + LANES], x[first + LANES : first + 2 * LANES]
        other, next_ = y[first : first + LANES], y[first + LANES : first + 2 * LANES]
        for lane in range(LANES):
            near = multiply_add(np.float64(one[lane]), np.float64(other[lane]), lanes[lane])
            lanes[lane] = multiply_add(np.float64(two[lane]), np.float64(next_[lane]), near)
    for j in range(whole, count):
        lanes[j % LANES] += np.float64(x[j]) * np.float64(y[j])


@JIT
def widen_run(stored: Any, out: Any) -> None:
    for j in range(stored.size):
        out[j] = widen(stored[j])


@JIT
def _subtract_run(base: Any, out: Any) -> None:
    for j in range(base.size):
        out[j] = out[j] - widen(base[j])


@JIT
def sums(row: Any, block: int, lanes: Any) -> None:
    """Per block, lanes[l] += row[l], row[l + 256], ..."""
    room = rooms(1, RUN, np.float32)[0]
    for low in range(0, row.size, RUN):
        part = row[low : min(low + RUN, row.size)]
        widen_run(part, room)
        add_run(room, part.size, lanes[low // block])


@JIT
def products(stored: Any, base: Any, of_deltas: bool, block: int, first: int, lanes: Any) -> None:
    """Inner products of all pairs of the vectors, or of their differences from the base.

    They are added to lanes [pairs, blocks, 256] from block `first` on.
    """
    size = stored[0].size
    room = rooms(MOST_MODELS, RUN, np.float32)
    for low in range(0, size, RUN):
        high = min(low + RUN, size)
        for i in range(len(stored)):
            widen_run(stored[i][low:high], room[i])
            if of_deltas:
                _subtract_run(base[low:high], room[i])
        at = first + low // block
        if len(stored) == 2 and high - low == RUN:
            multiply_two(room[0], room[1], lanes[0, at], lanes[1, at], lanes[2, at])
            continue
        pair = 0
        for i in range(len(stored)):
            for k in range(i, len(stored)):
                multiply_run(room[i], room[k], high - low, lanes[pair, at])
                pair += 1


@JIT
def products_of_models(files: Any, stored: Any, size: int, lanes: Any) -> None:
    """`products` of all that is stored, block by block."""
    for low in range(0, size, PIECE):
        high = min(low + PIECE, size)
        at = fetch(files, stored, low, high)
        part = cut(stored, at, at + high - low)
        products(part, part[0], False, BLOCK, low // BLOCK, lanes)


@JIT
def products_of_deltas(files: Any, stored: Any, size: int, lanes: Any) -> None:
    """`products` of the models' differences from the base, block by block."""
    for low in range(0, size, PIECE):
        high = min(low + PIECE, size)
        at = fetch(files, stored, low, high)
        part = cut(stored, at, at + high - low)
        products(part[:-1], part[-1], True, BLOCK, low // BLOCK, lanes)


@JIT
def _multiply_wide(x: Any, y: Any, count: int, lanes: Any) -> None:
    """As `multiply_run`, of float64 numbers, whose products are rounded before they are added."""
    for first in range(0, count // LANES * LANES, LANES):
        one, other = x[first : first + LANES], y[first : first + LANES]
        for lane in range(LANES):
            lanes[lane] += one[lane] * other[lane]
    for j in range(count // LANES * LANES, count):
        lanes[j % LANES] += x[j] * y[j]


@JIT
def products_apart(files: Any, stored: Any, size: int, lanes: Any) -> None:
    """`products` of the models' differences from the first of them, in float64."""
    room = rooms(MOST_MODELS, RUN, np.float64)
    for low in range(0, size, PIECE):
        high = min(low + PIECE, size)
        at = fetch(files, stored, low, high)
        for start in range(at, at + high - low, RUN):
            count = min(RUN, at + high - low - start)
            for i in range(len(stored)):
                for j in range(count):
                    room[i, j] = np.float64(widen(stored[i][start + j])) - np.float64(widen(stored[0][start + j]))
            pair = 0
            for i in range(len(stored)):
                for k in range(i, len(stored)):
                    _multiply_wide(room[i], room[k], count, lanes[pair, low // BLOCK])
                    pair += 1


@JIT
def keep_between(bits: Any, low: Any, high: Any, room: Any, places: Any, found: int) -> tuple[int, int]:
    """Of one run of magnitudes' bits: how many are above `high`; those in [low, high] go to room[found:].

    Gives (above, found). `bits` has RUN elements, filled up with zeros and a `low` of at least 1 where there are fewer;
    `places` is room for PLACES numbers.
    """
    if high >= low:
        counted: tuple[int, int] = keys_between(bits, low, np.uint32(high), room, places, found)
        return counted
    return count_above(bits, high), found  # a bracket of zeros alone


@JIT
def keep_rows(rows: Any, brackets: Any, room: Any, above: Any, found: Any) -> None:
    """Of each row of magnitudes' bits, what `keep_between` gives for each bracket [row, place, (low, high)]."""
    run = rooms(1, RUN, np.uint32)[0]
    places = rooms(1, PLACES, np.uint32)[0]
    for i in range(len(rows)):
        for start in range(0, rows.shape[1], RUN):
            part = rows[i, start : min(start + RUN, rows.shape[1])]
            for j in range(part.size):
                run[j] = part[j]
            for j in range(part.size, RUN):
                run[j] = np.uint32(0)
            for k in range(brackets.shape[1]):
                low, high, kept = brackets[i, k, 0], brackets[i, k, 1], found[i, k]
                more, found[i, k] = keep_between(run, low, high, room[i, k], places, kept)
                above[i, k] += more


@JIT
def count_upper(bits: Any, histogram: Any) -> None:
    for j in range(bits.size):
        histogram[bits[j] >> np.uint32(16)] += 1


@JIT
def count_lower(bits: Any, upper: Any, histogram: Any) -> None:
    for j in range(bits.size):
        if bits[j] >> np.uint32(16) == upper:
            histogram[bits[j] & np.uint32(0xFFFF)] += 1
