"""Tensors that are merged with what their method finds over all of them: granularity `model`.

They form a group where the same models are merged by the same method. What the method looks for over the group must not
depend on which of its tensors it looks at, so the settings that it needs for that are one and the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from smelt.errors import RecipeError, SmeltError
from smelt.methods import api
from smelt.methods.loading import answerable
from smelt.planning.anatomy import Role
from smelt.planning.entries import Action, Entry
from smelt.planning.explain import number_text
from smelt.recipe.schema import Recipe


@dataclass(frozen=True, slots=True)
class Group:
    """Tensors of one group in the plan's order; `counted` are those of them that reductions go over.

    A stored tensor counts once, however many tensors of the output are made of it, and so does an embedding that is
    also the head. Empty tensors count for nothing.
    """

    entries: tuple[Entry, ...]
    counted: tuple[Entry, ...]

    @property
    def size(self) -> int:
        """The number of entries (elements) that are counted."""
        return sum(entry.size for entry in self.counted)

    @property
    def input_bytes(self) -> int:
        """What one pass over the group reads."""
        return sum(entry.input_bytes for entry in self.counted)


def is_whole(entry: Entry) -> bool:
    """Whether the reductions of a tensor's method go over the whole model."""
    return entry.action is Action.MERGE and entry.values.get(api.GRANULARITY) == api.MODEL


def groups(entries: Iterable[Entry], *, tied: bool) -> tuple[Group, ...]:
    """The groups of a plan's entries, in the order of their first tensors; `tied`: the head is the embedding."""
    found: dict[Any, list[Entry]] = {}
    for entry in entries:
        if is_whole(entry):
            base = None if entry.base is None else entry.base.model
            found.setdefault((entry.method, tuple(one.model for one in entry.inputs), base), []).append(entry)
    return tuple(Group(tuple(group), _counted(group, tied=tied)) for group in found.values())


def _counted(group: Sequence[Entry], *, tied: bool) -> tuple[Entry, ...]:
    embeddings = {entry.shape for entry in group if entry.part.role is Role.EMBEDDING}
    counted: dict[Any, Entry] = {}
    for entry in group:
        again = tied and entry.part.role is Role.HEAD and entry.shape in embeddings
        if entry.size and not again:
            counted.setdefault(tuple((one.model, one.tensor.name) for one in entry.sources), entry)
    return tuple(counted.values())


def problems(found: Sequence[Group], recipe: Recipe) -> list[SmeltError]:
    """What keeps the reductions of a group from being the same for all of its tensors."""
    return [
        *(problem for group in found for problem in _unequal(group, recipe)),
        *(problem for group in found for problem in _by_column(group, recipe)),
    ]


def _unequal(group: Group, recipe: Recipe) -> list[SmeltError]:
    """Settings that the reductions need and that differ between tensors."""
    first = group.entries[0]
    info = api.get(first.method)
    problems: list[SmeltError] = []
    for name in first.values:
        other = next((entry for entry in group.entries if entry.values[name] != first.values[name]), None)
        if other is None or name in info.type.per_tensor:
            continue
        problems.append(
            RecipeError(
                f"{info.name} with granularity {api.MODEL} needs one `{name}` for all tensors, and it differs",
                where=[*(_told(entry, name) for entry in (first, other)), *_places(name, recipe)],
                fix=f"give `{name}` one value, or set `granularity` by `filter` to leave tensors out",
            )
        )
    return problems


def _told(entry: Entry, name: str) -> str:
    """A tensor's value of a setting, and where it comes from."""
    origin = entry.origins.get(name)
    origins = origin if isinstance(origin, tuple) else (origin,)
    said = dict.fromkeys("the default" if one is None else str(one) for one in origins)
    return f"tensor '{entry.name}': {name} {number_text(entry.values[name])} ({', '.join(said)})"


def _places(name: str, recipe: Recipe) -> list[str]:
    """Where the recipe sets a parameter, each place once."""
    scopes = [scope for block in recipe.blocks() for scope in block.scopes]
    scopes += [block.source_scope(index) for block in recipe.blocks() for index in range(len(block.sources))]
    places = [recipe.where(*scope.path, name) for scope in scopes if name in scope.parameters]
    return list(dict.fromkeys(line for lines in places for line in lines))


def _by_column(group: Group, recipe: Recipe) -> list[SmeltError]:
    """A reduction with a result for each column has none for the whole model: tensors have other columns."""
    first = group.entries[0]
    info = api.get(first.method)
    with answerable(info, at=f"at tensor '{first.name}'"):
        method = info.type(first.values, models=len(first.inputs))
        columns = [reduction.name for reduction in method.active() if reduction.scope == "column"]
    if not columns:
        return []
    return [
        RecipeError(
            f"{first.method}: {', '.join(columns)} goes over columns, and cannot go over the whole model",
            where=recipe.where("merge_method", value=True),
            fix="leave granularity out, or correct the method",
        )
    ]


def notes(found: Sequence[Group]) -> list[str]:
    """What is worth telling of the groups of a plan: that there are several, as not all models have all tensors."""
    if len(found) < 2:
        return []
    sizes = " and ".join(str(len(group.entries)) for group in found)
    return [f"granularity {api.MODEL}: {sizes} tensors are of different models, and each of these groups is a whole"]
