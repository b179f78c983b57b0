"""Passes over a tensor that must finish before its last one: sums and Gram matrices.

The k-th largest magnitude is in `selection`.

A reducer turns blocks of values into partial results (`partial`), folds these (`fold`) and ends with what the method
is given (`finish`). Blocks are always the same elements, and ordered reducers are folded in the order of the blocks,
so the result does not depend on tile size or thread count. Each reducer has a `whole` form, the plain definition on
the uncut tensor, against which it is tested.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

from array_api_compat import array_namespace

Array = Any


class Reducer(Protocol):
    """One reduction of one tensor: `rounds` passes of partial → fold, each ended by `close`, until `done`; `finish`."""

    rounds: ClassVar[int]
    ordered: ClassVar[bool]
    """True: partials are taken block by block and folded in block order. False: any cut and order gives the same."""

    @property
    def done(self) -> bool:
        """Whether enough rounds are closed for `finish`."""

    def refuses(self, values: Any, ndim: int) -> tuple[str, str] | None:
        """For a tile of `ndim` dimensions: what a reduction gave, and what it should give; None if it is well."""

    def partial(self, values: Any) -> Any: ...

    def fold(self, total: Any, partial: Any) -> Any: ...

    def close(self, total: Any) -> None: ...

    def finish(self) -> Any: ...


def dimensions(values: Any) -> int:
    return values.ndim if hasattr(values, "ndim") and hasattr(values, "dtype") else -1


def type_name(values: Any) -> str:
    """The element type of an array, in NumPy's words, whatever library it is of."""
    return str(values.dtype).removeprefix("torch.")


def described(values: Any) -> str:
    """What a value is, in words: `float32 [2, 9600]`, `a tuple of 3`, `None`."""
    if hasattr(values, "shape") and hasattr(values, "dtype"):
        return f"{type_name(values)} {list(values.shape)}"
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

    @property
    def done(self) -> bool:
        return self._total is not None

    def refuses(self, values: Any, ndim: int) -> tuple[str, str] | None:
        if dimensions(values) == ndim:
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

    @property
    def done(self) -> bool:
        return self._total is not None

    def refuses(self, values: Any, ndim: int) -> tuple[str, str] | None:
        fix = f"give Gram an array [k, ...] of {ndim} dimensions, or a tuple of k arrays"
        if isinstance(values, tuple):
            wrong = [part for part in values if dimensions(part) != ndim - 1]
            return (f"a tuple with {described(wrong[0])}", fix) if wrong or not values else None
        return None if dimensions(values) == ndim else (described(values), fix)

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

    @property
    def done(self) -> bool:
        return self._total is not None

    def refuses(self, values: Any, ndim: int) -> tuple[str, str] | None:
        if dimensions(values) == ndim:
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
