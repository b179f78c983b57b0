"""Trim, drop and elect on stored bytes: the functions of ties and dare, each in one pass over a tile.

A tile is worked on in runs that stay in the first cache: first each model's differences, with what is not kept set to
zero, then the election over all models. The operations and their order are those of `methods.stages`, so the bits are
too. Random numbers are compared as integers, and where only entries equal to the cut need one, only those draw it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba.extending import overload

from smelt.engine.given import Given
from smelt.engine.kernels.compiled import (
    COLUMNS,
    GRID,
    JIT,
    RUN,
    infinity,
    least,
    magnitude,
    mix,
    narrow,
    widen,
)
from smelt.engine.kernels.fetch import cut, feed, fetch
from smelt.engine.kernels.picking import PLACES, choose, draw_below, places_between
from smelt.engine.kernels.span import plain
from smelt.engine.kernels.sums import Kept, add_run, histograms, keep_between
from smelt.engine.tiles import BLOCK, PIECE
from smelt.methods.reducers import LANES
from smelt.methods.stages import TINY, counts_to_keep, divisor

_TRIM, _DROP, _DROP_AGAIN = 0, 1, 2


@JIT
def _widen_base(base: Any, out: Any) -> None:
    for j in range(base.size):
        out[j] = widen(base[j])


@JIT
def _subtract(stored: Any, base: Any, out: Any) -> None:
    """The differences of a run; what lies beyond its end becomes NaN, which equals no cut."""
    for j in range(stored.size):
        out[j] = widen(stored[j]) - base[j]
    for j in range(stored.size, RUN):
        out[j] = np.float32(np.nan)


@JIT
def _magnitudes(stored: Any, base: Any, out: Any) -> None:
    """The magnitudes of the differences of a run, as `_subtract` gives them."""
    for j in range(stored.size):
        out[j] = np.abs(widen(stored[j]) - widen(base[j]))
    for j in range(stored.size, RUN):
        out[j] = np.float32(np.nan)


@JIT
def _subtract_and_trim(stored: Any, base: Any, value: Any, kept: Any) -> None:
    """The differences of a run that are above the cut, 0 elsewhere."""
    for j in range(stored.size):
        delta = widen(stored[j]) - base[j]
        kept[j] = np.float32(0.0) if np.abs(delta) <= value else delta


@JIT
def _trim(deltas: Any, value: Any, limit: Any, key: Any, start: int, kept: Any, places: Any) -> None:
    """kept = the deltas above the cut; of those equal to it, those whose random number is below limit / GRID."""
    for j in range(RUN):
        kept[j] = np.float32(0.0) if np.abs(deltas[j]) <= value else deltas[j]
    if limit == 0 or value != value:  # nothing equals a NaN
        return
    words, target = deltas.view(np.uint32), kept.view(np.uint32)
    equal = places_between(words, np.float32(value).view(np.uint32), np.uint32(0), places)
    for k in range(equal):
        j = places[k]
        place = np.uint64(start) + np.uint64(j)
        drawn = mix(place >> np.uint64(1), key[0], key[1]) >> (np.uint64(32) * (place & np.uint64(1)))
        chosen = np.uint32(np.uint32(0) - np.uint32((drawn & np.uint64(0xFFFFFFFF)) >> np.uint64(8) < limit))
        target[j] = words[j] & chosen


@JIT
def _add_magnitudes(
    stored: Any,
    base: Any,
    rule: int,
    value: Any,
    limit: Any,
    key: Any,
    start: int,
    marks: Any,
    first: int,
    whole: Any,
    kept: Any,
) -> None:
    """Add abs of one model's deltas, and of what is kept of them, to a block's lanes, in the order of `Sum`.

    What was drawn for run r of the tile is left in marks[first + r], COLUMNS bytes (modulo len(marks)).
    """
    deltas = np.empty(RUN, dtype=np.float32)
    chosen = np.empty(RUN, dtype=np.float32)
    places = np.empty(PLACES, dtype=np.uint32)
    for low in range(0, stored.size, RUN):  # runs are whole lanes, and blocks whole runs
        high = min(low + RUN, stored.size)
        _magnitudes(stored[low:high], base[low:high], deltas)
        bits = marks[(first + low // RUN) % len(marks)]
        if rule == _TRIM:
            _trim(deltas, value, limit, key, start + low, chosen, places)
        else:
            draw_below(key, start + low, limit, bits)
            choose(deltas, bits, chosen)
        add_run(deltas, high - low, whole)
        add_run(chosen, high - low, kept)


@JIT
def _add_magnitudes_of_all(
    files: Any,
    stored: Any,
    rule: int,
    value: Any,
    limit: Any,
    keys: Any,
    start: int,
    size: int,
    marks: Any,
    first: int,
    whole: Any,
    kept: Any,
) -> None:
    """`_add_magnitudes` of all models, block by block: lanes [n, blocks, 256]."""
    for low in range(0, size, PIECE):
        high = min(low + PIECE, size)
        at = fetch(files, stored, low, high)
        part = cut(stored, at, at + high - low)
        block, run = low // BLOCK, first + low // RUN
        for i in range(len(part) - 1):
            settings = (rule, value[i], limit[i], keys[i], start + low)
            _add_magnitudes(part[i], part[-1], *settings, marks[i], run, whole[i, block], kept[i, block])


ELECT_MEAN: Any = (0,)
ELECT_SUM: Any = (0, 0)
ADD: Any = (0, 0, 0)
"""How kept deltas are combined. Told by a tuple's length, which is part of its type: only what is used is compiled."""


