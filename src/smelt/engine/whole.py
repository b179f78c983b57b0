"""Reductions over a whole model: each pass of them goes over all tensors of a group before the first one is merged.

A tensor folds its blocks in their order, and what the tensors give is folded in the order of the plan: the bits depend
neither on threads nor on tiles. Memory is that of one result for each tensor that is open, however large the model is;
the k-th largest is found by its digits, as no sample is narrow enough to keep what lies around it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from smelt.engine.inputs import Readable
from smelt.engine.memory import Budget
from smelt.engine.reducing import Part, Running, bind, schedule, startable
from smelt.engine.tensor import Settings, TensorRun
from smelt.engine.tiles import Scratch
from smelt.methods.selection import KthLargest, KthLargest64
from smelt.planning.entries import Entry, Plan
from smelt.planning.whole import Group, groups

Parts = Mapping[str, Part]
"""Tensor -> its part in the reductions over its model."""
HISTOGRAM = 2 * 8 << 16
"""Bytes that a k-th largest needs for a model: counts of 64 Ki digits in 64 bits, for two cuts."""
Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""


class Shown:
    """How far a run is that goes over its tensors several times: (bytes done, bytes in all) of all loops together."""

    def __init__(self, progress: Progress | None, plan: Plan, done: Collection[str], *, reduced: bool = False) -> None:
        self.read = 0
        """Bytes that the loops before have read."""
        self._progress = progress
        self._total = sum(entry.input_bytes + entry.nbytes for entry in plan.entries if entry.name not in done)
        left = [] if reduced else unfinished(plan, done)
        self._total += sum(group.input_bytes * passes_of(group) for group in left)

    def of_loop(self) -> Progress | None:
        """What the next loop is to call."""
        progress, before = self._progress, self.read
        if progress is None:
            return None
        return lambda done, total: progress(before + done, max(before + total, self._total))


class Sweep:
    """One pass over the tensors of all groups that have reductions left."""

    def __init__(self, going: Sequence[_Reductions]) -> None:
        self._of = {entry.name: one for one in going for entry in one.group.counted}
        self.entries = tuple(entry for one in going for entry in one.group.counted)
        """What it goes over: each tensor once, in the order in which results are folded."""

    def part(self, entry: Entry) -> Part:
        """What a tensor is to add to. Nobody else keeps it: what it holds goes with the tensor."""
        return self._of[entry.name].part()

    def take(self, entry: Entry, totals: Sequence[Any]) -> None:
        """Take what a tensor adds; from any thread."""
        self._of[entry.name].take(entry, totals)


class _Reductions:
    """The reductions of one group in progress."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.results: dict[str, Any] = {"size": group.size}
        self._place = {entry.name: place for place, entry in enumerate(group.counted)}
        self._waiting = list(bind(group.entries[0]).active()) if group.counted else []
        self._running: list[Running] = []

    def begin(self) -> bool:
        """Begin a pass; False where none is left."""
        for running in self._running:
            running.reset()
        for reduction in startable(self._waiting, {running.reduction.name for running in self._running}):
            self._waiting.remove(reduction)
            reducer = reduction.reducer(scope=reduction.scope, size=self.group.size)
            self._running.append(Running(reduction, reducer))
        return bool(self._running)

    def part(self) -> Part:
        return Part(self.results, tuple(Running(running.reduction, running.reducer) for running in self._running))

    def take(self, entry: Entry, totals: Sequence[Any]) -> None:
        for running, total in zip(self._running, totals, strict=True):
            running.fold(total, block=self._place[entry.name] if running.reducer.ordered else None)

    def end(self) -> None:
        """End a pass, when every tensor has added to it."""
        with np.errstate(all="ignore"):
            for running in self._running:
                running.reducer.close(running.total())
                if running.reducer.done:
                    self.results[running.reduction.name] = running.reducer.finish()
        self._running = [running for running in self._running if not running.reducer.done]


def reduced(plan: Plan, carry_out: Callable[[Sweep], None], *, done: Collection[str] = ()) -> dict[str, Part]:
    """The results for all tensors of a plan's groups, pass by pass; `carry_out` takes every tensor through one pass.

    A group whose tensors are all `done` is left out.
    """
    found = [_Reductions(group) for group in unfinished(plan, done)]
    while going := [one for one in found if one.begin()]:
        carry_out(Sweep(going))
        for one in going:
            one.end()
    return {entry.name: Part(one.results) for one in found for entry in one.group.entries}


def unfinished(plan: Plan, done: Collection[str]) -> list[Group]:
    """The groups of a plan that have tensors which are not done."""
    found = groups(plan.entries, tied=plan.tied)
    return [group for group in found if any(entry.name not in done for entry in group.entries)]


def one_by_one(sweep: Sweep, sources: Sequence[Readable], *, settings: Settings) -> None:
    """Carry out a pass with no threads."""
    budget, scratch = Budget(0), Scratch(settings.backend.empty)
    for entry in sweep.entries:
        tensor = TensorRun(entry, sources, None, settings=settings, budget=budget, part=sweep.part(entry))
        tensor.begin(scratch)
        for task in range(tensor.tasks):
            tensor.task(task, scratch)
        sweep.take(entry, tensor.totals())


def passes_of(group: Group) -> int:
    """How many passes go over a group before it is merged."""
    active = bind(group.entries[0]).active() if group.counted else ()
    return max((end for _, end in schedule(active)), default=0)


def result_bytes(group: Group, workers: int) -> int:
    """What the results of a group take at most: of the group, of tensors that are open, and of their tasks."""
    first = group.entries[0]
    counted = any(issubclass(one.reducer, KthLargest | KthLargest64) for one in bind(first).active())
    return (2 * workers + 2) * len(first.inputs) * HISTOGRAM if counted and group.counted else 0
