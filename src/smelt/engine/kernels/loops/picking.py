"""Sixteen elements at a time, as vectors that LLVM is told of: which are in a range of keys, which are drawn.

Loops that numba's compiler does not make vectors of, or not ones as wide as the processor has. Written in LLVM's own
terms, each works on every processor.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
from llvmlite import binding, ir
from numba.core import cgutils
from numba.extending import intrinsic

from smelt.engine.kernels.loops.elements import JIT, MIX, rooms, trailing_zeros
from smelt.engine.kernels.sizes import COLUMNS, LANES, RUN
from smelt.methods.reducers import LANES as ROW

_MAGNITUDE = 0x7FFFFFFF
_WORD, _LONG = ir.IntType(32), ir.IntType(64)
_WORDS, _LONGS = ir.VectorType(_WORD, LANES), ir.VectorType(_LONG, LANES // 2)
_BITS = ir.VectorType(ir.IntType(1), LANES)
_FLOATS, _DOUBLES = ir.VectorType(ir.FloatType(), LANES), ir.VectorType(ir.DoubleType(), LANES)
_int64, _uint64, _uint32, _uint16 = numba.types.int64, numba.types.uint64, numba.types.uint32, numba.types.uint16


def _everywhere(builder: Any, kind: Any, value: Any) -> Any:
    """A vector with this number in every lane."""
    nothing = ir.Constant(kind, ir.Undefined)
    first = builder.insert_element(nothing, value, ir.Constant(_WORD, 0))
    return builder.shuffle_vector(first, nothing, ir.Constant(ir.VectorType(_WORD, kind.count), [0] * kind.count))


def _steps(kind: Any, step: int = 1) -> Any:
    """The vector 0, step, 2 step, ..."""
    return ir.Constant(kind, [k * step % 2**kind.element.width for k in range(kind.count)])


def _at(context: Any, builder: Any, array_type: Any, array: Any, place: Any) -> Any:
    """Where sixteen words of an array begin."""
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [place]), _WORDS.as_pointer())


def _store_packed(builder: Any, words: Any, chosen: Any, place: Any) -> None:
    """Store the chosen of sixteen words one after the other; what lies behind them is undefined."""
    kind = ir.FunctionType(_WORDS, [_WORDS, _BITS, _WORDS])
    name = f"llvm.experimental.vector.compress.v{LANES}i32"
    compress = cgutils.get_or_insert_function(builder.module, kind, name)
    builder.store(builder.call(compress, [words, chosen, ir.Constant(_WORDS, ir.Undefined)]), place, align=4)


def _count(builder: Any, chosen: Any) -> Any:
    """How many of sixteen lanes are chosen, as an integer of 64 bits."""
    return builder.zext(builder.ctpop(builder.bitcast(chosen, ir.IntType(LANES))), _LONG)


def _doubles_at(context: Any, builder: Any, array_type: Any, array: Any, place: Any) -> Any:
    """Sixteen float32 numbers of an array, as float64."""
    numbers = builder.bitcast(_at(context, builder, array_type, array, place), _FLOATS.as_pointer())
    return builder.fpext(builder.load(numbers, align=4), _DOUBLES)


def _fold_rows(context: Any, builder: Any, kinds: Any, lanes: Any, first: Any, step: Any) -> Any:
    """The sums of sixteen lanes from `first` on, in each array of `lanes`, after `step`(start, sums) of each row."""
    targets = [
        builder.bitcast(_at(context, builder, kind, array, first), _DOUBLES.as_pointer())
        for kind, array in zip(kinds, lanes, strict=True)
    ]
    sums = [builder.load(target, align=8) for target in targets]
    for row in range(RUN // ROW):
        sums = step(builder.add(first, ir.Constant(_LONG, row * ROW)), sums)
    for target, value in zip(targets, sums, strict=True):
        builder.store(value, target, align=8)
    return context.get_dummy_value()


@intrinsic
def _pack_lanes(typing_context, bits, start, low, width, places, found):
    """Of sixteen elements from `start` on: put the places inside to places[found:], and say how many they are."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Sequence[Any]) -> Any:
        source, start, low, width, target, found = arguments
        keys = builder.load(_at(context, builder, signature.args[0], source, start), align=4)
        keys = builder.sub(
            builder.and_(keys, ir.Constant(_WORDS, [_MAGNITUDE] * LANES)), _everywhere(builder, _WORDS, low)
        )
        inside = builder.icmp_unsigned("<=", keys, _everywhere(builder, _WORDS, width))
        own = builder.add(_everywhere(builder, _WORDS, builder.trunc(start, _WORD)), _steps(_WORDS))
        _store_packed(builder, own, inside, _at(context, builder, signature.args[4], target, found))
        return _count(builder, inside)

    return _int64(bits, _int64, _uint32, _uint32, places, _int64), generate


