"""Trim, drop and elect on stored bytes: the functions of ties and dare, each in one pass over a tile.

A tile is worked on in short runs that stay in the first cache. The operations and their order are those of
`methods.stages`, so the bits are too.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba.extending import overload

from smelt.engine.given import Given
from smelt.engine.kernels.compiled import JIT, draw, widen
from smelt.engine.kernels.span import elements
from smelt.engine.kernels.sums import histograms
from smelt.engine.tiles import BLOCK
from smelt.methods.reducers import LANES
from smelt.methods.stages import TINY, counts_to_keep, divisor

RUN = 512
"""Elements worked on at a time."""
_KEEP_ALL, _TRIM, _DROP = 0, 1, 2


@JIT
def _deltas(stored: Any, base: Any, out: Any) -> None:
    for j in range(out.size):
        out[j] = widen(stored[j]) - widen(base[j])


@JIT
def _magnitude_bits(stored: Any, base: Any, out: Any) -> None:
    for j in range(out.size):
        out[j] = np.float32(widen(stored[j]) - widen(base[j])).view(np.uint32) & np.uint32(0x7FFFFFFF)


@JIT
def _keep(deltas: Any, rule: int, value: Any, share: Any, density: Any, key: Any, start: int, numbers: Any) -> None:
    """Set to zero what is not kept; `numbers` is room for random numbers."""
    if rule == _DROP:
        draw(key[0], key[1], start, numbers)
        for j in range(deltas.size):
            if not np.float64(numbers[j]) < density:
                deltas[j] = np.float32(0.0)
    elif rule == _TRIM:
        equal = 0
        for j in range(deltas.size):
            equal += np.abs(deltas[j]) == value
        if equal and np.float32(0.0) < share < np.float32(1.0):
            draw(key[0], key[1], start, numbers)
            for j in range(deltas.size):
                magnitude = np.abs(deltas[j])
                if magnitude <= value and not (magnitude == value and numbers[j] < share):
                    deltas[j] = np.float32(0.0)
        else:
            kept = share >= np.float32(1.0)
            for j in range(deltas.size):
                magnitude = np.abs(deltas[j])
                if magnitude <= value and not (kept and magnitude == value):
                    deltas[j] = np.float32(0.0)


@JIT
def _add_magnitudes(
    stored: Any,
    base: Any,
    rule: int,
    value: Any,
    share: Any,
    density: Any,
    key: Any,
    start: int,
    block: int,
    lanes: Any,
) -> None:
    """Add abs of what is kept of one model's deltas to each block's lanes, in the order of `Sum`."""
    deltas = np.empty(RUN, dtype=np.float32)
    numbers = np.empty(RUN, dtype=np.float32)
    for low in range(0, stored.size, RUN):  # runs are whole lanes, and blocks whole runs
        high = min(low + RUN, stored.size)
        part = deltas[: high - low]
        _deltas(stored[low:high], base[low:high], part)
        _keep(part, rule, value, share, density, key, start + low, numbers[: high - low])
        target = lanes[low // block]
        whole = part.size // LANES * LANES
        for first in range(0, whole, LANES):
            row = part[first : first + LANES]
            for lane in range(LANES):
                target[lane] += np.float64(np.abs(row[lane]))
        for j in range(whole, part.size):
            target[j - whole] += np.float64(np.abs(part[j]))


def _trim_and_elect(stored, base, value, share, density, numbers, weight, scale, normalize, total, factor, out):
    """One run of b + λ · mixed: trim, elect."""
    raise NotImplementedError


def _drop_and_elect(stored, base, value, share, density, numbers, weight, scale, normalize, total, factor, out):
    """One run of b + λ · mixed: drop at random, elect."""
    raise NotImplementedError


def _drop_and_add(stored, base, value, share, density, numbers, weight, scale, normalize, total, factor, out):
    """One run of b + λ · mixed: drop at random, add."""
    raise NotImplementedError


@overload(_trim_and_elect)
def _written_trim_and_elect(stored, base, value, share, density, numbers, weight, scale, normalize, total, factor, out):
    return _written(len(stored), random=False, elected=True)


@overload(_drop_and_elect)
def _written_drop_and_elect(stored, base, value, share, density, numbers, weight, scale, normalize, total, factor, out):
    return _written(len(stored), random=True, elected=True)


@overload(_drop_and_add)
def _written_drop_and_add(stored, base, value, share, density, numbers, weight, scale, normalize, total, factor, out):
    return _written(len(stored), random=True, elected=False)


def _written(models: int, *, random: bool, elected: bool) -> Any:
    """The loop over the elements of a run, written out for a number of models so that all stays in registers.

    The operations and their order are those of `methods.stages.combine`. Conditions are joined without branches.
    """
    each = range(models)
    lines = ["def loop(stored, base, value, share, density, numbers, weight, scale, normalize, total, factor, out):"]
    for i in each:
        lines.append(f"    s{i} = stored[{i}]; u{i} = numbers[{i}]; v{i} = value[{i}]; h{i} = share[{i}]")
        lines.append(f"    p{i} = density[{i}]; w{i} = weight[{i}]; f{i} = scale[{i}]")
    lines += ["    zero = np.float32(0.0)", "    for j in range(out.size):", "        b = widen(base[j])"]
    for i in each:
        keep = f"np.float64(u{i}[j]) < p{i}" if random else f"(not m{i} <= v{i}) | ((m{i} == v{i}) & (u{i}[j] < h{i}))"
        lines.append(f"        d{i} = widen(s{i}[j]) - b")
        lines.append(f"        m{i} = np.abs(d{i})")
        lines.append(f"        e{i} = f{i} * np.float64(d{i} if {keep} else zero)")
    lines.append(f"        t = {' + '.join(f'e{i}' for i in each)}")
    if elected:
        lines += ["        up = t >= 0.0", "        mixed = 0.0", "        agreeing = 0.0"]
        for i in each:
            lines.append(f"        a = (up & (not e{i} <= 0.0)) | ((not up) & (not e{i} >= 0.0))")
            lines.append(f"        mixed = mixed + e{i} if a else mixed")
            lines.append(f"        agreeing = agreeing + w{i} if a else agreeing")
        lines.append(f"        below = agreeing if normalize & (np.abs(agreeing) >= {TINY!r}) else 1.0")
        lines.append("        t = mixed / below")
    else:
        lines.append("        t = t / total")
    lines.append("        out[j] = np.float32(np.float64(b) + factor * t)")
    space: dict[str, Any] = {"np": np, "widen": widen}
    exec("\n".join(lines), space)
    return space["loop"]


@JIT
def _equals(stored: Any, base: Any, value: Any) -> int:
    """How many magnitudes of one model's deltas equal the cut."""
    equal = 0
    for j in range(stored.size):
        equal += np.abs(widen(stored[j]) - widen(base[j])) == value
    return equal


