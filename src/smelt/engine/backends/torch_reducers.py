"""Partial results of reducers from torch tensors: worked out on the device, folded on the host as all others are.

Sums add in the order of the NumPy definitions, so that float64 results are the same to the bit, and with them the cuts
and factors that follow from them. What is brought to the host is small: lanes of blocks, histograms of digits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from smelt.methods.reducers import LANES, Gram, Sum
from smelt.methods.selection import KthLargest, KthLargest64

Tensor = Any
ToHost = Callable[[Any], Any]

_BUCKETS = 1 << 16
_MOST_ROWS = 4096
"""Above this many additions one after the other, the library's own sums are taken: the last bit may differ."""
_AT_ONCE = 256
"""Rows of such a sum."""
_SIGN = -(1 << 63)


def _add_rows(rows: Tensor, term: Callable[[Tensor], Tensor]) -> Tensor:
    """Σ over the second last axis of `term` of each row [..., rows, width], in the order of the rows, float64."""
    count = rows.shape[-2]
    total = term(rows.new_zeros((*rows.shape[:-2], rows.shape[-1])))
    if count > _MOST_ROWS:
        for part in torch.split(rows, _AT_ONCE, dim=-2):
            total += term(part).sum(dim=-2)
        return total
    for i in range(count):
        total += term(rows[..., i, :])
    return total


def _lanes(values: Tensor, term: Callable[[Tensor], Tensor]) -> Tensor:
    """As `methods.reducers._lanes` of `term` of the values: [n, ..., t] -> [n, ..., 256]."""
    whole = values.shape[-1] // LANES * LANES
    total = _add_rows(values[..., :whole].reshape(*values.shape[:-1], -1, LANES), term)
    rest = values.shape[-1] - whole
    if rest:
        total[..., :rest] += term(values[..., whole:])
    return total


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.float64)


def _products(values: Tensor) -> Tensor:
    """All products of two of k vectors: [k, ...] -> [k, k, ...]."""
    wide = values.to(torch.float64)
    return wide[:, None] * wide[None, :]


def _pieces(values: Tensor, block: int) -> Iterator[Tensor]:
    """The blocks of a tile [n, ...]: whole ones together as [n, blocks, block], then the rest as [n, 1, rest]."""
    flat = values.reshape(values.shape[0], -1)
    whole = flat.shape[1] // block * block
    if whole:
        yield flat[:, :whole].reshape(flat.shape[0], -1, block)
    if flat.shape[1] > whole:
        yield flat[:, None, whole:]


def _ordered(reducer: Any, values: Tensor, block: int, term: Callable[[Tensor], Tensor], to_host: ToHost) -> list[Any]:
    """The partial result of each block of a tile, in order; blocks are the last axis but one of what is added."""
    width = values.shape[-1]
    parts = []
    for piece in _pieces(values, block):
        if reducer.by_lanes:
            added = _lanes(piece, term)
        else:
            added = _add_rows(piece.reshape(*piece.shape[:-1], -1, width), term)
        parts.append(added)
    return [made[..., place, :] for made in map(to_host, parts) for place in range(made.shape[-2])]


def sum_partials(reducer: Sum, values: Tensor, block: int, to_host: ToHost) -> list[Any]:
    """As `Sum.partial` of each block."""
    return _ordered(reducer, values, block, _wide, to_host)


def gram_partials(reducer: Gram, values: Any, block: int, to_host: ToHost) -> list[Any]:
    """As `Gram.partial` of each block."""
    vectors = torch.stack(tuple(values)) if isinstance(values, tuple) else values
    return _ordered(reducer, vectors, block, _products, to_host)


def _keys32(numbers: Tensor) -> Tensor:
    return numbers.view(torch.int32) & 0x7FFFFFFF


def _keys64(numbers: Tensor) -> Tensor:
    """The bits of the unsigned keys of `KthLargest64`, in int64."""
    plain = torch.where(torch.isnan(numbers), torch.full_like(numbers, torch.nan), numbers + 0.0)
    bits = plain.view(torch.int64)
    return torch.where(plain < 0.0, ~bits, bits | _SIGN)


