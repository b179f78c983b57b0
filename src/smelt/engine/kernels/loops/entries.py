"""Methods that decide at each entry by the size of its differences: nearswap, ram, consensus, sce.

Each is written out for a number of models, so that all stays in registers. The operations and their order are those of
the methods' own functions, so the bits are too.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba.extending import overload

from smelt.engine.kernels.loops.elements import (
    JIT,
    drawn_at,
    infinity,
    least,
    magnitude,
    narrow,
    ordered_key,
    rooms,
    widen,
)
from smelt.engine.kernels.loops.fetch import cut, fetch
from smelt.engine.kernels.loops.output import function, made
from smelt.engine.kernels.loops.sums import multiply_run
from smelt.engine.kernels.sizes import RUN
from smelt.engine.tiles import BLOCK, PIECE
from smelt.methods.nearswap import LEAST
from smelt.methods.stages import TINY


def _deltas(models: int) -> list[str]:
    """Of element j: b, and each d_i in float32."""
    return ["        b = widen(base[j])", *(f"        d{i} = np.float32(widen(s{i}[j]) - b)" for i in range(models))]


def _stored(models: int) -> list[str]:
    """Arrays in names of their own: taken from a tuple inside the loop they would be counted, and no vectors made."""
    return [f"    s{i} = stored[{i}]" for i in range(models)]


# --- nearswap -------------------------------------------------------------------------------------------------------


@JIT
def _swap(stored: Any, base: Any, t: float, out: Any) -> bool:
    worst = least(out)
    for j in range(out.size):
        x, b = widen(stored[j]), widen(base[j])
        distance = np.float64(np.abs(np.float32(x - b)))
        share = t / (LEAST if distance < LEAST else distance)
        share = 0.0 if share < 0.0 else share
        share = 1.0 if share > 1.0 else share
        y = narrow(np.float32(share * np.float64(x) + (1.0 - share) * np.float64(b)), out)
        out[j] = y
        worst = max(worst, magnitude(y))
    return bool(worst >= infinity(out))


@JIT
def swap_near(files: Any, stored: Any, t: float, out: Any) -> bool:
    """The tile of nearswap; whether a number of it is not finite."""
    found = False
    for low in range(0, out.size, PIECE):
        high = min(low + PIECE, out.size)
        at = fetch(files, stored, low, high)
        part = cut(stored, at, at + high - low)
        found |= _swap(part[0], part[-1], t, out[low:high])
    return found


# --- ram ------------------------------------------------------------------------------------------------------------


def _average(stored: Any, base: Any, epsilon: float, boost: Any, out: Any) -> bool:
    """b + the mean of the active d_i; those active alone are times boost[i]."""
    raise NotImplementedError


@overload(_average)
def _written_average(stored, base, epsilon, boost, out):
    each = range(len(stored))
    head = ["def loop(stored, base, epsilon, boost, out):", *_stored(len(stored))]
    head += [f"    r{i} = boost[{i}]" for i in each]
    body = _deltas(len(stored))
    body += [f"        a{i} = not np.float64(np.abs(d{i})) <= epsilon" for i in each]
    body += [f"        count = {' + '.join(f'(1.0 if a{i} else 0.0)' for i in each)}", "        total = 0.0"]
    for i in each:
        body += [f"        v = np.float64(d{i})", f"        v = r{i} * v if count == 1.0 else v"]
        body += [f"        total = total + v if a{i} else total"]
    body += ["        total = total / (1.0 if count < 1.0 else count)"]
    return made(head, body, "np.float64(b) + total", out)


@JIT
def average_active(files: Any, stored: Any, epsilon: float, boost: Any, out: Any) -> bool:
    """The tile of ram; whether a number of it is not finite. A boost of 1 changes nothing."""
    found = False
    for low in range(0, out.size, PIECE):
        high = min(low + PIECE, out.size)
        at = fetch(files, stored, low, high)
        part = cut(stored, at, at + high - low)
        found |= _average(part[:-1], part[-1], epsilon, boost, out[low:high])
    return found


def _count(stored: Any, base: Any, epsilon: float, size: int, counts: Any) -> None:
    """counts [2 n]: how many entries each model has changed alone, and how many with others."""
    raise NotImplementedError


@overload(_count)
def _written_count(stored, base, epsilon, size, counts):
    each = range(len(stored))
    lines = ["def loop(stored, base, epsilon, size, counts):", *_stored(len(stored))]
    lines += [f"    u{i} = 0; t{i} = 0" for i in each]
    lines += ["    for j in range(size):", *_deltas(len(stored))]
    lines += [f"        a{i} = 0 if np.float64(np.abs(d{i})) <= epsilon else 1" for i in each]
    lines += [f"        count = {' + '.join(f'a{i}' for i in each)}"]
    lines += [f"        u{i} += a{i} & (count == 1); t{i} += a{i} & (count > 1)" for i in each]
    lines += [f"    counts[{i}] += u{i}; counts[{len(stored) + i}] += t{i}" for i in each]
    return function(lines)


@JIT
def count_active(files: Any, stored: Any, epsilon: float, size: int, counts: Any) -> None:
    """`_count` of each block: int64 [blocks, 2 n]."""
    for low in range(0, size, PIECE):
        high = min(low + PIECE, size)
        at = fetch(files, stored, low, high)
        part = cut(stored, at, at + high - low)
        _count(part[:-1], part[-1], epsilon, high - low, counts[low // BLOCK])


# --- consensus ------------------------------------------------------------------------------------------------------


def _agree(stored: Any, base: Any, weight: Any, threshold: Any, agreement: float, factor: float, out: Any) -> bool:
    """b + λ · Σ w_i d_i where so many models ask for the entry; whether a number of it is not finite."""
    raise NotImplementedError


@overload(_agree)
def _written_agree(stored, base, weight, threshold, agreement, factor, out):
    each = range(len(stored))
    head = ["def loop(stored, base, weight, threshold, agreement, factor, out):", *_stored(len(stored))]
    head += [f"    w{i} = weight[{i}]; t{i} = threshold[{i}]" for i in each]
    body = [*_deltas(len(stored)), *(f"        e{i} = w{i} * np.float64(d{i})" for i in each), "        asking = 0.0"]
    for i in each:
        others = " + ".join(["0.0", *(f"e{k}" for k in each if k != i)])
        body += [f"        asks = not np.abs(e{i}) < t{i} * np.abs({others})"]
        body += ["        asking = asking + (1.0 if asks else 0.0)"]
    body += [f"        total = {' + '.join(f'e{i}' for i in each)}"]
    body += ["        kept = (asking >= agreement) | (not np.abs(total) < np.inf)"]
    return made(head, body, "np.float64(b) + factor * (total if kept else 0.0)", out)


@JIT
def agree_tile(files: Any, stored: Any, weight: Any, threshold: Any, agreement: float, factor: float, out: Any) -> bool:
    """The tile of consensus; whether a number of it is not finite."""
    found = False
    for low in range(0, out.size, PIECE):
        high = min(low + PIECE, out.size)
        at = fetch(files, stored, low, high)
        part = cut(stored, at, at + high - low)
        found |= _agree(part[:-1], part[-1], weight, threshold, agreement, factor, out[low:high])
    return found


# --- sce ------------------------------------------------------------------------------------------------------------


def _variance(stored: Any, base: Any, out: Any) -> None:
    """Var_i(d_i) at each entry of a run, float64."""
    raise NotImplementedError


@overload(_variance)
def _written_variance(stored, base, out):
    each, models = range(len(stored)), len(stored)
    lines = ["def loop(stored, base, out):", *_stored(models), "    for j in range(base.size):", *_deltas(models)]
    lines += [f"        mean = ({' + '.join(f'np.float64(d{i})' for i in each)}) / {models}.0"]
    lines += [f"        e{i} = np.float64(d{i}) - mean" for i in each]
    lines += [f"        out[j] = ({' + '.join(f'e{i} * e{i}' for i in each)}) / {models}.0"]
    return function(lines)


@JIT
def count_varying(files: Any, stored: Any, size: int, counts: Any) -> None:
    """In each block, how many entries vary: int64 [blocks]."""
    run = rooms(1, RUN, np.float64)[0]
    for low in range(0, size, PIECE):
        high = min(low + PIECE, size)
        at = fetch(files, stored, low, high)
        for start in range(at, at + high - low, RUN):
            part = cut(stored, start, min(start + RUN, at + high - low))
            _variance(part[:-1], part[-1], run)
            varying = 0
            for j in range(part[-1].size):
                varying += run[j] != 0.0
            counts[low // BLOCK] += varying


@JIT
def count_variances(files: Any, stored: Any, size: int, digit: int, prefix: Any, first: bool, histogram: Any) -> None:
    """The histogram of 16 bits, from bit `digit` on, of the variances' keys that begin with a prefix (`first`: all)."""
    run = rooms(1, RUN, np.float64)[0]
    for low in range(0, size, PIECE):
        high = min(low + PIECE, size)
        at = fetch(files, stored, low, high)
        for start in range(at, at + high - low, RUN):
            part = cut(stored, start, min(start + RUN, at + high - low))
            _variance(part[:-1], part[-1], run)
            for j in range(part[-1].size):
                place = np.uint64(ordered_key(run[j]) >> np.uint64(digit))
                if first or np.uint64(place >> np.uint64(16)) == prefix:
                    histogram[place & np.uint64(0xFFFF)] += 1


