"""What variants of one tensor (one method with several settings) have in common: stored bytes, and reductions.

A reduction is made once for all variants that agree in the settings it names (`uses`), and in those that the
reductions before it name. That this is all it depends on is not believed but made so: while it is shared, its function
is given a method that has no other setting, and raises where one is asked for.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from threading import get_ident
from typing import Any

import numpy as np

from smelt.engine.inputs import Inputs, Stored
from smelt.engine.memory import Budget, TensorMemory
from smelt.engine.reducing import Running
from smelt.engine.tiles import Scratch
from smelt.errors import RecipeError
from smelt.methods.api import Reduction
from smelt.methods.loading import definition_of
from smelt.planning.entries import Entry
from smelt.storage.sources.memory import MemoryCheckpoint

_SCOPES = frozenset({"tensor", "column"})
"""Scopes of reductions that see one tensor alone."""
_MOST_KEPT = 1 << 20
"""Bytes of a result above which it is not kept for later candidates."""


class SharedInputs(Inputs):
    """The sources of one tensor, read once for all of its variants.

    Where several passes need them they are kept, as far as memory allows. What lies in memory already is not copied.
    """

    def __init__(self, entry: Entry, sources: Sequence[Any], budget: Budget) -> None:
        super().__init__([(sources[source.model], source.tensor) for source in entry.sources])
        self.placed = False  # a kernel would read for one variant alone
        self.there = [_in_memory(source, spec.name, size) for source, spec, _, size in self._sources]
        self._memory = TensorMemory(budget)
        self._filled: set[int] = set()
        self._now: dict[int, tuple[int, int, Stored]] = {}

    @property
    def rereads(self) -> bool:
        """Whether a further pass reads once more."""
        return self.kept is None and any(data is None for data in self.there)

    def keep_for_all(self, scratch: Scratch | None) -> None:
        """As `Inputs.keep`, until `abandon`."""
        self.keep(self._memory, scratch)

    def forget(self) -> None:
        """The calling thread begins another task: its buffers will hold other bytes."""
        self._now.pop(get_ident(), None)

    def read(self, low: int, high: int, scratch: Scratch, *, again: bool) -> tuple[Stored, int]:
        """As `Inputs.read`, once in a task; what was kept is known here, and not to one variant."""
        now = self._now.get(get_ident())
        if now is not None and now[:2] == (low, high):
            return now[2], 0
        stored, read = super().read(low, high, scratch, again=low in self._filled)
        self._filled.add(low)
        self._now[get_ident()] = (low, high, stored)
        return stored, read

    def abandon(self) -> None:
        """Give back what is kept."""
        self.kept = None
        self._now.clear()
        self._memory.release()


class Known:
    """What reductions gave, for all variants of all tensors, those of later runs too."""

    def __init__(self) -> None:
        self._results: dict[tuple[Any, ...], Any] = {}

    def get(self, key: tuple[Any, ...]) -> Any:
        """The result under a key, in a tuple of one; None where there is none."""
        return self._results.get(key)

    def put(self, key: tuple[Any, ...], result: Any) -> None:
        """Keep a result, unless it is large."""
        if _size(result) <= _MOST_KEPT:
            self._results[key] = (result,)


class Group:
    """The variants of one tensor that are worked on together: the bytes, and who makes which reduction."""

    def __init__(self, name: tuple[Any, ...], inputs: SharedInputs, known: Known) -> None:
        self.name = name
        self.inputs = inputs
        self.known = known
        self.running: dict[tuple[Any, ...], tuple[Share, Running]] = {}


class Share:
    """The part that one variant has in its group; used by its `TensorRun`."""

    def __init__(self, group: Group, entry: Entry, method: Any, fused: Callable[[tuple[str, ...]], bool]) -> None:
        self._group = group
        self._values = entry.values
        self._method = method
        self._active = frozenset(reduction.name for reduction in method.active())
        self._by_name = {reduction.name: reduction for reduction in method.info.reductions}
        self._derived = frozenset(derived.name for derived in method.info.derived)
        self._fused = fused
        self._pending: dict[str, tuple[Share, Running]] = {}
        self._views: dict[tuple[int, tuple[str, ...]], Any] = {}

    @property
    def pending(self) -> set[str]:
        """The reductions that another variant makes for this one, and has not ended."""
        return set(self._pending)

    def waits_for(self, other: Share) -> bool:
        """Whether the other variant makes a reduction for this one."""
        return any(owner is other for owner, _ in self._pending.values())

    def begin(self, reductions: Sequence[Reduction], results: dict[str, Any]) -> list[Reduction]:
        """Of reductions that may begin those that this variant makes itself; known results are put into `results`."""
        keys = [self._key(reduction) for reduction in reductions]
        found = [self._group.known.get(key) for key in keys]
        makers = [self._group.running.get(key) for key in keys]
        others = [known is None and maker is None for known, maker in zip(found, makers, strict=True)]
        if any(others) and self._fused(tuple(reduction.name for reduction in reductions)):
            return list(reductions)  # one kernel makes all of them in the time of one
        for reduction, known, maker in zip(reductions, found, makers, strict=True):
            if known is not None:
                results[reduction.name] = known[0]
            elif maker is not None:
                self._pending[reduction.name] = maker
        return [reduction for reduction, own in zip(reductions, others, strict=True) if own]

    def began(self, running: Running) -> None:
        """Let the group know of a reduction that this variant makes."""
        self._group.running.setdefault(self._key(running.reduction), (self, running))

    def ended(self, running: Running, result: Any) -> None:
        """A reduction that this variant makes has its result."""
        self._group.known.put(self._key(running.reduction), result)

    def collect(self, results: dict[str, Any]) -> None:
        """Take over what others have ended; they come first when a pass ends."""
        for name, (_, running) in list(self._pending.items()):
            if running.reducer.done:
                results[name] = running.reducer.finish()
                del self._pending[name]

    def view(self, method: Any, reductions: Sequence[Reduction]) -> Any:
        """The method as these reductions may see it: with the settings that they name, and no other."""
        uses: set[str] = set()
        for reduction in reductions:
            if reduction.uses is None:
                return method
            uses.update(reduction.uses)
        key = (id(method), tuple(sorted(uses)))
        if key not in self._views:
            names = ", ".join(reduction.name for reduction in reductions)
            self._views[key] = _restricted(method, key[1], names)
        return self._views[key]

    def _key(self, reduction: Reduction) -> tuple[Any, ...]:
        """What the result of a reduction depends on within the group."""
        names = sorted(self._before(reduction.name))
        steps = [self._by_name.get(name) for name in names]
        fields = {field for step in steps if step is not None for field in step.uses or ()}
        if any(step is None or step.uses is None or step.scope not in _SCOPES for step in steps):
            fields = set(self._values)
        settings = tuple((field, repr(self._values[field])) for field in sorted(fields))
        return (*self._group.name, reduction.name, tuple((name, name in self._active) for name in names), settings)

    def _before(self, name: str) -> set[str]:
        """A reduction, and all results that it is made from."""
        found = {name}
        for argument in self._by_name[name].arguments if name in self._by_name else ():
            if argument in self._by_name or argument in self._derived:
                found |= self._before(argument)
        return found


def _restricted(method: Any, uses: tuple[str, ...], names: str) -> Any:
    kind: Any = type(method)
    seen: Any = object.__new__(_view_type(kind, uses, names))
    seen.n = method.n
    for name in uses:
        attribute = method.info.fields[name].attribute
        setattr(seen, attribute, copy.copy(vars(method)[attribute]))
    return seen


@cache
def _view_type(cls: Any, uses: tuple[str, ...], names: str) -> Any:
    """The method's class with settings that cannot be read, but for those that are named."""

    def hidden(name: str) -> property:
        def refuse(_: Any) -> Any:
            raise RecipeError(
                f"method {cls.info.name}: {names} reads the setting `{name}`, which it does not name",
                where=[definition_of(cls.info.reductions[0].function)],
                fix=f'name it in the method\'s file: @reduce(..., uses=[..., "{name}"])',
            )

        return property(refuse)

    others = {field.attribute: hidden(name) for name, field in cls.info.fields.items() if name not in uses}
    return type(cls.__name__, (cls,), {**others, "__slots__": ()})


def _in_memory(source: Any, name: str, size: int) -> Any:
    """The tensor's bytes where they lie in memory and kernels can take them as they are; else None."""
    if not isinstance(source, MemoryCheckpoint):
        return None
    data = source.data(name)
    return data if data.flags.writeable and data.ctypes.data % max(size, 1) == 0 else None


def _size(result: Any) -> int:
    """Bytes of the arrays of a result."""
    if isinstance(result, np.ndarray):
        return result.nbytes
    if isinstance(result, tuple | list):
        return sum(_size(part) for part in result)
    if hasattr(result, "__dataclass_fields__"):
        return sum(_size(getattr(result, name)) for name in result.__dataclass_fields__)
    return 0


def variant_key(values: Mapping[str, Any]) -> str:
    """Settings as a text that is the same for the same numbers; -0 is not 0."""
    return repr(sorted(values.items()))
