"""One output tensor on its way: its passes in order, its reductions, its tiles.

A tensor's passes run one after the other; within a pass its tasks are independent of each other. Whoever finishes the
last task of a pass ends the pass. Results of reductions are folded in the order of the blocks.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Protocol

import numpy as np

from smelt import dtypes
from smelt.engine.given import Given
from smelt.engine.kernels import DEFINITIONS, Kernels
from smelt.engine.reducing import Running, bind, schedule
from smelt.engine.rng import key
from smelt.engine.tiles import Geometry, Scratch
from smelt.errors import NumericError, RecipeError
from smelt.methods import api
from smelt.methods.api import Undefined
from smelt.methods.loading import answerable, definition_of
from smelt.methods.reducers import described
from smelt.planning.entries import Action, Entry
from smelt.storage import digests
from smelt.storage.checkpoint import TensorSource

_READ_BACK = 8 * digests.BLOCK
"""Bytes that are read back at a time for digests."""


class Sink(Protocol):
    """Where output goes: positional writes of a tensor's bytes, and reading back what was written."""

    def write(self, name: str, start: int, data: Any) -> None: ...

    def read_back(self, name: str, start: int, stop: int, buffer: Any) -> None: ...


@dataclass(frozen=True, slots=True)
class Settings:
    """What the engine is told beside the plan."""

    workers: int
    tile: int
    seed: int
    keep_bytes: int
    allow_nonfinite: bool = False
    kernels: Kernels = DEFINITIONS


@dataclass(frozen=True, slots=True)
class TensorResult:
    """What is known of a written tensor: its digest, and how many of its numbers are NaN or infinite.

    `inherited` of them stand where an input has one too, `created` where all inputs are finite.
    """

    name: str
    digest: str
    inherited: int = 0
    created: int = 0


class Budget:
    """Memory that tensors may keep between their passes, `limit` bytes in all.

    What is given back is kept for the next tensor of that size: layers repeat, and fresh memory costs a page fault for
    every 4 KiB.
    """

    def __init__(self, limit: int) -> None:
        self._limit = self._left = limit
        self._spare: dict[int, list[Any]] = {}
        self._lock = threading.Lock()

    def take(self, size: int) -> Any:
        """An uninitialised array of `size` bytes, or None where the limit does not allow it."""
        with self._lock:
            if self._spare.get(size):
                return self._spare[size].pop()
            if size > self._limit:
                return None
            while size > self._left and self._drop_largest():
                pass
            if size > self._left:
                return None
            self._left -= size
        return np.empty(size, dtype=np.uint8)

    def give(self, array: Any) -> None:
        """Take an array back."""
        with self._lock:
            self._spare.setdefault(array.size, []).append(array)

    def _drop_largest(self) -> bool:
        sizes = [size for size, arrays in self._spare.items() if arrays]
        if not sizes:
            return False
        self._spare[max(sizes)].pop()
        self._left += max(sizes)
        return True


