"""Trim, band, drop and elect: what the loops on stored bytes are told for ties, breadcrumbs and dare."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from smelt.engine.given import Given
from smelt.engine.kernels.feeding import feed, plain
from smelt.engine.kernels.loading import Loop
from smelt.engine.kernels.sizes import (
    ADD,
    AVERAGE,
    BAND,
    COLUMNS,
    DROP,
    DROP_AGAIN,
    ELECT_MEAN,
    ELECT_SUM,
    GRID,
    RUN,
    TRIM,
)
from smelt.engine.kernels.sums import Kept, histograms
from smelt.engine.tiles import BLOCK
from smelt.methods.reducers import LANES
from smelt.methods.selection import band_shares
from smelt.methods.stages import band_counts, counts_to_keep, divisor
from smelt.specs import Grain

_MIX = Loop("task_vectors", "mix_tile")
_ADD_MAGNITUDES = Loop("task_vectors", "add_magnitudes")
_KEEP_MAGNITUDES = Loop("task_vectors", "keep_magnitudes")
_ALL_MAGNITUDES = Loop("task_vectors", "all_magnitudes")
_COUNT_UPPER = Loop("task_vectors", "count_upper")
_COUNT_LOWER = Loop("task_vectors", "count_lower")


Mixing = Callable[[Any, Given], tuple[Any, ...]]
"""(method, given) -> how loops are told to mix: kind, w_i, w_i f_i, Σ w_i."""


def limits(share: Any) -> Any:
    """The number below which a random number times GRID must be for the entry to be kept, uint32 [n]."""
    return np.clip(np.ceil(np.asarray(share, dtype=np.float64) * GRID), 0, GRID).astype(np.uint32)


def largest(method: Any, given: Given, reducer: Any, *, rule: int) -> Any:
    """The partial result of KthLargest over abs(d_i)."""
    if (fed := feed(given)) is None:
        return None
    counts = given.once("counts to keep", lambda: _counts(method, given["size"], rule))
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


def _counts(method: Any, size: int, rule: int) -> Any:
    return band_counts(method.density, method.gamma, size) if rule == BAND else counts_to_keep(method.density, size)


def stream_keys(given: Given) -> Any:
    return np.array(given.streams, dtype=np.uint64).reshape(-1, 2)


_DRAWN = "which entries dare keeps"


def _marks(given: Given, *, lasting: Any) -> tuple[Any, int]:
    """Room for the bits of runs, [n, runs, COLUMNS], and the place of the tile's first run in it.

    `lasting` is what the tensor keeps between passes; where it is None, there is room for one run at a time.
    """
    if lasting is None:
        return given.scratch.array("marks", (given.models, 1, COLUMNS), np.uint8), 0
    return lasting, given.start // RUN


def _bounds(method: Any, given: Given, rule: int) -> tuple[Any, Any]:
    """Value and limit of each model's cuts, [n, 1], or [n, 2] of a band; for a random choice no value plays a part."""
    if rule == DROP:
        return np.zeros((given.models, 1), dtype=np.float32), limits(method.density.reshape(-1, 1))
    cut = given["cut"]
    if rule == BAND:
        if cut is None:
            return _EVERYTHING[0].repeat(given.models, axis=0), _EVERYTHING[1].repeat(given.models, axis=0)
        return np.ascontiguousarray(cut.value), limits(band_shares(cut))
    if cut is None:  # below every magnitude
        return np.full((given.models, 1), -1.0, dtype=np.float32), np.zeros((given.models, 1), dtype=np.uint32)
    whole = cut.share >= 1.0  # a cut just below the value keeps all that equal it
    value = np.where(whole, np.nextafter(cut.value, np.float32(-1.0)), cut.value)
    return value, np.where(whole, np.uint32(0), limits(cut.share))


_EVERYTHING = np.array([[np.inf, -1.0]], dtype=np.float32), np.array([[GRID, 0]], dtype=np.uint32)
"""A band with all numbers inside."""


