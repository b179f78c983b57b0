"""Random choice by rank: each entry of a row is kept with a probability that its magnitude's rank in the row gives.

No row is sorted. Magnitudes are counted in buckets, which bounds the ranks of each bucket's entries, and so their
probabilities; nearly always the random number is below or above all of these. For the others their bucket is sorted.
The decisions are those of `methods.della.prune_by_rank`, to the bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from smelt.engine.kernels.loops.elements import JIT, mix, rooms, trailing_zeros, widen
from smelt.engine.kernels.loops.fetch import cut, fetch
from smelt.engine.kernels.loops.picking import choose, mark_below
from smelt.engine.kernels.loops.sums import add_run, widen_run
from smelt.engine.kernels.loops.task_vectors import combine_run
from smelt.engine.kernels.sizes import COLUMNS, GRID, MOST_MODELS, ROW_PARTS, RUN
from smelt.engine.tiles import PIECE

_MOST_BUCKETS, _FEW_BUCKETS = 2048, 128
"""Buckets of a wide and of a narrow row: 16 powers of two, each cut into 128 or into 8."""
_BORDERS = _MOST_BUCKETS + 1
_NAN = np.uint32(0x7F800001)
"""The key of every NaN, next above that of infinity."""
_GAPS = (1750, 701, 301, 132, 57, 23, 10, 4, 1)
"""Steps of Shell's sort, as Ciura found them."""
_ROW_BYTES = PIECE // 8
"""Bytes that hold a bit for each element of the widest row."""
_KEYS, _BUCKETS, _ORDERED, _LEAST, _MOST, _WORDS, _DRAWN, _WHOLE, _KEPT = range(ROW_PARTS)
"""The parts of the room of a piece: uint32 [ROW_PARTS, PIECE + WORD]. All but the last two hold a row at a time."""


@JIT
def _limit(share: float, spread: float, rank: float, last: float) -> Any:
    """The number below which a random number times GRID must be for an entry of this rank to be kept."""
    return _grid(share - spread + 2.0 * spread * rank / last)


@JIT
def _grid(probability: float) -> Any:
    return np.uint32(np.int64(np.ceil(min(max(probability, 0.0), 1.0) * np.float64(GRID))))


@JIT
def _draw(key: Any, start: int, width: int, words: Any, drawn: Any) -> None:
    """The random numbers of elements [start, start + width), times GRID."""
    pairs = words.view(np.uint64)
    first = start >> 1
    for j in range(((start + width + 1) >> 1) - first):
        pairs[j] = mix(np.uint64(first + j), key[0], key[1])
    odd = start & 1
    for j in range(width):
        drawn[j] = np.uint32(words[odd + j] >> np.uint32(8))


@JIT
def _count(keys: Any, width: int, count: int, shift: Any, buckets: Any, begins: Any) -> None:
    """Each key's bucket, and how many keys lie in the buckets before each.

    Zeros have the first bucket to themselves; the second takes all that is small beside the largest.
    """
    top = np.uint32(0)
    for j in range(width):
        top = max(top, keys[j])
    offset = np.int32(np.int32(count - 1) - np.int32(top >> shift))
    for j in range(width):
        bucket = max(np.int32(np.int32(keys[j] >> shift) + offset), np.int32(1))
        buckets[j] = np.uint32(np.int32(0) if keys[j] == np.uint32(0) else bucket)
    for b in range(count + 1):
        begins[b] = np.int32(0)
    for j in range(width):
        begins[buckets[j] + np.uint32(1)] += np.int32(1)
    for b in range(count):
        begins[b + 1] += begins[b]


@JIT
def _fill(keys: Any, width: int, buckets: Any, ends: Any, ordered: Any) -> None:
    """Put the keys in the order of their buckets; `ends`, where the buckets begin, is moved to where they end."""
    for j in range(width):
        bucket = buckets[j]
        ordered[ends[bucket]] = keys[j]
        ends[bucket] += np.int32(1)


@JIT
def _sort(keys: Any) -> None:
    """Sort in place; done at once where all are equal."""
    least, most = keys[0], keys[0]
    for j in range(keys.size):
        least, most = min(least, keys[j]), max(most, keys[j])
    if least == most:
        return
    for gap in _GAPS:
        for j in range(gap, keys.size):
            key, at = keys[j], j
            while at >= gap and keys[at - gap] > key:
                keys[at] = keys[at - gap]
                at -= gap
            keys[at] = key


