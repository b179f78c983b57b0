"""Passes over a tensor that must finish before its last one: sums, Gram matrices, the k-th largest magnitude.

A reducer turns blocks of values into partial results (`partial`), folds these (`fold`) and ends with what the method
is given (`finish`). Blocks are always the same elements, and ordered reducers are folded in the order of the blocks,
so the result does not depend on tile size or thread count. Each reducer has a `whole` form, the plain definition on
the uncut tensor, against which it is tested.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
from array_api_compat import array_namespace

Array = Any

_BUCKETS = 1 << 16
_SIGN = np.uint64(1 << 63)


class Reducer(Protocol):
    """One reduction of one tensor: `rounds` passes of partial → fold, each ended by `close`; then `finish`."""

    rounds: ClassVar[int]
    ordered: ClassVar[bool]
    """True: partials are taken block by block and folded in block order. False: any cut and order gives the same."""

    def refuses(self, values: Any, ndim: int) -> tuple[str, str] | None:
        """For a tile of `ndim` dimensions: what a reduction gave, and what it should give; None if it is well."""

    def partial(self, values: Any) -> Any: ...

    def fold(self, total: Any, partial: Any) -> Any: ...

    def close(self, total: Any) -> None: ...

    def finish(self) -> Any: ...


def _dimensions(values: Any) -> int:
    return values.ndim if hasattr(values, "ndim") and hasattr(values, "dtype") else -1


def described(values: Any) -> str:
    """What a value is, in words: `float32 [2, 9600]`, `a tuple of 3`, `None`."""
    if hasattr(values, "shape") and hasattr(values, "dtype"):
        return f"{values.dtype} {list(values.shape)}"
    if isinstance(values, tuple | list):
        return f"a {type(values).__name__} of {len(values)}"
    return "None" if values is None else f"a {type(values).__name__}"


LANES = 256
"""Running sums side by side: element j of a block is added to lane j mod 256, and the lanes are added at the end.