@JIT
def _select(run: Any, count: int, value: float, limit: Any, key: Any, start: int, kept: Any) -> None:
    """Where a run of variances is above the cut, or equals it and has a random number below limit / GRID."""
    for j in range(count):
        kept[j] = np.uint8(0 if run[j] <= value else 1)
    if limit == 0:
        return
    for j in range(count):
        if run[j] == value:
            kept[j] = np.uint8(drawn_at(start + j, key) < limit)


@JIT
def add_energies(
    files: Any,
    stored: Any,
    chooses: bool,
    value: float,
    limit: Any,
    key: Any,
    start: int,
    size: int,
    lanes: Any,
) -> None:
    """Add the squares of the d_i that are kept to lanes [n, blocks, 256], in the order of `Sum`."""
    run = rooms(1, RUN, np.float64)[0]
    deltas = rooms(1, RUN, np.float32)[0]
    kept = rooms(1, RUN, np.uint8)[0]
    for j in range(RUN):
        kept[j] = np.uint8(1)
    for low in range(0, size, PIECE):
        high = min(low + PIECE, size)
        at = fetch(files, stored, low, high)
        for place in range(low, high, RUN):
            count = min(RUN, high - place)
            part = cut(stored, at + place - low, at + place - low + count)
            if chooses:
                _variance(part[:-1], part[-1], run)
                _select(run, count, value, limit, key, start + place, kept)
            for i in range(len(part) - 1):
                for j in range(count):
                    delta = np.float32(widen(part[i][j]) - widen(part[-1][j]))
                    deltas[j] = delta if kept[j] else np.float32(0.0)
                multiply_run(deltas, deltas, count, lanes[i, low // BLOCK])


def _fuse(stored: Any, base: Any, kept: Any, shares: Any, out: Any) -> bool:
    """b + the mean by shares of the d_i that have the sign of their sum; whether a number of it is not finite."""
    raise NotImplementedError


@overload(_fuse)
def _written_fuse(stored, base, kept, shares, out):
    each, models = range(len(stored)), len(stored)
    head = ["def loop(stored, base, kept, shares, out):", *_stored(models)]
    head += [f"    c{i} = shares[{i}]" for i in each]
    body = _deltas(models)
    body += [f"        e{i} = np.float64(d{i} if kept[j] else np.float32(0.0))" for i in each]
    body += [
        f"        up = ({' + '.join(f'e{i}' for i in each)}) >= 0.0",
        "        mixed = 0.0",
        "        agreeing = 0.0",
    ]
    for i in each:
        body += [f"        g = e{i} if up else -e{i}", "        a = not g <= 0.0"]
        body += [f"        mixed = mixed + c{i} * e{i} if a else mixed"]
        body += [f"        agreeing = agreeing + c{i} if a else agreeing"]
    body += [f"        mixed = mixed / (1.0 if agreeing < {TINY!r} else agreeing)"]
    return made(head, body, "np.float64(b) + mixed", out)


@JIT
def fuse_tile(
    files: Any,
    stored: Any,
    chooses: bool,
    value: float,
    limit: Any,
    key: Any,
    start: int,
    shares: Any,
    out: Any,
) -> bool:
    """The tile of sce; whether a number of it is not finite."""
    run = rooms(1, RUN, np.float64)[0]
    kept = rooms(1, RUN, np.uint8)[0]
    for j in range(RUN):
        kept[j] = np.uint8(1)
    found = False
    for low in range(0, out.size, PIECE):
        high = min(low + PIECE, out.size)
        at = fetch(files, stored, low, high)
        for place in range(low, high, RUN):
            count = min(RUN, high - place)
            part = cut(stored, at + place - low, at + place - low + count)
            if chooses:
                _variance(part[:-1], part[-1], run)
                _select(run, count, value, limit, key, start + place, kept)
            found |= _fuse(part[:-1], part[-1], kept, shares, out[place : place + count])
    return found
