"""One output tensor on its way: its passes in order, its reductions, its tiles.

A tensor's passes run one after the other: those of its reductions, the one that writes, and where tasks are not whole
digest blocks one that reads back. Within a pass its tasks are independent of each other. Whoever finishes the last task
of a pass ends the pass. Results of reductions are folded in the order of the blocks.
"""

from __future__ import annotations

import contextlib
import enum
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from smelt import dtypes
from smelt.engine.backends import HOST, Backend
from smelt.engine.given import Given
from smelt.engine.inputs import Inputs, Readable, Stored
from smelt.engine.kernels import DEFINITIONS, Kernels
from smelt.engine.memory import Budget, TensorMemory
from smelt.engine.reducing import Part, Running, bind, startable
from smelt.engine.rng import key
from smelt.engine.sharing import Group, Share
from smelt.engine.tiles import STREAMED_TASK, TASK, Geometry, Scratch
from smelt.errors import NumericError, RecipeError
from smelt.methods.api import Reduction, Undefined
from smelt.methods.loading import answerable, definition_of
from smelt.methods.reducers import described
from smelt.methods.selection import KthLargest
from smelt.planning.entries import Entry
from smelt.specs import Grain
from smelt.storage import digests

_SAMPLE = (16, 2048)
"""Chunks of a sample, and elements of each."""
_WORTH_SAMPLE = 1 << 20
"""Elements of a tensor from which on a sample is taken."""
_SMALL = 1 << 16
"""Elements of a tensor up to which all keys are sorted: that is quicker than two histograms of 64 Ki buckets."""
_NOWHERE = np.zeros(0, dtype=np.intp)
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
    backend: Backend = HOST


@dataclass(frozen=True, slots=True)
class TensorResult:
    """What is known of a written tensor: its digest, and how many of its numbers are NaN or infinite.

    `inherited` of them stand where an input has one too, `created` where all inputs are finite.
    """

    name: str
    digest: str
    inherited: int = 0
    created: int = 0


class Stage(enum.Enum):
    """What the tasks of the present pass do."""

    REDUCE = enum.auto()
    WRITE = enum.auto()
    READ_BACK = enum.auto()