@JIT
def _mix(
    stored: Any,
    base: Any,
    random: bool,
    elected: bool,
    value: Any,
    share: Any,
    density: Any,
    keys: Any,
    start: int,
    weight: Any,
    scale: Any,
    normalize: bool,
    total: float,
    factor: float,
    out: Any,
) -> None:
    """b + λ · mixed of a tile, run by run; random numbers are made where they decide something."""
    room = np.zeros((len(stored), RUN), dtype=np.float32)
    for low in range(0, out.size, RUN):
        high = min(low + RUN, out.size)
        bases, result = base[low:high], out[low:high]
        for i in range(len(stored)):
            part = stored[i][low:high]
            decides = random or (np.float32(0.0) < share[i] < np.float32(1.0) and _equals(part, bases, value[i]) > 0)
            if decides:
                draw(keys[i, 0], keys[i, 1], start + low, room[i][: high - low])
        parts = _cut_out(stored, low, high)
        if not random:
            _trim_and_elect(parts, bases, value, share, density, room, weight, scale, normalize, total, factor, result)
        elif elected:
            _drop_and_elect(parts, bases, value, share, density, room, weight, scale, normalize, total, factor, result)
        else:
            _drop_and_add(parts, bases, value, share, density, room, weight, scale, normalize, total, factor, result)


def _cut_out(stored: Any, low: int, high: int) -> Any:
    """Elements [low, high) of each model's array."""
    raise NotImplementedError


@overload(_cut_out)
def _written_cut_out(stored, low, high):
    items = "".join(f"stored[{i}][low:high], " for i in range(len(stored)))
    space: dict[str, Any] = {}
    exec(f"def cut(stored, low, high): return ({items})", space)
    return space["cut"]


def _rule(method: Any, given: Given, *, random: bool) -> tuple[Any, ...]:
    """How a method keeps entries: the rule, and per model the cut's value and share, and the density."""
    density = np.ascontiguousarray(method.density.reshape(-1))
    zeros = np.zeros(given.models, dtype=np.float32)
    if random:
        return _DROP, zeros, zeros, density
    cut = given["cut"]
    if cut is None:
        return _KEEP_ALL, zeros, zeros, density
    return _TRIM, np.ascontiguousarray(cut.value[:, 0]), np.ascontiguousarray(cut.share[:, 0]), density


def _keys(given: Given) -> Any:
    return np.array(given.streams, dtype=np.uint64).reshape(-1, 2)


