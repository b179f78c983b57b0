"""Partial results of reducers in one pass: sums and inner products by lanes, entries around the k-th largest."""

from __future__ import annotations

from typing import Any

import numpy as np

from smelt.engine.given import Given
from smelt.engine.kernels.compiled import JIT, RUN, widen
from smelt.engine.kernels.fetch import cut, feed, fetch
from smelt.engine.kernels.picking import PLACES, places_between
from smelt.engine.tiles import BLOCK, PIECE
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
def _multiply_two(x: Any, y: Any, count: int, squares: Any, products: Any, others: Any) -> None:
    """As `_multiply_run` of x · x, x · y and y · y, each number widened once."""
    whole = count // (2 * LANES) * (2 * LANES)
    for first in range(0, whole, 2 * LANES):
        one, two = x[first : first + LANES], x[first + LANES : first + 2 * LANES]
        other, next_ = y[first : first + LANES], y[first + LANES : first + 2 * LANES]
        for lane in range(LANES):
            a, b = np.float64(one[lane]), np.float64(other[lane])
            c, d = np.float64(two[lane]), np.float64(next_[lane])
            squares[lane] = (squares[lane] + a * a) + c * c
            products[lane] = (products[lane] + a * b) + c * d
            others[lane] = (others[lane] + b * b) + d * d
    for j in range(whole, count):
        a, b = np.float64(x[j]), np.float64(y[j])
        squares[j % LANES] += a * a
        products[j % LANES] += a * b
        others[j % LANES] += b * b


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
def _products(stored: Any, base: Any, of_deltas: bool, block: int, first: int, lanes: Any) -> None:
    """Inner products of all pairs of the vectors, or of their differences from the base.

    They are added to lanes [pairs, blocks, 256] from block `first` on.
    """
    size = stored[0].size
    room = np.empty((len(stored), RUN), dtype=np.float32)
    for low in range(0, size, RUN):
        high = min(low + RUN, size)
        for i in range(len(stored)):
            _widen_run(stored[i][low:high], room[i])
            if of_deltas:
                _subtract_run(base[low:high], room[i])
        at = first + low // block
        if len(stored) == 2:
            _multiply_two(room[0], room[1], high - low, lanes[0, at], lanes[1, at], lanes[2, at])
            continue
        pair = 0
        for i in range(len(stored)):
            for k in range(i, len(stored)):
                _multiply_run(room[i], room[k], high - low, lanes[pair, at])
                pair += 1


