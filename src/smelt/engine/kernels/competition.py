"""Parameter competition balancing, a chunk at a time: loops make exponents, NumPy their powers, loops what is left."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from smelt.engine.given import Given
from smelt.engine.kernels.feeding import feed
from smelt.engine.kernels.loading import Loop
from smelt.engine.kernels.task_vectors import limits, stream_keys
from smelt.engine.tiles import BLOCK
from smelt.methods.reducers import LANES
from smelt.methods.stages import counts_to_keep
from smelt.specs import Grain

_RANGES = Loop("competition", "product_ranges")
_EXPONENTS = Loop("competition", "exponents")
_ADD = Loop("competition", "add_parts")
_COUNT = Loop("competition", "count_scores")
_BALANCE = Loop("competition", "balance")
_CHUNK_BYTES = 1 << 20
"""What the powers of a chunk may take: half of a second cache."""


def _pairs(models: int) -> int:
    return models * (models + 1) // 2


def ranges(method: Any, given: Given, reducer: Any) -> Any:
    """The partial result of Extremes over the products of all pairs, [2, pairs]."""
    if (fed := feed(given)) is None:
        return None
    found = np.empty((_pairs(given.models), 2))
    found[:] = np.inf, -np.inf
    _RANGES(*fed, given.count, found)
    return found.T


def _chunks(given: Given, fed: Any) -> Iterator[tuple[int, int, Any, Any, Any]]:
    """(low, high, powers, d_i, b) of the tile's chunks; they last until the next."""
    least, most = given["ranges"]
    with np.errstate(all="ignore"):
        usable = np.isfinite(most - least) & (most > least)
        widths = np.stack([least, np.where(usable, most - least, 1.0)], axis=1)
    models = given.models
    count = models + _pairs(models)
    chunk = BLOCK
    while chunk > LANES and 8 * count * chunk > _CHUNK_BYTES:
        chunk //= 2
    for low in range(0, given.count, chunk):
        high = min(low + chunk, given.count)
        parts = given.scratch.array("parts", (count, high - low), np.float64)
        deltas = given.scratch.array("deltas of a chunk", (models, high - low), np.float32)
        bases = given.scratch.array("base of a chunk", (high - low,), np.float32)
        _EXPONENTS(*fed, low, high, widths, usable.astype(np.uint8), parts, deltas, bases)
        np.exp(parts, out=parts)
        yield low, high, parts, deltas, bases


def sums(method: Any, given: Given, reducer: Any) -> Any:
    """Partial results of the sums of the powers: lanes [blocks, parts, 256]."""
    if (fed := feed(given)) is None:
        return None
    lanes = np.zeros((-(-given.count // BLOCK), given.models + _pairs(given.models), LANES))
    for low, _, parts, _, _ in _chunks(given, fed):
        _ADD(parts, lanes[low // BLOCK])
    return lanes


def digits(method: Any, given: Given, reducer: Any) -> Any:
    """The partial result of KthLargest64 over the β_i."""
    if (fed := feed(given)) is None:
        return None
    counts = given.once("counts to keep", lambda: counts_to_keep(method.density, given["size"]))
    prefixes = reducer.prefixes(given.models)
    first = not prefixes.shape[1]
    wanted = np.zeros(given.models, dtype=np.uint64) if first else np.ascontiguousarray(prefixes[:, 0])
    histograms = np.zeros((given.models, 1, 1 << 16), dtype=np.int64)
    total = np.ascontiguousarray(given["sums"])
    for _, _, parts, _, _ in _chunks(given, fed):
        _COUNT(parts, total, given.models, reducer.digit, wanted, int(first), histograms[:, 0])
    return counts.reshape(given.models, 1), histograms


def tile(method: Any, given: Given, out: Any) -> bool | None:
    """The tile, as stored elements of the output; None too for rows, which have no kernel."""
    if (fed := feed(given)) is None or method.grain is not Grain.ELEMENT:
        return None
    cut = given["cut"]
    values, below = np.zeros(given.models), np.zeros(given.models, dtype=np.uint32)
    if cut is not None:
        values, below = np.ascontiguousarray(cut.value[:, 0]), np.ascontiguousarray(limits(cut.share)[:, 0])
    total, keys = np.ascontiguousarray(given["sums"]), stream_keys(given)
    found = False
    for low, high, parts, deltas, bases in _chunks(given, fed):
        chosen = (int(cut is not None), values, below, keys, given.start + low)
        found |= bool(_BALANCE(parts, total, deltas, bases, *chosen, float(method.lambda_), out[low:high]))
    return found


FUNCTIONS: dict[tuple[str, ...], Any] = {
    ("pcb", "ranges"): ranges,
    ("pcb", "sums"): sums,
    ("pcb", "cut"): digits,
    ("pcb", "tile"): tile,
}
"""(method, function) -> kernel."""
