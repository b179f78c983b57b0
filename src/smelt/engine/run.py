"""The loop: for tensor, for pass, for task; where reductions go over the whole model, one such loop before for each.

Workers take the earliest task there is; where none is ready, one opens the next tensor of the plan. A tensor of a
single task stays with its worker through all its passes. So big tensors are worked on by all, small ones each by one,
and only a few are open at a time.
"""

from __future__ import annotations

import heapq
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import array_api_compat.numpy  # noqa: F401 - array_namespace would import it in some worker, at a bad moment
import numpy as np

from smelt.engine.backends import HOST, Backend, default_tile, default_workers
from smelt.engine.blas import single_threaded
from smelt.engine.copying import CopyRun, Known
from smelt.engine.inputs import Readable
from smelt.engine.kernels import DEFINITIONS, Kernels, fused
from smelt.engine.memory import Budget
from smelt.engine.reducing import bind
from smelt.engine.steps import StepSource, Stopped, Workshop, steps_among
from smelt.engine.tensor import Settings, Sink, TensorResult, TensorRun
from smelt.engine.tiles import Scratch
from smelt.engine.whole import Parts, Shown, Sweep, reduced
from smelt.errors import InputError, SmeltError, StorageError, raise_all
from smelt.methods import api
from smelt.planning.entries import Action, Entry, Input, Plan
from smelt.storage.checkpoint import TensorSource
from smelt.storage.signals import deferred, held

_log = logging.getLogger(__name__)
KEEP_BYTES = 96 << 20
"""Stored bytes that multi-pass tensors may keep in memory, all together."""

WORTH_KERNELS = 64 << 20
"""Input bytes of merged tensors from which on loading the compiled kernels (half a second) is repaid."""
_OPEN = -1
"""In place of a task's number: open the tensor."""
_PATIENCE = 1.0
"""Seconds after which a worker that waits for another looks whether all are still well."""
_COMPARE = 1 << 20
"""Bytes compared at a time."""

Progress = Callable[[int, int], None]
"""Called now and then with (bytes done, bytes in all), from the thread that called `run`."""

OnTensor = Callable[[TensorResult], None]
"""Called with the result of each tensor when all its bytes are with the sink, from the worker that wrote the last."""


class Unit(Protocol):
    """What workers carry out, in passes of tasks, as `TensorRun` has them."""

    entry: Entry

    @property
    def tasks(self) -> int: ...

    @property
    def alone(self) -> bool: ...

    @property
    def bytes_reread(self) -> int: ...

    @property
    def bytes_sampled(self) -> int: ...

    def begin(self, scratch: Scratch) -> None: ...

    def task(self, task: int, scratch: Scratch) -> tuple[int, int]: ...

    def end_pass(self, scratch: Scratch) -> bool: ...

    def abandon(self) -> None: ...

    def result(self) -> TensorResult: ...


@dataclass(frozen=True, slots=True)
class Units:
    """Work in place of the plan's entries: `make` gives that of an entry by its number, `moved` counts all bytes."""

    make: Callable[[int, Sequence[Readable], Settings, Budget], Unit]
    moved: int


@dataclass(frozen=True, slots=True)
class RunResult:
    """What a run gives: one result per entry, in plan order, how long it took, and the bytes that it moved.

    Of merges within the recipe, what they read of stored models is counted, and not what they gave.
    """

    tensors: tuple[TensorResult, ...]
    seconds: float
    bytes_read: int
    bytes_written: int