@JIT
def _below(ordered: Any, key: Any) -> int:
    """How many of the sorted keys are below this one."""
    low, high = 0, ordered.size
    while low < high:
        middle = (low + high) >> 1
        if ordered[middle] < key:
            low = middle + 1
        else:
            high = middle
    return low


@JIT
def _settle(
    share: float, spread: float, room: Any, width: int, count: int, begins: Any, undecided: Any, bits: Any
) -> None:
    """Decide on the entries whose bit in `undecided` differs from that in `bits`, by their exact ranks."""
    keys, ordered, drawn = room[_KEYS], room[_ORDERED], room[_DRAWN]
    ends = rooms(1, _BORDERS, np.int32)[0]
    is_sorted = rooms(1, _BORDERS, np.uint8)[0]
    one, two = bits.view(np.uint64), undecided.view(np.uint64)
    filled = False
    for number in range(one.size):
        word = one[number] ^ two[number]
        while word:
            j = np.int64(trailing_zeros(word)) + 64 * number
            word &= word - np.uint64(1)
            if not filled:
                for b in range(count):
                    ends[b], is_sorted[b] = begins[b], np.uint8(0)
                _fill(keys, width, room[_BUCKETS], ends, ordered)
                filled = True
            bucket = room[_BUCKETS, j]
            first = np.int64(begins[bucket])
            part = ordered[first : np.int64(begins[bucket + np.uint32(1)])]
            if is_sorted[bucket] == 0:
                _sort(part)
                is_sorted[bucket] = np.uint8(1)
            below, upto = _below(part, keys[j]), _below(part, np.uint32(keys[j] + np.uint32(1)))
            rank = np.float64(2 * first + below + upto - 1) / 2.0  # the mean of those that equal it
            bit = np.uint64(1) << np.uint64(j & 63)
            if drawn[j] < _limit(share, spread, rank, np.float64(width - 1)):
                one[number] |= bit
            else:
                one[number] &= ~bit


@JIT
def _decide(share: float, spread: float, key: Any, start: int, width: int, room: Any, bits: Any) -> None:
    """Which entries of a row are kept, as bits; its keys are in the room. `start` is the place of its first element."""
    drawn, least, most = room[_DRAWN], room[_LEAST], room[_MOST]
    _draw(key, start, width, room[_WORDS], drawn)
    for j in range(width, 8 * bits.size):
        least[j] = most[j] = np.uint32(0)
    if width == 1 or share >= 1.0 or share <= 0.0:
        limit = _grid(share)
        for j in range(width):
            least[j] = limit
        mark_below(drawn, least, bits)
        return
    count, shift = _MOST_BUCKETS, 16
    while count > width and count > _FEW_BUCKETS:
        count, shift = count >> 1, shift + 1
    begins = rooms(1, _BORDERS, np.int32)[0]
    lowest = rooms(1, _MOST_BUCKETS, np.uint32)[0]
    highest = rooms(1, _MOST_BUCKETS, np.uint32)[0]
    undecided = rooms(1, _ROW_BYTES, np.uint8)[0][: bits.size]
    buckets = room[_BUCKETS]
    _count(room[_KEYS], width, count, np.uint32(shift), buckets, begins)
    last = np.float64(width - 1)
    for b in range(count):
        first = _limit(share, spread, np.float64(begins[b]), last)
        final = _limit(share, spread, np.float64(begins[b + 1] - np.int32(1)), last)
        lowest[b], highest[b] = min(first, final), max(first, final)
    for j in range(width):
        least[j], most[j] = lowest[buckets[j]], highest[buckets[j]]
    mark_below(drawn, least, bits)
    mark_below(drawn, most, undecided)
    _settle(share, spread, room, width, count, begins, undecided, bits)


@JIT
def _take_magnitudes(stored: Any, base: Any, whole: Any, keys: Any) -> None:
    """The magnitudes of a row's differences, and their keys."""
    for j in range(stored.size):
        size = np.float32(np.abs(widen(stored[j]) - widen(base[j])))
        whole[j] = size
        keys[j] = min(np.uint32(size.view(np.uint32)), _NAN)


