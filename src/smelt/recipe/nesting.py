"""Recipes of recipes: which merges are made of which, in what order they are needed, and what makes that impossible."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from smelt.errors import RecipeError, SmeltError
from smelt.recipe.document import visible
from smelt.recipe.references import ModelName
from smelt.recipe.schema import Recipe

MAX_LEVELS = 32
"""Most merges that are made one out of another."""
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,95}")
_WORDS = frozenset(("base", "union", "auto"))
"""What `tokenizer_source` and `chat_template` understand as something else than a model."""


def faults(recipe: Recipe) -> list[SmeltError]:
    """Names that a merge cannot have, and merges that are made of themselves."""
    if not recipe.merges:
        return []
    found: list[SmeltError] = []
    for name in recipe.merges:
        where = recipe.where("merges", name)
        if not _NAME.fullmatch(name):
            fix = "use letters, digits, `_`, `-` and `.`: a name with `/` would be a folder or a model of the hub"
            found.append(RecipeError(f"a merge cannot be called '{visible(name)}'", where=where, fix=fix))
        elif name in _WORDS:
            fix = "call it something else: the word has a meaning of its own"
            found.append(RecipeError(f"a merge cannot be called '{name}'", where=where, fix=fix))
    circles = list(_circles(recipe))
    found += circles
    if not circles and _too_deep(recipe):
        found.append(
            RecipeError(
                f"the merges are made one out of another over more than {MAX_LEVELS} levels",
                where=recipe.where("merges"),
                fix="write some of them first, and name the folders",
            )
        )
    return found


def needed(recipe: Recipe) -> list[str]:
    """The names of the merges that the output is made of, each after those that it is made of itself."""
    uses = _uses(recipe)
    order: dict[str, None] = {}

    def visit(name: str) -> None:
        if name not in order:
            for other in uses[name]:
                visit(other)
            order[name] = None

    for name in _used_by(recipe, uses):
        visit(name)
    return list(order)


def mentions(recipe: Recipe) -> dict[ModelName, list[str]]:
    """Every stored model that the output is made of, each once, with the place where the recipe first names it."""
    steps = recipe.steps()
    found: dict[str, tuple[ModelName, list[str]]] = {}
    for one in (recipe, *(steps[name] for name in needed(recipe))):
        for name, where in one.mentions().items():
            if name.text not in steps:
                found.setdefault(name.text, (name, where))
    return dict(found.values())


def unused(recipe: Recipe) -> list[str]:
    """A warning for every merge that the output is not made of."""
    used = set(needed(recipe))
    return [
        f"{recipe.position('merges', name)}: the merge `{name}` is not used"
        for name in recipe.merges or {}
        if name not in used
    ]


def _used_by(recipe: Recipe, names: Mapping[str, object]) -> list[str]:
    return [name.text for name in recipe.mentions() if name.text in names]


def _uses(recipe: Recipe) -> dict[str, list[str]]:
    """For each merge the merges that it names as models."""
    steps = recipe.steps()
    return {name: _used_by(step, steps) for name, step in steps.items()}


def _circles(recipe: Recipe) -> Iterator[SmeltError]:
    """One error for each circle that a walk from merge to merge meets."""
    uses = _uses(recipe)
    done: set[str] = set()
    for first in uses:
        if first in done:
            continue
        path = [first]
        left = [list(uses[first])]
        while path:  # without recursion: nothing bounds the length of a chain before this
            if not left[-1]:
                done.add(path.pop())
                left.pop()
                continue
            other = left[-1].pop(0)
            if other in path:
                yield _circle(recipe, [*path[path.index(other) :], other])
            elif other not in done:
                path.append(other)
                left.append(list(uses[other]))


def _circle(recipe: Recipe, names: Sequence[str]) -> RecipeError:
    where = [line for name in dict.fromkeys(names) for line in recipe.where("merges", name)]
    what = "a merge is made of itself" if len(names) == 2 else "merges are made of each other in a circle"
    return RecipeError(f"{what}: {' → '.join(names)}", where=where, fix="take one of these models out")


def _too_deep(recipe: Recipe) -> bool:
    """Whether a chain has more than MAX_LEVELS merges; there is no circle."""
    uses = _uses(recipe)
    level = dict.fromkeys(uses, 1)
    for _ in range(MAX_LEVELS):
        level = {name: 1 + max((level[other] for other in others), default=0) for name, others in uses.items()}
    return max(level.values()) > MAX_LEVELS
