"""Partial results of reducers in one pass: sums and inner products by lanes, entries around the k-th largest."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from smelt.engine.given import Given
from smelt.engine.kernels.feeding import feed
from smelt.engine.kernels.loading import Loop
from smelt.engine.kernels.sizes import MOST_MODELS, RUN, SPILL
from smelt.engine.tiles import BLOCK
from smelt.methods.reducers import LANES, Gram, Sum
from smelt.methods.selection import Between, KthLargest

_SUMS = Loop("sums", "sums")
_PRODUCTS = Loop("sums", "products")
_PRODUCTS_OF_MODELS = Loop("sums", "products_of_models")
_PRODUCTS_OF_DELTAS = Loop("sums", "products_of_deltas")
_PRODUCTS_APART = Loop("sums", "products_apart")
_KEEP_ROWS = Loop("sums", "keep_rows")
_COUNT_UPPER = Loop("sums", "count_upper")
_COUNT_LOWER = Loop("sums", "count_lower")


def sum_partials(reducer: Sum, values: Any, block: int) -> Any:
    """As `Sum.partial` of each block: [blocks, n, 256]; None where there is no kernel."""
    if not reducer.by_lanes or values.dtype != np.float32:
        return None
    rows = np.ascontiguousarray(values).reshape(len(values), -1)
    if block % RUN:
        return None
    lanes = np.zeros((len(rows), -(-rows.shape[1] // block), LANES))
    for row, target in zip(rows, lanes, strict=True):
        _SUMS(row, block, target)
    return lanes.transpose(1, 0, 2)


def gram_partials(reducer: Gram, values: Any, block: int) -> Any:
    """As `Gram.partial` of each block: [blocks, k, k, 256]; None where there is no kernel."""
    if not reducer.by_lanes or block % RUN or len(values) > MOST_MODELS or any(v.dtype != np.float32 for v in values):
        return None
    vectors = tuple(np.ascontiguousarray(vector).reshape(-1) for vector in values)
    lanes = _lanes(len(vectors), vectors[0].size, block)
    _PRODUCTS(vectors, vectors[0], False, block, 0, lanes)
    return _square(lanes, len(vectors))


def _lanes(k: int, size: int, block: int) -> Any:
    """Room for the sums of all pairs of k vectors, [pairs, blocks, 256]."""
    return np.zeros((k * (k + 1) // 2, -(-size // block), LANES))


def _square(lanes: Any, k: int) -> Any:
    """[blocks, k, k, 256] from the pairs."""
    return lanes.transpose(1, 0, 2)[:, _pairs(k)]


@cache
def _pairs(k: int) -> Any:
    """Which pair each place of a Gram matrix is, [k, k]."""
    pair = np.zeros((k, k), dtype=np.intp)
    pair[np.triu_indices(k)] = np.arange(k * (k + 1) // 2)
    return np.maximum(pair, pair.T)


def of_models(method: Any, given: Given, reducer: Gram) -> Any:
    """Inner products of all that is stored, from its bytes."""
    return _gram(given, _PRODUCTS_OF_MODELS, len(given.stored.buffers))


def of_deltas(method: Any, given: Given, reducer: Gram) -> Any:
    """Inner products of the models' differences from the base."""
    return _gram(given, _PRODUCTS_OF_DELTAS, given.models)


def of_vectors(method: Any, given: Given, reducer: Gram) -> Any:
    """Of the differences where there is a base, else of the models."""
    return (of_deltas if given.has_base else of_models)(method, given, reducer)


def of_base_and_model(method: Any, given: Given, reducer: Gram) -> Any:
    """Of the base and the one model, in this order; stored is the base last."""
    found = of_models(method, given, reducer)
    return None if found is None else found[:, ::-1, ::-1]


def of_models_apart(method: Any, given: Given, reducer: Gram) -> Any:
    """Of the models' differences from the first of them, in float64."""
    return None if given.has_base else _gram(given, _PRODUCTS_APART, given.models)


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
        kept = Kept(reducer, rows.shape[1], lambda shape: np.empty(shape, dtype=np.uint32))
        _KEEP_ROWS(rows, kept.brackets, kept.room, kept.above, kept.found)
        return kept.between(reducer, counts)
    histogram = histograms(reducer, len(rows))
    for row, prefixes, targets in zip(rows, reducer.prefixes(len(rows)), histogram, strict=True):
        _count_digits(row, prefixes, targets)
    return counts.reshape(len(rows), -1), histogram


class Kept:
    """What kernels find around a guess, for each row and place: how many keys are `above`, and those inside, in `room`.

    Zeros fill up the last run: the brackets begin at 1, so that none are kept.
    """

    def __init__(self, reducer: KthLargest, count: int, empty: Callable[[tuple[int, ...]], Any]) -> None:
        self.brackets = np.maximum(reducer.brackets, np.array([1, 0])).astype(np.uint32)
        shape = self.brackets.shape[:2]
        self.room = empty((*shape, count + SPILL))
        self.above, self.found = (np.zeros(shape, dtype=np.int64) for _ in range(2))

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
        _COUNT_UPPER(bits, targets[0])
        return
    done: dict[int, int] = {}
    for place, prefix in enumerate(prefixes.tolist()):
        if prefix in done:
            targets[place] = targets[done[prefix]]
        else:
            done[prefix] = place
            _COUNT_LOWER(bits, np.uint32(prefix), targets[place])


PARTIALS: dict[type, Any] = {Sum: sum_partials, Gram: gram_partials, KthLargest: cut_partial}
"""Reducer -> its kernel, for the values that a method's function gives."""


FUNCTIONS: dict[tuple[str, ...], Any] = {
    ("slerp", "products"): of_base_and_model,
    ("karcher", "products"): of_models,
    ("model_stock", "products"): of_deltas,
    ("nuslerp", "products"): of_vectors,
    ("multislerp", "products"): of_vectors,
    ("geometric_median", "products"): of_models_apart,
}
"""(method, reduction) -> kernel on the stored bytes."""
