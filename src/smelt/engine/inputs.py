"""What one task reads of every source: read as a whole, or piece by piece by the kernel that works on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Protocol

import numpy as np

from smelt.dtypes import DType
from smelt.engine.memory import TensorMemory
from smelt.engine.tiles import PIECE, Scratch
from smelt.specs import TensorSpec
from smelt.storage.files import Buffer

SHARE = 0.25
"""Of the memory that tensors may keep, what tasks may take for what kernels read: more of it leaves the third cache."""


class Readable(Protocol):
    """What tensors are read from: a source, or what stands before one."""

    @property
    def name(self) -> str: ...

    def read_into(self, spec: TensorSpec, start: int, stop: int, buffer: Buffer) -> None: ...


def lies_in_files(source: Any) -> bool:
    """Whether a source's tensors lie in files as they are: it can say where (`place_of`), and others can read them."""
    return hasattr(source, "place_of")  # a protocol checked at run time would take longer than to open a small tensor


@dataclass(frozen=True, slots=True)
class Stored:
    """The stored bytes of a range of elements, one buffer and type a source (the base last).

    Where `files` is None all of them are in the buffers. Else nothing is yet: `files` holds the descriptor and position
    of each, int64 [n, 2], and the buffers have room for the range or for one piece of it.
    """

    buffers: Sequence[tuple[Any, DType]]
    files: Any = None


class Inputs:
    """The sources of one tensor. `kept`: one array a source that lasts from pass to pass, or None.

    What a kernel reads is kept task by task instead, as far as there is room. `there` holds, for each source, the
    tensor's bytes where they lie in memory and can be used as they are, else None.
    """

    def __init__(self, sources: Sequence[tuple[Readable, TensorSpec]]) -> None:
        self._sources = [(source, spec, spec.dtype, spec.dtype.bits // 8) for source, spec in sources]
        self.placed = all(lies_in_files(source) for source, _ in sources)
        self.there: list[Any] = [None] * len(sources)
        self.kept: list[Any] | None = None
        self._room: tuple[TensorMemory, int] | None = None
        self._blocks: dict[int, Any] = {}

    @property
    def bytes_kept(self) -> int:
        """What is kept of tasks."""
        return sum(self._blocks[low].size for low in list(self._blocks))

    def keep_tasks(self, memory: TensorMemory, task: int) -> None:
        """Keep what kernels read for tasks of so many elements, until `drop`."""
        self._room = memory, task

    def drop(self, low: int) -> None:
        """Keep no longer what was read for the task from element `low` on."""
        if self._room is not None and (block := self._blocks.pop(low, None)) is not None:
            self._room[0].give(block)

    def keep(self, memory: TensorMemory, scratch: Scratch | None) -> None:
        """Find room for all inputs: in a worker's own buffers, or without any within the common limit."""
        sizes = [0 if there is not None else s[1].nbytes for s, there in zip(self._sources, self.there, strict=True)]
        if scratch is not None:
            self.kept = [scratch.array(f"raw {i}", (size,), np.uint8) for i, size in enumerate(sizes)]
        elif (block := memory.take(sum(sizes))) is not None:
            self.kept = [block[low:high] for low, high in pairwise(accumulate(sizes, initial=0))]

    def read(self, low: int, high: int, scratch: Scratch, *, again: bool) -> tuple[Stored, int]:
        """Elements [low, high) of every source, and how many bytes were read for it; `again`: what is kept is there."""
        buffers, read = [], 0
        for i, (source, spec, dtype, size) in enumerate(self._sources):
            first, last = low * size, high * size
            if self.there[i] is not None:
                buffers.append((self.there[i][first:last], dtype))
                continue
            if self.kept is None:
                buffer = scratch.array(f"raw {i}", (last - first,), np.uint8)
            else:
                buffer = self.kept[i][first:last]
            if self.kept is None or not again:
                source.read_into(spec, first, last, buffer)
                read += last - first
            buffers.append((buffer, dtype))
        return Stored(buffers), read

    def unread(self, low: int, high: int, scratch: Scratch, *, again: bool, keep: bool) -> tuple[Stored, int] | None:
        """As `read`, for a kernel that reads by itself; None where nothing is to be read, or not from files.

        With `keep` there is room for all of the range, if any is left, and what is read lasts until `drop`.
        """
        if not self.placed or (again and self.kept is not None):
            return None
        sizes = [(high - low) * size for *_, size in self._sources]
        if low in self._blocks:
            return Stored(self._cut(self._blocks[low], sizes)), 0
        files = np.array(
            [source.place_of(spec, low * size, high * size) for source, spec, _, size in self._sources],  # type: ignore[attr-defined]
            dtype=np.int64,
        )
        if keep and (block := self._block(low)) is not None:
            return Stored(self._cut(block, sizes), files), sum(sizes)
        buffers = []
        for i, (_, _, dtype, size) in enumerate(self._sources):
            if self.kept is None:
                buffer = scratch.array(f"raw {i}", (min(sizes[i], PIECE * size),), np.uint8)
            else:
                buffer = self.kept[i][low * size : high * size]
            buffers.append((buffer, dtype))
        return Stored(buffers, files), sum(sizes)

    def _block(self, low: int) -> Any:
        """Room for what one task reads, if there is any."""
        if self._room is None:
            return None
        memory, task = self._room
        block = memory.take(task * sum(size for *_, size in self._sources), share=SHARE)
        if block is not None:
            self._blocks[low] = block
        return block

    def _cut(self, block: Any, sizes: Sequence[int]) -> list[tuple[Any, DType]]:
        """A task's room, cut into that of the sources."""
        ends = pairwise(accumulate(sizes, initial=0))
        return [(block[first:last], source[2]) for (first, last), source in zip(ends, self._sources, strict=True)]

    def sample(self, chunks: int, length: int, size: int, scratch: Scratch) -> tuple[Stored, int]:
        """Chunks of `length` elements at even distances over the tensor's `size`."""
        buffers = []
        for i, (source, spec, dtype, width) in enumerate(self._sources):
            buffer = scratch.array(f"sample {i}", (chunks * length * width,), np.uint8)
            for chunk in range(chunks):
                low = (size - length) * chunk // (chunks - 1) * width
                part = buffer[chunk * length * width : (chunk + 1) * length * width]
                source.read_into(spec, low, low + length * width, part)
            buffers.append((buffer, dtype))
        return Stored(buffers), sum(len(buffer) for buffer, _ in buffers)
