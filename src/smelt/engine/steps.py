"""Merges within a recipe, read as if they were checkpoints: what is read of them is computed then, and never written.

Each tensor's reductions come first, once; whoever needs them helps with them. After that any range can be made, by any
thread, as often as it is asked for. The bits are those of a checkpoint that the merge would have written.
"""

from __future__ import annotations

import builtins
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from smelt.engine.backends import HOST, default_tile
from smelt.engine.inputs import Readable
from smelt.engine.memory import Budget
from smelt.engine.reducing import Part
from smelt.engine.tensor import Settings, TensorRun
from smelt.engine.tiles import TASK, Scratch
from smelt.engine.whole import Parts, Sweep, one_by_one, reduced
from smelt.planning.entries import Action, Entry, Input, Plan
from smelt.planning.whole import is_whole
from smelt.specs import TensorSpec
from smelt.storage.checkpoint import Documents, FileInfo, TensorSource, check_range
from smelt.storage.files import Buffer
from smelt.storage.layout import METADATA

_LOOK = 0.1
"""Seconds after which a thread that waits for others looks whether the run is to stop."""


class Stopped(BaseException):
    """The run was stopped while a thread worked for a merge within it."""


class StepSource(Documents):
    """A merge of the recipe as a model: its tensors are the plan's, float32 or what the plan says.

    `sources` are those of the plan's models, `documents` the small files that would stand beside the weights. Raises
    what the merge itself would raise, while it is read.
    """

    def __init__(
        self,
        name: str,
        plan: Plan,
        sources: Sequence[TensorSource],
        *,
        documents: Mapping[str, builtins.bytes],
        allow_nonfinite: bool = False,
    ) -> None:
        self.name = name
        self.plan = plan
        self.sources = tuple(sources)
        self.root: Path | None = None
        self.files: tuple[FileInfo, ...] = ()
        self.metadata: dict[str, str] = dict(METADATA)
        ordered = sorted(plan.entries, key=lambda entry: -entry.dtype.bits)  # as they would lie in a file
        self.tensors = {e.name: TensorSpec(e.name, e.dtype, e.shape) for e in ordered}
        self.allow_nonfinite = allow_nonfinite
        self._entries = {entry.name: entry for entry in plan.entries}
        self._documents = dict(documents)
        self._written: TensorSource | None = None
        self._workshop: Workshop | None = None
        self._readers: list[Readable] = []
        self._settings: Settings | None = None
        self._whole: tuple[str, Parts] | None = None
        self._held: Counter[str] = Counter()
        self._made: dict[str, _Made] = {}
        self._lock = threading.Lock()

    @property
    def computed(self) -> bool:
        """Whether reading computes; not if the merge has been written, and is read from there."""
        return self._written is None

    def read_from(self, written: TensorSource) -> None:
        """Read from now on from the checkpoint that this merge has been written to."""
        self._written = written

    def read_into(self, spec: TensorSpec, start: int, stop: int, buffer: Buffer) -> None:
        """Fill `buffer` with bytes [start, stop) of the tensor; within a run (`Workshop.open`) from any thread."""
        if self._written is not None:
            self._written.read_into(self._written.tensors[spec.name], start, stop, buffer)
            return
        check_range(spec, start, stop, buffer)
        if start == stop:
            return
        entry = self._entries[spec.name]
        if self._workshop is None:  # outside a run
            with Workshop.open([self], _alone(self.plan.seed), Budget(0)):
                self.read_into(spec, start, stop, buffer)
        elif entry.action is not Action.MERGE:
            source = entry.inputs[0]
            self._readers[source.model].read_into(source.tensor, start, stop, buffer)
        else:
            self._of(entry).read_into(start, stop, buffer)

    @property
    def settings(self) -> Settings:
        """What it works with in the present run."""
        assert self._settings is not None
        return self._settings

    def has_whole(self, device: str) -> bool:
        """Whether the reductions over its whole model are done, on this device; they last from run to run."""
        return self._whole is not None and self._whole[0] == device

    def take_whole(self, parts: Parts, device: str) -> None:
        """Take what the reductions over its whole model have given."""
        self._whole = (device, parts)

    def _make_whole(self) -> None:
        """Make them where no run has: with no threads, when the first tensor is read that needs them."""

        def carry_out(sweep: Sweep) -> None:
            one_by_one(sweep, self._readers, settings=self.settings)

        self.take_whole(reduced(self.plan, carry_out), self.settings.backend.name)

    def inputs_of(self, name: str) -> Sequence[Input]:
        """What a tensor is made of, by the places of `sources`."""
        return self._entries[name].sources

    def hold(self, name: str) -> None:
        """Keep what is found out about a tensor until `drop` has been called as often."""
        with self._lock:
            self._held[name] += 1
            if self._held[name] > 1:
                return
        for step, tensor in self._inner(name):
            step.hold(tensor)

    def drop(self, name: str) -> None:
        """Let go of a tensor once."""
        with self._lock:
            self._held[name] -= 1
            if self._held[name]:
                return
            made = self._made.pop(name, None)
        if made is not None:
            made.abandon()
        for step, tensor in self._inner(name):
            step.drop(tensor)

    def _inner(self, name: str) -> Iterator[tuple[StepSource, str]]:
        """The tensors of other merges that a tensor is made of."""
        for source in self._entries[name].sources if self.computed else ():
            step = self.sources[source.model]
            if isinstance(step, StepSource):
                yield step, source.tensor.name

    def _of(self, entry: Entry) -> _Made:
        with self._lock:
            if entry.name not in self._made:
                assert self._workshop is not None
                part = self._part(entry) if is_whole(entry) else None
                self._made[entry.name] = _Made(entry, self._readers, self._workshop, self.settings, part)
            return self._made[entry.name]

    def _part(self, entry: Entry) -> Part:
        if not self.has_whole(self.settings.backend.name):
            self._make_whole()
        assert self._whole is not None
        return self._whole[1][entry.name]

    def enter(self, workshop: Workshop, settings: Settings) -> None:
        """Work within a run from now on."""
        self._settings = replace(settings, seed=self.plan.seed, allow_nonfinite=self.allow_nonfinite)
        self._readers = [workshop.reader(source) for source in self.sources]
        self._workshop = workshop

    def leave(self) -> None:
        """The run is over: forget what was found out in it."""
        for made in self._made.values():
            made.abandon()
        self._made.clear()
        self._held.clear()
        self._workshop = None

    def changed(self) -> list[str]:
        """The weight files of what it was written to that are no longer what they were; inputs are asked themselves."""
        return [] if self._written is None else self._written.changed()

    def close(self) -> None:
        """Nothing is open."""