class TensorRun:
    """The work of one entry. `task(pass, number)` may be called from any thread; `end_pass` by one."""

    def __init__(
        self, entry: Entry, sources: Sequence[TensorSource], sink: Sink, *, settings: Settings, budget: Budget
    ) -> None:
        self.entry = entry
        self._sources = sources
        self._sink = sink
        self._settings = settings
        self._budget = budget
        self._lock = threading.Lock()
        self._results: dict[str, Any] = {}
        self._digests: dict[int, bytes] = {}
        self._inherited = self._created = 0
        self._kept: list[Any] | None = None
        self._block: Any = None
        self._method: Any = None
        if entry.action is Action.MERGE:
            self._method = bind(entry)
            self._results = dict.fromkeys(reduction.name for reduction in self._method.info.reductions)
        grain = self._method.grain if self._method else api.Grain.ELEMENT
        self.geometry = Geometry.of(entry.shape, grain, tile=settings.tile)
        self._reductions = schedule(self._method.active()) if self._method else []
        self._running: list[Running] = []
        self._reduction_passes = max((start + r.reducer.rounds for start, r in self._reductions), default=0)
        aligned = entry.dtype.nbytes(self.geometry.task * 8) % (8 * digests.BLOCK) == 0
        self._digest_inline = aligned or self.geometry.tasks == 1
        self.passes = self._reduction_passes + 1 + (0 if self._digest_inline else 1)
        if self._method:
            self._streams = [key(settings.seed, entry.name, source.stream) for source in entry.inputs]
        if self._reduction_passes:
            self._keep_inputs()
        self._begin_pass(0)

    def tasks(self, number: int) -> int:
        """How many tasks pass `number` has."""
        if number > self._reduction_passes:
            return -(-self.entry.nbytes // _READ_BACK)
        return self.geometry.tasks

    @property
    def bytes_reread(self) -> int:
        """What its later passes read again, because the input is not kept."""
        return 0 if self._kept is not None else self._reduction_passes * self.entry.input_bytes

    def task(self, number: int, task: int, scratch: Scratch) -> tuple[int, int]:
        """Do one task of a pass; gives the bytes read and the bytes written."""
        if number > self._reduction_passes:
            self._digest_written(task, scratch)
            return 0, 0
        start, stop = self.geometry.span(task)
        if number < self._reduction_passes:
            return self._reduce(number, start, stop, scratch), 0
        if self._method is None:
            return self._copy(start, stop, scratch)
        return self._write(start, stop, scratch)

    def end_pass(self, number: int) -> None:
        """Close the reductions that end with this pass and open those that begin with the next."""
        with np.errstate(all="ignore"):
            for running in self._running:
                running.reducer.close(running.total())
                if number + 1 == running.start + running.reducer.rounds:
                    self._results[running.reduction.name] = running.reducer.finish()
        if number + 1 < self._reduction_passes:
            self._begin_pass(number + 1)
        elif number + 1 == self._reduction_passes:
            self._derive()
        elif number + 1 == self.passes:
            self._release()

    def abandon(self) -> None:
        self._release()

    def result(self) -> TensorResult:
        blocks = [self._digests[block] for block in sorted(self._digests)]
        return TensorResult(self.entry.name, digests.joined(blocks), self._inherited, self._created)

    def _keep_inputs(self) -> None:
        self._block = self._budget.take(self.entry.input_bytes)
        if self._block is not None:
            ends = list(accumulate(source.tensor.nbytes for source in self.entry.sources))
            self._kept = [self._block[low:high] for low, high in pairwise([0, *ends])]

    def _release(self) -> None:
        if self._kept is not None:
            self._kept = None
            self._budget.give(self._block)

    def _begin_pass(self, number: int) -> None:
        going = [r for r in self._running if number < r.start + r.reducer.rounds]
        for running in going:
            running.reset()
        for start, reduction in self._reductions:
            if start == number:
                reducer = reduction.reducer(scope=reduction.scope, size=self.geometry.size)
                going.append(Running(reduction, reducer, start))
        self._running = going
        if not self._reduction_passes and self._method:
            self._derive()

    def _derive(self) -> None:
        with np.errstate(all="ignore"):
            for derived in self._method.info.derived:
                self._results[derived.name] = self._call(derived.function, derived.arguments, self._results)

    def _call(self, function: Callable[..., Any], names: Sequence[str], given: Mapping[str, Any]) -> Any:
        """Call a function of the method; what it raises is told with the line of the method's file."""
        try:
            with answerable(self._method.info, at=f"at tensor '{self.entry.name}'"):
                return function(self._method, *(given[name] for name in names))
        except Undefined as error:
            raise self._undefined(str(error)) from error

    def _checked(self, values: Any, shape: tuple[int, ...]) -> Any:
        """A tile's result as a flat float32 array; it must have the shape of the tile."""
        if isinstance(values, np.generic):  # what NumPy makes of 0-d arrays
            values = np.asarray(values)
        if not isinstance(values, np.ndarray) or values.dtype != np.float32 or values.shape != shape:
            raise self._misused(type(self._method).tile, described(values), f"return an array, float32 {list(shape)}")
        return np.ascontiguousarray(values).reshape(-1)

    def _misused(self, function: Callable[..., Any], got: str, rule: str) -> RecipeError:
        """A function of the method that gives something else than the contract asks for."""
        return RecipeError(
            f"method {self.entry.method}: {function.__name__} gave {got}, and is to {rule}",
            where=[definition_of(function), f"at tensor '{self.entry.name}'"],
            fix="correct the method",
        )

    def _raw(self, number: int, start: int, stop: int, scratch: Scratch) -> tuple[list[Any], int]:
        """The stored bytes of elements [start, stop) of every source, and how many bytes were read for it."""
        raw: list[Any] = []
        read = 0
        for i, source in enumerate(self.entry.sources):
            dtype = source.tensor.dtype
            low, high = dtype.nbytes(start), dtype.nbytes(stop)
            if self._kept is None:
                buffer = scratch.array(f"raw {i}", (high - low,), np.uint8)
            else:
                buffer = self._kept[i][low:high]
            if self._kept is None or number == 0:
                self._sources[source.model].read_into(source.tensor, low, high, memoryview(buffer))
                read += high - low
            raw.append(buffer)
        return raw, read

    def _given(self, raw: Sequence[Any], task_start: int, low: int, high: int, scratch: Scratch) -> Given:
        """What the method's functions are given for elements [low, high) of the tensor."""
        stored = []
        for source, data in zip(self.entry.sources, raw, strict=True):
            dtype = source.tensor.dtype
            stored.append((data[dtype.nbytes(low - task_start) : dtype.nbytes(high - task_start)], dtype))
        return Given(
            stored,
            has_base=self.entry.base is not None,
            start=low,
            count=high - low,
            geometry=self.geometry,
            streams=self._streams,
            results=self._results,
            scratch=scratch,
            kernels=self._settings.kernels,
        )

    def _reduce(self, number: int, start: int, stop: int, scratch: Scratch) -> int:
        raw, read = self._raw(number, start, stop, scratch)
        kernels = self._settings.kernels
        with np.errstate(all="ignore"):
            whole = self._given(raw, start, start, stop, scratch)
            left = [running for running in self._running if not self._reduce_by_kernel(running, whole)]
            for low, high in self.geometry.tile_spans(start, stop) if left else ():
                given = self._given(raw, start, low, high, scratch)
                for running in left:
                    values = self._call(running.reduction.function, running.reduction.arguments, given)
                    if problem := running.reducer.refuses(values, len(given.shape) + 1):
                        raise self._misused(running.reduction.function, *problem)
                    running.add(values, low, high, self.geometry, kernel=kernels.partials.get(type(running.reducer)))
        return read

    def _reduce_by_kernel(self, running: Running, given: Given) -> bool:
        """Let a kernel make the partial results of a task from the stored bytes; False where there is none."""
        kernel = self._settings.kernels.functions.get((self.entry.method, running.reduction.name))
        partials = kernel(self._method, given, running.reducer) if kernel is not None else None
        if partials is None:
            return False
        if running.reducer.ordered:
            for place, partial in enumerate(partials, given.start // self.geometry.block):
                running.fold(partial, block=place)
        else:
            running.fold(partials)
        return True

    def _write(self, start: int, stop: int, scratch: Scratch) -> tuple[int, int]:
        entry = self.entry
        raw, read = self._raw(self._reduction_passes, start, stop, scratch)
        out = scratch.array("out", (entry.dtype.nbytes(stop - start),), np.uint8)
        kernel = self._settings.kernels.functions.get((entry.method, "tile"))
        with np.errstate(all="ignore"):
            values = kernel(self._method, self._given(raw, start, start, stop, scratch)) if kernel is not None else None
            if values is not None:
                self._settings.kernels.encode(values, entry.dtype, out)
            for low, high in self.geometry.tile_spans(start, stop) if values is None else ():
                piece = out[entry.dtype.nbytes(low - start) : entry.dtype.nbytes(high - start)]
                given = self._given(raw, start, low, high, scratch)
                values = self._call(type(self._method).tile, self._method.info.tile_arguments, given)
                self._settings.kernels.encode(self._checked(values, given.shape), entry.dtype, piece)
        if self._settings.kernels.any_nonfinite(out, entry.dtype):
            self._count_nonfinite(out, raw, start)
        self._sink.write(entry.name, entry.dtype.nbytes(start), memoryview(out))
        self._digest(entry.dtype.nbytes(start), out)
        return read, len(out)

    def _copy(self, start: int, stop: int, scratch: Scratch) -> tuple[int, int]:
        raw, read = self._raw(0, start, stop, scratch)
        dtype = self.entry.dtype
        self._sink.write(self.entry.name, dtype.nbytes(start), memoryview(raw[0]))
        self._digest(dtype.nbytes(start), raw[0])
        if dtype.floating:
            with self._lock:
                self._inherited += int(np.count_nonzero(dtypes.nonfinite(raw[0], dtype)))
        return read, len(raw[0])

    def _count_nonfinite(self, out: Any, raw: Sequence[Any], start: int) -> None:
        """Count the NaNs and infinities of a task's output; new ones fail the merge unless they are allowed."""
        bad = dtypes.nonfinite(out, self.entry.dtype)
        theirs = np.zeros(len(bad), dtype=bool)
        for source, stored in zip(self.entry.sources, raw, strict=True):
            theirs |= dtypes.nonfinite(stored, source.tensor.dtype)
        created = bad & ~theirs
        with self._lock:
            self._inherited += int(np.count_nonzero(bad & theirs))
            self._created += int(np.count_nonzero(created))
        if created.any() and not self._settings.allow_nonfinite:
            raise self._new_nonfinite(start + int(np.argmax(created)))

    def _new_nonfinite(self, element: int) -> NumericError:
        entry = self.entry
        place = np.unravel_index(element, entry.shape) if entry.shape else ()
        return NumericError(
            f"tensor '{entry.name}' would get a NaN or infinity where every model has a number",
            where=[
                f"first at index {[int(i) for i in place]}, method {entry.method}, written as {entry.dtype}",
                *(f"{self._sources[source.model].name}  {source.tensor}" for source in entry.sources),
            ],
            fix="choose a wider dtype (float32, bfloat16) or smaller weights, or pass --allow nonfinite",
        )

    def _undefined(self, reason: str) -> NumericError:
        entry = self.entry
        return NumericError(
            f"tensor '{entry.name}': {reason}",
            where=[
                f"method {entry.method}",
                *(f"{self._sources[source.model].name}  {source.tensor}" for source in entry.sources),
            ],
            fix="give this tensor other settings or another method",
        )

    def _digest(self, start: int, data: Any) -> None:
        """Take the digests of the blocks of `data`, bytes from `start` on, if they are taken while writing."""
        if self._digest_inline:
            first = start // digests.BLOCK
            self._digests.update(enumerate(digests.of_blocks(memoryview(data)), first))

    def _digest_written(self, task: int, scratch: Scratch) -> None:
        """Read a part of the written tensor back for its digests: its tasks were not whole blocks."""
        start = task * _READ_BACK
        stop = min(start + _READ_BACK, self.entry.nbytes)
        buffer = scratch.array("written", (stop - start,), np.uint8)
        self._sink.read_back(self.entry.name, start, stop, memoryview(buffer))
        self._digests.update(enumerate(digests.of_blocks(memoryview(buffer)), start // digests.BLOCK))
