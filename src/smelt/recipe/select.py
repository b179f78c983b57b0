"""Settings -> numbers: filters, globs and gradients, for one tensor at one place in the stack."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

from smelt.recipe.document import KeyPath, shorten, visible
from smelt.recipe.schema import Recipe
from smelt.recipe.settings import Case, Conditional, Gradient, Plain, Scalar, Setting


@dataclass(frozen=True, slots=True)
class Level:
    """The settings of one part of a recipe; `label` says which in explanations: `model org/x`, `slice 2`, `recipe`."""

    label: str
    parameters: Mapping[str, Setting]


@dataclass(frozen=True, slots=True)
class Found:
    """A setting's value for one tensor, and where it comes from.

    `case` is the condition that applied (`filter: mlp`, `all`), None where the setting has no cases; `place` says how
    the value follows: `scalar`, or `gradient [0, 0.5, 1] at 0.25 -> 0.25`.
    """

    value: Plain
    level: str
    case: str | None
    place: str

    def __str__(self) -> str:
        return ", ".join(part for part in (self.level, self.case, self.place) if part and part != "scalar")


def resolve(name: str, levels: Sequence[Level], *, tensor: str, t: float) -> Found | None:
    """The value of setting `name`, from the first level that has one for this tensor; None if no level has.

    `levels` go from the nearest (model) to the widest (recipe). `tensor` is the name that filters are held against: of
    the model's tensor for per-model settings, of the output's for method-wide ones. `t` in [0, 1] is the layer's place
    in the stack.
    """
    for level in levels:
        setting = level.parameters.get(name)
        if setting is None:
            continue
        owner: Scalar | Gradient | Case | None
        owner = _first_case(setting, tensor) if isinstance(setting, Conditional) else setting
        if owner is None:
            continue
        key = (level.label, t)
        found: Found | None = owner.cache.get(key)
        if found is None:
            found = owner.cache[key] = _found(owner, level.label, t)
        return found
    return None


def gradient_at(values: Sequence[Plain], t: float) -> Plain:
    """The value of a gradient at t in [0, 1]: between two numbers on a line, of words and booleans the one before.

    >>> gradient_at([0, 0.5, 1], 0.25)
    0.25
    """
    place = t * (len(values) - 1)
    index = int(place)
    low = values[index]
    high = values[min(index + 1, len(values) - 1)]
    if not Gradient(tuple(values)).is_numeric:
        return low
    part = place - index
    return (1 - part) * float(low) + part * float(high) if part else low


def unmatched(recipe: Recipe, names: Iterable[str]) -> list[str]:
    """A warning for every filter and glob that fits none of the tensor `names`, with its position and near names."""
    known = sorted(set(names))
    joined = "\n".join(known)
    templates: list[str] = []
    warnings: dict[str, None] = {}
    for path, case in _conditions(recipe):
        if case.match is not None:
            fits = any(_matcher(case.match)(name) for name in known)
        else:
            fits = "\n" not in (case.filter or "") and (case.filter or "") in joined
        if fits:
            continue
        templates = templates or sorted({re.sub(r"(?<![^.])\d+(?![^.])", "*", name) for name in known})
        kind, text = ("match", case.match) if case.match is not None else ("filter", case.filter or "")
        candidates = templates if kind == "match" else _pieces(tuple(templates))
        near = difflib.get_close_matches(text, candidates, n=3, cutoff=0.5)
        hint = f"; near it are {', '.join(near)}" if near else ""
        shown = shorten(visible(text), limit=80)
        warnings[f"{recipe.position(*path, kind)}: {kind} '{shown}' fits no tensor{hint}"] = None
    return list(warnings)


def _first_case(setting: Conditional, tensor: str) -> Case | None:
    for case in setting.cases:
        if case.match is not None:
            if _matcher(case.match)(tensor):
                return case
        elif case.filter is None or case.filter in tensor or case.filter == "*":
            return case
    return None


@cache
def _matcher(pattern: str) -> Callable[[str], bool]:
    """Whether a glob fits a whole dotted name; `*` goes across dots. Remembers, as models share their names."""
    compiled = re.compile(fnmatch.translate(pattern))

    @lru_cache(maxsize=1 << 17)
    def fits(name: str) -> bool:
        return compiled.match(name) is not None

    return fits


def _found(owner: Scalar | Gradient | Case, label: str, t: float) -> Found:
    case, source = (owner.text, owner.value) if isinstance(owner, Case) else (None, owner)
    if isinstance(source, Scalar):
        return Found(source.value, label, case, "scalar")
    value = gradient_at(source.values, t)
    steps = shorten(", ".join(_written(step) for step in source.values))
    return Found(value, label, case, f"gradient [{steps}] at {t:.4g} -> {_written(value)}")


def _written(value: Plain) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return value if isinstance(value, str) else f"{value:.6g}"


def _conditions(recipe: Recipe) -> Iterator[tuple[KeyPath, Case]]:
    """Every case with a condition, each place of the recipe once."""
    seen: set[KeyPath] = set()
    for block in recipe.blocks():
        for scope in (*(block.source_scope(index) for index in range(len(block.sources))), *block.scopes):
            if scope.path in seen:
                continue
            seen.add(scope.path)
            for name, setting in scope.parameters.items():
                if isinstance(setting, Conditional):
                    for index, case in enumerate(setting.cases):
                        if not case.is_all:
                            yield (*scope.path, name, index), case


@lru_cache(maxsize=4)
def _pieces(templates: tuple[str, ...]) -> list[str]:
    """What a filter may have meant: one to three neighbouring parts of a name, layer numbers left out."""
    pieces: set[str] = set()
    for template in templates:
        for run in template.split(".*."):
            parts = run.split(".")
            for length in (1, 2, 3):
                pieces.update(".".join(parts[i : i + length]) for i in range(len(parts) - length + 1))
    return sorted(pieces)