@JIT
def _products_of_models(files: Any, stored: Any, size: int, lanes: Any) -> None:
    """`_products` of all that is stored, block by block."""
    for low in range(0, size, PIECE):
        high = min(low + PIECE, size)
        at = fetch(files, stored, low, high)
        part = cut(stored, at, at + high - low)
        _products(part, part[0], False, BLOCK, low // BLOCK, lanes)


@JIT
def _products_of_deltas(files: Any, stored: Any, size: int, lanes: Any) -> None:
    """`_products` of the models' differences from the base, block by block."""
    for low in range(0, size, PIECE):
        high = min(low + PIECE, size)
        at = fetch(files, stored, low, high)
        part = cut(stored, at, at + high - low)
        _products(part[:-1], part[-1], True, BLOCK, low // BLOCK, lanes)


@JIT
def keep_between(bits: Any, low: Any, high: Any, room: Any, places: Any, found: int) -> tuple[int, int]:
    """Of one run of magnitudes' bits: how many are above `high`; those in [low, high] go to room[found:].

    Gives (above, found). `bits` has RUN elements, filled up with zeros and a `low` of at least 1 where there are fewer;
    `places` is room for PLACES numbers.
    """
    above = np.uint32(0)
    for j in range(RUN):
        above = np.uint32(above + np.uint32(bits[j] > high))
    if high < low:  # a bracket of zeros alone
        return int(above), found
    inside = places_between(bits, low, np.uint32(high - low), places)
    for k in range(inside):
        room[found + k] = bits[places[k]]
    return int(above), found + inside


@JIT
def _keep_rows(rows: Any, brackets: Any, room: Any, above: Any, found: Any) -> None:
    """Of each row of magnitudes' bits, what `keep_between` gives for each bracket [row, place, (low, high)]."""
    run = np.empty(RUN, dtype=np.uint32)
    places = np.empty(PLACES, dtype=np.uint32)
    for i in range(len(rows)):
        for start in range(0, rows.shape[1], RUN):
            part = rows[i, start : min(start + RUN, rows.shape[1])]
            run[: part.size] = part
            run[part.size :] = 0
            for k in range(brackets.shape[1]):
                low, high, kept = brackets[i, k, 0], brackets[i, k, 1], found[i, k]
                more, found[i, k] = keep_between(run, low, high, room[i, k], places, kept)
                above[i, k] += more


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
    if not reducer.by_lanes or block % RUN or any(vector.dtype != np.float32 for vector in values):
        return None
    vectors = tuple(np.ascontiguousarray(vector).reshape(-1) for vector in values)
    lanes = _lanes(len(vectors), vectors[0].size, block)
    _products(vectors, vectors[0], False, block, 0, lanes)
    return _square(lanes, len(vectors))


def _lanes(k: int, size: int, block: int) -> Any:
    """Room for the sums of all pairs of k vectors, [pairs, blocks, 256]."""
    return np.zeros((k * (k + 1) // 2, -(-size // block), LANES))


def _square(lanes: Any, k: int) -> Any:
    """[blocks, k, k, 256] from the pairs."""
    pair = np.zeros((k, k), dtype=np.intp)
    pair[np.triu_indices(k)] = np.arange(k * (k + 1) // 2)
    return lanes.transpose(1, 0, 2)[:, np.maximum(pair, pair.T)]


def of_models(method: Any, given: Given, reducer: Gram) -> Any:
    """Inner products of all that is stored, from its bytes."""
    return _gram(given, _products_of_models, len(given.stored.buffers))


def of_deltas(method: Any, given: Given, reducer: Gram) -> Any:
    """Inner products of the models' differences from the base."""
    return _gram(given, _products_of_deltas, given.models)


def of_vectors(method: Any, given: Given, reducer: Gram) -> Any:
    """Of the differences where there is a base, else of the models."""
    return (of_deltas if given.has_base else of_models)(method, given, reducer)


def of_base_and_model(method: Any, given: Given, reducer: Gram) -> Any:
    """Of the base and the one model, in this order; stored is the base last."""
    found = of_models(method, given, reducer)
    return None if found is None else found[:, ::-1, ::-1]


def _gram(given: Given, kernel: Any, k: int) -> Any:
    if (fed := feed(given)) is None:
        return None
    lanes = _lanes(k, given.count, BLOCK)
    kernel(*fed, given.count, lanes)
    return _square(lanes, k)


def cut_partial(reducer: KthLargest, values: Any, block: int) -> Any:
    """As `KthLargest.partial`."""
    if reducer.keeps_all:
        return reducer.partial(values)
    numbers, counts = (np.asarray(part) for part in values)
    rows = np.ascontiguousarray(numbers).view(np.uint32).reshape(len(numbers), -1)
    if reducer.brackets is not None:
        kept = Kept(reducer, np.empty((*reducer.brackets.shape[:2], rows.shape[1]), dtype=np.uint32))
        _keep_rows(rows, kept.brackets, kept.room, kept.above, kept.found)
        return kept.between(reducer, counts)
    histogram = histograms(reducer, len(rows))
    for row, prefixes, targets in zip(rows, reducer.prefixes(len(rows)), histogram, strict=True):
        _count_digits(row, prefixes, targets)
    return counts.reshape(len(rows), -1), histogram


class Kept:
    """What kernels find around a guess, for each row and place: how many keys are `above`, and those inside, in `room`.

    Zeros fill up the last run: the brackets begin at 1, so that none are kept.
    """

    def __init__(self, reducer: KthLargest, room: Any) -> None:
        self.brackets = np.maximum(reducer.brackets, np.array([1, 0])).astype(np.uint32)
        self.room = room
        self.above, self.found = (np.zeros(room.shape[:2], dtype=np.int64) for _ in range(2))

    def between(self, reducer: KthLargest, counts: Any) -> Between:
        """The partial result."""
        kept = [
            [room[:n].copy() for room, n in zip(*row, strict=True)] for row in zip(self.room, self.found, strict=True)
        ]
        return reducer.found(counts, self.above, kept)


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