def _combine(kind, room, bases, weight, scale, total, factor, out):
    """One run of b + λ · mixed; whether a number of it is not finite."""
    raise NotImplementedError


@overload(_combine)
def _written_combine(kind, room, bases, weight, scale, total, factor, out):
    return _written(len(weight), elected=len(kind) < len(ADD), mean=len(kind) == len(ELECT_MEAN))


def _written(models: int, *, elected: bool, mean: bool) -> Any:
    """The loop over the elements of a run, written out for a number of models so that all stays in registers.

    The operations and their order are those of `methods.stages.combine`. Conditions are joined without branches.
    """
    each = range(models)
    lines = ["def loop(kind, room, bases, weight, scale, total, factor, out):"]
    lines += ["    worst = least(out)"]
    lines += [f"    d{i} = room[{i}]; w{i} = weight[{i}]; f{i} = scale[{i}]" for i in each]
    lines += ["    for j in range(out.size):"]
    lines += [f"        e{i} = f{i} * np.float64(d{i}[j])" for i in each]
    lines += [f"        t = {' + '.join(f'e{i}' for i in each)}"]
    if elected:
        lines += ["        up = t >= 0.0", "        mixed = 0.0", "        agreeing = 0.0"]
        for i in each:
            lines += [f"        g = e{i} if up else -e{i}", "        a = not g <= 0.0"]
            lines += [f"        mixed = mixed + e{i} if a else mixed"]
            lines += [f"        agreeing = agreeing + w{i} if a else agreeing"] if mean else []
        below = f" / (agreeing if np.abs(agreeing) >= {TINY!r} else 1.0)" if mean else ""
        lines += [f"        t = mixed{below}"]
    else:
        lines += ["        t = t / total"]
    lines += ["        y = narrow(np.float64(bases[j]) + factor * t, out)"]
    lines += ["        out[j] = y", "        worst = max(worst, magnitude(y))", "    return worst >= infinity(out)"]
    space: dict[str, Any] = {"np": np, "narrow": narrow, "magnitude": magnitude}
    space |= {"infinity": infinity, "least": least}
    exec("\n".join(lines), space)
    return space["loop"]