def run(
    plan: Plan,
    sources: Sequence[TensorSource],
    sink: Sink,
    *,
    workers: int | None = None,
    tile: int | None = None,
    allow_nonfinite: bool = False,
    kernels: bool | None = None,
    known: Mapping[str, Known] | None = None,
    backend: Backend = HOST,
    keep_bytes: int | None = None,
    done: Mapping[str, TensorResult] | None = None,
    on_tensor: OnTensor | None = None,
    units: Units | None = None,
    progress: Progress | None = None,
    whole: Parts | None = None,
) -> RunResult:
    """Carry out a plan: read `sources` (one per model of the plan), write every tensor into `sink`.

    The result does not depend on `workers` (threads), `tile` (elements a method sees at once) or `kernels` (whether
    compiled ones are used; None: if the merge is large enough to repay loading them), or on `keep_bytes` (stored bytes
    that tensors may keep between their passes). `backend` is where methods work. Copied tensors that are in `known` are
    moved unread. Sources may be merges of their own (`engine.steps`), which work with the same settings. `done` are
    results of tensors that are in the sink already; `on_tensor` is told of each other one when it is written. `units`
    stand in for what is done for the plan's entries (`engine.variants`). `whole` are the results of reductions over the
    whole model (`whole_results`), which are worked out first if they are not given. Raises the first error of any
    worker; KeyboardInterrupt stops the workers and is passed on.
    """
    plans = _plans(plan, sources)
    if backend.kernels is not None:
        chosen = backend.kernels
    else:
        chosen = _kernels() if kernels or (kernels is None and worth_kernels(*plans)) else DEFINITIONS
    settings = Settings(
        workers=workers or default_workers(backend.name),
        tile=tile or default_tile(backend.name),
        seed=plan.seed,
        keep_bytes=KEEP_BYTES if keep_bytes is None else keep_bytes,
        allow_nonfinite=allow_nonfinite,
        kernels=chosen,
        backend=backend,
    )
    started = time.perf_counter()
    with _opened(plan, sources, settings) as (workshop, budget):
        shown = Shown(progress, plan, done or {}, reduced=whole is not None)
        parts = _whole(plan, sources, settings, budget, workshop, done=done or {}, shown=shown, given=whole)
        crew = _Crew(
            plan,
            sources,
            sink,
            settings,
            known=known or {},
            done=done or {},
            on_tensor=on_tensor,
            budget=budget,
            workshop=workshop,
            parts=parts,
            units=units,
        )
        crew.work(shown.of_loop())
    read = shown.read + crew.read if workshop is None else workshop.bytes_read
    return RunResult(tuple(crew.results()), time.perf_counter() - started, read, crew.written)


def whole_results(plan: Plan, sources: Sequence[TensorSource]) -> Parts:
    """What reductions over the whole model give for a plan, by the array definitions."""
    settings = Settings(workers=default_workers(), tile=default_tile(HOST.name), seed=plan.seed, keep_bytes=KEEP_BYTES)
    with _opened(plan, sources, settings) as (workshop, budget):
        return _whole(plan, sources, settings, budget, workshop, done={}, shown=Shown(None, plan, {}))


@contextmanager
def _opened(
    plan: Plan, sources: Sequence[TensorSource], settings: Settings
) -> Iterator[tuple[Workshop | None, Budget]]:
    """What is shared by all that a run does, until the context ends."""
    budget = Budget(settings.keep_bytes, settings.backend.empty)
    with ExitStack() as stack:
        if uses_linear_algebra(*_plans(plan, sources)):
            stack.enter_context(single_threaded())
        within = any(isinstance(source, StepSource) for source in sources)
        yield stack.enter_context(Workshop.open(sources, settings, budget)) if within else None, budget


def _plans(plan: Plan, sources: Sequence[TensorSource]) -> list[Plan]:
    """The plan, and those of the merges within that are computed."""
    return [plan, *(step.plan for step in steps_among(sources) if step.computed)]


def _whole(
    plan: Plan,
    sources: Sequence[TensorSource],
    settings: Settings,
    budget: Budget,
    workshop: Workshop | None,
    *,
    done: Mapping[str, TensorResult],
    shown: Shown,
    given: Parts | None = None,
) -> Parts:
    """Make the reductions over whole models: first those of merges within, then the plan's own if none are given."""
    for source in sources:
        if isinstance(source, StepSource) and source.computed and not source.has_whole(settings.backend.name):
            its = source.settings
            found = _whole(source.plan, source.sources, its, budget, workshop, done={}, shown=shown)
            source.take_whole(found, settings.backend.name)

    def carry_out(sweep: Sweep) -> None:
        crew = _Crew(
            replace(plan, entries=sweep.entries),
            sources,
            None,
            settings,
            known={},
            done={},
            on_tensor=None,
            budget=budget,
            workshop=workshop,
            parts={},
            sweep=sweep,
        )
        crew.work(shown.of_loop())
        shown.read += crew.read
        if workshop is not None:
            workshop.go_on()

    return reduced(plan, carry_out, done=done) if given is None else given


def worth_kernels(*plans: Plan) -> bool:
    """Whether a merge is large enough to repay loading the compiled kernels; copies have no use for them."""
    merged = sum(entry.input_bytes for one in plans for entry in one.entries if entry.action is Action.MERGE)
    return merged >= WORTH_KERNELS


def uses_linear_algebra(*plans: Plan) -> bool:
    """Whether a method of these plans sees whole tensors, and so may call BLAS."""
    entries = [entry for plan in plans for entry in plan.entries]
    able = {name for name in {entry.method for entry in entries} if _may_see_tensors(name)}
    merged = (entry for entry in entries if entry.method in able and entry.action is Action.MERGE)
    return any(bind(entry).grain is api.Grain.TENSOR for entry in merged)


def _may_see_tensors(method: str) -> bool:
    """Methods that say nothing of their grain have ELEMENT: no need to bind each of their entries."""
    return api.get(method).type.grain is not api.Method.grain


