"""Sweeps in memory: candidates one after the other as state dicts, with inputs and reductions kept between them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from smelt import keeping
from smelt.candidates import Candidates, Planning, check_variants, of_candidate, open_candidates, planning_of
from smelt.dtypes import Bytes
from smelt.engine.backends import CPU, Backend, choose
from smelt.engine.run import check_equal
from smelt.engine.sharing import Known
from smelt.engine.variants import run_variants
from smelt.errors import NumericError, RecipeError
from smelt.in_memory import MemorySink, check_types, from_bytes, is_torch, opened_state
from smelt.prepared import Prepared
from smelt.preparing import check_numbers
from smelt.recipe.nesting import mentions
from smelt.recipe.parse import from_dict, load
from smelt.recipe.schema import Recipe
from smelt.recipe.settings import Plain
from smelt.recipe.sweeps import Over, over_mapping, variants
from smelt.specs import TensorSpec
from smelt.storage.checkpoint import TensorSource
from smelt.storage.sources.memory import MemoryCheckpoint
from smelt.writing import check_steps


@dataclass(frozen=True, slots=True)
class Candidate:
    """One candidate: its name, what is set, its tensors by name, and what `score` gave for them."""

    name: str
    settings: Mapping[str, Plain]
    tensors: dict[str, Any]
    score: Any = None


def sweep(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    over: Mapping[str, Any],
    *,
    models: Mapping[str, Mapping[str, Any]] | None = None,
    score: Callable[[dict[str, Any]], Any] | None = None,
    tensors: str = "numpy",
    load_inputs: bool = True,
    allow: Iterable[str] = (),
    strict: bool = False,
    seed: int = 0,
    workers: int | None = None,
    tile: int | None = None,
    device: str = CPU,
    trust_methods: bool = False,
    trust_pickles: bool = False,
) -> Iterator[Candidate]:
    """The candidates of a sweep, one after the other, in memory; a further one costs its arithmetic alone.

    `over` maps settings to values, as `smelt sweep --over` does: `{"lambda": "0.2:1.2:0.2", "density": [0.3, 0.5]}`.
    `models` gives the recipe's models as state dicts by name; without it they are read from where the recipe says,
    into memory (all of them at once), or with `load_inputs` false for each candidate anew. The tensors are of the
    kind of `models`, else NumPy arrays or with `tensors="torch"` torch tensors; each candidate has its own. `score` is
    called with them. The bits are those of `smelt.merge`, whose other settings these are.

    Raises RecipeError and InputError at once, NumericError at the candidate whose numbers cannot be.

    >>> import numpy as np
    >>> a, b = {"w": np.float32([1, 2])}, {"w": np.float32([3, 6])}
    >>> recipe = {"merge_method": "slerp", "base_model": "a", "models": [{"model": "b"}]}
    >>> found = sweep(recipe, {"t": [0, 1]}, models={"a": a, "b": b}, score=lambda state: state["w"].sum())
    >>> [(one.name, float(one.score)) for one in found]
    [('t=0', 3.0), ('t=1', 9.0)]
    """
    check_numbers(workers=workers, tile=tile)
    if tensors not in ("numpy", "torch"):
        raise RecipeError(f"tensors are numpy or torch, not {tensors}", fix="leave it out for numpy")
    overs = over_mapping(over)
    planning = planning_of(
        allow, keep_folder=Path(keeping.FOLDER), strict=strict, seed=seed, workers=workers, tile=tile, device=device
    )
    if models is not None:
        first = next((next(iter(state.values()), None) for state in models.values()), None)
        kind = "torch" if is_torch(first) else "numpy"
    else:
        kind = tensors
    stack = ExitStack()
    try:
        if models is not None:
            candidates = _over_states(recipe, overs, models, planning)
        else:
            opened = open_candidates(
                recipe, overs, planning=planning, trust_methods=trust_methods, trust_pickles=trust_pickles
            )
            candidates = stack.enter_context(opened)
        trial = _Trial(candidates, choose(device), kind=kind, copied=models is None and load_inputs)
        trial.check()
    except BaseException:
        stack.close()
        raise
    return _candidates(trial, stack, score)


def _candidates(trial: _Trial, stack: ExitStack, score: Callable[[dict[str, Any]], Any] | None) -> Iterator[Candidate]:
    with stack:
        for family in trial.candidates.families():
            for number in family:
                variant = trial.candidates.variants[number]
                state = trial.state(number)
                yield Candidate(variant.name, variant.settings, state, None if score is None else score(state))


def _over_states(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    overs: list[Over],
    models: Mapping[str, Mapping[str, Any]],
    planning: Planning,
) -> Candidates:
    """The candidates of a recipe over state dicts. Raises RecipeError and InputError."""
    read = load(recipe) if isinstance(recipe, str | Path) else recipe
    read = read if isinstance(read, Recipe) else from_dict(read)
    if read.methods:
        fix = "define the method in Python: a class with @register is known from then on"
        raise RecipeError("method files are not loaded for models in memory", where=read.where("methods"), fix=fix)
    made = variants(read, overs)
    check_variants(made)
    lacking = [(name.text, where) for name, where in mentions(read).items() if name.text not in models]
    if lacking:
        name, where = lacking[0]
        given = ", ".join(models) or "none"
        raise RecipeError(f"`models` has no '{name}'", where=where, fix=f"give its state dict: there are {given}")
    needed = {name.text for name in mentions(read)}
    stored = {name: opened_state(name, state) for name, state in models.items() if name in needed}
    return Candidates(tuple(made), stored, {}, planning)


class _Trial:
    """What all candidates share: inputs, reductions, settings."""

    def __init__(self, candidates: Candidates, backend: Backend, *, kind: str, copied: bool) -> None:
        self.candidates = candidates
        self._backend = backend
        self._kind = kind
        self._copied = copied
        self._loaded: dict[int, dict[str, tuple[TensorSpec, Bytes]]] = {}
        self._known: tuple[Any, Known] = (None, Known())

    def check(self) -> None:
        """Find before the first candidate what is wrong with any family. Raises as planning does."""
        for family in self.candidates.families():
            prepared = self.candidates.prepared(family[0])
            check_types(prepared.plan, self._kind)
            check_steps(prepared, None)
            check_equal(prepared.plan, [model.source for model in prepared.models])

    def state(self, number: int) -> dict[str, Any]:
        """The tensors of a candidate."""
        prepared = self.candidates.prepared(number)
        if self._known[0] is not prepared.steps:
            self._known = (prepared.steps, Known())
        plan, cost, planning = prepared.plan, prepared.forecast, self.candidates.planning
        sink = MemorySink(plan)
        try:
            run_variants(
                [plan],
                [self._source(prepared, index) for index in range(len(prepared.models))],
                [sink],
                workers=planning.workers,
                tile=planning.tile,
                allow_nonfinite="nonfinite" in planning.allow | frozenset(prepared.recipe.allow),
                kernels=cost.kernels or None,
                backend=self._backend,
                known=self._known[1],
            )
        except NumericError as error:
            raise of_candidate(error, self.candidates.variants[number].name) from error
        data = sink.data
        return {one.name: from_bytes(data[one.name], one.dtype, one.shape, kind=self._kind) for one in plan.entries}

    def _source(self, prepared: Prepared, index: int) -> TensorSource:
        """A model of the plan, in memory where it is to be."""
        model = prepared.models[index]
        if not self._copied or model.planned.merged:
            return model.source
        loaded = self._loaded.setdefault(id(model), {})
        for source in (source for entry in prepared.plan.entries for source in entry.sources):
            if source.model == index and source.tensor.name not in loaded:
                loaded[source.tensor.name] = _load(model.source, source.tensor)
        return MemoryCheckpoint(model.name, loaded)


def _load(source: TensorSource, tensor: TensorSpec) -> tuple[TensorSpec, Bytes]:
    data: Any = np.empty(tensor.nbytes, dtype=np.uint8)
    source.read_into(tensor, 0, tensor.nbytes, memoryview(data))
    return tensor, data
