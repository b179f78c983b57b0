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
    draw_below,
    element,
    infinity,
    least,
    magnitude,
    mix,
    narrow,
    trailing_zeros,
    widen,
)
from smelt.engine.kernels.span import elements, plain
from smelt.engine.kernels.sums import add_run, between, histograms, keep_between
from smelt.engine.tiles import BLOCK
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
def _trim(deltas: Any, value: Any, limit: Any, key: Any, start: int, kept: Any, marks: Any) -> None:
    """kept = the deltas above the cut; of those equal to it, those whose random number is below limit / GRID."""
    for j in range(RUN):
        kept[j] = np.float32(0.0) if np.abs(deltas[j]) <= value else deltas[j]
    if limit == 0:
        return
    for i in range(COLUMNS):
        equal = np.uint8(0)
        for k in range(8):
            equal = np.uint8(equal | np.uint8(np.uint8(np.abs(deltas[k * COLUMNS + i]) == value) << np.uint8(k)))
        marks[i] = equal
    words = marks.view(np.uint64)
    for number in range(words.size):
        word = words[number]
        while word:
            j = element(trailing_zeros(word) + np.uint64(64 * number))
            place = np.uint64(start) + j
            drawn = mix(place >> np.uint64(1), key[0], key[1]) >> (np.uint64(32) * (place & np.uint64(1)))
            if (drawn & np.uint64(0xFFFFFFFF)) >> np.uint64(8) < limit:
                kept[j] = deltas[j]
            word &= word - np.uint64(1)


@JIT
def _choose(deltas: Any, marks: Any, kept: Any) -> None:
    """kept = the deltas whose bit is set, 0 elsewhere."""
    for k in range(8):
        row, target = deltas[k * COLUMNS : (k + 1) * COLUMNS], kept[k * COLUMNS : (k + 1) * COLUMNS]
        for i in range(COLUMNS):
            target[i] = row[i] if (marks[i] >> np.uint8(k)) & np.uint8(1) else np.float32(0.0)


