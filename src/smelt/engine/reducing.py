"""Reductions of one tensor in progress: when each begins, and the folding of partial results in block order."""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from smelt.engine.tiles import Geometry
from smelt.methods import api
from smelt.methods.loading import answerable
from smelt.methods.selection import KthLargest
from smelt.planning.entries import Entry


class Running:
    """A reduction in progress: partial results wait here until their turn comes."""

    def __init__(self, reduction: api.Reduction, reducer: Any) -> None:
        self.reduction = reduction
        self.reducer = reducer
        self._lock = threading.Lock()
        self.reset()

    def reset(self) -> None:
        """Begin a round."""
        self._sum: Any = None
        self._next = 0
        self._waiting: dict[int, Any] = {}

    def add(self, values: Any, low: int, high: int, geometry: Geometry, *, kernel: Any = None) -> None:
        """Take the values of the tile [low, high); `kernel` stands in for the reducer's `partial`."""
        if not self.reducer.ordered:
            self.fold(self.reducer.partial(values) if kernel is None else kernel(self.reducer, values, 0))
            return
        partials = kernel(self.reducer, values, geometry.block) if kernel is not None else None
        for place, (block, first, last) in enumerate(geometry.blocks(low, high)):
            if partials is None:
                part = self.reducer.partial(_slice(values, first, last, geometry.block_axis))
            else:
                part = partials[place]
            self.fold(part, block=block)

    def take(self, partials: Any, block: int) -> None:
        """Take a kernel's partial results: one for each block from number `block` on where they are ordered."""
        if not self.reducer.ordered:
            self.fold(partials)
            return
        for number, partial in enumerate(partials, block):
            self.fold(partial, block=number)

    def fold(self, partial: Any, *, block: int | None = None) -> None:
        """Take a partial result: of a block in its turn, or of any part where the order does not matter."""
        with self._lock:
            if block is None:
                self._sum = self.reducer.fold(self._sum, partial)
                return
            self._waiting[block] = partial
            while self._next in self._waiting:
                self._sum = self.reducer.fold(self._sum, self._waiting.pop(self._next))
                self._next += 1

    def total(self) -> Any:
        """The folded result of the round, when every block has come."""
        assert not self._waiting
        return self._sum


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor's part in reductions over its whole model: `results` are those known by now, with `size`.

    In a pass of such reductions the tensor adds to `running`, and is done; in none it is merged with the results.
    """

    results: Mapping[str, Any]
    running: tuple[Running, ...] = ()


def _slice(values: Any, first: int, last: int, axis: int) -> Any:
    if isinstance(values, tuple):
        return tuple(_slice(value, first, last, axis) for value in values)
    return values[..., first:last] if axis == -1 else values[..., first:last, :]


def bind(entry: Entry) -> Any:
    """The entry's method with its settings, its per-model fields shaped for the tensor's tiles."""
    info = api.get(entry.method)
    with answerable(info, at=f"at tensor '{entry.name}'"):
        method = info.type(entry.values, models=len(entry.inputs))
        if method.grain is api.Grain.TENSOR:
            method.shape_fields(1 + len(entry.shape))
    return method


def startable(waiting: Sequence[api.Reduction], running: Collection[str]) -> list[api.Reduction]:
    """Those of the waiting reductions that need no result of one that waits or runs."""
    missing = {reduction.name for reduction in waiting}.union(running)
    return [reduction for reduction in waiting if missing.isdisjoint(reduction.arguments)]


def schedule(reductions: Sequence[api.Reduction], *, guessed: bool = False) -> list[tuple[int, int]]:
    """The passes [begin, end) of each reduction: as early as what it asks for allows.

    `guessed`: a k-th largest takes one pass, as it does where a sample tells around which number to look.
    """
    ends: dict[str, int] = {}
    placed = []
    for reduction in reductions:
        start = max((ends.get(name, 0) for name in reduction.arguments), default=0)
        rounds = 1 if guessed and reduction.reducer is KthLargest else reduction.reducer.rounds
        ends[reduction.name] = start + rounds
        placed.append((start, start + rounds))
    return placed
