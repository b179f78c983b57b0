"""Partial results of reducers in one pass: sums and inner products by lanes, histograms of the keys' 16-bit digits."""

from __future__ import annotations

from typing import Any

import numpy as np

from smelt.engine.kernels.compiled import JIT
from smelt.methods.reducers import LANES, Gram, KthLargest, Sum


@JIT
def _add_lanes(row: Any, lanes: Any) -> None:
    """lanes[l] += row[l], row[l + 256], ... in this order."""
    whole = row.size // LANES * LANES
    for start in range(0, whole, LANES):
        part = row[start : start + LANES]
        for lane in range(LANES):
            lanes[lane] += np.float64(part[lane])
    for j in range(whole, row.size):
        lanes[j - whole] += np.float64(row[j])


@JIT
def _add_products(one: Any, two: Any, lanes: Any) -> None:
    whole = one.size // LANES * LANES
    for start in range(0, whole, LANES):
        a, b = one[start : start + LANES], two[start : start + LANES]
        for lane in range(LANES):
            lanes[lane] += np.float64(a[lane]) * np.float64(b[lane])
    for j in range(whole, one.size):
        lanes[j - whole] += np.float64(one[j]) * np.float64(two[j])


@JIT
def _count_upper(bits: Any, histogram: Any) -> None:
    for j in range(bits.size):
        histogram[bits[j] >> np.uint32(16)] += 1


@JIT
def _count_lower(bits: Any, upper: Any, histogram: Any) -> None:
    for j in range(bits.size):
        if bits[j] >> np.uint32(16) == upper:
            histogram[bits[j] & np.uint32(0xFFFF)] += 1


def sum_partial(reducer: Sum, values: Any) -> Any:
    """As `Sum.partial`."""
    if not reducer.by_lanes or values.dtype != np.float32:
        return reducer.partial(values)
    lanes = np.zeros((len(values), LANES))
    for row, target in zip(values, lanes, strict=True):
        _add_lanes(np.ascontiguousarray(row).reshape(-1), target)
    return lanes


def gram_partial(reducer: Gram, values: Any) -> Any:
    """As `Gram.partial`."""
    if not reducer.by_lanes or any(vector.dtype != np.float32 for vector in values):
        return reducer.partial(values)
    vectors = [np.ascontiguousarray(vector).reshape(-1) for vector in values]
    lanes = np.zeros((len(vectors), len(vectors), LANES))
    for i, one in enumerate(vectors):
        for j in range(i, len(vectors)):
            _add_products(one, vectors[j], lanes[i, j])
            lanes[j, i] = lanes[i, j]
    return lanes


def cut_partial(reducer: KthLargest, values: Any) -> Any:
    """As `KthLargest.partial`."""
    numbers, counts = (np.asarray(part) for part in values)
    rows = np.ascontiguousarray(numbers).view(np.uint32).reshape(len(numbers), -1)
    histogram = histograms(reducer, len(rows))
    for row, prefixes, targets in zip(rows, reducer.prefixes(len(rows)), histogram, strict=True):
        count_digits(row, prefixes, targets)
    return counts.reshape(len(rows), -1), histogram


def histograms(reducer: KthLargest, rows: int) -> Any:
    """Empty histograms for this round, [rows, cuts, 65536]."""
    return np.zeros((rows, len(reducer.prefixes(rows)[0]) or 1, 1 << 16), dtype=np.int64)


def count_digits(bits: Any, prefixes: Any, targets: Any) -> None:
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


PARTIALS: dict[type, Any] = {Sum: sum_partial, Gram: gram_partial, KthLargest: cut_partial}
"""Reducer -> its kernel."""