@intrinsic
def _pack_keys(typing_context, bits, start, low, width, high, room, found):
    """Of sixteen magnitudes from `start` on: put those inside to room[found:].

    Says how many they are, and in the upper half how many are above `high`.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Sequence[Any]) -> Any:
        source, start, low, width, high, target, found = arguments
        keys = builder.load(_at(context, builder, signature.args[0], source, start), align=4)
        above = builder.icmp_unsigned(">", keys, _everywhere(builder, _WORDS, high))
        distance = builder.sub(keys, _everywhere(builder, _WORDS, low))
        inside = builder.icmp_unsigned("<=", distance, _everywhere(builder, _WORDS, width))
        _store_packed(builder, keys, inside, _at(context, builder, signature.args[5], target, found))
        upper = builder.shl(_count(builder, above), ir.Constant(_LONG, 32))
        return builder.or_(_count(builder, inside), upper)

    return _int64(bits, _int64, _uint32, _uint32, _uint32, room, _int64), generate


@intrinsic
def _draw_lanes(typing_context, first, key, limit):
    """Sixteen bits: which of the numbers of eight words are below the limit; `first` is the key and the first word."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Sequence[Any]) -> Any:
        first, key, limit = arguments
        step, *factors = MIX
        z = builder.add(_everywhere(builder, _LONGS, first), _steps(_LONGS, step))

        def shifted(z: Any, by: int) -> Any:
            return builder.xor(z, builder.lshr(z, ir.Constant(_LONGS, [by] * _LONGS.count)))

        z = builder.mul(shifted(z, 30), ir.Constant(_LONGS, [factors[0]] * _LONGS.count))
        z = shifted(builder.xor(z, _everywhere(builder, _LONGS, key)), 27)
        z = shifted(builder.mul(z, ir.Constant(_LONGS, [factors[1]] * _LONGS.count)), 31)
        numbers = builder.lshr(builder.bitcast(z, _WORDS), ir.Constant(_WORDS, [8] * LANES))
        below = builder.icmp_unsigned("<", numbers, _everywhere(builder, _WORDS, limit))
        return builder.bitcast(below, ir.IntType(LANES))

    return _uint16(_uint64, _uint64, _uint32), generate


@intrinsic
def _compare_lanes(typing_context, numbers, limits, start):
    """Sixteen bits: which of the numbers from `start` on are below their limits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Sequence[Any]) -> Any:
        kinds, (*arrays, start) = signature.args, arguments
        one, two = (
            builder.load(_at(context, builder, kind, array, start), align=4)
            for kind, array in zip(kinds, arrays, strict=False)
        )
        return builder.bitcast(builder.icmp_unsigned("<", one, two), ir.IntType(LANES))

    return _uint16(numbers, limits, _int64), generate


@intrinsic
def _choose_lanes(typing_context, values, start, bits, target):
    """Sixteen elements from `start` on: target = values where the bit is set, 0 elsewhere."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Sequence[Any]) -> Any:
        source, start, bits, target = arguments
        words = builder.load(_at(context, builder, signature.args[0], source, start), align=4)
        chosen = builder.select(builder.bitcast(bits, _BITS), words, ir.Constant(_WORDS, [0] * LANES))
        builder.store(chosen, _at(context, builder, signature.args[3], target, start), align=4)
        return context.get_dummy_value()

    return numba.types.void(values, _int64, _uint16, target), generate


