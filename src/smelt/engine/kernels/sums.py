"""Partial results of reducers in one pass: sums and inner products by lanes, entries around the k-th largest."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from smelt.engine.given import Given
from smelt.engine.kernels.compiled import (
    COLUMNS,
    JIT,
    RUN,
    element,
    trailing_zeros,
    widen,
)
from smelt.engine.kernels.span import elements
from smelt.engine.tiles import BLOCK
from smelt.methods.reducers import LANES, Gram, Sum
from smelt.methods.selection import Between, KthLargest


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
def _multiply_run(x: Any, y: Any, count: int, lanes: Any) -> None:
    """As `add_run`, of x · y: exact products of float32 numbers."""
    whole = count // (2 * LANES) * (2 * LANES)
    for first in range(0, whole, 2 * LANES):
        one, two = x[first : first + LANES], x[first + LANES : first + 2 * LANES]
        other, next_ = y[first : first + LANES], y[first + LANES : first + 2 * LANES]
        for lane in range(LANES):
            near = np.float64(one[lane]) * np.float64(other[lane])
            far = np.float64(two[lane]) * np.float64(next_[lane])
            lanes[lane] = (lanes[lane] + near) + far
    for j in range(whole, count):
        lanes[j % LANES] += np.float64(x[j]) * np.float64(y[j])


@JIT
def _widen_run(stored: Any, out: Any) -> None:
    for j in range(stored.size):
        out[j] = widen(stored[j])


@JIT
def _subtract_run(base: Any, out: Any) -> None:
    for j in range(base.size):
        out[j] = out[j] - widen(base[j])


@JIT
def _sums(row: Any, block: int, lanes: Any) -> None:
    """Per block, lanes[l] += row[l], row[l + 256], ..."""
    room = np.empty(RUN, dtype=np.float32)
    for low in range(0, row.size, RUN):
        part = row[low : min(low + RUN, row.size)]
        _widen_run(part, room)
        add_run(room, part.size, lanes[low // block])


@JIT
def _products(stored: Any, base: Any, of_deltas: bool, block: int, lanes: Any) -> None:
    """Inner products of all pairs of the vectors, or of their differences from the base: lanes [pairs, blocks, 256]."""
    size = stored[0].size
    room = np.empty((len(stored), RUN), dtype=np.float32)
    for low in range(0, size, RUN):
        high = min(low + RUN, size)
        for i in range(len(stored)):
            _widen_run(stored[i][low:high], room[i])
            if of_deltas:
                _subtract_run(base[low:high], room[i])
        pair = 0
        for i in range(len(stored)):
            for k in range(i, len(stored)):
                _multiply_run(room[i], room[k], high - low, lanes[pair, low // block])
                pair += 1


@JIT
def keep_between(bits: Any, low: Any, high: Any, room: Any, marks: Any, found: int) -> tuple[int, int]:
    """Of one run of magnitudes' bits: how many are above `high`; those in [low, high] go to room[found:].

    Gives (above, found). `bits` has RUN elements, filled up with zeros and a `low` of at least 1 where there are fewer;
    `marks` is room for COLUMNS bytes.
    """
    above = np.uint32(0)
    for j in range(RUN):
        above = np.uint32(above + np.uint32(bits[j] > high))
    width = np.uint32(high - low)
    for i in range(COLUMNS):
        inside = np.uint8(0)
        for k in range(8):
            place = np.uint32(bits[k * COLUMNS + i] - low)
            inside = np.uint8(inside | np.uint8(np.uint8(place <= width) << np.uint8(k)))
        marks[i] = inside
    words = marks.view(np.uint64)
    for number in range(words.size):
        word = words[number]
        while word:
            room[found] = bits[element(trailing_zeros(word) + np.uint64(64 * number))]
            found += 1
            word &= word - np.uint64(1)
    return int(above), found


@JIT
def _keep_row(bits: Any, low: Any, high: Any, room: Any) -> tuple[int, int]:
    run = np.empty(RUN, dtype=np.uint32)
    marks = np.empty(COLUMNS, dtype=np.uint8)
    above, found = 0, 0
    for start in range(0, bits.size, RUN):
        part = bits[start : min(start + RUN, bits.size)]
        run[: part.size] = part
        run[part.size :] = 0
        more, found = keep_between(run, low, high, room, marks, found)
        above += more
    return above, found


@JIT
def _count_upper(bits: Any, histogram: Any) -> None:
    for j in range(bits.size):
        histogram[bits[j] >> np.uint32(16)] += 1


@JIT
def _count_lower(bits: Any, upper: Any, histogram: Any) -> None:
    for j in range(bits.size):
        if bits[j] >> np.uint32(16) == upper:
            histogram[bits[j] & np.uint32(0xFFFF)] += 1


def sum_partials(reducer: Sum, values: Any, block: int) -> Any:
    """As `Sum.partial` of each block: [blocks, n, 256]; None where there is no kernel."""
    if not reducer.by_lanes or values.dtype != np.float32:
        return None
    rows = np.ascontiguousarray(values).reshape(len(values), -1)
    if block % RUN:
        return None
    lanes = np.zeros((len(rows), -(-rows.shape[1] // block), LANES))
    for row, target in zip(rows, lanes, strict=True):
        _sums(row, block, target)
    return lanes.transpose(1, 0, 2)


def gram_partials(reducer: Gram, values: Any, block: int) -> Any:
    """As `Gram.partial` of each block: [blocks, k, k, 256]; None where there is no kernel."""
    if not reducer.by_lanes or any(vector.dtype != np.float32 for vector in values):
        return None
    return _gram(tuple(np.ascontiguousarray(vector).reshape(-1) for vector in values), None, block)


def _gram(vectors: tuple[Any, ...], base: Any, block: int) -> Any:
    """[blocks, k, k, 256] for vectors, or their differences from the base where there is one; None for odd blocks."""
    if block % RUN:
        return None
    k = len(vectors)
    lanes = np.zeros((k * (k + 1) // 2, -(-vectors[0].size // block), LANES))
    _products(vectors, vectors[0] if base is None else base, base is not None, block, lanes)
    return lanes.transpose(1, 0, 2)[:, _pairs(k)]


@cache
def _pairs(k: int) -> Any:
    """Which of the pairs in order holds the inner product of vectors i and j, [k, k]."""
    pair = np.zeros((k, k), dtype=np.intp)
    pair[np.triu_indices(k)] = np.arange(k * (k + 1) // 2)
    return np.maximum(pair, pair.T)


def of_models(method: Any, given: Given, reducer: Gram) -> Any:
    """Inner products of the models themselves, from their stored bytes."""
    stored = elements(given)
    return None if stored is None else _gram(stored[: given.models], None, BLOCK)


def of_deltas(method: Any, given: Given, reducer: Gram) -> Any:
    """Inner products of the models' differences from the base."""
    stored = elements(given)
    return None if stored is None else _gram(stored[:-1], stored[-1], BLOCK)