@JIT
def _add_magnitudes(
    stored: Any,
    base: Any,
    rule: int,
    value: Any,
    limit: Any,
    key: Any,
    start: int,
    block: int,
    marks: Any,
    first: int,
    whole: Any,
    kept: Any,
) -> None:
    """Add abs of one model's deltas, and of what is kept of them, to each block's lanes, in the order of `Sum`.

    What was drawn for run r of the tile is left in marks[first + r], COLUMNS bytes (modulo len(marks)).
    """
    deltas = np.empty(RUN, dtype=np.float32)
    chosen = np.empty(RUN, dtype=np.float32)
    words = np.empty(RUN // 2, dtype=np.uint64)
    for low in range(0, stored.size, RUN):  # runs are whole lanes, and blocks whole runs
        high = min(low + RUN, stored.size)
        _magnitudes(stored[low:high], base[low:high], deltas)
        bits = marks[(first + low // RUN) % len(marks)]
        if rule == _TRIM:
            _trim(deltas, value, limit, key, start + low, chosen, bits)
        else:
            draw_below(key, start + low, limit, words, bits)
            _choose(deltas, bits, chosen)
        add_run(deltas, high - low, whole[low // block])
        add_run(chosen, high - low, kept[low // block])


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
    words = np.empty(RUN // 2, dtype=np.uint64)
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
                _trim(deltas, value[i], limit[i], keys[i], start + low, room[i], bits)
            else:
                if rule == _DROP:
                    draw_below(keys[i], start + low, limit[i], words, bits)
                _choose(deltas, bits, room[i])
        result = out[low:high]
        found |= _combine(kind, room, bases, weight, scale, total, factor, result)
    return found


def _limits(share: Any) -> Any:
    """The number below which a random number times GRID must be for the entry to be kept, uint32 [n]."""
    return np.clip(np.ceil(np.asarray(share, dtype=np.float64) * GRID), 0, GRID).astype(np.uint32)


@JIT
def _count_upper(stored: Any, base: Any, histogram: Any) -> None:
    """The histogram of the upper 16 bits of abs(d)."""
    bits = np.empty(RUN, dtype=np.uint32)
    for low in range(0, stored.size, RUN):
        high = min(low + RUN, stored.size)
        _magnitude_bits(stored[low:high], base[low:high], bits)
        for j in range(high - low):
            histogram[bits[j] >> np.uint32(16)] += 1


@JIT
def _count_lower(stored: Any, base: Any, histograms: Any, prefixes: Any) -> None:
    """The histograms of the lower 16 bits of the abs(d) that begin with each prefix."""
    bits = np.empty(RUN, dtype=np.uint32)
    for low in range(0, stored.size, RUN):
        high = min(low + RUN, stored.size)
        _magnitude_bits(stored[low:high], base[low:high], bits)
        for place in range(prefixes.size):
            histogram = histograms[place]
            for j in range(high - low):
                if bits[j] >> np.uint32(16) == prefixes[place]:
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
def _keep_magnitudes(stored: Any, base: Any, low: Any, high: Any, room: Any) -> tuple[int, int]:
    """How many abs(d) are above the bracket [low, high], and how many inside, whose bits go to `room`."""
    bits = np.empty(RUN, dtype=np.uint32)
    marks = np.empty(COLUMNS, dtype=np.uint8)
    above, found = 0, 0
    for start in range(0, stored.size, RUN):
        stop = min(start + RUN, stored.size)
        _magnitude_bits(stored[start:stop], base[start:stop], bits)
        more, found = keep_between(bits, low, high, room, marks, found)
        above += more
    return above, found


def cut(method: Any, given: Given, reducer: Any) -> Any:
    """The partial result of KthLargest over abs(d_i)."""
    stored = elements(given)
    if stored is None:
        return None
    counts = given.once("counts to keep", lambda: counts_to_keep(method.density, given["size"]))
    if reducer.brackets is not None:
        room = given.scratch.array("inside", (given.count,), np.uint32)
        base = stored[-1]
        return between(reducer, counts, lambda row, *ends: _keep_magnitudes(stored[row], base, *ends, room), room)
    histogram = histograms(reducer, given.models)
    prefixes = reducer.prefixes(given.models).astype(np.uint32)
    for i in range(given.models):
        if prefixes.shape[1]:
            _count_lower(stored[i], stored[-1], histogram[i], prefixes[i])
        else:
            _count_upper(stored[i], stored[-1], histogram[i, 0])
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
    stored = elements(given)
    if stored is None:
        return None
    settings = given.once("settings of the tile", lambda: _settings(method, given, random=random, elected=elected))
    value, limit, keys, kind, weight, scale, total = settings
    lasting = given.kept(_DRAWN)
    rule = (_DROP if lasting is None else _DROP_AGAIN) if random else _TRIM
    numbers = (rule, kind, value, limit, keys, given.start, *_marks(given, lasting=lasting))
    return bool(_mix(stored[:-1], stored[-1], *numbers, weight, scale, total, float(method.lambda_), out))


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
    stored = elements(given)
    if stored is None:
        return None
    whole, kept = (np.zeros((given.models, -(-given.count // BLOCK), LANES)) for _ in range(2))
    value, limit = _dropping(method, given) if random else _trimming(given)
    shape = (given.models, -(-given.size // RUN), COLUMNS)
    marks, first = _marks(given, lasting=given.keep(_DRAWN, shape) if random else None)
    keys = _keys(given)
    for i in range(given.models):
        settings = (_DROP if random else _TRIM, value[i], limit[i], keys[i], given.start, BLOCK)
        _add_magnitudes(stored[i], stored[-1], *settings, marks[i], first, whole[i], kept[i])
    return whole.transpose(1, 0, 2), kept.transpose(1, 0, 2)


def _second(parts: Any) -> Any:
    return None if parts is None else parts[1]


FUNCTIONS: dict[tuple[str, ...], Any] = {
    ("ties", "cut"): cut,
    ("ties", "kept"): lambda method, given, reducer: _second(magnitudes(method, given, random=False)),
    ("ties", "tile"): lambda method, given, out: tile(method, given, out, random=False, elected=True),
    ("dare_linear", "whole", "kept"): lambda method, given, *reducers: magnitudes(method, given, random=True),
    ("dare_linear", "tile"): lambda method, given, out: tile(method, given, out, random=True, elected=False),
    ("dare_ties", "whole", "kept"): lambda method, given, *reducers: magnitudes(method, given, random=True),
    ("dare_ties", "tile"): lambda method, given, out: tile(method, given, out, random=True, elected=True),
}
"""(method, function) or (method, reductions of one pass...) -> kernel."""