def _kernels() -> Kernels:
    """The compiled kernels; where there is no memory to load them, the definitions, which give the same."""
    try:
        with deferred():
            return fused()
    except (MemoryError, OSError, SystemError, ImportError) as error:
        _log.warning("the compiled kernels cannot be loaded, so this takes longer: %s", error)
        return DEFINITIONS


class _Crew:
    """The workers and what they share: the heap of ready tasks, and how many of each open pass are left."""

    def __init__(
        self,
        plan: Plan,
        sources: Sequence[TensorSource],
        sink: Sink | None,
        settings: Settings,
        *,
        known: Mapping[str, Known],
        done: Mapping[str, TensorResult],
        on_tensor: OnTensor | None,
        budget: Budget,
        workshop: Workshop | None,
        parts: Parts,
        sweep: Sweep | None = None,
        units: Units | None = None,
    ) -> None:
        self._plan = plan
        self._units = units
        self._parts = parts
        self._sweep = sweep
        self._known = known
        self._sources = sources
        self._workshop = workshop
        self._readers: list[Readable] = list(sources if workshop is None else map(workshop.reader, sources))
        self._sink = sink
        self._settings = settings
        self._budget = budget
        self._ready: list[tuple[int, int, int]] = []
        self._open: dict[int, Unit] = {}
        self._left: dict[int, int] = {}
        self._next = 0
        self._opening = 0
        self._results = [done.get(entry.name) for entry in plan.entries]
        self._on_tensor = on_tensor
        self._changed = threading.Condition()
        self._failures: dict[int, BaseException] = {}
        self._stop = False
        self._lost = False
        written = 0 if sink is None else 1
        left = [entry for entry in plan.entries if entry.name not in done]
        self._expected = sum(entry.input_bytes + written * entry.nbytes for entry in left)
        if units is not None:
            self._expected = units.moved
        self.read = self.written = 0

    def work(self, progress: Progress | None) -> None:
        threads = [
            threading.Thread(target=self._worker, name=f"smelt-{i}", daemon=True) for i in range(self._settings.workers)
        ]
        try:
            for thread in threads:
                _start(thread)
            while any(thread.is_alive() for thread in threads):
                threads[0].join(0.05) if threads[0].is_alive() else time.sleep(0.005)
                if progress is not None:
                    progress(self.read + self.written, self._expected)
        finally:
            with held():  # no thread may outlive this call: its files will be closed
                with self._changed:
                    self._stop_all()
                for thread in threads:
                    if thread.ident is not None:
                        thread.join()
                for tensor in self._open.values():
                    tensor.abandon()
        if self._failures:  # of several, that of the earliest tensor, whichever thread was quicker
            raise self._failures[min(self._failures)]
        if self._lost:
            raise _no_memory()
        if progress is not None:
            progress(self._expected, self._expected)

    def results(self) -> list[TensorResult]:
        return [result for result in self._results if result is not None]

    def _worker(self) -> None:
        scratch = Scratch(self._settings.backend.empty)
        index = -1
        try:
            with self._settings.backend.working():
                while (taken := self._take()) is not None:
                    index, number, task = taken
                    if task == _OPEN:
                        self._begin(index, scratch)
                        continue
                    read, written = self._open[index].task(task, scratch)
                    self._done(index, number, read, written, scratch)
        except Stopped:
            return
        except BaseException as error:
            try:
                with self._changed:
                    self._fail(index, error)
            except BaseException:  # no memory even to say so
                self._lost = self._stop = True

    def _stop_all(self) -> None:
        """Have every worker stop after the task that it is at; the lock is held."""
        self._stop = True
        if self._workshop is not None:
            self._workshop.stop()
        self._changed.notify_all()

    def _fail(self, index: int, error: BaseException) -> None:
        """Remember what went wrong with a tensor, and stop; the lock is held."""
        self._failures.setdefault(index, self._placed(error))
        self._stop_all()

    def _placed(self, error: BaseException) -> BaseException:
        if isinstance(error, MemoryError):
            return _no_memory()
        return self._settings.backend.explained(error) or error

    def _take(self) -> tuple[int, int, int] | None:
        with self._changed:
            while not self._stop:
                if self._ready:
                    return heapq.heappop(self._ready)
                if self._next < len(self._plan.entries):
                    self._next += 1
                    if self._results[self._next - 1] is not None:
                        continue  # written by an earlier run
                    self._opening += 1
                    return self._next - 1, 0, _OPEN
                if not self._open and not self._opening:
                    return None
                self._changed.wait(_PATIENCE)
            return None

    def _begin(self, index: int, scratch: Scratch) -> None:
        """Open a tensor and share its tasks out, or do all of it where it is small."""
        entry = self._plan.entries[index]
        tensor = self._tensor(index)
        if self._workshop is not None:
            self._workshop.hold(entry, self._sources)
        read = written = 0
        if entry.size:
            tensor.begin(scratch)
        while tensor.alone and entry.size:
            more = [tensor.task(task, scratch) for task in range(tensor.tasks)]
            read, written = read + sum(r for r, _ in more), written + sum(w for _, w in more)
            if not tensor.end_pass(scratch):
                break
        result = self._finished(tensor) if tensor.alone else None
        if tensor.alone and self._workshop is not None:
            self._workshop.drop(entry, self._sources)
        with self._changed:
            self._opening -= 1
            if result is not None:
                self._count(read + tensor.bytes_sampled, written)
                self._results[index] = result
                if not self._opening:
                    self._changed.notify_all()
            else:
                self._open[index] = tensor
                self._queue(index, tensor, 0)

    def _finished(self, tensor: Unit) -> TensorResult:
        """The result of a tensor that is done; of what is written is told."""
        result = tensor.result()
        if self._sweep is not None:
            assert isinstance(tensor, TensorRun)
            self._sweep.take(tensor.entry, tensor.totals())
        if self._on_tensor is not None:
            self._on_tensor(result)
        return result

    def _tensor(self, index: int) -> Unit:
        if self._units is not None:
            return self._units.make(index, self._readers, self._settings, self._budget)
        entry = self._plan.entries[index]
        if entry.action is Action.MERGE:
            part = self._parts.get(entry.name) if self._sweep is None else self._sweep.part(entry)
            return TensorRun(entry, self._readers, self._sink, settings=self._settings, budget=self._budget, part=part)
        known = self._known.get(entry.name)
        assert self._sink is not None
        return CopyRun(entry, self._readers, self._sink, settings=self._settings, known=known)

    def _count(self, read: int, written: int) -> None:
        self.read += read
        self.written += written

    def _queue(self, index: int, tensor: Unit, number: int) -> None:
        """Make the tasks of the tensor's present pass ready; the lock is held."""
        self._left[index] = tensor.tasks
        self._expected += tensor.bytes_reread
        for task in range(tensor.tasks):
            heapq.heappush(self._ready, (index, number, task))
        self._changed.notify_all()

    def _done(self, index: int, number: int, read: int, written: int, scratch: Scratch) -> None:
        with self._changed:
            self._count(read, written)
            self._left[index] -= 1
            if self._left[index]:
                return
            tensor = self._open[index]
        again = tensor.end_pass(scratch)
        result = None if again else self._finished(tensor)
        if not again and self._workshop is not None:
            self._workshop.drop(tensor.entry, self._sources)
        with self._changed:
            if result is None:
                self._queue(index, tensor, number + 1)
            else:
                self.read += tensor.bytes_sampled
                self._results[index] = result
                del self._open[index], self._left[index]
                self._changed.notify_all()