@JIT
def _add_model(
    stored: Any,
    base: Any,
    share: float,
    spread: float,
    key: Any,
    start: int,
    width: int,
    room: Any,
    marks: Any,
    first: int,
    whole: Any,
    kept: Any,
) -> None:
    """Add abs of one model's deltas, and of what is kept of them, to a block's lanes.

    What is kept of row r is left in marks[first + r] (modulo len(marks)).
    """
    sizes, chosen = room[_WHOLE].view(np.float32), room[_KEPT].view(np.float32)
    for low in range(0, stored.size, width):
        row = sizes[low:]
        _take_magnitudes(stored[low : low + width], base[low : low + width], row, room[_KEYS])
        bits = marks[(first + low // width) % len(marks)]
        _decide(share, spread, key, start + low, width, room, bits)
        choose(row, bits, chosen[low:])
    for low in range(0, stored.size, RUN):
        count = min(RUN, stored.size - low)
        add_run(sizes[low : low + RUN], count, whole)
        add_run(chosen[low : low + RUN], count, kept)


@JIT
def add_magnitudes(
    files: Any,
    stored: Any,
    share: Any,
    spread: Any,
    keys: Any,
    start: int,
    size: int,
    width: int,
    block: int,
    room: Any,
    marks: Any,
    first: int,
    whole: Any,
    kept: Any,
) -> None:
    """`_add_model` of all models, block by block (of whole rows): lanes [n, blocks, 256]."""
    for low in range(0, size, block):
        high = min(low + block, size)
        at = fetch(files, stored, low, high)
        part = cut(stored, at, at + high - low)
        number, row = low // block, first + low // width
        for i in range(len(part) - 1):
            settings = (share[i], spread[i], keys[i], start + low, width, room)
            _add_model(part[i], part[-1], *settings, marks[i], row, whole[i, number], kept[i, number])


@JIT
def _mix_row(
    stored: Any,
    base: Any,
    kind: Any,
    marks: Any,
    row: int,
    weight: Any,
    scale: Any,
    total: float,
    factor: float,
    out: Any,
) -> bool:
    """b + λ · mixed of one row, run by run; whether a number of it is not finite."""
    bases = rooms(1, RUN, np.float32)[0]
    deltas = rooms(1, RUN, np.float32)[0]
    kept = rooms(MOST_MODELS, RUN, np.float32)
    found = False
    for low in range(0, out.size, RUN):
        high = min(low + RUN, out.size)
        widen_run(base[low:high], bases)
        for i in range(len(stored)):
            widen_run(stored[i][low:high], deltas)
            for j in range(high - low):
                deltas[j] = deltas[j] - bases[j]
            choose(deltas, marks[i, row, low // 8 : min(low // 8 + COLUMNS, marks.shape[2])], kept[i])
        result = out[low:high]
        found |= combine_run(kind, kept, bases, weight, scale, total, factor, result)
    return found


@JIT
def mix_tile(
    files: Any,
    stored: Any,
    again: bool,
    kind: Any,
    share: Any,
    spread: Any,
    keys: Any,
    start: int,
    width: int,
    block: int,
    room: Any,
    marks: Any,
    first: int,
    weight: Any,
    scale: Any,
    total: float,
    factor: float,
    out: Any,
) -> bool:
    """b + λ · mixed, row by row; `again`: what is kept is known from an earlier pass."""
    found = False
    sizes = room[_WHOLE].view(np.float32)
    for low in range(0, out.size, block):
        high = min(low + block, out.size)
        at = fetch(files, stored, low, high)
        for place in range(low, high, width):
            part = cut(stored, at + place - low, at + place - low + width)
            row = (first + place // width) % marks.shape[1]
            if not again:
                for i in range(len(part) - 1):
                    _take_magnitudes(part[i], part[-1], sizes, room[_KEYS])
                    _decide(share[i], spread[i], keys[i], start + place, width, room, marks[i, row])
            settings = (weight, scale, total, factor)
            found |= _mix_row(part[:-1], part[-1], kind, marks, row, *settings, out[place : place + width])
    return found
