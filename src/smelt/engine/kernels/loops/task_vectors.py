"""Trim, band, drop and elect on stored bytes, each in one pass over a tile.

A tile is worked on in runs that stay in the first cache: first each model's differences, with what is not kept set to
zero, then the election over all models. The operations and their order are those of `methods.stages`, so the bits are
too. Random numbers are compared as integers, and where only entries equal to the cut need one, only those draw it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba.extending import overload

from smelt.engine.kernels.loops import sums
from smelt.engine.kernels.loops.elements import JIT, drawn_at, rooms, widen
from smelt.engine.kernels.loops.fetch import cut, fetch
from smelt.engine.kernels.loops.output import made
from smelt.engine.kernels.loops.picking import add_chosen, choose, draw_below, places_between
from smelt.engine.kernels.loops.sums import add_run, keep_between, widen_run
from smelt.engine.kernels.sizes import ADD, AVERAGE, BAND, DROP, ELECT_MEAN, MOST_MODELS, PLACES, RUN, TRIM
from smelt.engine.tiles import BLOCK, PIECE
from smelt.methods.stages import TINY


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
    _draw_equal(deltas, value, limit, key, start, kept, places)


@JIT
def _band(deltas: Any, value: Any, limit: Any, key: Any, start: int, kept: Any, places: Any) -> None:
    """kept = the deltas between two cuts, value[0] ≥ value[1], and NaN; of those equal to one as `_trim` does."""
    high, low = value[0], value[1]
    for j in range(RUN):
        size = np.abs(deltas[j])
        kept[j] = deltas[j] if ((size > low) & (size < high)) | (size != size) else np.float32(0.0)
    if high != low:
        _draw_equal(deltas, high, limit[0], key, start, kept, places)
    _draw_equal(deltas, low, limit[1], key, start, kept, places)


@JIT
def _draw_equal(deltas: Any, value: Any, limit: Any, key: Any, start: int, kept: Any, places: Any) -> None:
    """Keep those of the deltas whose magnitude is `value` whose random number is below limit / GRID."""
    if limit == 0 or value != value:  # nothing equals a NaN
        return
    words, target = deltas.view(np.uint32), kept.view(np.uint32)
    equal = places_between(words, np.float32(value).view(np.uint32), np.uint32(0), places)
    for k in range(equal):
        j = places[k]
        chosen = np.uint32(np.uint32(0) - np.uint32(drawn_at(np.uint64(start) + np.uint64(j), key) < limit))
        target[j] = words[j] & chosen


@JIT
def _add_model(
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
    deltas = rooms(1, RUN, np.float32)[0]
    chosen = rooms(1, RUN, np.float32)[0]
    places = rooms(1, PLACES, np.uint32)[0]
    for low in range(0, stored.size, RUN):  # runs are whole lanes, and blocks whole runs
        high = min(low + RUN, stored.size)
        _magnitudes(stored[low:high], base[low:high], deltas)
        bits = marks[(first + low // RUN) % len(marks)]
        if rule == TRIM:
            _trim(deltas, value[0], limit[0], key, start + low, chosen, places)
        elif rule == BAND:
            _band(deltas, value, limit, key, start + low, chosen, places)
        else:
            draw_below(key, start + low, limit[0], bits)
            if high - low == RUN:
                add_chosen(deltas, bits, whole, kept)
                continue
            choose(deltas, bits, chosen)
        add_run(deltas, high - low, whole)
        add_run(chosen, high - low, kept)


@JIT
def add_magnitudes(
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
    """`_add_model` of all models, block by block: lanes [n, blocks, 256]."""
    for low in range(0, size, PIECE):
        high = min(low + PIECE, size)
        at = fetch(files, stored, low, high)
        part = cut(stored, at, at + high - low)
        block, run = low // BLOCK, first + low // RUN
        for i in range(len(part) - 1):
            settings = (rule, value[i], limit[i], keys[i], start + low)
            _add_model(part[i], part[-1], *settings, marks[i], run, whole[i, block], kept[i, block])


def combine_run(kind, room, bases, weight, scale, total, factor, out):
    """One run of b + λ · mixed; whether a number of it is not finite."""
    raise NotImplementedError


@overload(combine_run)
def _written_combine(kind, room, bases, weight, scale, total, factor, out):
    value = "np.float64(bases[j]) + factor * t"
    head = ["def loop(kind, room, bases, weight, scale, total, factor, out):"]
    head += [f"    d{i} = room[{i}]; w{i} = weight[{i}]; f{i} = scale[{i}]" for i in range(len(weight))]
    if len(kind) == len(AVERAGE):
        return made(head, _average(len(weight)), value, out)
    return made(head, _mixed(len(weight), elected=len(kind) < len(ADD), mean=len(kind) == len(ELECT_MEAN)), value, out)


def _average(models: int) -> list[str]:
    """t = the mean of the entries that are not 0, as `methods.ram.average_active` makes it; 0 where there is none."""
    each = range(models)
    body = [f"        e{i} = np.float64(d{i}[j]); a{i} = not np.abs(e{i}) <= 0.0" for i in each]
    body += [f"        count = {' + '.join(f'(1.0 if a{i} else 0.0)' for i in each)}", "        t = 0.0"]
    body += [f"        t = t + e{i} if a{i} else t" for i in each]
    return [*body, "        t = t / (1.0 if count < 1.0 else count)"]


def _mixed(models: int, *, elected: bool, mean: bool) -> list[str]:
    """t of one element, written out for a number of models so that all stays in registers.

    The operations and their order are those of `methods.stages.combine`. Conditions are joined without branches.
    """
    each = range(models)
    body = [f"        e{i} = f{i} * np.float64(d{i}[j])" for i in each]
    body += [f"        t = {' + '.join(f'e{i}' for i in each)}"]
    if elected:
        body += ["        up = t >= 0.0", "        mixed = 0.0", "        agreeing = 0.0"]
        for i in each:
            body += [f"        g = e{i} if up else -e{i}", "        a = not g <= 0.0"]
            body += [f"        mixed = mixed + e{i} if a else mixed"]
            body += [f"        agreeing = agreeing + w{i} if a else agreeing"] if mean else []
        below = f" / (agreeing if np.abs(agreeing) >= {TINY!r} else 1.0)" if mean else ""
        body += [f"        t = mixed{below}"]
    else:
        body += ["        t = t / total"]
    return body


@JIT
def _mix_piece(
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
    bases = rooms(1, RUN, np.float32)[0]
    deltas = rooms(1, RUN, np.float32)[0]
    places = rooms(1, PLACES, np.uint32)[0]
    room = rooms(MOST_MODELS, RUN, np.float32)
    for i in range(len(stored)):
        for j in range(RUN):
            room[i, j] = np.float32(0.0)
    found = False
    for low in range(0, out.size, RUN):
        high = min(low + RUN, out.size)
        widen_run(base[low:high], bases)
        for i in range(len(stored)):
            if rule == TRIM and limit[i, 0] == 0:
                _subtract_and_trim(stored[i][low:high], bases, value[i, 0], room[i])
                continue
            _subtract(stored[i][low:high], bases, deltas)
            bits = marks[i, (first + low // RUN) % marks.shape[1]]
            if rule == TRIM:
                _trim(deltas, value[i, 0], limit[i, 0], keys[i], start + low, room[i], places)
            elif rule == BAND:
                _band(deltas, value[i], limit[i], keys[i], start + low, room[i], places)
            else:
                if rule == DROP:
                    draw_below(keys[i], start + low, limit[i, 0], bits)
                choose(deltas, bits, room[i])
        result = out[low:high]
        found |= combine_run(kind, room, bases, weight, scale, total, factor, result)
    return found


@JIT
def mix_tile(
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
    """`_mix_piece` piece by piece."""
    found = False
    for low in range(0, out.size, PIECE):
        high = min(low + PIECE, out.size)
        at = fetch(files, stored, low, high)
        part = cut(stored, at, at + high - low)
        chosen = (rule, kind, value, limit, keys, start + low, marks, first + low // RUN)
        found |= _mix_piece(part[:-1], part[-1], *chosen, weight, scale, total, factor, out[low:high])
    return found


@JIT
def count_upper(files: Any, stored: Any, size: int, histograms: Any) -> None:
    """The histogram of the upper 16 bits of abs(d_i), for each model."""
    bits = rooms(1, RUN, np.uint32)[0]
    for low in range(0, size, PIECE):
        high = min(low + PIECE, size)
        at = fetch(files, stored, low, high)
        for i in range(len(stored) - 1):
            histogram = histograms[i, 0]
            for start in range(at, at + high - low, RUN):
                stop = min(start + RUN, at + high - low)
                _magnitude_bits(stored[i][start:stop], stored[-1][start:stop], bits)
                sums.count_upper(bits[: stop - start], histogram)


@JIT
def count_lower(files: Any, stored: Any, size: int, histograms: Any, prefixes: Any) -> None:
    """The histograms of the lower 16 bits of the abs(d_i) that begin with each prefix."""
    bits = rooms(1, RUN, np.uint32)[0]
    for low in range(0, size, PIECE):
        high = min(low + PIECE, size)
        at = fetch(files, stored, low, high)
        for i in range(len(stored) - 1):
            for start in range(at, at + high - low, RUN):
                stop = min(start + RUN, at + high - low)
                _magnitude_bits(stored[i][start:stop], stored[-1][start:stop], bits)
                for place in range(prefixes.shape[1]):
                    sums.count_lower(bits[: stop - start], prefixes[i, place], histograms[i, place])


@JIT
def _magnitude_bits(stored: Any, base: Any, out: Any) -> None:
    """The bits of abs(d) of a run; zeros beyond its end."""
    for j in range(stored.size):
        delta = np.float32(widen(stored[j]) - widen(base[j]))
        out[j] = np.uint32(delta.view(np.uint32) & np.uint32(0x7FFFFFFF))
    for j in range(stored.size, RUN):
        out[j] = np.uint32(0)


@JIT
def keep_magnitudes(files: Any, stored: Any, size: int, brackets: Any, room: Any, above: Any, found: Any) -> None:
    """Of each model's abs(d_i), what `keep_between` gives for each bracket [model, place, (low, high)]."""
    bits = rooms(1, RUN, np.uint32)[0]
    places = rooms(1, PLACES, np.uint32)[0]
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
def all_magnitudes(files: Any, stored: Any, size: int, out: Any) -> None:
    """The bits of all abs(d_i), uint32 [n, size]."""
    for low in range(0, size, PIECE):
        high = min(low + PIECE, size)
        at = fetch(files, stored, low, high)
        for i in range(len(stored) - 1):
            for j in range(high - low):
                delta = np.float32(widen(stored[i][at + j]) - widen(stored[-1][at + j]))
                out[i, low + j] = np.uint32(delta.view(np.uint32) & np.uint32(0x7FFFFFFF))