def of_vectors(method: Any, given: Given, reducer: Gram) -> Any:
    """Of the differences where there is a base, else of the models."""
    return (of_deltas if given.has_base else of_models)(method, given, reducer)


def of_base_and_model(method: Any, given: Given, reducer: Gram) -> Any:
    """Of the base and the one model, in this order."""
    stored = elements(given)
    return None if stored is None else _gram((stored[1], stored[0]), None, BLOCK)


def cut_partial(reducer: KthLargest, values: Any, block: int) -> Any:
    """As `KthLargest.partial`."""
    numbers, counts = (np.asarray(part) for part in values)
    rows = np.ascontiguousarray(numbers).view(np.uint32).reshape(len(numbers), -1)
    if reducer.brackets is not None:
        room = np.empty(rows.shape[1], dtype=np.uint32)
        return between(reducer, counts, lambda row, low, high: _keep_row(rows[row], low, high, room), room)
    histogram = histograms(reducer, len(rows))
    for row, prefixes, targets in zip(rows, reducer.prefixes(len(rows)), histogram, strict=True):
        _count_digits(row, prefixes, targets)
    return counts.reshape(len(rows), -1), histogram


def between(reducer: KthLargest, counts: Any, keep: Any, room: Any) -> Between:
    """The partial result with a guess; `keep` puts the keys of (row, low, high) that are inside to `room`.

    It gives how many keys are above, and how many inside. Zeros fill up the last run, so that none are kept.
    """

    def find(row: int, low: Any, high: Any) -> tuple[int, Any]:
        above, inside = keep(row, max(low, np.uint32(1)), high)
        return above, room[:inside].copy()

    return reducer.found(counts, find)


def histograms(reducer: KthLargest, rows: int) -> Any:
    """Empty histograms for this round, [rows, cuts, 65536]."""
    return np.zeros((rows, len(reducer.prefixes(rows)[0]) or 1, 1 << 16), dtype=np.int64)


def _count_digits(bits: Any, prefixes: Any, targets: Any) -> None:
    """Count the 16-bit digits of one row of keys: the upper ones in round 1, in round 2 the lower ones of a bucket."""
    if not len(prefixes):
        _count_upper(bits, targets[0])
        return
    done: dict[int, int] = {}
    for place, prefix in enumerate(prefixes.tolist()):
        if prefix in done:
            targets[place] = targets[done[prefix]]
        else:
            done[prefix] = place
            _count_lower(bits, np.uint32(prefix), targets[place])


PARTIALS: dict[type, Any] = {Sum: sum_partials, Gram: gram_partials, KthLargest: cut_partial}
"""Reducer -> its kernel, for the values that a method's function gives."""
FUNCTIONS: dict[tuple[str, ...], Any] = {
    ("slerp", "products"): of_base_and_model,
    ("karcher", "products"): of_models,
    ("model_stock", "products"): of_deltas,
    ("nuslerp", "products"): of_vectors,
    ("multislerp", "products"): of_vectors,
}
"""(method, reduction) -> kernel on the stored bytes."""
