"""A tensor whose bytes are the result: read once, written, digested, and searched for NaN and infinity.

Bytes whose digest is known already, because the user trusts their model's record, are not looked at: they are moved.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from smelt import dtypes
from smelt.engine.inputs import Readable
from smelt.engine.tensor import Settings, Sink, TensorResult
from smelt.engine.tiles import Scratch
from smelt.planning.entries import Entry
from smelt.storage import digests

PIECE = digests.BLOCK
"""Bytes read at a time: they are written, hashed and searched while they are in the cache; larger pieces are slower."""
TASK = 4 * PIECE
"""Bytes that a worker takes at a time."""
MOVE = 64 << 20
"""Bytes moved at a time, between which a merge can be stopped."""
_SEARCH = 1 << 18
"""Bytes searched at a time, so that what NumPy makes of them stays in the second cache."""


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of a tensor without reading it; `move(start, stop)` brings these bytes of it to their place."""

    digest: str
    nonfinite: int
    move: Callable[[int, int], None]


class CopyRun:
    """The work of an entry whose bytes are those of its first input; used as `TensorRun` is."""

    bytes_reread = bytes_sampled = 0

    def __init__(
        self,
        entry: Entry,
        sources: Sequence[Readable],
        sink: Sink,
        *,
        settings: Settings,
        known: Known | None = None,
    ) -> None:
        self.entry = entry
        self._source = sources[entry.inputs[0].model]
        self._sink = sink
        self._any_nonfinite = settings.kernels.any_nonfinite
        self._known = known
        self._task = TASK if known is None else MOVE
        self._lock = threading.Lock()
        self._digests: dict[int, bytes] = {}
        self._nonfinite = 0

    @property
    def tasks(self) -> int:
        """How many tasks its one pass has."""
        return -(-self.entry.nbytes // self._task)

    @property
    def alone(self) -> bool:
        """Whether one worker does all of it."""
        return self.tasks <= 1

    def begin(self, scratch: Scratch) -> None:
        """Nothing is to be prepared."""

    def task(self, task: int, scratch: Scratch) -> tuple[int, int]:
        """Copy one part of the tensor; gives the bytes read and the bytes written."""
        start, stop = task * self._task, min((task + 1) * self._task, self.entry.nbytes)
        if self._known is not None:
            self._known.move(start, stop)
        else:
            for low in range(start, stop, PIECE):
                self._copy(low, min(low + PIECE, stop), scratch)
        return stop - start, stop - start

    def end_pass(self, scratch: Scratch) -> bool:
        """There is no other pass."""
        return False

    def abandon(self) -> None:
        """Nothing is held."""

    def result(self) -> TensorResult:
        """What is known of the tensor now; every number that is not finite is inherited."""
        if self._known is not None:
            return TensorResult(self.entry.name, self._known.digest, self._known.nonfinite)
        blocks = [self._digests[block] for block in sorted(self._digests)]
        return TensorResult(self.entry.name, digests.joined(blocks), self._nonfinite)

    def _copy(self, start: int, stop: int, scratch: Scratch) -> None:
        piece = scratch.array("copied", (stop - start,), np.uint8)
        self._source.read_into(self.entry.inputs[0].tensor, start, stop, memoryview(piece))
        self._sink.write(self.entry.name, start, memoryview(piece))
        self._digests.update(enumerate(digests.of_blocks(memoryview(piece)), start // digests.BLOCK))
        if self.entry.dtype.floating and (found := self._count_nonfinite(piece)):
            with self._lock:
                self._nonfinite += found

    def _count_nonfinite(self, piece: Any) -> int:
        """How many numbers are NaN or infinite; they are counted only where there are any, which is rare."""
        dtype = self.entry.dtype
        count = 0
        for low in range(0, len(piece), _SEARCH):
            part = piece[low : low + _SEARCH]
            if self._any_nonfinite(part, dtype):
                count += int(np.count_nonzero(dtypes.nonfinite(part, dtype)))
        return count
