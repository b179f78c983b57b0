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


class Reducer(Protocol):
    """One reduction of one tensor: `rounds` passes of partial → fold, each ended by `close`; then `finish`."""

    rounds: ClassVar[int]
    ordered: ClassVar[bool]
    """True: partials are taken block by block and folded in block order. False: any cut and order gives the same."""

    def partial(self, values: Any) -> Any: ...

    def fold(self, total: Any, partial: Any) -> Any: ...

    def close(self, total: Any) -> None: ...

    def finish(self) -> Any: ...


class Sum:
    """Σ of the values over all elements, per model, in float64: values [n, t] -> [n] (column scope: [n, width])."""

    rounds: ClassVar[int] = 1
    ordered: ClassVar[bool] = True

    def __init__(self, *, scope: str, size: int) -> None:
        self._scope = scope
        self._total: Any = None

    def partial(self, values: Array) -> Array:
        xp = array_namespace(values)
        axis = 1 if self._scope == "column" else tuple(range(1, values.ndim))
        return xp.sum(values, axis=axis, dtype=xp.float64)

    def fold(self, total: Any, partial: Any) -> Any:
        return partial if total is None else total + partial

    def close(self, total: Any) -> None:
        self._total = total

    def finish(self) -> Array:
        return self._total

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
        self._axis = 0 if scope == "column" else None
        self._total: Any = None

    def partial(self, values: Sequence[Array]) -> Array:
        return gram(values, axis=self._axis)

    def fold(self, total: Any, partial: Any) -> Any:
        return partial if total is None else total + partial

    def close(self, total: Any) -> None:
        self._total = total

    def finish(self) -> Array:
        return self._total

    @staticmethod
    def whole(values: Sequence[Array]) -> Array:
        """The definition: k arrays [N] -> [k, k]."""
        return gram(values, axis=None)


@dataclass(frozen=True, slots=True)
class Cut:
    """Where the k-th largest magnitude lies: keep what is above `value`, and of what equals it the `share`.

    `value` float32 [n, 1], `share` float32 [n, 1] = (K − G)/E, where K entries are to be kept, G lie strictly above
    the value and E equal it. K = 0 gives value = inf, share = 0.
    """

    value: Array
    share: Array


class KthLargest:
    """The k-th largest of float32 magnitudes, exactly, without sorting.

    Non-negative floats are ordered as their bit patterns are, so two histograms find it: one of the upper 16 bits,
    then one of the lower 16 bits of the entries in the bucket that holds it. Counts are integers: no order matters.
    Input: (magnitudes [n, t], counts [n]); result: `Cut`.
    """

    rounds: ClassVar[int] = 2
    ordered: ClassVar[bool] = False

    def __init__(self, *, scope: str, size: int) -> None:
        self._size = size
        self._counts: Any = None
        self._upper: Any = None
        self._above: Any = None
        self._cut: Cut | None = None

    def partial(self, values: tuple[Array, Array]) -> Any:
        magnitudes, counts = values
        bits = np.asarray(magnitudes).view(np.uint32)
        if self._upper is None:
            histogram = [np.bincount(row >> np.uint32(16), minlength=1 << 16) for row in bits]
        else:
            histogram = [
                np.bincount(row[(row >> np.uint32(16)) == upper] & np.uint32(0xFFFF), minlength=1 << 16)
                for row, upper in zip(bits, self._upper, strict=True)
            ]
        return np.asarray(counts).reshape(-1), np.stack(histogram)

    def fold(self, total: Any, partial: Any) -> Any:
        return partial if total is None else (total[0], total[1] + partial[1])

    def close(self, total: Any) -> None:
        counts, histogram = total
        if self._upper is None:
            self._counts = np.minimum(counts, self._size)
            self._upper, self._above = _locate(histogram, self._counts)
            return
        lower, above = _locate(histogram, self._counts - self._above)
        rows = np.arange(len(lower))
        equal = histogram[rows, lower]
        bits = (self._upper.astype(np.uint32) << np.uint32(16)) | lower.astype(np.uint32)
        wanted = self._counts - self._above - above
        none = self._counts <= 0
        value = np.where(none, np.float32(np.inf), bits.view(np.float32))
        share = np.where(none, 0.0, wanted / np.maximum(equal, 1))
        self._cut = Cut(value.astype(np.float32)[:, None], share.astype(np.float32)[:, None])

    def finish(self) -> Cut:
        assert self._cut is not None
        return self._cut

    @staticmethod
    def whole(values: tuple[Array, Array]) -> Cut:
        """The definition, by sorting: magnitudes [n, N], counts [n]."""
        magnitudes, counts = (np.asarray(part) for part in values)
        value = np.full((len(magnitudes), 1), np.inf, dtype=np.float32)
        share = np.zeros((len(magnitudes), 1), dtype=np.float32)
        for row, count in enumerate(np.minimum(counts.reshape(-1), magnitudes.shape[1])):
            if count > 0:
                value[row] = np.sort(magnitudes[row])[::-1][int(count) - 1]
                above = np.sum(magnitudes[row] > value[row])
                share[row] = (count - above) / np.sum(magnitudes[row] == value[row])
        return Cut(value, share)


def _locate(histogram: Any, counts: Any) -> tuple[Any, Any]:
    """Per row: the bucket in which the count-th largest lies, and how many entries lie in higher buckets."""
    from_top = np.cumsum(histogram[:, ::-1], axis=1)
    place = np.array([np.searchsorted(row, max(int(count), 1)) for row, count in zip(from_top, counts, strict=True)])
    place = np.minimum(place, histogram.shape[1] - 1)
    rows = np.arange(len(place))
    above = from_top[rows, place] - histogram[rows, histogram.shape[1] - 1 - place]
    return histogram.shape[1] - 1 - place, above
