"""Trim, drop and elect: what the loops on stored bytes are told for ties and dare."""

from __future__ import annotations

from typing import Any

import numpy as np

from smelt.engine.given import Given
from smelt.engine.kernels.feeding import feed, plain
from smelt.engine.kernels.loading import Loop
from smelt.engine.kernels.sizes import ADD, COLUMNS, DROP, DROP_AGAIN, ELECT_MEAN, ELECT_SUM, GRID, RUN, TRIM
from smelt.engine.kernels.sums import Kept, histograms
from smelt.engine.tiles import BLOCK
from smelt.methods.reducers import LANES
from smelt.methods.stages import counts_to_keep, divisor

_MIX = Loop("task_vectors", "mix_tile")
_ADD_MAGNITUDES = Loop("task_vectors", "add_magnitudes")
_KEEP_MAGNITUDES = Loop("task_vectors", "keep_magnitudes")
_ALL_MAGNITUDES = Loop("task_vectors", "all_magnitudes")
_COUNT_UPPER = Loop("task_vectors", "count_upper")
_COUNT_LOWER = Loop("task_vectors", "count_lower")


def _limits(share: Any) -> Any:
    """The number below which a random number times GRID must be for the entry to be kept, uint32 [n]."""
    return np.clip(np.ceil(np.asarray(share, dtype=np.float64) * GRID), 0, GRID).astype(np.uint32)


def largest(method: Any, given: Given, reducer: Any) -> Any:
    """The partial result of KthLargest over abs(d_i)."""
    if (fed := feed(given)) is None:
        return None
    counts = given.once("counts to keep", lambda: counts_to_keep(method.density, given["size"]))
    if reducer.keeps_all:
        keys = np.empty((given.models, given.count), dtype=np.uint32)
        _ALL_MAGNITUDES(*fed, given.count, keys)
        return reducer.all_of(counts, keys)
    if reducer.brackets is not None:
        kept = Kept(reducer, given.count, lambda shape: given.scratch.array("inside", shape, np.uint32))
        _KEEP_MAGNITUDES(*fed, given.count, kept.brackets, kept.room, kept.above, kept.found)
        return kept.between(reducer, counts)
    histogram = histograms(reducer, given.models)
    prefixes = reducer.prefixes(given.models).astype(np.uint32)
    if prefixes.shape[1]:
        _COUNT_LOWER(*fed, given.count, histogram, prefixes)
    else:
        _COUNT_UPPER(*fed, given.count, histogram)
    return counts.reshape(given.models, -1), histogram


def _keys(given: Given) -> Any:
    return np.array(given.streams, dtype=np.uint64).reshape(-1, 2)


_DRAWN = "which entries dare keeps"


def _marks(given: Given, *, lasting: Any) -> tuple[Any, int]:
    """Room for the bits of runs, [n, runs, COLUMNS], and the place of the tile's first run in it.

    `lasting` is what the tensor keeps between passes; where it is None, there is room for one run at a time.
    """
    if lasting is None:
        return given.scratch.array("marks", (given.models, 1, COLUMNS), np.uint8), 0
    return lasting, given.start // RUN


def _trimming(given: Given) -> tuple[Any, Any]:
    """Value and limit of each model's cut. A share of 1 keeps all that equal the value: a cut just below it."""
    cut = given["cut"]
    if cut is None:  # below every magnitude
        return np.full(given.models, -1.0, dtype=np.float32), np.zeros(given.models, dtype=np.uint32)
    value, share = np.ascontiguousarray(cut.value[:, 0]), cut.share[:, 0]
    whole = share >= 1.0
    value = np.where(whole, np.nextafter(value, np.float32(-1.0)), value)
    return value, np.where(whole, np.uint32(0), _limits(share))


def _dropping(method: Any, given: Given) -> tuple[Any, Any]:
    """As `_trimming`, for random choice: the value plays no part."""
    return np.zeros(given.models, dtype=np.float32), _limits(method.density.reshape(-1))


def tile(method: Any, given: Given, out: Any, *, random: bool, elected: bool) -> bool | None:
    """The tile of a method that keeps, weighs and mixes deltas, as stored elements of the output."""
    if (fed := feed(given)) is None:
        return None
    settings = given.once("settings of the tile", lambda: _settings(method, given, random=random, elected=elected))
    value, limit, keys, kind, weight, scale, total = settings
    lasting = given.kept(_DRAWN)
    rule = (DROP if lasting is None else DROP_AGAIN) if random else TRIM
    numbers = (rule, kind, value, limit, keys, given.start, *_marks(given, lasting=lasting))
    return bool(_MIX(*fed, *numbers, weight, scale, total, float(method.lambda_), out))


def _settings(method: Any, given: Given, *, random: bool, elected: bool) -> tuple[Any, ...]:
    """What is the same for all tiles of the tensor."""
    weight = method.weight.reshape(-1)
    factors = given["factors"]
    scale = weight if factors is None else (method.weight * factors).reshape(-1)
    value, limit = _dropping(method, given) if random else _trimming(given)
    kind = (ELECT_MEAN if method.normalize else ELECT_SUM) if elected else ADD
    total = divisor(weight) if method.normalize else 1.0
    return value, limit, _keys(given), kind, plain(weight), plain(scale), total


def magnitudes(method: Any, given: Given, *, random: bool) -> Any:
    """Partial results of Σ abs(d_i) and of Σ abs of what is kept: lanes [blocks, n, 256] of both."""
    if (fed := feed(given)) is None:
        return None
    whole, kept = (np.zeros((given.models, -(-given.count // BLOCK), LANES)) for _ in range(2))
    shape = (given.models, -(-given.size // RUN), COLUMNS)
    marks, first = _marks(given, lasting=given.keep(_DRAWN, shape) if random else None)
    settings = (DROP if random else TRIM, *(_dropping(method, given) if random else _trimming(given)), _keys(given))
    _ADD_MAGNITUDES(*fed, *settings, given.start, given.count, marks, first, whole, kept)
    return whole.transpose(1, 0, 2), kept.transpose(1, 0, 2)


def _second(parts: Any) -> Any:
    return None if parts is None else parts[1]


FUNCTIONS: dict[tuple[str, ...], Any] = {
    ("ties", "cut"): largest,
    ("ties", "kept"): lambda method, given, reducer: _second(magnitudes(method, given, random=False)),
    ("ties", "tile"): lambda method, given, out: tile(method, given, out, random=False, elected=True),
    ("dare_linear", "whole", "kept"): lambda method, given, *reducers: magnitudes(method, given, random=True),
    ("dare_linear", "tile"): lambda method, given, out: tile(method, given, out, random=True, elected=False),
    ("dare_ties", "whole", "kept"): lambda method, given, *reducers: magnitudes(method, given, random=True),
    ("dare_ties", "tile"): lambda method, given, out: tile(method, given, out, random=True, elected=True),
}
"""(method, function) or (method, reductions of one pass...) -> kernel."""