class TensorRun:
    """The work of one entry that is merged. `task` may be called from any thread, `begin` and `end_pass` by one.

    Without a sink nothing is written: when the reductions are done, any thread may ask `produce` for any part. In a
    `group` it is one of several variants of the tensor, which read together and share what reductions they can. With a
    `part` its reductions go over the whole model, and it makes none of its own.
    """

    def __init__(
        self,
        entry: Entry,
        sources: Sequence[Readable],
        sink: Sink | None,
        *,
        settings: Settings,
        budget: Budget,
        group: Group | None = None,
        part: Part | None = None,
    ) -> None:
        self.entry = entry
        self._sources = sources
        self._sink = sink
        self._settings = settings
        self._memory = TensorMemory(budget)
        self._lock = threading.Lock()
        self._digests: dict[int, bytes] = {}
        self._inherited = self._created = 0
        self._method: Any = bind(entry)
        self._placed: Any = settings.backend.method(self._method)
        self.share = None if group is None else Share(group, entry, self._method, self._is_fused)
        self._results = dict.fromkeys(reduction.name for reduction in self._method.info.reductions)
        self._streams = [key(settings.seed, entry.name, source.stream) for source in entry.inputs]
        inputs = [(sources[source.model], source.tensor) for source in entry.sources]
        self._inputs = Inputs(inputs) if group is None else group.inputs
        self._tile_kernel = settings.kernels.functions.get((entry.method, "tile"))
        streams = self._tile_kernel is not None and self._inputs.placed and group is None
        task = STREAMED_TASK if streams and entry.size > STREAMED_TASK else TASK
        self.geometry = Geometry.of(entry.shape, self._method.grain, tile=settings.tile, task=task)
        self._waiting = list(self._method.active()) if part is None else []
        self._running: list[Running] = [] if part is None else list(part.running)
        self._adding = bool(self._running)
        self._results |= {} if part is None else part.results
        self.bytes_sampled = 0
        self._first_pass = True
        self._multiple = bool(self._waiting)
        aligned = entry.dtype.nbytes(self.geometry.task * 8) % (8 * digests.BLOCK) == 0
        self._digest_inline = aligned or self.geometry.tasks == 1
        self._stage = Stage.WRITE

    @property
    def tasks(self) -> int:
        """How many tasks the present pass has."""
        return -(-self.entry.nbytes // _READ_BACK) if self._stage is Stage.READ_BACK else self.geometry.tasks

    @property
    def bytes_reread(self) -> int:
        """What the present pass reads once more, because the input is not kept."""
        again = not self._first_pass and self._inputs.kept is None and self._stage is not Stage.READ_BACK
        return self.entry.input_bytes - self._inputs.bytes_kept if again else 0

    @property
    def alone(self) -> bool:
        """Whether one worker does all of it."""
        return self.geometry.tasks <= 1 and self._sink is not None

    @property
    def reducing(self) -> bool:
        """Whether the present pass is one of reductions."""
        return self._stage is Stage.REDUCE

    @property
    def multiple(self) -> bool:
        """Whether it takes more than one pass."""
        return self._multiple

    def begin(self, scratch: Scratch) -> None:
        """Prepare the first pass."""
        if self._multiple and self.share is None:
            self._keep_inputs(scratch)
        self._begin_pass(scratch)

    def task(self, task: int, scratch: Scratch) -> tuple[int, int]:
        """Do one task of the present pass; gives the bytes read and the bytes written."""
        if self._stage is Stage.READ_BACK:
            self._digest_written(task, scratch)
            return 0, 0
        start, stop = self.geometry.span(task)
        if self._stage is Stage.REDUCE:
            return self._reduce(start, stop, scratch), 0
        return self._write(start, stop, scratch)

    def end_pass(self, scratch: Scratch) -> bool:
        """End the present pass and prepare the next; False when there is none."""
        self._first_pass = False
        if self._adding:
            self.abandon()
            return False
        if self._stage is Stage.REDUCE:
            self._close_reductions()
            self._begin_pass(scratch)
            return True
        if self._stage is Stage.WRITE and not self._digest_inline:
            self._stage = Stage.READ_BACK
            return True
        self.abandon()
        return False

    def abandon(self) -> None:
        """Give back what is kept."""
        if self.share is None:
            self._inputs.kept = None
        self._memory.release()

    def totals(self) -> list[Any]:
        """What the tensor adds to the reductions over its model, when their pass is done."""
        return [running.total() for running in self._running]

    def result(self) -> TensorResult:
        blocks = [self._digests[block] for block in sorted(self._digests)]
        return TensorResult(self.entry.name, digests.joined(blocks), self._inherited, self._created)

    # --- passes -------------------------------------------------------------------------------------------------

    def _keep_inputs(self, scratch: Scratch) -> None:
        """Find room for the inputs: what kernels read is kept by tasks, as many as there is room for."""
        if self.alone or self._tile_kernel is None or not self._inputs.placed:
            self._inputs.keep(self._memory, scratch if self.alone else None)
        elif self._sink is not None:
            self._inputs.keep_tasks(self._memory, self.geometry.task)

    def _begin_pass(self, scratch: Scratch) -> None:
        for running in self._running:
            running.reset()
        for reduction in self._startable():
            running = Running(reduction, reduction.reducer(scope=reduction.scope, size=self.geometry.size))
            if isinstance(running.reducer, KthLargest):
                self._guess(running, scratch)
            if self.share is not None:
                self.share.began(running)
            self._running.append(running)
        others = self.share is not None and bool(self.share.pending)
        self._stage = Stage.REDUCE if self._running or others else Stage.WRITE
        if self._stage is Stage.WRITE:
            self._derive()

    def _startable(self) -> list[Reduction]:
        """Take the reductions that may begin now from those that wait; some of them another variant may have made."""
        going = {running.reduction.name for running in self._running}
        own: list[Reduction] = []
        while True:
            pending = set() if self.share is None else self.share.pending
            found = startable(self._waiting, going | pending)
            for reduction in found:
                self._waiting.remove(reduction)
            own += found if self.share is None else self.share.begin(found, self._results)
            if not found:
                return own
            going |= {reduction.name for reduction in own}

    def _is_fused(self, names: tuple[str, ...]) -> bool:
        """Whether one kernel makes these reductions."""
        return len(names) > 1 and (self.entry.method, *names) in self._settings.kernels.functions

    def _seen(self, method: Any, *running: Running) -> Any:
        """The method as these reductions may see it."""
        return method if self.share is None else self.share.view(method, [one.reduction for one in running])

    def _close_reductions(self) -> None:
        with np.errstate(all="ignore"):
            for running in self._running:
                running.reducer.close(running.total())
                if running.reducer.done:
                    self._results[running.reduction.name] = running.reducer.finish()
                    if self.share is not None:
                        self.share.ended(running, self._results[running.reduction.name])
        if self.share is not None:
            self.share.collect(self._results)
        self._running = [running for running in self._running if not running.reducer.done]

    def _guess(self, running: Running, scratch: Scratch) -> None:
        """Show the reducer a sample of the tensor: chunks at even distances; of a small one it is to keep all."""
        chunks, length = _SAMPLE
        reduction = running.reduction
        if self._settings.backend.kernels is not None:  # a device counts digits: it has no pass around a guess
            return
        if self.geometry.size <= _SMALL:
            running.reducer.keeps_all = reduction.scope == "tensor"
            return
        if self.geometry.size < _WORTH_SAMPLE or self.geometry.grain is not Grain.ELEMENT:
            return
        if "uniform" in reduction.arguments:  # a sample is not a range of the random stream
            return
        stored, read = self._inputs.sample(chunks, length, self.geometry.size, scratch)
        self.bytes_sampled += read
        given = self._tile_given(stored, 0, chunks * length, scratch)
        with np.errstate(all="ignore"):
            seen = self._seen(self._method, running)
            numbers, counts = self._call(reduction.function, reduction.arguments, given, method=seen)
            running.reducer.guess((np.asarray(numbers).reshape(-1, chunks, length), counts))

    def _derive(self) -> None:
        with np.errstate(all="ignore"):
            for derived in self._method.info.derived:
                self._results[derived.name] = self._call(
                    derived.function, derived.arguments, self._results, method=self._method
                )

    def _call(
        self, function: Callable[..., Any], names: Sequence[str], given: Mapping[str, Any], *, method: Any
    ) -> Any:
        """Call a function of the method; what it raises is told with the line of the method's file."""
        try:
            with answerable(self._method.info, at=f"at tensor '{self.entry.name}'"):
                return function(method, *(given[name] for name in names))
        except Undefined as error:
            raise self._undefined(str(error)) from error

    def _checked(self, values: Any, shape: tuple[int, ...]) -> Any:
        """A tile's result as a flat float32 array; it must have the shape of the tile."""
        flat = self._settings.backend.flat(values, shape)
        if flat is None:
            raise self._misused(type(self._method).tile, described(values), f"return an array, float32 {list(shape)}")
        return flat

    def _misused(self, function: Callable[..., Any], got: str, rule: str) -> RecipeError:
        """A function of the method that gives something else than the contract asks for."""
        return RecipeError(
            f"method {self.entry.method}: {function.__name__} gave {got}, and is to {rule}",
            where=[definition_of(function), f"at tensor '{self.entry.name}'"],
            fix="correct the method",
        )

    # --- tiles --------------------------------------------------------------------------------------------------

    def _read(self, low: int, high: int, scratch: Scratch) -> tuple[Stored, int]:
        return self._inputs.read(low, high, scratch, again=not self._first_pass)

    def _by_kernel(
        self, low: int, high: int, scratch: Scratch, work: Callable[[Given], Any]
    ) -> tuple[Any, Stored, int]:
        """What a kernel's `work` gives for elements [low, high); what it was given, all read; bytes read for it.

        It reads by itself where it can.
        """
        keep = self._stage is Stage.REDUCE
        if (found := self._inputs.unread(low, high, scratch, again=not self._first_pass, keep=keep)) is not None:
            with contextlib.suppress(OSError):
                if (result := work(self._tile_given(found[0], low, high, scratch))) is not None:
                    return result, *found
                self._inputs.drop(low)
                return None, *found
            self._inputs.drop(low)
        stored, read = self._read(low, high, scratch)
        return work(self._tile_given(stored, low, high, scratch)), stored, read

    def _tile_given(self, stored: Stored, low: int, high: int, scratch: Scratch) -> Given:
        """What the method's functions are given for elements [low, high) of the tensor."""
        given: Given = self._settings.backend.given(
            stored,
            has_base=self.entry.base is not None,
            start=low,
            count=high - low,
            geometry=self.geometry,
            streams=self._streams,
            results=self._results,
            scratch=scratch,
            kernels=self._settings.kernels,
            memory=self._memory,
        )
        return given

    def _tiles(self, stored: Stored, start: int, stop: int, scratch: Scratch) -> Iterator[tuple[int, int, Given]]:
        """(low, high, what is given) for the tiles of a task, whose stored bytes these are."""
        for low, high in self.geometry.tile_spans(start, stop):
            pieces = [
                (data[dtype.bits // 8 * (low - start) : dtype.bits // 8 * (high - start)], dtype)
                for data, dtype in stored.buffers
            ]
            yield low, high, self._tile_given(Stored(pieces), low, high, scratch)

    def _reduce(self, start: int, stop: int, scratch: Scratch) -> int:
        if not self._running:  # another variant is at the reduction that this one waits for
            return 0
        kernels = self._settings.kernels
        with np.errstate(all="ignore"):
            if (read := self._reduce_by_kernel(start, stop, scratch)) is not None:
                return read
            stored, read = self._read(start, stop, scratch)
            left = (
                self._left_by_kernels(self._tile_given(stored, start, stop, scratch))
                if kernels.functions
                else self._running
            )
            for low, high, given in self._tiles(stored, start, stop, scratch) if left else ():
                for running in left:
                    reduction = running.reduction
                    seen = self._seen(self._placed, running)
                    values = self._call(reduction.function, reduction.arguments, given, method=seen)
                    if problem := running.reducer.refuses(values, len(given.shape) + 1):
                        raise self._misused(reduction.function, *problem)
                    running.add(values, low, high, self.geometry, kernel=kernels.partials.get(type(running.reducer)))
        return read

    def _reduce_by_kernel(self, start: int, stop: int, scratch: Scratch) -> int | None:
        """Let one kernel make the partial results of all reductions; gives the bytes read, or None if there is none."""
        names = [running.reduction.name for running in self._running]
        kernel = self._settings.kernels.functions.get((self.entry.method, *names))
        if kernel is None:
            return None
        reducers = [running.reducer for running in self._running]
        seen = self._seen(self._method, *self._running)
        partials, _, read = self._by_kernel(start, stop, scratch, lambda given: kernel(seen, given, *reducers))
        if partials is None:
            return None
        for running, part in zip(self._running, partials if len(names) > 1 else [partials], strict=True):
            running.take(part, start // self.geometry.block)
        return read

    def _left_by_kernels(self, given: Given) -> list[Running]:
        """Let kernels make partial results of single reductions; gives those that have none."""
        left = []
        for running in self._running:
            kernel = self._settings.kernels.functions.get((self.entry.method, running.reduction.name))
            seen = self._seen(self._method, running)
            partials = kernel(seen, given, running.reducer) if kernel is not None else None
            if partials is None:
                left.append(running)
            else:
                running.take(partials, given.start // self.geometry.block)
        return left

    def produce(self, start: int, stop: int, out: Any, scratch: Scratch) -> int:
        """Put the stored bytes of elements [start, stop) of the result into `out`; gives the bytes read for it.

        Only after the reductions; both ends must lie where the method's grain allows a cut.
        """
        size = self.entry.dtype.bits // 8
        with np.errstate(all="ignore"):
            if (read := self._write_by_kernel(start, stop, out, scratch)) is not None:
                return read
            stored, read = self._read(start, stop, scratch)
            for low, high, given in self._tiles(stored, start, stop, scratch):
                piece = out[(low - start) * size : (high - start) * size]
                arguments = self._method.info.tile_arguments
                values = self._call(type(self._method).tile, arguments, given, method=self._placed)
                cut = self._encode(self._checked(values, given.shape), piece)
                if cut is not None:
                    self._count_nonfinite(piece, given.stored, low, cut)
        return read

    def _write(self, start: int, stop: int, scratch: Scratch) -> tuple[int, int]:
        assert self._sink is not None
        size = self.entry.dtype.bits // 8
        out = scratch.array("out", ((stop - start) * size,), np.uint8)
        read = self.produce(start, stop, out, scratch)
        self._inputs.drop(start)
        self._sink.write(self.entry.name, start * size, out)
        self._digest(start * size, out)
        return read, len(out)

    def _write_by_kernel(self, start: int, stop: int, out: Any, scratch: Scratch) -> int | None:
        """Let a kernel write a whole task to `out`; gives the bytes read, or None if there is none."""
        kernel = self._tile_kernel
        # kernels count on whole blocks before the range; what is read of a merge within a recipe may begin anywhere
        if kernel is None or start % self.geometry.block:
            return None
        kind = self._settings.kernels.elements.get(self.entry.dtype.code)
        values = scratch.array("values", (stop - start,), np.float32) if kind is None else out.view(kind)
        found, stored, read = self._by_kernel(start, stop, scratch, lambda given: kernel(self._method, given, values))
        if found is None:
            return None
        cut = self._encode(values, out) if kind is None else _NOWHERE if found else None
        if cut is not None:
            if stored.files is not None:
                stored, _ = self._read(start, stop, scratch)
            self._count_nonfinite(out, stored, start, cut)
        return read

    def _encode(self, values: Any, out: Any) -> Any:
        """Encode numbers into `out`.

        Gives None where all are finite; else the places (there may be none) where the type cut a number.
        """
        kernels, dtype = self._settings.kernels, self.entry.dtype
        kernels.encode(values, dtype, out)
        cut = dtypes.saturated(self._settings.backend.to_host(values) if dtype.saturates else values, dtype)
        return cut if cut.size or kernels.any_nonfinite(out, dtype) else None

    def _count_nonfinite(self, out: Any, stored: Stored, start: int, cut: Any) -> None:
        """Count the NaNs and infinities of a tile's output; new ones fail the merge unless they are allowed.

        So do numbers that the output's type had to cut to its range (their places are `cut`): in another type each of
        them would be an infinity.
        """
        bad = dtypes.nonfinite(out, self.entry.dtype)
        bad[cut] = True
        theirs = np.zeros(len(bad), dtype=bool)
        for data, dtype in stored.buffers:
            theirs |= dtypes.nonfinite(data, dtype)
        created = bad & ~theirs
        with self._lock:
            self._inherited += int(np.count_nonzero(bad & theirs))
            self._created += int(np.count_nonzero(created))
        if created.any() and not self._settings.allow_nonfinite:
            raise self._new_nonfinite(start + int(np.argmax(created)))

    def _new_nonfinite(self, element: int) -> NumericError:
        entry = self.entry
        place = np.unravel_index(element, entry.shape) if entry.shape else ()
        beyond = f" or a number beyond ±{entry.dtype.finite_max:g}" if entry.dtype.saturates else " or infinity"
        return NumericError(
            f"tensor '{entry.name}' would get a NaN{beyond} where every model has a number",
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
        assert self._sink is not None
        self._sink.read_back(self.entry.name, start, stop, memoryview(buffer))
        self._digests.update(enumerate(digests.of_blocks(memoryview(buffer)), start // digests.BLOCK))
