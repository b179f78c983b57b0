"""Partial results of reducers in one pass: sums and inner products by lanes, histograms of the keys' 16-bit digits."""

from __future__ import annotations

from typing import Any

import numpy as np

from smelt.engine.kernels.compiled import JIT
from smelt.methods.reducers import LANES, Gram, KthLargest, Sum


@JIT
def _add_lanes(row: Any, block: int, lanes: Any) -> None:
    """Per block, lanes[l] += row[l], row[l + 256], ... in this order."""
    for number in range(len(lanes)):
        part = row[number * block : min((number + 1) * block, row.size)]
        target = lanes[number]
        whole = part.size // LANES * LANES
        for start in range(0, whole, LANES):
            run = part[start : start + LANES]
            for lane in range(LANES):
                target[lane] += np.float64(run[lane])
        for j in range(whole, part.size):
            target[j - whole] += np.float64(part[j])


@JIT
def _add_products(one: Any, two: Any, block: int, lanes: Any) -> None:
    for number in range(len(lanes)):
        low, high = number * block, min((number + 1) * block, one.size)
        first, second = one[low:high], two[low:high]
        target = lanes[number]
        whole = first.size // LANES * LANES
        for start in range(0, whole, LANES):
            a, b = first[start : start + LANES], second[start : start + LANES]
            for lane in range(LANES):
                target[lane] += np.float64(a[lane]) * np.float64(b[lane])
        for j in range(whole, first.size):
            target[j - whole] += np.float64(first[j]) * np.float64(second[j])


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
    lanes = np.zeros((len(rows), -(-rows.shape[1] // block), LANES))
    for row, target in zip(rows, lanes, strict=True):
        _add_lanes(row, block, target)
    return lanes.transpose(1, 0, 2)


def gram_partials(reducer: Gram, values: Any, block: int) -> Any:
    """As `Gram.partial` of each block: [blocks, k, k, 256]; None where there is no kernel."""
    if not reducer.by_lanes or any(vector.dtype != np.float32 for vector in values):
        return None
    vectors = [np.ascontiguousarray(vector).reshape(-1) for vector in values]
    k = len(vectors)
    lanes = np.zeros((k, k, -(-vectors[0].size // block), LANES))
    for i, one in enumerate(vectors):
        for j in range(i, k):
            _add_products(one, vectors[j], block, lanes[i, j])
            lanes[j, i] = lanes[i, j]
    return lanes.transpose(2, 0, 1, 3)


def cut_partial(reducer: KthLargest, values: Any, block: int) -> Any:
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


PARTIALS: dict[type, Any] = {Sum: sum_partials, Gram: gram_partials, KthLargest: cut_partial}
"""Reducer -> its kernel."""