def _start(thread: threading.Thread) -> None:
    try:
        thread.start()
    except RuntimeError as error:  # what Python says where the system gives no more of them
        raise StorageError(f"cannot start a thread: {error}", fix="use fewer threads (--threads 1)") from error


def _no_memory() -> StorageError:
    return StorageError("not enough memory for the tiles", fix="use fewer threads (--threads 1), or say --memory SIZE")


def check_equal(plan: Plan, sources: Sequence[TensorSource]) -> None:
    """Compare the tensors that cannot be averaged (integers, packed types): InputError naming those that differ.

    It is done before anything is written, since it decides whether the merge is possible at all.
    """
    problems: list[SmeltError] = []
    for entry in plan.entries:
        if entry.action is not Action.EQUAL:
            continue
        first, *others = entry.sources
        differing = [other for other in others if not _same_bytes(first, other, sources)]
        if differing:
            problems.append(
                InputError(
                    f"tensor '{entry.name}' holds {entry.dtype} numbers that differ between the models",
                    where=[f"{plan.models[source.model].published}  {source.tensor}" for source in (first, *differing)],
                    fix="the scale of a LoRA pair is not averaged: bring all models to one alpha (multiply lora_up or "
                    "lora_B by old alpha / new alpha), or leave out those that differ"
                    if entry.dtype.floating
                    else "numbers of this type are never averaged: leave out the models that differ",
                )
            )
    raise_all(problems)


def _same_bytes(first: Input, other: Input, sources: Sequence[TensorSource]) -> bool:
    size = first.tensor.nbytes
    one, two = (np.empty(min(_COMPARE, size), dtype=np.uint8) for _ in range(2))
    for start in range(0, size, _COMPARE):
        stop = min(start + _COMPARE, size)
        for source, buffer in ((first, one), (other, two)):
            view: Any = buffer[: stop - start]
            sources[source.model].read_into(source.tensor, start, stop, view)
        if not np.array_equal(one[: stop - start], two[: stop - start]):
            return False
    return True