def tile(method: Any, given: Given, *, random: bool, elected: bool) -> Any:
    """The tile of a method that keeps, weighs and mixes deltas: float32 [t]."""
    stored = elements(given)
    if stored is None:
        return None
    weight = np.ascontiguousarray(method.weight.reshape(-1))
    factors = given["factors"]
    scale = weight if factors is None else np.ascontiguousarray((method.weight * factors).reshape(-1))
    total_weight = divisor(weight) if method.normalize and not elected else 1.0
    out = given.scratch.array("values", (given.count,), np.float32)
    rule, value, share, density = _rule(method, given, random=random)
    if rule == _KEEP_ALL:  # a cut below every magnitude
        value, share = value - np.float32(1.0), share
    numbers = (_plain(value, np.float32), _plain(share, np.float32), _plain(density, float), _keys(given), given.start)
    settings = (
        _plain(weight, float),
        _plain(scale, float),
        bool(method.normalize),
        total_weight,
        float(method.lambda_),
    )
    _mix(stored[:-1], stored[-1], random, elected, *numbers, *settings, out)
    return out


def _plain(numbers: Any, kind: Any) -> tuple[Any, ...]:
    """One number per model as a tuple, which the kernel holds in registers."""
    return tuple(kind(number) for number in numbers)


def magnitudes(method: Any, given: Given, *, kept: bool, random: bool) -> Any:
    """Partial results of Σ abs(d_i), of all entries or of those kept: lanes [blocks, n, 256]."""
    stored = elements(given)
    if stored is None:
        return None
    lanes = np.zeros((given.models, -(-given.count // BLOCK), LANES))
    rule, value, share, density = _rule(method, given, random=random) if kept else _nothing_dropped(given)
    keys = _keys(given)
    for i in range(given.models):
        settings = (rule, value[i], share[i], density[i], keys[i], given.start, BLOCK)
        _add_magnitudes(stored[i], stored[-1], *settings, lanes[i])
    return lanes.transpose(1, 0, 2)


def _nothing_dropped(given: Given) -> tuple[Any, ...]:
    zeros = np.zeros(given.models, dtype=np.float32)
    return _KEEP_ALL, zeros, zeros, np.zeros(given.models)


@JIT
def _count_magnitudes(stored: Any, base: Any, targets: Any, prefixes: Any) -> None:
    """Histograms of the 16-bit digits of abs(d): of the upper ones, or of the lower ones behind each prefix."""
    bits = np.empty(RUN, dtype=np.uint32)
    for low in range(0, stored.size, RUN):
        high = min(low + RUN, stored.size)
        part = bits[: high - low]
        _magnitude_bits(stored[low:high], base[low:high], part)
        if prefixes.size == 0:
            target = targets[0]
            for j in range(part.size):
                target[part[j] >> np.uint32(16)] += 1
        for place in range(prefixes.size):
            target = targets[place]
            for j in range(part.size):
                if part[j] >> np.uint32(16) == prefixes[place]:
                    target[part[j] & np.uint32(0xFFFF)] += 1


def cut(method: Any, given: Given, reducer: Any) -> Any:
    """The partial result of KthLargest over abs(d_i)."""
    stored = elements(given)
    if stored is None:
        return None
    histogram = histograms(reducer, given.models)
    prefixes = reducer.prefixes(given.models).astype(np.uint32)
    for i in range(given.models):
        _count_magnitudes(stored[i], stored[-1], histogram[i], prefixes[i])
    return counts_to_keep(method.density, given["size"]).reshape(given.models, -1), histogram


FUNCTIONS: dict[tuple[str, str], Any] = {
    ("ties", "cut"): cut,
    ("ties", "whole"): lambda method, given, reducer: magnitudes(method, given, kept=False, random=False),
    ("ties", "kept"): lambda method, given, reducer: magnitudes(method, given, kept=True, random=False),
    ("ties", "tile"): lambda method, given: tile(method, given, random=False, elected=True),
    ("dare_linear", "whole"): lambda method, given, reducer: magnitudes(method, given, kept=False, random=True),
    ("dare_linear", "kept"): lambda method, given, reducer: magnitudes(method, given, kept=True, random=True),
    ("dare_linear", "tile"): lambda method, given: tile(method, given, random=True, elected=False),
    ("dare_ties", "whole"): lambda method, given, reducer: magnitudes(method, given, kept=False, random=True),
    ("dare_ties", "kept"): lambda method, given, reducer: magnitudes(method, given, kept=True, random=True),
    ("dare_ties", "tile"): lambda method, given: tile(method, given, random=True, elected=True),
}
"""(method, function) -> kernel."""
