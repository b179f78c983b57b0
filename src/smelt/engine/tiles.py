"""How a tensor is cut: blocks whose elements never change, tiles of whole blocks, tasks of whole tiles.

A *block* is the unit of every sum: 64 Ki elements, or a fixed number of rows. A *tile* is what a method sees at once;
its size follows the caches. A *task* is what a worker takes, reads and writes at once, and what a kernel sees: for
tensors that are cut between any elements, a task's output is whole 1 MiB digest blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from smelt.specs import Grain

BLOCK = 1 << 16
"""Elements of a block."""
PIECE = BLOCK
"""Elements that a kernel reads of each model and works on at a time: all of them fit the second cache."""
TASK = 1 << 20
"""Least elements of a task: 2 MiB of a two-byte type. Workers meet at the interpreter's lock a few times a task."""
STREAMED_TASK = 2 * TASK
"""The same where kernels read by themselves, so that only its output takes room: 3 % quicker."""
DEFAULT_TILE = 1 << 17
"""Elements of a tile, unless asked otherwise."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """The cuts of one tensor of `size` elements seen as `rows` × `width` (ELEMENT: one row of all)."""

    grain: Grain
    shape: tuple[int, ...]
    size: int
    width: int
    block: int
    tile: int
    task: int

    @classmethod
    def of(cls, shape: tuple[int, ...], grain: Grain, *, tile: int = DEFAULT_TILE, task: int = TASK) -> Geometry:
        """Cuts for a tensor of this shape; `tile` and `task` (elements) are rounded up to whole blocks and tiles."""
        size = math.prod(shape)
        if grain is Grain.ELEMENT:
            width, block = 1, BLOCK
        elif grain is Grain.TENSOR:
            width, block = size, max(size, 1)
        else:
            width = size // max(shape[0] if shape else 1, 1) if grain is Grain.SLAB else (shape[-1] if shape else 1)
            block = max(1, BLOCK // max(width, 1)) * max(width, 1)
        whole_tile = max(1, tile // block) * block
        whole_task = max(1, -(-task // whole_tile)) * whole_tile
        return cls(grain, shape, size, width, block, whole_tile, whole_task)

    @property
    def tasks(self) -> int:
        return -(-self.size // self.task)

    @property
    def block_axis(self) -> int:
        """The axis of a tile along which it is cut into blocks."""
        return -1 if self.grain is Grain.ELEMENT else -2

    def span(self, task: int) -> tuple[int, int]:
        """Elements [start, stop) of a task."""
        return task * self.task, min((task + 1) * self.task, self.size)

    def tile_spans(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Elements [start, stop) of the tiles of a task that covers [start, stop)."""
        return [(low, min(low + self.tile, stop)) for low in range(start, stop, self.tile)]

    def blocks(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """(number, low, high) of the blocks of a tile; low and high along `block_axis`, from the tile's start."""
        unit = 1 if self.grain is Grain.ELEMENT else max(self.width, 1)
        return [
            (low // self.block, (low - start) // unit, (min(low + self.block, stop) - start) // unit)
            for low in range(start, stop, self.block)
        ]

    def view(self, flat: Any) -> Any:
        """Elements [..., t] of a tile in the shape that the method sees: [..., t], [..., r, width], [..., *shape]."""
        if self.grain is Grain.ELEMENT:
            return flat
        if self.grain is Grain.TENSOR:
            return flat.reshape(flat.shape[:-1] + self.shape)
        return flat.reshape((*flat.shape[:-1], -1, max(self.width, 1)))


class Scratch:
    """Buffers of one worker, by name, reused from tile to tile and grown when needed; `empty` makes them."""

    def __init__(self, empty: Callable[..., Any] = np.empty) -> None:
        self._empty = empty
        self._buffers: dict[tuple[str, Any], Any] = {}

    def array(self, name: str, shape: tuple[int, ...], dtype: Any) -> Any:
        """An uninitialised array; the next call with the same name and type may give the same memory."""
        count = math.prod(shape)
        kept = self._buffers.get((name, dtype))
        if kept is None or kept.size < count:
            kept = self._buffers[(name, dtype)] = self._empty(count, dtype=dtype)
        return kept[:count].reshape(shape)