@JIT
def _mix(
    stored: Any,
    base: Any,
    rule: int,
    kind: Any,
    value: Any,
    limit: Any,
    keys: Any,
    start: int,
    marks: Any,
    first: int,
    weight: Any,
    scale: Any,
    total: float,
    factor: float,
    out: Any,
) -> bool:
    """b + λ · mixed of a tile, run by run; whether a number of it is not finite. `marks` is [n, runs, COLUMNS]."""
    bases = np.empty(RUN, dtype=np.float32)
    deltas = np.empty(RUN, dtype=np.float32)
    places = np.empty(PLACES, dtype=np.uint32)
    room = np.zeros((len(stored), RUN), dtype=np.float32)
    found = False
    for low in range(0, out.size, RUN):
        high = min(low + RUN, out.size)
        _widen_base(base[low:high], bases)
        for i in range(len(stored)):
            if rule == _TRIM and limit[i] == 0:
                _subtract_and_trim(stored[i][low:high], bases, value[i], room[i])
                continue
            _subtract(stored[i][low:high], bases, deltas)
            bits = marks[i, (first + low // RUN) % marks.shape[1]]
            if rule == _TRIM:
                _trim(deltas, value[i], limit[i], keys[i], start + low, room[i], places)
            else:
                if rule == _DROP:
                    draw_below(keys[i], start + low, limit[i], bits)
                choose(deltas, bits, room[i])
        result = out[low:high]
        found |= _combine(kind, room, bases, weight, scale, total, factor, result)
    return found


@JIT
def _mix_all(
    files: Any,
    stored: Any,
    rule: int,
    kind: Any,
    value: Any,
    limit: Any,
    keys: Any,
    start: int,
    marks: Any,
    first: int,
    weight: Any,
    scale: Any,
    total: float,
    factor: float,
    out: Any,
) -> bool:
    """`_mix` piece by piece."""
    found = False
    for low in range(0, out.size, PIECE):
        high = min(low + PIECE, out.size)
        at = fetch(files, stored, low, high)
        part = cut(stored, at, at + high - low)
        chosen = (rule, kind, value, limit, keys, start + low, marks, first + low // RUN)
        found |= _mix(part[:-1], part[-1], *chosen, weight, scale, total, factor, out[low:high])
    return found


def _limits(share: Any) -> Any:
    """The number below which a random number times GRID must be for the entry to be kept, uint32 [n]."""
    return np.clip(np.ceil(np.asarray(share, dtype=np.float64) * GRID), 0, GRID).astype(np.uint32)


@JIT
def _count_upper(files: Any, stored: Any, size: int, histograms: Any) -> None:
    """The histogram of the upper 16 bits of abs(d_i), for each model."""
    bits = np.empty(RUN, dtype=np.uint32)
    for low in range(0, size, PIECE):
        high = min(low + PIECE, size)
        at = fetch(files, stored, low, high)
        for i in range(len(stored) - 1):
            histogram = histograms[i, 0]
            for start in range(at, at + high - low, RUN):
                stop = min(start + RUN, at + high - low)
                _magnitude_bits(stored[i][start:stop], stored[-1][start:stop], bits)
                for j in range(stop - start):
                    histogram[bits[j] >> np.uint32(16)] += 1


@JIT
def _count_lower(files: Any, stored: Any, size: int, histograms: Any, prefixes: Any) -> None:
    """The histograms of the lower 16 bits of the abs(d_i) that begin with each prefix."""
    bits = np.empty(RUN, dtype=np.uint32)
    for low in range(0, size, PIECE):
        high = min(low + PIECE, size)
        at = fetch(files, stored, low, high)
        for i in range(len(stored) - 1):
            for start in range(at, at + high - low, RUN):
                stop = min(start + RUN, at + high - low)
                _magnitude_bits(stored[i][start:stop], stored[-1][start:stop], bits)
                for place in range(prefixes.shape[1]):
                    prefix, histogram = prefixes[i, place], histograms[i, place]
                    for j in range(stop - start):
                        if bits[j] >> np.uint32(16) == prefix:
                            histogram[bits[j] & np.uint32(0xFFFF)] += 1


@JIT
def _magnitude_bits(stored: Any, base: Any, out: Any) -> None:
    """The bits of abs(d) of a run; zeros beyond its end."""
    for j in range(stored.size):
        delta = np.float32(widen(stored[j]) - widen(base[j]))
        out[j] = np.uint32(delta.view(np.uint32) & np.uint32(0x7FFFFFFF))
    for j in range(stored.size, RUN):
        out[j] = np.uint32(0)


@JIT
def _keep_magnitudes(files: Any, stored: Any, size: int, brackets: Any, room: Any, above: Any, found: Any) -> None:
    """Of each model's abs(d_i), what `keep_between` gives for each bracket [model, place, (low, high)]."""
    bits = np.empty(RUN, dtype=np.uint32)
    places = np.empty(PLACES, dtype=np.uint32)
    for low in range(0, size, PIECE):
        high = min(low + PIECE, size)
        at = fetch(files, stored, low, high)
        for i in range(len(stored) - 1):
            for start in range(at, at + high - low, RUN):
                stop = min(start + RUN, at + high - low)
                _magnitude_bits(stored[i][start:stop], stored[-1][start:stop], bits)
                for k in range(brackets.shape[1]):
                    first, last, kept = brackets[i, k, 0], brackets[i, k, 1], found[i, k]
                    more, found[i, k] = keep_between(bits, first, last, room[i, k], places, kept)
                    above[i, k] += more


@JIT
def _all_magnitudes(files: Any, stored: Any, size: int, out: Any) -> None:
    """The bits of all abs(d_i), uint32 [n, size]."""
    for low in range(0, size, PIECE):
        high = min(low + PIECE, size)
        at = fetch(files, stored, low, high)
        for i in range(len(stored) - 1):
            for j in range(high - low):
                delta = np.float32(widen(stored[i][at + j]) - widen(stored[-1][at + j]))
                out[i, low + j] = np.uint32(delta.view(np.uint32) & np.uint32(0x7FFFFFFF))


def largest(method: Any, given: Given, reducer: Any) -> Any:
    """The partial result of KthLargest over abs(d_i)."""
    if (fed := feed(given)) is None:
        return None
    counts = given.once("counts to keep", lambda: counts_to_keep(method.density, given["size"]))
    if reducer.keeps_all:
        keys = np.empty((given.models, given.count), dtype=np.uint32)
        _all_magnitudes(*fed, given.count, keys)
        return reducer.all_of(counts, keys)
    if reducer.brackets is not None:
        shape = (*reducer.brackets.shape[:2], given.count)
        kept = Kept(reducer, given.scratch.array("inside", shape, np.uint32))
        _keep_magnitudes(*fed, given.count, kept.brackets, kept.room, kept.above, kept.found)
        return kept.between(reducer, counts)
    histogram = histograms(reducer, given.models)
    prefixes = reducer.prefixes(given.models).astype(np.uint32)
    if prefixes.shape[1]:
        _count_lower(*fed, given.count, histogram, prefixes)
    else:
        _count_upper(*fed, given.count, histogram)
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
    rule = (_DROP if lasting is None else _DROP_AGAIN) if random else _TRIM
    numbers = (rule, kind, value, limit, keys, given.start, *_marks(given, lasting=lasting))
    return bool(_mix_all(*fed, *numbers, weight, scale, total, float(method.lambda_), out))


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
    settings = (_DROP if random else _TRIM, *(_dropping(method, given) if random else _trimming(given)), _keys(given))
    _add_magnitudes_of_all(*fed, *settings, given.start, given.count, marks, first, whole, kept)
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
