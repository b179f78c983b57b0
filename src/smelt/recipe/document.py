"""Plain values of a recipe and where each stands in its text; what errors need to point at them."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from smelt.errors import RecipeError

MAX_BYTES = 1 << 20
MAX_DEPTH = 64
MAX_NODES = 100_000
"""Values of a recipe, aliases expanded."""
MAX_INTEGER = (1 << 63) - 1

KeyPath: TypeAlias = tuple[str | int, ...]
"""Where a value stands in the tree: `("models", 0, "parameters", "weight")`."""


@dataclass(frozen=True, slots=True)
class Position:
    """A place in the text; both counts start at 1."""

    line: int
    column: int


@dataclass(frozen=True, slots=True, eq=False)
class Document:
    """Plain values and where they stand.

    `positions` holds the place of the key for a mapping's entries, of the element for a sequence's; `values` the place
    of the value. Both are empty for values that never were text.
    """

    value: Any
    source: str
    positions: dict[KeyPath, Position] = field(default_factory=dict)
    values: dict[KeyPath, Position] = field(default_factory=dict)
    lines: tuple[str, ...] = ()

    def find(self, path: KeyPath, *, value: bool = False) -> Position | None:
        """The place of `path` (of its value), or of the nearest part of the tree around it that has one."""
        places = self.values if value else self.positions
        for length in range(len(path), -1, -1):
            if (place := places.get(path[:length])) is not None:
                return place
        return None

    def label(self, path: KeyPath, *, value: bool = False) -> str:
        """`recipe.yml:7:5`, or the bare source name where nothing is known."""
        place = self.find(path, value=value)
        return f"{self.source}:{place.line}:{place.column}" if place else self.source

    def where(self, path: KeyPath, *, value: bool = False) -> list[str]:
        """The lines of an error that say where: the place, and the text of its line."""
        place = self.find(path, value=value)
        if place is not None:
            return where_lines(self.source, self.lines, place)
        return [f"{self.source}: {dotted(path)}" if path else self.source]


def dotted(path: KeyPath) -> str:
    """A path for people.

    >>> dotted(("models", 0, "parameters", "weight"))
    'models[0].parameters.weight'
    """
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return visible(text.removeprefix("."))


def from_plain(tree: Any, *, source: str) -> Document:
    """Values that never were text (a dict built in Python), held to the same rules. Raises RecipeError."""
    count = 0

    def copy(value: Any, path: KeyPath) -> Any:
        nonlocal count
        count += 1
        if count > MAX_NODES or len(path) > MAX_DEPTH:
            raise RecipeError("the recipe is too large or too deeply nested", where=[source])
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        if isinstance(value, Mapping):
            for key in value:
                if not isinstance(key, str):
                    raise RecipeError(f"the key {key!r} is not text", where=[f"{source}: {dotted(path) or 'top'}"])
            return {key: copy(entry, (*path, key)) for key, entry in value.items()}
        if isinstance(value, (list, tuple)):
            return [copy(entry, (*path, index)) for index, entry in enumerate(value)]
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, str) and not holds_unsafe(value):
            return str(value)
        if isinstance(value, int) and abs(value) <= MAX_INTEGER:
            return int(value)
        if isinstance(value, float) and math.isfinite(value):
            return float(value)
        shown = shorten(visible(str(value)))
        raise RecipeError(f"{shown} cannot stand in a recipe", where=[f"{source}: {dotted(path)}"])

    return Document(copy(tree, ()), source)


def shorten(text: str, *, limit: int = 60) -> str:
    """At most `limit` characters of a text."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def where_lines(source: str, lines: tuple[str, ...], place: Position) -> list[str]:
    """`recipe.yml:7:5`, and the text of that line (cut to fit)."""
    label = f"{source}:{place.line}:{place.column}"
    text = lines[place.line - 1] if place.line <= len(lines) else ""
    if not text.strip():
        return [label]
    start = max(0, place.column - 60) if len(text) > 100 else 0
    shown = shorten(text[start:].rstrip(), limit=100)
    return [label, f"| {'…' if start else ''}{visible(shown)}"]


def holds_unsafe(text: str) -> bool:
    """Whether a text holds what no file name and no UTF-8 can: NUL, half of a surrogate pair."""
    return any(character == "\0" or "\ud800" <= character <= "\udfff" for character in text)


def visible(text: str) -> str:
    """Text with control characters escaped, so that a recipe cannot write to the terminal."""
    return "".join(c if c.isprintable() or c == "\t" else c.encode("unicode_escape").decode() for c in text)
