"""Several plans over the same models in one run: each input is read once, and written is what every plan gives.

Tensors that come out the same in several plans are worked out once and written to each of them. Those that differ in
settings alone are *variants*: they go through their passes together, on the same stored bytes (`engine.sharing`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from smelt.engine.backends import HOST, Backend, default_tile
from smelt.engine.copying import CopyRun
from smelt.engine.forecast import forecast, passes
from smelt.engine.inputs import Readable
from smelt.engine.memory import Budget
from smelt.engine.reducing import bind
from smelt.engine.run import KEEP_BYTES, WORTH_KERNELS, Progress, Units, run
from smelt.engine.sharing import Group, Known, SharedInputs, variant_key
from smelt.engine.tensor import Settings, Sink, TensorResult, TensorRun
from smelt.engine.tiles import Geometry, Scratch
from smelt.errors import NumericError
from smelt.planning.entries import Action, Entry, Plan
from smelt.planning.whole import is_whole
from smelt.storage.checkpoint import TensorSource

OnVariant = Callable[[int, TensorResult], None]
"""Called with the number of a plan and the result of a tensor that is written for it."""


@dataclass(frozen=True, slots=True)
class VariantsResult:
    """What a run of several plans gives: for each its results in plan order, or the error that ended it."""

    tensors: tuple[tuple[TensorResult, ...], ...]
    failed: Mapping[int, NumericError]
    seconds: float
    bytes_read: int


@dataclass(frozen=True, slots=True)
class _Work:
    """One distinct tensor, and the plans that it is written for."""

    entry: Entry
    plans: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Unit:
    """What is worked on together: variants of one tensor, or one copy."""

    name: tuple[Any, ...]
    works: dict[str, _Work] = field(default_factory=dict)

    @property
    def entry(self) -> Entry:
        return next(iter(self.works.values())).entry


def run_variants(
    plans: Sequence[Plan],
    sources: Sequence[TensorSource],
    sinks: Sequence[Sink],
    *,
    workers: int | None = None,
    tile: int | None = None,
    allow_nonfinite: bool = False,
    kernels: bool | None = None,
    backend: Backend = HOST,
    keep_bytes: int | None = None,
    done: Sequence[Mapping[str, TensorResult]] | None = None,
    known: Known | None = None,
    on_tensor: OnVariant | None = None,
    progress: Progress | None = None,
) -> VariantsResult:
    """Carry out plans over the same models (`sources`, one per model), each into a sink of its own.

    The bits are those of `run` for each plan alone. `done` are, for each plan, results of tensors that are in its sink
    already; `known` keeps what reductions gave for further calls over the same models and seed. A plan that fails for
    its numbers (NumericError) ends alone, and the others go on. Raises the first such error where all have failed,
    and as `run` does.
    """
    backend_tile = tile or default_tile(backend.name)
    there = done or [{} for _ in plans]
    if _go_over_models(plans):
        settings: dict[str, Any] = {
            "workers": workers,
            "tile": tile,
            "allow_nonfinite": allow_nonfinite,
            "kernels": kernels,
        }
        settings |= {"backend": backend, "keep_bytes": keep_bytes}
        return _apart(plans, sources, sinks, there, on_tensor, progress, **settings)
    units = _units(plans, there, tile=backend_tile)
    state = _State(plans, sinks, [dict(one) for one in there], on_tensor)
    memory = Known() if known is None else known

    def make(index: int, readers: Sequence[Readable], settings: Settings, budget: Budget) -> Together:
        return Together(units[index], state, readers, settings=settings, budget=budget, known=memory)

    moved = sum(unit.entry.input_bytes + unit.entry.nbytes * _copies(unit) for unit in units)
    if kernels is None:
        kernels = sum(u.entry.input_bytes * len(u.works) for u in units if _merges(u.entry)) >= WORTH_KERNELS
    finished = run(
        replace(plans[0], entries=tuple(unit.entry for unit in units)),
        sources,
        sinks[0],
        workers=workers,
        tile=tile,
        allow_nonfinite=allow_nonfinite,
        kernels=kernels,
        backend=backend,
        keep_bytes=keep_bytes,
        units=Units(make, moved),
        progress=progress,
    )
    results = tuple(
        tuple(state.results[number][entry.name] for entry in plan.entries) if number not in state.failed else ()
        for number, plan in enumerate(plans)
    )
    return VariantsResult(results, dict(state.failed), finished.seconds, finished.bytes_read)


def _go_over_models(plans: Sequence[Plan]) -> bool:
    """Whether reductions of a plan go over the whole model: their passes are not those of one tensor."""
    return any(is_whole(entry) for plan in plans for entry in plan.entries)


def _apart(
    plans: Sequence[Plan],
    sources: Sequence[TensorSource],
    sinks: Sequence[Sink],
    done: Sequence[Mapping[str, TensorResult]],
    on_tensor: OnVariant | None,
    progress: Progress | None,
    **settings: Any,
) -> VariantsResult:
    """`run_variants` by one run after the other."""
    results: list[tuple[TensorResult, ...]] = []
    failed: dict[int, NumericError] = {}
    seconds, read = 0.0, 0
    for number, (plan, sink, there) in enumerate(zip(plans, sinks, done, strict=True)):
        written = None if on_tensor is None else partial(on_tensor, number)
        shown = None if progress is None else partial(_share, progress, number, len(plans))
        try:
            finished = run(plan, sources, sink, done=there, on_tensor=written, progress=shown, **settings)
        except NumericError as error:
            failed[number] = error
            results.append(())
            continue
        results.append(finished.tensors)
        seconds, read = seconds + finished.seconds, read + finished.bytes_read
    if len(failed) == len(plans):
        raise failed[0]
    return VariantsResult(tuple(results), failed, seconds, read)


def _share(progress: Progress, number: int, count: int, done: int, total: int) -> None:
    """Show one of several runs that are alike as a part of all."""
    progress(number * total + done, count * total)


def bytes_together(plans: Sequence[Plan], *, tile: int | None = None, keep_bytes: int = KEEP_BYTES) -> int:
    """Bytes that these plans read in one run; of merges within the recipe what they give is counted."""
    if _go_over_models(plans):
        return sum(forecast(plan, tile=tile, keep_bytes=keep_bytes).bytes_read for plan in plans)
    read = 0
    for unit in _units(plans, [{} for _ in plans], tile=tile or default_tile(HOST.name)):
        size = unit.entry.input_bytes
        once = size <= keep_bytes or not _merges(unit.entry)
        read += size if once else size * max(passes(work.entry) for work in unit.works.values())
    return read


def _merges(entry: Entry) -> bool:
    return entry.action is Action.MERGE


def _copies(unit: _Unit) -> int:
    """How often the unit's tensor is written."""
    return sum(len(work.plans) for work in unit.works.values())