So the order of additions, and with it every bit, is the same in a library's sum over the rows and in a kernel's loop.
"""


def _lanes(values: Array) -> Array:
    """Sum float64 or float32 values [..., t] by lanes: [..., 256] in float64."""
    xp = array_namespace(values)
    whole = values.shape[-1] // LANES * LANES
    rows = xp.reshape(values[..., :whole], (*values.shape[:-1], -1, LANES))
    lanes = xp.sum(rows, axis=-2, dtype=xp.float64)
    rest = values.shape[-1] - whole
    if rest:
        lanes[..., :rest] += values[..., whole:]
    return lanes


class Sum:
    """Σ of the values over all elements, per model, in float64: values [n, t] -> [n] (column scope: [n, width])."""

    rounds: ClassVar[int] = 1
    ordered: ClassVar[bool] = True

    def __init__(self, *, scope: str, size: int) -> None:
        self.by_lanes = scope != "column"
        self._total: Any = None

    def refuses(self, values: Any, ndim: int) -> tuple[str, str] | None:
        if _dimensions(values) == ndim:
            return None
        return described(values), f"give Sum one array of {ndim} dimensions, [n, ...] as the tile's"

    def partial(self, values: Array) -> Array:
        xp = array_namespace(values)
        if not self.by_lanes:
            return xp.sum(values, axis=1, dtype=xp.float64)
        return _lanes(xp.reshape(values, (values.shape[0], -1)))

    def fold(self, total: Any, partial: Any) -> Any:
        return partial if total is None else total + partial

    def close(self, total: Any) -> None:
        self._total = total

    def finish(self) -> Array:
        return array_namespace(self._total).sum(self._total, axis=-1) if self.by_lanes else self._total

    @staticmethod
    def whole(values: Array) -> Array:
        """The definition: values [n, N] -> [n]."""
        xp = array_namespace(values)
        return xp.sum(values, axis=1, dtype=xp.float64)


def gram(vectors: Sequence[Array], *, axis: int | None) -> Array:
    """Inner products of all pairs along `axis` (None: all elements), in float64: k arrays [*s] -> [k, k, *rest].

    Each product of two float32 numbers is exact in float64. No BLAS, whose sums depend on the machine's thread count.
    """
    xp = array_namespace(vectors[0])
    wide = [xp.astype(vector, xp.float64) for vector in vectors]
    k = len(wide)
    rows: list[list[Array]] = [[None] * k for _ in range(k)]
    for i in range(k):
        for j in range(i, k):
            rows[i][j] = rows[j][i] = xp.sum(wide[i] * wide[j], axis=axis)
    return xp.stack([xp.stack(row) for row in rows])


class Gram:
    """Inner products of the given vectors: k arrays [t] -> [k, k] (column scope: [k, k, width])."""

    rounds: ClassVar[int] = 1
    ordered: ClassVar[bool] = True

    def __init__(self, *, scope: str, size: int) -> None:
        self.by_lanes = scope != "column"
        self._total: Any = None

    def refuses(self, values: Any, ndim: int) -> tuple[str, str] | None:
        fix = f"give Gram an array [k, ...] of {ndim} dimensions, or a tuple of k arrays"
        if isinstance(values, tuple):
            wrong = [part for part in values if _dimensions(part) != ndim - 1]
            return (f"a tuple with {described(wrong[0])}", fix) if wrong or not values else None
        return None if _dimensions(values) == ndim else (described(values), fix)

    def partial(self, values: Sequence[Array]) -> Array:
        if not self.by_lanes:
            return gram(values, axis=0)
        xp = array_namespace(values[0])
        wide = [xp.astype(xp.reshape(vector, (-1,)), xp.float64) for vector in values]
        k = len(wide)
        rows: list[list[Array]] = [[None] * k for _ in range(k)]
        for i in range(k):
            for j in range(i, k):
                rows[i][j] = rows[j][i] = _lanes(wide[i] * wide[j])
        return xp.stack([xp.stack(row) for row in rows])

    def fold(self, total: Any, partial: Any) -> Any:
        return partial if total is None else total + partial

    def close(self, total: Any) -> None:
        self._total = total

    def finish(self) -> Array:
        return array_namespace(self._total).sum(self._total, axis=-1) if self.by_lanes else self._total

    @staticmethod
    def whole(values: Sequence[Array]) -> Array:
        """The definition: k arrays [N] -> [k, k]."""
        return gram(values, axis=None)


class Extremes:
    """The least and the largest of the values over all elements: [k, t] -> [2, k]; NaN where there is one."""

    rounds: ClassVar[int] = 1
    ordered: ClassVar[bool] = False

    def __init__(self, *, scope: str, size: int) -> None:
        self._total: Any = None

    def refuses(self, values: Any, ndim: int) -> tuple[str, str] | None:
        if _dimensions(values) == ndim:
            return None
        return described(values), f"give Extremes one array of {ndim} dimensions, [k, ...] as the tile's"

    def partial(self, values: Array) -> Array:
        return self.whole(array_namespace(values).reshape(values, (values.shape[0], -1)))

    def fold(self, total: Any, partial: Any) -> Any:
        if total is None:
            return partial
        xp = array_namespace(partial)
        return xp.stack([xp.minimum(total[0], partial[0]), xp.maximum(total[1], partial[1])])

    def close(self, total: Any) -> None:
        self._total = total

    def finish(self) -> Array:
        return self._total

    @staticmethod
    def whole(values: Array) -> Array:
        """The definition: values [k, N] -> [2, k]."""
        xp = array_namespace(values)
        return xp.stack([xp.min(values, axis=1), xp.max(values, axis=1)])


@dataclass(frozen=True, slots=True)
class Cut:
    """Where the K-th largest lies: keep what is above `value`, and of what equals it the `share`.

    All [n, k], for k counts asked of each of n rows: `value` in the type of the numbers, `share` float32 = (K − G)/E
    (rounded by `to_grid`), and int64 `count` = K, `above` = G entries strictly larger than the value, `equal` = E
    entries equal to it. K = 0 gives value = inf, share = 0, G = E = 0.
    """

    value: Array
    share: Array
    count: Array
    above: Array
    equal: Array


def to_grid(share: Any) -> Any:
    """The share rounded up to a multiple of 2⁻²⁴, exact in float32.

    Random numbers are multiples of 2⁻²⁴, so that `uniform < share` decides as it would with the share in float64.
    """
    return (np.ceil(np.asarray(share, dtype=np.float64) * 2.0**24) * 2.0**-24).astype(np.float32)


def band_shares(cut: Cut) -> Array:
    """Of the entries equal to each of two cuts, the share with a rank between them, float32 [n, 2].

    Column 0 is the cut of the T largest, column 1 that of the T + K largest. T = 0 cuts nothing off: share 1.
    """
    first, last = cut.count[:, :1], cut.count[:, 1:]
    inside = np.minimum(cut.above + cut.equal, last) - np.maximum(cut.above, first)
    shares = to_grid(inside / np.maximum(cut.equal, 1))
    shares[:, :1] = np.where(first == 0, np.float32(1.0), shares[:, :1])
    return shares


class _RadixSelect:
    """The K-th largest number of each row, exactly, without sorting: a histogram of 16 bits of the keys in each round.

    Keys are unsigned integers in the order of the numbers. A round narrows each cut to the bucket that holds it; the
    next one looks only at that bucket's entries. Counts are integers: no order matters. Input: (numbers [n, ...],
    counts [n] or [n, k]); result: `Cut`.
    """

    rounds: ClassVar[int]
    ordered: ClassVar[bool] = False
    _type: ClassVar[str]

    def __init__(self, *, scope: str, size: int) -> None:
        self._size = size
        self._round = 0
        self._counts: Any = None
        self._prefix: Any = None
        self._above: Any = None
        self._equal: Any = None

    @staticmethod
    def _keys(numbers: Any) -> Any:
        raise NotImplementedError

    @staticmethod
    def _numbers(keys: Any) -> Any:
        raise NotImplementedError

    def refuses(self, values: Any, ndim: int) -> tuple[str, str] | None:
        fix = f"return (magnitudes, counts): an array of {ndim} dimensions, and whole numbers [n] or [n, k]"
        if not isinstance(values, tuple) or len(values) != 2:
            return described(values), fix
        magnitudes, counts = values
        if _dimensions(magnitudes) != ndim or magnitudes.dtype != self._type:
            return f"magnitudes that are {described(magnitudes)}", fix.replace("an array", f"a {self._type} array")
        found = np.asarray(counts)
        if found.dtype.kind not in "iu" or found.ndim not in (1, 2) or found.shape[0] != magnitudes.shape[0]:
            return f"counts that are {described(counts)}", fix
        return None

    def partial(self, values: tuple[Array, Array]) -> Any:
        numbers, counts = (np.asarray(part) for part in values)
        keys = self._keys(np.ascontiguousarray(numbers)).reshape(len(numbers), -1)
        digit = keys.dtype.type(16 * (self.rounds - 1 - self._round))
        if self._round == 0:
            histogram = [[np.bincount((row >> digit).astype(np.intp), minlength=_BUCKETS)] for row in keys]
        else:
            histogram = [self._narrow(row, digit, prefixes) for row, prefixes in zip(keys, self._prefix, strict=True)]
        return counts.reshape(len(keys), -1), np.asarray(histogram)

    @staticmethod
    def _narrow(row: Any, digit: Any, prefixes: Any) -> list[Any]:
        """One histogram per prefix, of the next 16 bits of the keys that begin with it."""
        upper = row >> (digit + row.dtype.type(16))
        found: dict[int, Any] = {}
        for prefix in prefixes.tolist():
            if prefix not in found:
                inside = row[upper == row.dtype.type(prefix)]
                lower = (inside >> digit) & row.dtype.type(_BUCKETS - 1)
                found[prefix] = np.bincount(lower.astype(np.intp), minlength=_BUCKETS)
        return [found[prefix] for prefix in prefixes.tolist()]

    def prefixes(self, rows: int) -> Any:
        """What the keys must begin with to be counted in this round, [rows, cuts]; no cuts in the first."""
        return np.zeros((rows, 0), dtype=np.uint64) if self._round == 0 else self._prefix

    def fold(self, total: Any, partial: Any) -> Any:
        if total is not None:
            partial[1][...] += total[1]
        return partial

    def close(self, total: Any) -> None:
        counts, histogram = total
        if self._round == 0:
            self._counts = np.clip(counts, 0, self._size)
            self._above = np.zeros_like(self._counts)
            self._prefix = np.zeros(self._counts.shape, dtype=np.uint64)
            histogram = np.broadcast_to(histogram, (*self._counts.shape, _BUCKETS))
        bucket, above, self._equal = _locate(histogram, self._counts - self._above)
        self._above = self._above + above
        self._prefix = (self._prefix << np.uint64(16)) | bucket.astype(np.uint64)
        self._round += 1

    def finish(self) -> Cut:
        return _cut(self._numbers(self._prefix), self._counts, self._above, self._equal)

    @classmethod
    def whole(cls, values: tuple[Array, Array]) -> Cut:
        """The definition, by sorting: numbers [n, N], counts [n] or [n, k]."""
        numbers, counts = (np.asarray(part) for part in values)
        counts = np.clip(counts.reshape(len(numbers), -1), 0, numbers.shape[1])
        value = np.full(counts.shape, np.inf, dtype=numbers.dtype)
        above, equal = np.zeros_like(counts), np.zeros_like(counts)
        for (row, place), count in np.ndenumerate(counts):
            if count > 0:
                value[row, place] = np.sort(numbers[row])[::-1][int(count) - 1]
                above[row, place] = np.sum(numbers[row] > value[row, place])
                equal[row, place] = np.sum(numbers[row] == value[row, place])
        return _cut(value, counts, above, equal)


class KthLargest(_RadixSelect):
    """The K-th largest of float32 magnitudes: non-negative floats are ordered as their bit patterns are."""

    rounds: ClassVar[int] = 2
    _type: ClassVar[str] = "float32"

    @staticmethod
    def _keys(numbers: Any) -> Any:
        return numbers.view(np.uint32)

    @staticmethod
    def _numbers(keys: Any) -> Any:
        return keys.astype(np.uint32).view(np.float32)


class KthLargest64(_RadixSelect):
    """The K-th largest of float64 numbers of any sign; −0 equals 0, NaN is larger than all."""

    rounds: ClassVar[int] = 4
    _type: ClassVar[str] = "float64"

    @staticmethod
    def _keys(numbers: Any) -> Any:
        plain = np.where(np.isnan(numbers), np.nan, numbers + 0.0)
        bits = plain.view(np.uint64)
        return np.where(plain < 0.0, ~bits, bits | _SIGN)

    @staticmethod
    def _numbers(keys: Any) -> Any:
        return np.where(keys & _SIGN, keys ^ _SIGN, ~keys).view(np.float64)


def _cut(value: Any, count: Any, above: Any, equal: Any) -> Cut:
    none = count <= 0
    value = np.where(none, value.dtype.type(np.inf), value)
    above, equal = np.where(none, 0, above), np.where(none, 0, equal)
    return Cut(value, to_grid((count - above) / np.maximum(equal, 1)), count, above, equal)


def _locate(histogram: Any, counts: Any) -> tuple[Any, Any, Any]:
    """Per histogram [n, k, buckets]: the bucket of its count-th largest, how many are in higher ones, and in it."""
    flat = histogram.reshape(-1, histogram.shape[-1])
    from_top = np.cumsum(flat[:, ::-1], axis=1)
    wanted = np.maximum(counts.reshape(-1), 1)
    place = np.array([np.searchsorted(row, count) for row, count in zip(from_top, wanted, strict=True)])
    place = np.minimum(place, flat.shape[1] - 1)
    bucket = flat.shape[1] - 1 - place
    rows = np.arange(len(place))
    equal = flat[rows, bucket]
    above = from_top[rows, place] - equal
    return bucket.reshape(counts.shape), above.reshape(counts.shape), equal.reshape(counts.shape)
