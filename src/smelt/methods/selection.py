"""The k-th largest number of each row of a tensor, exactly and without sorting.

By radix: a histogram of 16 bits of the keys in each round, which narrows each cut to the bucket that holds it. Or, of
magnitudes, by a guess: a sample places a narrow bracket around the cut, and one pass counts what is above it and keeps
what is inside. If the cut was not inside, the radix rounds follow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from array_api_compat import array_namespace

from smelt.methods.reducers import described, dimensions, type_name

Array = Any

_BUCKETS = 1 << 16
_SIGN = np.uint64(1 << 63)


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
    share = share if dimensions(share) >= 0 else np.asarray(share, dtype=np.float64)
    xp = array_namespace(share)
    return xp.astype(xp.ceil(xp.astype(share, xp.float64) * 2.0**24) * 2.0**-24, xp.float32)


def band_shares(cut: Cut) -> Array:
    """Of the entries equal to each of two cuts, the share with a rank between them, float32 [n, 2] (or [n, rows, 2]).

    Column 0 is the cut of the T largest, column 1 that of the T + K largest. T = 0 cuts nothing off: share 1.
    """
    xp = array_namespace(cut.count)
    first, last = cut.count[..., :1], cut.count[..., 1:]
    inside = xp.minimum(cut.above + cut.equal, last) - xp.maximum(cut.above, first)
    equal = xp.where(cut.equal < 1, xp.ones_like(cut.equal), cut.equal)
    shares = to_grid(xp.astype(inside, xp.float64) / xp.astype(equal, xp.float64))
    upper = xp.where(first == 0, xp.ones_like(shares[..., :1]), shares[..., :1])
    return xp.concat([upper, shares[..., 1:]], axis=-1)


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
        self._result: Cut | None = None
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

    @property
    def done(self) -> bool:
        return self._result is not None

    def refuses(self, values: Any, ndim: int) -> tuple[str, str] | None:
        fix = f"return (magnitudes, counts): an array of {ndim} dimensions, and whole numbers [n] or [n, k]"
        if not isinstance(values, tuple) or len(values) != 2:
            return described(values), fix
        magnitudes, counts = values
        if dimensions(magnitudes) != ndim or type_name(magnitudes) != self._type:
            return f"magnitudes that are {described(magnitudes)}", fix.replace("an array", f"a {self._type} array")
        found = counts if dimensions(counts) >= 0 else np.asarray(counts)  # an array of a device stays where it is
        whole = type_name(found).startswith(("int", "uint"))
        if not whole or found.ndim not in (1, 2) or found.shape[0] != magnitudes.shape[0]:
            return f"counts that are {described(counts)}", fix
        return None

    def partial(self, values: tuple[Array, Array]) -> Any:
        numbers, counts = (np.asarray(part) for part in values)
        keys = self._keys(np.ascontiguousarray(numbers)).reshape(len(numbers), -1)
        digit = keys.dtype.type(self.digit)
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

    @property
    def round(self) -> int:
        """How many rounds are done."""
        return self._round

    @property
    def digit(self) -> int:
        """The lowest of the 16 bits of a key that this round counts."""
        return 16 * (self.rounds - 1 - self._round)

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
        if self._round == self.rounds:
            self._result = _cut(self._numbers(self._prefix), self._counts, self._above, self._equal)

    def finish(self) -> Cut:
        assert self._result is not None
        return self._result

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


@dataclass(frozen=True, slots=True)
class Between:
    """What one pass finds of a guess: entries above each bracket, int64 [n, k], and the keys inside it, [n][k] arrays.

    `inside` is None where there are too many of them to keep.
    """

    counts: Array
    above: Array
    inside: list[list[list[Any]]] | None
    kept: int


class KthLargest(_RadixSelect):
    """The K-th largest of float32 magnitudes: non-negative floats are ordered as their bit patterns are.

    With a `guess` from a sample, one pass finds it: those above a bracket are counted, those inside it kept, but for
    zeros, of which a fine-tune in bfloat16 may have any number: what is neither above nor inside a bracket that begins
    at zero is one. Should the K-th largest turn out to lie outside, the two rounds of the radix follow. Either way the
    result is exact.
    """

    rounds: ClassVar[int] = 2
    _type: ClassVar[str] = "float32"

    MOST_KEPT: ClassVar[int] = 1 << 22
    """Keys kept of the bracket's inside, all together: 16 MiB."""
    _CROWDED: ClassVar[float] = 0.125
    """A bracket with a larger share of the sample inside is not tried."""

    def __init__(self, *, scope: str, size: int) -> None:
        super().__init__(scope=scope, size=size)
        self.brackets: Any = None
        self.keeps_all = False
        """Set before the first pass of a small tensor: it keeps all keys, and that pass is the only one."""

    def guess(self, values: tuple[Array, Array]) -> None:
        """Place a bracket around each cut, from a sample in chunks of the tensor: numbers [n, chunks, ...], counts.

        Its half width is three standard errors of the rank, by the binomial law or by how much the chunks differ,
        whichever is larger.
        """
        numbers, counts = (np.asarray(part) for part in values)
        keys = np.ascontiguousarray(numbers).view(np.uint32).reshape(*numbers.shape[:2], -1)
        rows, chunks, length = keys.shape
        counts = np.clip(counts.reshape(rows, -1), 0, self._size)
        total = chunks * length
        brackets = np.zeros((*counts.shape, 2), dtype=np.uint32)
        for (row, place), count in np.ndenumerate(counts):
            share = float(count) / self._size
            middle = min(int(share * total), total - 1)
            from_low = np.sort(keys[row], axis=None)
            by_chunk = (keys[row] > from_low[total - 1 - middle]).mean(axis=1)
            error = max(np.sqrt(share * (1.0 - share) / total), float(by_chunk.std()) / np.sqrt(chunks))
            half = int(np.ceil(total * 3.0 * error)) + 2
            low, high = total - 1 - middle - half, total - 1 - middle + half
            ends = 0 if low < 0 else from_low[low], np.uint32(0xFFFFFFFF) if high >= total else from_low[high]
            brackets[row, place] = ends
            first, last = (
                np.searchsorted(from_low, max(ends[0], 1), side="left"),
                np.searchsorted(from_low, ends[1], side="right"),
            )
            if last - first > self._CROWDED * total:
                return
        self.brackets = brackets

    def between(self, values: tuple[Array, Array]) -> Between:
        """The partial result of the pass with a guess."""
        numbers, counts = (np.asarray(part) for part in values)
        keys = np.ascontiguousarray(numbers).view(np.uint32).reshape(len(numbers), -1)
        low, high = np.maximum(self.brackets[..., :1], 1), self.brackets[..., 1:]
        above = np.count_nonzero(keys[:, None] > high, axis=-1)
        inside = (keys[:, None] >= low) & (keys[:, None] <= high)
        return self.found(
            counts, above, [[row[chosen] for chosen in one] for row, one in zip(keys, inside, strict=True)]
        )

    def found(self, counts: Array, above: Array, inside: Sequence[Sequence[Array]]) -> Between:
        """A partial result from how many keys of each (row, place) are above its bracket, and those inside."""
        kept = sum(keys.size for row in inside for keys in row)
        return Between(counts.reshape(len(above), -1), above, [[[keys] for keys in row] for row in inside], kept)

    def all_of(self, counts: Array, keys: Array) -> Between:
        """A partial result from all keys of each row."""
        shape = counts.reshape(len(keys), -1).shape
        return self.found(counts, np.zeros(shape, np.int64), [[row] * shape[1] for row in keys])

    def partial(self, values: tuple[Array, Array]) -> Any:
        if self.keeps_all:
            numbers, counts = (np.asarray(part) for part in values)
            return self.all_of(counts, np.ascontiguousarray(numbers).view(np.uint32).reshape(len(numbers), -1))
        return super().partial(values) if self.brackets is None else self.between(values)

    def fold(self, total: Any, partial: Any) -> Any:
        if not isinstance(partial, Between):
            return super().fold(total, partial)
        if total is None:
            return partial
        kept = total.kept + partial.kept
        together = None
        if total.inside is not None and partial.inside is not None and kept <= self.MOST_KEPT:
            together = total.inside
            for row, new_row in zip(together, partial.inside, strict=True):
                for parts, new in zip(row, new_row, strict=True):
                    parts.extend(new)
        return Between(total.counts, total.above + partial.above, together, kept)

    def close(self, total: Any) -> None:
        if not isinstance(total, Between):
            super().close(total)
            return
        brackets, self.brackets = self.brackets, None
        if total.inside is None:
            return
        counts = np.clip(total.counts, 0, self._size)
        keys, above, equal = np.zeros(counts.shape, np.uint32), np.zeros_like(counts), np.zeros_like(counts)
        for (row, place), count in np.ndenumerate(counts):
            inside = np.concatenate(total.inside[row][place])
            wanted = int(max(count, 1) - total.above[row, place])
            zeros = 0
            if brackets is not None and brackets[row, place, 0] == 0:
                zeros = int(self._size - total.above[row, place]) - inside.size
            if not 1 <= wanted <= inside.size + zeros:
                return
            key, higher, same = (0, inside.size, zeros) if wanted > inside.size else _within(inside, wanted)
            keys[row, place] = key
            above[row, place] = total.above[row, place] + higher
            equal[row, place] = same
        self._result = _cut(self._numbers(keys), counts, above, equal)

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


def _within(keys: Any, wanted: int) -> tuple[int, int, int]:
    """The `wanted`-th largest of the keys, how many are larger, and how many equal it."""
    ordered = np.sort(keys)  # many times faster than numpy.partition, where NumPy sorts in vectors
    key = ordered[keys.size - wanted]
    first, last = np.searchsorted(ordered, key, side="left"), np.searchsorted(ordered, key, side="right")
    return int(key), int(keys.size - last), int(last - first)


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