def _units(plans: Sequence[Plan], done: Sequence[Mapping[str, TensorResult]], *, tile: int) -> list[_Unit]:
    """All that is to be done for plans over the same models, in the order of their tensors."""
    by_tensor: dict[str, list[tuple[int, Entry]]] = {}
    for number, plan in enumerate(plans):
        for entry in plan.entries:
            if entry.name not in done[number]:
                by_tensor.setdefault(entry.name, []).append((number, entry))
    units: list[_Unit] = []
    for found in by_tensor.values():
        of_tensor: dict[tuple[Any, ...], _Unit] = {}
        for number, entry in found:
            name, settings = _names(entry, tile)
            work = of_tensor.setdefault(name, _Unit(name)).works.setdefault(settings, _Work(entry))
            work.plans.append(number)
        units += of_tensor.values()
    return units


def _names(entry: Entry, tile: int) -> tuple[tuple[Any, ...], str]:
    """What variants of a tensor have in common, and what tells them apart."""
    if not _merges(entry):
        return ("copy", entry.name, entry.dtype.code, entry.shape, entry.inputs[0]), ""
    grain = bind(entry).grain if entry.size else None
    geometry = None if grain is None else Geometry.of(entry.shape, grain, tile=tile)
    common = (entry.method, entry.name, entry.dtype.code, entry.shape, geometry, entry.inputs, entry.base)
    return common, variant_key(entry.values)


class _State:
    """What is known of each plan while all are carried out."""

    def __init__(
        self,
        plans: Sequence[Plan],
        sinks: Sequence[Sink],
        results: list[dict[str, TensorResult]],
        on_tensor: OnVariant | None,
    ) -> None:
        self.sinks = sinks
        self.results = results
        self.failed: dict[int, NumericError] = {}
        self._places = [{entry.name: place for place, entry in enumerate(plan.entries)} for plan in plans]
        self._on_tensor = on_tensor
        self._lock = threading.Lock()

    def going(self, plans: Iterable[int]) -> list[int]:
        """Those of the plans that have not failed."""
        return [number for number in plans if number not in self.failed]

    def finished(self, result: TensorResult, plans: Iterable[int]) -> None:
        """A tensor is written for these plans."""
        for number in self.going(plans):
            self.results[number][result.name] = result
            if self._on_tensor is not None:
                self._on_tensor(number, result)

    def fail(self, error: NumericError, tensor: str, plans: Iterable[int]) -> None:
        """A tensor cannot be made for these plans. Raises the error where no plan is left."""
        with self._lock:
            for number in plans:
                self.failed.setdefault(number, error)
            if len(self.failed) == len(self.sinks):
                raise self.failed[min(self.failed)]