@intrinsic
def _add_lanes(typing_context, values, bits, first, whole, kept):
    """Of a run's numbers, those of sixteen lanes from `first` on: add all to `whole`, and to `kept` where bits are set.

    The lanes are float64; those of a number are `ROW` places apart, and are added in the order of the numbers.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Sequence[Any]) -> Any:
        source, bits, first, *lanes = arguments
        halves = context.make_array(signature.args[1])(context, builder, bits).data

        def step(start: Any, sums: Sequence[Any]) -> list[Any]:
            number = _doubles_at(context, builder, signature.args[0], source, start)
            half = builder.load(builder.gep(halves, [builder.lshr(start, ir.Constant(_LONG, 4))]), align=2)
            chosen = builder.select(builder.bitcast(half, _BITS), number, ir.Constant(_DOUBLES, [0.0] * LANES))
            return [builder.fadd(sums[0], number), builder.fadd(sums[1], chosen)]

        return _fold_rows(context, builder, signature.args[3:], lanes, first, step)

    return numba.types.void(values, bits, _int64, whole, kept), generate


@intrinsic
def _multiply_lanes(typing_context, x, y, first, squares, products, others):
    """Of two runs, the numbers of sixteen lanes from `first` on: add x · x, x · y and y · y to their lanes.

    As in `_add_lanes`; products of float32 numbers are exact, so that they may be fused with the sums.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Sequence[Any]) -> Any:
        x, y, first, *lanes = arguments
        kind = ir.FunctionType(_DOUBLES, [_DOUBLES] * 3)
        fused = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.v{LANES}f64")

        def step(start: Any, sums: Sequence[Any]) -> list[Any]:
            one = _doubles_at(context, builder, signature.args[0], x, start)
            two = _doubles_at(context, builder, signature.args[1], y, start)
            pairs = ((one, one), (one, two), (two, two))
            return [builder.call(fused, [*pair, total]) for pair, total in zip(pairs, sums, strict=True)]

        return _fold_rows(context, builder, signature.args[3:], lanes, first, step)

    return numba.types.void(x, y, _int64, squares, products, others), generate


_multiply: Any = _multiply_lanes
_add: Any = _add_lanes
_pack: Any = _pack_lanes
_pack_magnitudes: Any = _pack_keys
_draw: Any = _draw_lanes
_choose: Any = _choose_lanes
_compare: Any = _compare_lanes