def _is_by_row(method: Any) -> bool:
    """Whether cuts are those of rows, which have no kernel."""
    return bool(method.grain is not Grain.ELEMENT)


def tile(method: Any, given: Given, out: Any, *, rule: int, mixed: Mixing) -> bool | None:
    """The tile of a method that keeps, weighs and mixes deltas, as stored elements of the output."""
    if (fed := feed(given)) is None or _is_by_row(method):
        return None
    settings = given.once("settings of the tile", lambda: _settings(method, given, rule=rule, mixed=mixed))
    value, limit, keys, kind, weight, scale, total = settings
    lasting = given.kept(_DRAWN)
    again = DROP_AGAIN if rule == DROP and lasting is not None else rule
    numbers = (again, kind, value, limit, keys, given.start, *_marks(given, lasting=lasting))
    return bool(_MIX(*fed, *numbers, weight, scale, total, float(method.lambda_), out))


def _settings(method: Any, given: Given, *, rule: int, mixed: Mixing) -> tuple[Any, ...]:
    """What is the same for all tiles of the tensor."""
    value, limit = _bounds(method, given, rule)
    return value, limit, stream_keys(given), *mixed(method, given)


def mixing(method: Any, given: Given, *, elected: bool) -> tuple[Any, ...]:
    """How loops are told to mix: kind, w_i, w_i f_i, Σ w_i."""
    weight = method.weight.reshape(-1)
    factors = given["factors"]
    scale = weight if factors is None else (method.weight * factors).reshape(-1)
    kind = (ELECT_MEAN if method.normalize else ELECT_SUM) if elected else ADD
    return kind, plain(weight), plain(scale), divisor(weight) if method.normalize else 1.0


def _averaging(method: Any, given: Given) -> tuple[Any, ...]:
    """The same for the mean of what is kept, which needs none of it."""
    ones = (1.0,) * given.models
    return AVERAGE, ones, ones, 1.0


def magnitudes(method: Any, given: Given, *, rule: int) -> Any:
    """Partial results of Σ abs(d_i) and of Σ abs of what is kept: lanes [blocks, n, 256] of both."""
    if (fed := feed(given)) is None or _is_by_row(method):
        return None
    whole, kept = (np.zeros((given.models, -(-given.count // BLOCK), LANES)) for _ in range(2))
    shape = (given.models, -(-given.size // RUN), COLUMNS)
    marks, first = _marks(given, lasting=given.keep(_DRAWN, shape) if rule == DROP else None)
    settings = (rule, *_bounds(method, given, rule), stream_keys(given))
    _ADD_MAGNITUDES(*fed, *settings, given.start, given.count, marks, first, whole, kept)
    return whole.transpose(1, 0, 2), kept.transpose(1, 0, 2)


def _kept_magnitudes(method: Any, given: Given, reducer: Any, *, rule: int) -> Any:
    parts = magnitudes(method, given, rule=rule)
    return None if parts is None else parts[1]


def _functions() -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, rule, elected in (("ties", TRIM, True), ("breadcrumbs", BAND, False), ("breadcrumbs_ties", BAND, True)):
        yield (name, "cut"), partial(largest, rule=rule)
        yield (name, "kept"), partial(_kept_magnitudes, rule=rule)
        yield (name, "tile"), partial(tile, rule=rule, mixed=partial(mixing, elected=elected))
    yield ("localize", "cut"), partial(largest, rule=TRIM)
    yield ("localize", "tile"), partial(tile, rule=TRIM, mixed=_averaging)
    for name, elected in (("dare_linear", False), ("dare_ties", True)):
        yield (name, "whole", "kept"), lambda method, given, *reducers: magnitudes(method, given, rule=DROP)
        yield (name, "tile"), partial(tile, rule=DROP, mixed=partial(mixing, elected=elected))


FUNCTIONS: dict[tuple[str, ...], Any] = dict(_functions())
"""(method, function) or (method, reductions of one pass...) -> kernel."""