class _Tee:
    """A sink that writes to several."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = sinks

    def write(self, name: str, start: int, data: Any) -> None:
        for sink in self._sinks:
            sink.write(name, start, data)

    def read_back(self, name: str, start: int, stop: int, buffer: Any) -> None:
        self._sinks[0].read_back(name, start, stop, buffer)


@dataclass(slots=True)
class _Variant:
    """A run for those plans that take the same result; `over` when all of its passes are."""

    run: TensorRun | CopyRun
    plans: list[int]
    over: bool = False
    failed: bool = False

    @property
    def live(self) -> bool:
        return not (self.over or self.failed)


class Together:
    """The work of a unit, as `TensorRun` is that of an entry."""

    def __init__(
        self,
        unit: _Unit,
        state: _State,
        sources: Sequence[Readable],
        *,
        settings: Settings,
        budget: Budget,
        known: Known,
    ) -> None:
        self.entry = unit.entry
        self._state = state
        self._inputs: SharedInputs | None = None
        self._variants: list[_Variant] = []
        self._first_pass = True
        works = [(work.entry, state.going(work.plans)) for work in unit.works.values()]
        works = [(entry, plans) for entry, plans in works if plans]
        if not _merges(self.entry):
            for entry, plans in works:
                copied = CopyRun(entry, sources, self._sink(plans), settings=settings)
                self._variants.append(_Variant(copied, plans))
            return
        self._inputs = SharedInputs(self.entry, sources, budget)
        self._group = Group(unit.name, self._inputs, known)
        for entry, plans in works:
            sink = self._sink(plans)
            made = TensorRun(entry, sources, sink, settings=settings, budget=budget, group=self._group)
            self._variants.append(_Variant(made, plans))

    def _sink(self, plans: Sequence[int]) -> Sink:
        sinks = [self._state.sinks[number] for number in plans]
        return sinks[0] if len(sinks) == 1 else _Tee(sinks)

    @property
    def tasks(self) -> int:
        """How many tasks the present pass has: as many as that of its variants with the most."""
        return max((one.run.tasks for one in self._live()), default=1)

    @property
    def bytes_reread(self) -> int:
        """What the present pass reads once more, because the input is not kept."""
        again = self._inputs is not None and not self._first_pass and self._inputs.rereads
        return self.entry.input_bytes if again else 0

    @property
    def bytes_sampled(self) -> int:
        """Bytes read of samples."""
        return sum(one.run.bytes_sampled for one in self._variants)

    @property
    def alone(self) -> bool:
        """Whether one worker does all of it."""
        return all(one.run.alone for one in self._variants)

    def begin(self, scratch: Scratch) -> None:
        """Prepare the first pass of all variants."""
        runs = [one.run for one in self._variants]
        if self._inputs is not None and any(isinstance(one, TensorRun) and one.multiple for one in runs):
            self._inputs.keep_for_all(scratch if self.alone else None)
        for one in self._live():
            self._guarded(one, lambda one=one: one.run.begin(scratch))  # type: ignore[misc]

    def task(self, task: int, scratch: Scratch) -> tuple[int, int]:
        """Do one task of the present pass for all variants; gives the bytes read and the bytes written."""
        read = written = 0
        if self._inputs is not None:
            self._inputs.forget()
        for one in self._live():
            if task < one.run.tasks:
                moved = self._guarded(one, lambda one=one: one.run.task(task, scratch))  # type: ignore[misc]
                if moved is not None:
                    read, written = read + moved[0], written + moved[1] * len(one.plans)
        return read, written

    def end_pass(self, scratch: Scratch) -> bool:
        """End the present pass of all variants and prepare the next; False when there is none."""
        self._first_pass = False
        for (
            one
        ) in self._live():  # in their order: a variant that makes a reduction stands before those that wait for it
            more = self._guarded(one, lambda one=one: one.run.end_pass(scratch))  # type: ignore[misc]
            one.over = more is False
        if self._live():
            return True
        self.abandon()
        return False

    def abandon(self) -> None:
        """Give back what is kept."""
        for one in self._variants:
            one.run.abandon()
        if self._inputs is not None:
            self._inputs.abandon()

    def result(self) -> TensorResult:
        """Tell of all that is written; gives the first of it."""
        for one in self._variants:
            if not one.failed:
                self._state.finished(one.run.result(), one.plans)
        first = next((one for one in self._variants if not one.failed), None)
        return TensorResult(self.entry.name, "") if first is None else first.run.result()

    def _live(self) -> list[_Variant]:
        return [one for one in self._variants if one.live]

    def _guarded(self, one: _Variant, work: Callable[[], Any]) -> Any:
        """Do something for a variant; where its numbers do not allow it, it ends, and those that wait for it."""
        try:
            return work()
        except NumericError as error:
            failing = [one]
            mine = one.run.share if isinstance(one.run, TensorRun) else None
            if mine is not None:
                failing += [other for other in self._live() if other is not one and _waits(other.run, mine)]
            for variant in failing:
                variant.failed = True
            self._state.fail(error, self.entry.name, [number for variant in failing for number in variant.plans])
            return None


def _waits(run: TensorRun | CopyRun, maker: Any) -> bool:
    return isinstance(run, TensorRun) and run.share is not None and run.share.waits_for(maker)