@JIT
def draw_below(key: Any, start: int, limit: Any, bits: Any) -> None:
    """Which elements [start, start + RUN) of a random stream are below limit / GRID, as bits, uint8 [COLUMNS].

    `start` is even. Bit k of byte i is that of element 8 i + k.
    """
    halves = bits.view(np.uint16)
    word = np.uint64(key[0]) + np.uint64(start >> 1) * np.uint64(MIX[0])
    for j in range(halves.size):
        halves[j] = _draw(word, np.uint64(key[1]), np.uint32(limit))
        word += np.uint64(np.uint64(LANES // 2) * np.uint64(MIX[0]))


@JIT
def mark_below(numbers: Any, limits: Any, bits: Any) -> None:
    """Which numbers are below their limits, uint32 both, as `draw_below` sets bits: as many as there are."""
    halves = bits.view(np.uint16)
    for j in range(halves.size):
        halves[j] = _compare(numbers, limits, LANES * j)


@JIT
def choose(values: Any, bits: Any, target: Any) -> None:
    """target = the elements of a run whose bit is set, as `draw_below` sets them; 0 elsewhere. Both are float32."""
    halves = bits.view(np.uint16)
    for j in range(halves.size):
        _choose(values, LANES * j, halves[j], target)


@JIT
def add_chosen(values: Any, bits: Any, whole: Any, kept: Any) -> None:
    """Add the numbers of a whole run to the sums of their lanes in `whole`, and to `kept` those whose bit is set."""
    halves = bits.view(np.uint16)
    for first in range(0, ROW, LANES):
        _add(values, halves, first, whole, kept)


@JIT
def multiply_two(x: Any, y: Any, squares: Any, products: Any, others: Any) -> None:
    """Add x · x, x · y and y · y of two whole runs to the sums of their lanes."""
    for first in range(0, ROW, LANES):
        _multiply(x, y, first, squares, products, others)


@JIT
def packed_places(bits: Any, low: Any, width: Any, places: Any) -> int:
    """`places_between`, sixteen elements at a time."""
    found = 0
    for j in range(0, RUN, LANES):
        found += _pack(bits, j, low, width, places, found)
    return found


@JIT
def marked_places(bits: Any, low: Any, width: Any, places: Any) -> int:
    """`places_between`, by the bits of comparisons, eight rows at a time, looking only at those that are set."""
    marks = rooms(1, COLUMNS, np.uint8)[0]
    for i in range(COLUMNS):
        inside = np.uint8(0)
        for k in range(8):
            key = np.uint32(bits[k * COLUMNS + i] & np.uint32(_MAGNITUDE))
            inside = np.uint8(inside | np.uint8(np.uint8(np.uint32(key - low) <= width) << np.uint8(k)))
        marks[i] = inside
    words = marks.view(np.uint64)
    found = 0
    for number in range(words.size):
        word = words[number]
        while word:
            place = trailing_zeros(word) + np.uint64(64 * number)
            places[found] = (place & np.uint64(7)) * np.uint64(COLUMNS) + (place >> np.uint64(3))
            found += 1
            word &= word - np.uint64(1)
    return found


@JIT
def _packed_keys(bits: Any, low: Any, high: Any, room: Any, places: Any, found: int) -> tuple[int, int]:
    """`keys_between`, sixteen elements at a time."""
    counts = 0
    for j in range(0, RUN, LANES):
        at = found + (counts & 0xFFFFFFFF)
        counts += _pack_magnitudes(bits, j, low, np.uint32(high - low), high, room, at)
    return counts >> 32, found + (counts & 0xFFFFFFFF)


@JIT
def count_above(bits: Any, high: Any) -> int:
    """How many of a run's magnitudes are above `high`."""
    above = np.uint32(0)
    for j in range(RUN):
        above = np.uint32(above + np.uint32(bits[j] > high))
    return int(above)


@JIT
def _marked_keys(bits: Any, low: Any, high: Any, room: Any, places: Any, found: int) -> tuple[int, int]:
    """`keys_between`, by their places."""
    inside = marked_places(bits, low, np.uint32(high - low), places)
    for k in range(inside):
        room[found + k] = bits[places[k]]
    return count_above(bits, high), found + inside


def _packs() -> bool:
    """Whether compiled code packs vectors: LLVM has a name for it since 19, and would spell it out without AVX-512."""
    if binding.llvm_version_info < (19,) or {"NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES"} & os.environ.keys():
        return False
    return bool(binding.get_host_cpu_features().get("avx512f", False))


places_between: Any = packed_places if _packs() else marked_places
"""(bits, low, width, places) -> how many of a run's magnitudes are in [low, low + width]; their places go to `places`.

`bits` has RUN float32 numbers seen as uint32, whose sign does not count; `places` is uint32 [PLACES].
"""
keys_between: Any = _packed_keys if _packs() else _marked_keys
"""(bits, low, high, room, places, found) -> (how many of a run's magnitudes are above, `found` and those inside).

Those in [low, high] go to room[found:], which has room for LANES more; `places` is as above.
"""
