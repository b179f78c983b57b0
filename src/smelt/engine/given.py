"""What a method's function is given for one tile: each value is made when it is first asked for.

So a function that asks for `deltas` alone costs no `x`, and a kernel that works on the stored bytes costs neither.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from smelt.engine.inputs import Stored
from smelt.engine.kernels import Kernels
from smelt.engine.tiles import Geometry, Scratch


class Memory(Protocol):
    """What a tensor remembers for kernels from tile to tile."""

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` gives, made once for the tensor's tiles of this pass."""

    def keep(self, name: str, shape: tuple[int, ...]) -> Any:
        """An uint8 array that lasts to the tensor's end, the same for all its tiles; None where memory is short."""

    def kept(self, name: str) -> Any:
        """What `keep` has given for this name; None if it was never asked for."""


class Arguments(Mapping[str, Any]):
    """The arguments of one tile, elements [start, start + count) of the tensor, wherever tiles live.

    `stored` holds the tile's bytes of every source, `streams` the keys of the random numbers of each model, `results`
    what reductions and derived values gave. Bytes that are not read yet are for kernels alone.
    """

    def __init__(
        self,
        stored: Stored,
        *,
        has_base: bool,
        start: int,
        count: int,
        geometry: Geometry,
        streams: Sequence[tuple[int, int]],
        results: Mapping[str, Any],
    ) -> None:
        self.stored = stored
        self.has_base = has_base
        self.start = start
        self.count = count
        self.streams = streams
        self._geometry = geometry
        self._results = results
        self._made: dict[str, Any] = {}

    @property
    def models(self) -> int:
        """How many models there are, the base not counted."""
        return len(self.stored.buffers) - self.has_base

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tile as the method sees it: [t], [r, width] or the tensor's."""
        return tuple(self._geometry.view(np.broadcast_to(np.float32(0), (self.count,))).shape)

    def __getitem__(self, name: str) -> Any:
        if name not in self._made:
            self._made[name] = self._make(name)
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        yield from ("x", "base", "deltas", "vectors", "uniform", "size")
        yield from self._results

    def __len__(self) -> int:
        return 6 + len(self._results)

    @abstractmethod
    def _make(self, name: str) -> Any:
        """The argument of this name, when it is first asked for."""


class Given(Arguments):
    """The arguments of one tile as NumPy arrays, and what kernels need beside them."""

    def __init__(
        self,
        stored: Stored,
        *,
        scratch: Scratch,
        kernels: Kernels,
        memory: Memory,
        geometry: Geometry,
        **place: Any,
    ) -> None:
        super().__init__(stored, geometry=geometry, **place)
        self.scratch = scratch
        self.size, self.width, self.block = geometry.size, geometry.width, geometry.block
        self.once, self.keep, self.kept = memory.once, memory.keep, memory.kept
        self._kernels = kernels

    def _make(self, name: str) -> Any:
        if name in self._results:
            return self._results[name]
        if name == "size":
            return self._geometry.size
        if name == "base":
            return self._view(self._base()) if self.has_base else None
        if name == "vectors" and not self.has_base:
            return self["x"]
        if name == "vectors":
            return self["deltas"]
        if name == "uniform":
            numbers = self.scratch.array("uniform", (self.models, self.count), np.float32)
            for i, stream in enumerate(self.streams):
                self._kernels.uniform(stream, self.start, self.start + self.count, numbers[i])
            return self._view(numbers)
        values = self.scratch.array(name, (self.models, self.count), np.float32)
        for i in range(self.models):
            self._kernels.decode(*self.stored.buffers[i], values[i])
        if name == "deltas":
            np.subtract(values, self._base(), out=values)
        return self._view(values)

    def _base(self) -> Any:
        if "flat base" not in self._made:
            base = self.scratch.array("base", (self.count,), np.float32)
            self._kernels.decode(*self.stored.buffers[-1], base)
            self._made["flat base"] = base
        return self._made["flat base"]

    def _view(self, flat: Any) -> Any:
        shown = self._geometry.view(flat).view()
        shown.flags.writeable = False  # a method must not change what the next function of the pass is given
        return shown
