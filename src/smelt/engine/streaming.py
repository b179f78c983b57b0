"""Merges whose files do not fit in memory stream them: what is done with is let go (`storage.caching` says why)."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from smelt.engine.steps import StepSource
from smelt.planning.entries import Plan
from smelt.specs import TensorSpec
from smelt.storage import caching
from smelt.storage.checkpoint import Checkpoint, TensorSource


def exceed_memory(sources: Iterable[TensorSource], written: int) -> bool:
    """Whether all files of `sources` and `written` bytes of output are more than the system could keep in memory."""
    room = caching.available_bytes()
    return room is not None and written + sum(info.size for source in sources for info in source.files) > room


class Stream:
    """What a merge reads of `stored`, let go tensor by tensor where it is `needed`. Safe from many threads.

    The plan is that of the output, or of one of several `outputs` that are written side by side from the same tensors;
    all of them have `written` bytes.
    """

    def __init__(
        self,
        plan: Plan,
        sources: Sequence[TensorSource],
        stored: Sequence[TensorSource],
        *,
        written: int,
        outputs: int = 1,
    ) -> None:
        self.needed = exceed_memory(stored, written)
        self._entries = {entry.name: entry for entry in plan.entries} if self.needed else {}
        self._sources = sources
        self._outputs = outputs
        self._finished: Counter[str] = Counter()
        self._lock = threading.Lock()
        for source in stored:
            if self.needed and isinstance(source, Checkpoint):
                source.stream()

    def finished(self, name: str) -> None:
        """One of the outputs has this tensor; when all have it, the tensors that it is made of are let go."""
        if not self.needed:
            return
        with self._lock:
            self._finished[name] += 1
            if self._finished[name] < self._outputs:
                return
        entry = self._entries[name]
        for source in entry.sources:
            for one, tensor in _stored(self._sources[source.model], source.tensor):
                one.let_go(tensor)


def _stored(source: TensorSource, tensor: TensorSpec) -> Iterator[tuple[Checkpoint, TensorSpec]]:
    """The stored tensors that one of a model is, or is made of where the model is a merge within the recipe."""
    if isinstance(source, Checkpoint):
        yield source, tensor
    elif isinstance(source, StepSource) and source.computed:
        for one in source.inputs_of(tensor.name):
            yield from _stored(source.sources[one.model], one.tensor)