def _alone(seed: int) -> Settings:
    return Settings(workers=1, tile=default_tile(HOST.name), seed=seed, keep_bytes=0)


class _Made:
    """One tensor of a merge within the recipe: its reductions, shared out among those who need them; then its parts."""

    def __init__(
        self,
        entry: Entry,
        sources: Sequence[Readable],
        workshop: Workshop,
        settings: Settings,
        part: Part | None,
    ) -> None:
        self._workshop = workshop
        self._run = TensorRun(entry, sources, None, settings=settings, budget=workshop.budget, part=part)
        self._size = entry.dtype.bits // 8
        self._unit = max(self._run.geometry.width, 1)
        """Elements between two places where the grain allows a cut; the whole tensor where there is no other."""
        self._wide = self._unit > max(settings.tile, 1)
        """Whether such a piece is more than is mostly asked for at once: then the last ones are remembered."""
        self._pieces: OrderedDict[int, Any] = OrderedDict()
        self._most = settings.workers + 1
        self._one_at_a_time = threading.Lock()
        self._changed = threading.Condition()
        self._begun = self._ready = False
        self._tasks: list[int] = []
        self._left = 0
        self._failure: BaseException | None = None

    def read_into(self, start: int, stop: int, buffer: Buffer) -> None:
        """Fill `buffer` with bytes [start, stop) of the result."""
        with self._workshop.deeper() as scratch:
            self._reduce(scratch)
            step = self._unit * self._size
            out: Any = np.frombuffer(buffer, dtype=np.uint8)
            if self._wide:
                for number in range(start // step, -(-stop // step)):
                    low, high = max(start, number * step), min(stop, (number + 1) * step)
                    piece = self._piece(number, scratch)
                    out[low - start : high - start] = piece[low - number * step : high - number * step]
                return
            first, last = start // step * step, -(-stop // step) * step
            direct = (first, last) == (start, stop) and out.ctypes.data % self._size == 0
            made = out if direct else scratch.array("made", (last - first,), np.uint8)
            self._run.produce(first // self._size, last // self._size, made, scratch)
            if not direct:
                out[:] = made[start - first : stop - first]

    def abandon(self) -> None:
        """Give back what is kept."""
        self._run.abandon()
        self._pieces.clear()

    def _piece(self, number: int, scratch: Scratch) -> Any:
        """The stored bytes of a wide piece, made once while it is needed."""
        with self._one_at_a_time:
            if number not in self._pieces:
                piece = np.empty(self._unit * self._size, dtype=np.uint8)
                self._run.produce(number * self._unit, (number + 1) * self._unit, piece, scratch)
                self._pieces[number] = piece
                if len(self._pieces) > self._most:
                    self._pieces.popitem(last=False)
            return self._pieces[number]

    def _reduce(self, scratch: Scratch) -> None:
        """Come back when the reductions are done; until then take what is left of them."""
        while (task := self._take()) is not None:
            try:
                self._do(task, scratch)
            except BaseException as error:
                with self._changed:
                    self._failure = error
                    self._changed.notify_all()
                raise

    def _take(self) -> int | None:
        """The next task; -1 to begin; None when all is done."""
        with self._changed:
            while True:
                self._workshop.look()
                if self._failure is not None:
                    raise self._failure
                if self._ready:
                    return None
                if not self._begun:
                    self._begun = True
                    return -1
                if self._tasks:
                    return self._tasks.pop()
                self._changed.wait(_LOOK)

    def _do(self, task: int, scratch: Scratch) -> None:
        run = self._run
        if task < 0:
            run.begin(scratch)
        else:
            run.task(task, scratch)
            with self._changed:
                self._left -= 1
                if self._left:
                    return
            run.end_pass(scratch)
        with self._changed:
            self._ready = not run.reducing
            self._left = 0 if self._ready else run.tasks
            self._tasks = list(range(self._left))[::-1]
            self._changed.notify_all()


@dataclass(slots=True)
class _Bench:
    """What one thread has of its own: buffers for each level of merges, what it has read, how many bytes that were."""

    scratches: list[Scratch] = field(default_factory=list)
    level: int = 0
    read: int = 0
    held: int = 0
    remembered: OrderedDict[tuple[int, str, int, int], Any] = field(default_factory=OrderedDict)


class Workshop:
    """What a run lends to the merges within it, and how it reads: a range that several of them need, once.

    Each thread remembers the last ranges that it read of those sources that more than one merge uses. As they are cut
    alike where the methods allow it, a chain of merges reads such a source once.
    """

    def __init__(self, sources: Sequence[TensorSource], settings: Settings, budget: Budget) -> None:
        self.budget = budget
        self._settings = settings
        self._steps = steps_among(sources)
        uses = Counter(
            id(source) for group in (sources, *(step.sources for step in self._steps)) for source in {*group}
        )
        self._shared = {key for key, count in uses.items() if count > 1}
        self._limit = len(self._shared) * remembered_bytes(settings.tile)
        self._local = threading.local()
        self._benches: list[_Bench] = []
        self._lock = threading.Lock()
        self._stopped = False

    @classmethod
    @contextmanager
    def open(cls, sources: Sequence[TensorSource], settings: Settings, budget: Budget) -> Iterator[Workshop]:
        """A workshop for all merges that `sources` are or are made of, until the context ends."""
        workshop = cls(sources, settings, budget)
        try:
            for step in workshop._steps:
                step.enter(workshop, settings)
            yield workshop
        finally:
            for step in workshop._steps:
                step.leave()

    @property
    def bytes_read(self) -> int:
        """Bytes that were read of stored models."""
        return sum(bench.read for bench in self._benches)

    def reader(self, source: TensorSource) -> Readable:
        """How to read a source within the run."""
        computed = isinstance(source, StepSource) and source.computed
        return _Reader(source, self, shared=id(source) in self._shared, counted=not computed)

    def hold(self, entry: Entry, sources: Sequence[TensorSource]) -> None:
        """Before a tensor is worked on: what is found out about its inputs is kept."""
        for source in entry.sources:
            step = sources[source.model]
            if isinstance(step, StepSource):
                step.hold(source.tensor.name)

    def drop(self, entry: Entry, sources: Sequence[TensorSource]) -> None:
        """A tensor is done."""
        for source in entry.sources:
            step = sources[source.model]
            if isinstance(step, StepSource):
                step.drop(source.tensor.name)

    def stop(self) -> None:
        """Make all threads raise Stopped as soon as they look."""
        self._stopped = True

    def go_on(self) -> None:
        """Let threads work again: those of a loop that came to its end were told to stop."""
        self._stopped = False

    def look(self) -> None:
        """Raise Stopped if the run is to stop."""
        if self._stopped:
            raise Stopped

    def bench(self) -> _Bench:
        """The calling thread's own."""
        try:
            found: _Bench = self._local.bench
        except AttributeError:
            found = self._local.bench = _Bench()
            with self._lock:
                self._benches.append(found)
        return found

    @contextmanager
    def deeper(self) -> Iterator[Scratch]:
        """Buffers for the next level of merges: those of the levels above are in use."""
        bench = self.bench()
        if bench.level == len(bench.scratches):
            bench.scratches.append(Scratch(self._settings.backend.empty))
        bench.level += 1
        try:
            yield bench.scratches[bench.level - 1]
        finally:
            bench.level -= 1

    def remember(self, bench: _Bench, key: tuple[int, str, int, int], data: Buffer) -> None:
        """Keep a copy of what was read, and forget the oldest beyond the limit."""
        size = key[3] - key[2]
        if size > self._limit:
            return
        bench.remembered[key] = np.frombuffer(data, dtype=np.uint8).copy()
        bench.held += size
        while bench.held > self._limit:
            (_, _, start, stop), _ = bench.remembered.popitem(last=False)
            bench.held -= stop - start


class _Reader:
    """A source as it is read within a run."""

    def __init__(self, source: TensorSource, workshop: Workshop, *, shared: bool, counted: bool) -> None:
        self.name = source.name
        self._source = source
        self._workshop = workshop
        self._shared = shared
        self._counted = counted

    def read_into(self, spec: TensorSpec, start: int, stop: int, buffer: Buffer) -> None:
        """As the source's; what this thread has read a moment ago is not read again."""
        bench = self._workshop.bench()
        key = (id(self._source), spec.name, start, stop)
        if (known := bench.remembered.get(key)) is not None:
            bench.remembered.move_to_end(key)
            np.frombuffer(buffer, dtype=np.uint8)[:] = known
            return
        self._source.read_into(spec, start, stop, buffer)
        if self._counted:
            bench.read += stop - start
        if self._shared and stop > start:
            self._workshop.remember(bench, key, buffer)


def remembered_bytes(tile: int) -> int:
    """What a thread may remember of each source that several merges use: as much as two tasks of float32."""
    return 2 * 4 * (TASK + tile)


def steps_among(sources: Iterable[TensorSource]) -> list[StepSource]:
    """All merges that sources are or are made of, each once."""
    found: dict[int, StepSource] = {}
    left = list(sources)
    while left:
        source = left.pop(0)
        if isinstance(source, StepSource) and id(source) not in found:
            found[id(source)] = source
            left += source.sources if source.computed else ()
    return list(found.values())