_KEYS: dict[type, Callable[[Tensor], Tensor]] = {KthLargest: _keys32, KthLargest64: _keys64}


def cut_partial(reducer: Any, values: tuple[Tensor, Any], to_host: ToHost) -> tuple[Any, Any]:
    """As the `partial` of a radix select: (counts [n, k], histograms int64 [n, 1 or k, 65536])."""
    numbers, counts = values
    keys = _KEYS[type(reducer)](numbers.contiguous()).reshape(numbers.shape[0], -1)
    n = keys.shape[0]
    prefixes = reducer.prefixes(n)
    bits = 16 * reducer.rounds
    done = reducer.round
    digit = bits - 16 * (done + 1)
    if done == 0:
        rows = _BUCKETS * torch.arange(n, dtype=torch.int64, device=keys.device)[:, None]
        digits = ((keys >> digit) & (_BUCKETS - 1)) + rows
        histogram = to_host(torch.bincount(digits.reshape(-1), minlength=n * _BUCKETS)).reshape(n, 1, _BUCKETS)
    else:
        begun = (1 << (16 * done)) - 1
        histogram = to_host(
            torch.stack([_narrow(row, digit, begun, prefixes[i].tolist()) for i, row in enumerate(keys)])
        )
    return to_host(counts).reshape(n, -1), histogram


def _narrow(row: Tensor, digit: int, begun: int, prefixes: list[int]) -> Tensor:
    """One histogram per prefix, of the next 16 bits of the keys that begin with it."""
    upper = (row >> (digit + 16)) & begun
    found: dict[int, Tensor] = {}
    for prefix in prefixes:
        if prefix not in found:
            inside = row[upper == prefix]
            found[prefix] = torch.bincount((inside >> digit) & (_BUCKETS - 1), minlength=_BUCKETS)
    return torch.stack([found[prefix] for prefix in prefixes])


def _elsewhere(reducer: Any, values: Any, block: int, to_host: ToHost) -> Any:
    """Of a reducer that is not known here: its own `partial`, of the values brought to the host."""
    given = tuple(to_host(part) for part in values) if isinstance(values, tuple) else to_host(values)
    if not reducer.ordered:
        return reducer.partial(given)
    first = given[0] if isinstance(given, tuple) else given
    inner = first.shape if isinstance(given, tuple) else first.shape[1:]
    size = 1
    for length in inner:
        size *= length
    if block >= size:
        return [reducer.partial(given)]
    step, axis = (block, len(inner) - 1) if len(inner) == 1 else (block // inner[-1], len(inner) - 2)
    stops = range(0, inner[axis], step)
    return [reducer.partial(_cut(given, low, low + step, rows=len(inner) > 1)) for low in stops]


def _cut(values: Any, low: int, high: int, *, rows: bool) -> Any:
    if isinstance(values, tuple):
        return tuple(_cut(value, low, high, rows=rows) for value in values)
    return values[..., low:high, :] if rows else values[..., low:high]


class Partials(Mapping[type, Callable[..., Any]]):
    """Reducer -> (reducer, values, block) -> its partial results on the host; every reducer has one."""

    def __init__(self, to_host: ToHost) -> None:
        self._to_host = to_host

    def __getitem__(self, kind: type) -> Callable[..., Any]:
        host = self._to_host
        if kind is Sum:
            return lambda reducer, values, block: sum_partials(reducer, values, block, host)
        if kind is Gram:
            return lambda reducer, values, block: gram_partials(reducer, values, block, host)
        if kind in _KEYS:
            return lambda reducer, values, block: cut_partial(reducer, values, host)
        return lambda reducer, values, block: _elsewhere(reducer, values, block, host)

    def __iter__(self) -> Iterator[type]:
        return iter((Sum, Gram, *_KEYS))

    def __len__(self) -> int:
        return 2 + len(_KEYS)
