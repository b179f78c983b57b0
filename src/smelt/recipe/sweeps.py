"""Sweeps: `lambda=0.2:1.2:0.2` as values of a setting, where in a recipe it stands, and the recipes that follow."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from itertools import product
from typing import Any

from pydantic import ValidationError

from smelt.errors import RecipeError, nearest
from smelt.methods import api
from smelt.recipe.canonical import canonical
from smelt.recipe.document import KeyPath, dotted, shorten, visible
from smelt.recipe.nesting import needed
from smelt.recipe.parse import changed
from smelt.recipe.schema import Recipe
from smelt.recipe.settings import Plain, Scalar, read_setting

MOST = 1000
"""Most candidates of a sweep."""
_NAME_BYTES = 200
"""Most bytes of a candidate's name: the folders beside it have longer ones."""
_NUMBER = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_WORD = re.compile(r"[A-Za-z_][\w.-]*")
_UNSAFE = re.compile(r"[/\\:*?\"<>|\x00-\x1f\x7f]")
_TAIL = re.compile(r"\[(\d+)\]|\.(value)")
_STEP = re.compile(r"\[(\d+)\]")


@dataclass(frozen=True, slots=True)
class Over:
    """One swept setting: its key as it was written, and the values it takes, each with its text."""

    key: str
    values: tuple[tuple[str, Plain], ...]


@dataclass(frozen=True, slots=True)
class Variant:
    """One candidate of a sweep: its name (`lambda=0.2,density=0.3`), what is set, and the recipe that says so."""

    name: str
    settings: Mapping[str, Plain]
    recipe: Recipe


def read_over(texts: Iterable[str]) -> list[Over]:
    """What `--over KEY=VALUES` asks for. Raises RecipeError.

    >>> read_over(["lambda=0.2:1.0:0.4"])[0].values
    (('0.2', 0.2), ('0.6', 0.6), ('1.0', 1.0))
    """
    overs = []
    for text in texts:
        key, equals, values = text.rpartition("=")
        if not equals or not key.strip() or not values.strip():
            fix = "write a setting and its values: lambda=0.2:1.2:0.2, density=0.3,0.5"
            raise RecipeError(f"'{visible(shorten(text))}' says no setting with values", fix=fix)
        overs.append(_over(key.strip(), values.split(",")))
    return _distinct(overs)


def over_mapping(over: Mapping[str, Any]) -> list[Over]:
    """The same from Python: values are a text as on the command line, or numbers, words and booleans in a sequence."""
    overs = []
    for key, values in over.items():
        if isinstance(values, str):
            overs.append(_over(key, values.split(",")))
            continue
        if isinstance(values, bool | int | float) or not isinstance(values, Iterable):
            values = [values]
        overs.append(_over(key, [_text(value) for value in values]))
    return _distinct(overs)


def variants(recipe: Recipe, overs: Sequence[Over]) -> list[Variant]:
    """Every combination of the values, the last setting changing first. Raises as parsing a recipe does."""
    count = 1
    for over in overs:
        count *= len(over.values)
    if not overs:
        raise RecipeError("there is nothing to sweep over", fix="say --over SETTING=VALUES")
    if count > MOST:
        sizes = " × ".join(str(len(over.values)) for over in overs)
        what = f"{sizes} = {count}" if len(overs) > 1 else str(count)
        raise RecipeError(f"the sweep has {what} candidates, and {MOST} is the most", fix="take fewer values")
    tree = _tree(recipe)
    places = [_Finder(recipe, tree, over.key).path() for over in overs]
    _refuse_overlap(overs, places)
    found: dict[str, Variant] = {}
    for values in product(*(over.values for over in overs)):
        name = ",".join(f"{over.key}={text}" for over, (text, _) in zip(overs, values, strict=True))
        name = _UNSAFE.sub("_", name)
        if len(name.encode("utf-8", "replace")) > _NAME_BYTES:
            fix = "sweep over fewer settings at once, or name models by their place: models[0].weight"
            raise RecipeError(f"the name of a candidate is too long: {shorten(visible(name))}", fix=fix)
        if name in found:
            fix = "name models by their place: models[0].weight"
            raise RecipeError(f"two candidates have the name {visible(name)}", fix=fix)
        copied = _copy(tree)
        for path, (_, value) in zip(places, values, strict=True):
            _put(copied, path, value)
        settings = {over.key: value for over, (_, value) in zip(overs, values, strict=True)}
        found[name] = Variant(name, settings, changed(recipe, copied))
    return list(found.values())


# --- values ---------------------------------------------------------------------------------------------------------


def _over(key: str, texts: Sequence[str]) -> Over:
    values: dict[tuple[bool, Plain], str] = {}
    for text in texts:
        for one in _expanded(key, text.strip()):
            try:
                setting = read_setting(one)
            except ValidationError as error:
                raise RecipeError(f"{key} cannot be {visible(shorten(one))}", fix="take another number") from error
            assert isinstance(setting, Scalar)
            value = (isinstance(setting.value, bool), setting.value)  # to Python, True is 1
            if value in values:
                raise RecipeError(f"{key} is given {values[value]} twice", fix="give each value once")
            values[value] = one
            if len(values) > MOST:
                raise RecipeError(f"{key} has more than {MOST} values, and {MOST} is the most", fix="take fewer values")
    return Over(key, tuple((text, value) for (_, value), text in values.items()))


def _expanded(key: str, text: str) -> Iterator[str]:
    """The texts of the values that one part of a list stands for."""
    parts = text.split(":")
    if len(parts) == 1 and (_NUMBER.fullmatch(text) or _WORD.fullmatch(text)):
        yield text
        return
    if len(parts) != 3 or not all(_NUMBER.fullmatch(part.strip()) for part in parts):
        fix = "write numbers or words with commas between them, or FIRST:LAST:STEP"
        raise RecipeError(f"{key} cannot be '{visible(shorten(text))}'", fix=fix)
    try:
        first, last, step = (Decimal(part.strip()) for part in parts)
        if not step or (last - first) / step < 0:
            fix = f"write it like 0.2:1.2:0.2: a step that leads from {first} to {last}"
            raise RecipeError(f"{key}={text} never comes to its end", fix=fix)
        count = int((last - first) / step) + 1
    except InvalidOperation as error:
        raise RecipeError(f"{key}={text} has numbers that are too large", fix="take smaller ones") from error
    if count > MOST:
        raise RecipeError(f"{key}={text} has {count} values, and {MOST} is the most", fix="take a larger step")
    for number in range(count):
        yield f"{first + number * step:f}"


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if hasattr(value, "item"):  # NumPy's numbers
        return _text(value.item())
    return str(value) if isinstance(value, str | int) else repr(value)


def _distinct(overs: list[Over]) -> list[Over]:
    for place, over in enumerate(overs):
        if any(other.key == over.key for other in overs[:place]):
            raise RecipeError(f"{over.key} is swept twice", fix=f"give all of its values at once: {over.key}=0.1,0.2")
    return overs


# --- places ---------------------------------------------------------------------------------------------------------


class _Finder:
    """Where the setting that a key names stands in a recipe, or would stand."""

    def __init__(self, recipe: Recipe, tree: dict[str, Any], key: str) -> None:
        self._recipe = recipe
        self._tree = tree
        self._key = key

    def path(self) -> KeyPath:
        if self._key.startswith("merges."):
            names = list(self._recipe.merges or {})
            name, rest = self._named(self._key.removeprefix("merges."), {one: [one] for one in names}, "merge")
            if name not in needed(self._recipe):
                where = self._recipe.where("merges", str(name))
                raise RecipeError(f"{self._key}: the output is not made of the merge `{name}`", where=where)
            return self._in_body(rest, ("merges", name))
        return self._in_body(self._key, ())

    def _in_body(self, rest: str, at: KeyPath) -> KeyPath:
        """A key within one merge: of its parts, or a bare setting."""
        if (found := self._in_part(rest, at)) is not None:
            return found
        name, tail = self._split(rest)
        self._check_known(name, at)
        places = [path for path in _places(self._at(at), at) if path[-1] == name]
        if tail or not places:
            return self._with_tail((*at, "parameters", name), tail)
        if len(places) == 1:
            value = self._at(places[0])
            if not isinstance(value, list | dict):
                return places[0]
            cases = isinstance(value, dict) or any(isinstance(entry, dict) for entry in value)
            kind = "has cases by tensor name" if cases else "is a gradient over the layers"
            inner = f"{dotted(places[0])}[0]{'.value' if cases else ''}"
            fix = f"sweep over one of its numbers, {inner}, or replace it whole: {dotted(places[0])}"
        else:
            kind = f"is set in {len(places)} places"
            fix = f"say which: {', '.join(dotted(path) for path in places[:4])}{', ...' * (len(places) > 4)}"
        where = [line for path in places[:4] for line in self._recipe.where(*path)]
        raise RecipeError(f"`{visible(self._key)}` {kind}, so it is not one number to sweep over", where=where, fix=fix)

    def _in_part(self, rest: str, at: KeyPath) -> KeyPath | None:
        """A key that names the part of a merge in which its setting stands; None for a bare one."""
        for part in ("models", "sources", "slices"):
            if rest.startswith((f"{part}.", f"{part}[")):
                place, left = self._entry(rest.removeprefix(part), (*at, part))
                return self._within(left, place)
        if rest.startswith("modules."):
            names = list(self._at((*at, "modules")) or {})
            name, left = self._named(rest.removeprefix("modules."), {one: [one] for one in names}, "module")
            return self._within(left, (*at, "modules", name))
        if rest.startswith("parameters."):
            name, tail = self._split(rest.removeprefix("parameters."))
            return self._with_tail((*at, "parameters", name), tail)
        if rest in ("lines.alpha", "lines.beta"):
            if not isinstance(self._at((*at, "lines")), dict):
                raise RecipeError(f"{self._key}: the recipe has no `lines`", fix="add `lines: {alpha: ..., beta: ...}`")
            return (*at, "lines", rest.removeprefix("lines."))
        return None

    def _within(self, rest: str, at: KeyPath) -> KeyPath:
        """A key within a model, a slice or a module; `parameters.` may be left out."""
        if (found := self._in_part(rest, at)) is not None:
            return found
        name, tail = self._split(rest)
        return self._with_tail((*at, "parameters", name), tail)

    def _entry(self, rest: str, at: KeyPath) -> tuple[KeyPath, str]:
        """`[0].weight` or `.legal.weight`: which entry of a list is meant, and what follows."""
        entries = self._at(at)
        entries = entries if isinstance(entries, list) else []
        if (found := _STEP.match(rest)) is not None:
            number = int(found[1])
            if number >= len(entries):
                fix = f"{dotted(at)} has {len(entries)}, counted from 0"
                raise RecipeError(f"{self._key}: there is no {dotted((*at, number))}", fix=fix)
            return (*at, number), rest[found.end() :].removeprefix(".")
        names: dict[int, list[str]] = {}
        for number, entry in enumerate(entries):
            model = entry.get("model") if isinstance(entry, dict) else None
            text = model if isinstance(model, str) else str(model.get("model", model.get("path"))) if model else ""
            names[number] = [text, text.rstrip("/").rpartition("/")[2]]
        number_, left = self._named(rest.removeprefix("."), names, "model")
        return (*at, number_), left

    def _named(self, rest: str, known: Mapping[Any, Sequence[str]], kind: str) -> tuple[Any, str]:
        """The one of `known` whose name `rest` begins with, the longest of them, and what follows the dot."""
        fits = [(len(n), key) for key, names in known.items() for n in {*names} if n and rest.startswith(f"{n}.")]
        longest = max((length for length, _ in fits), default=0)
        found = list(dict.fromkeys(key for length, key in fits if length == longest))
        if len(found) == 1:
            return found[0], rest[longest + 1 :]
        given = [names[-1] for names in known.values() if names[-1]]
        if found:
            fix = "name it by its place: models[0].weight"
            raise RecipeError(f"{visible(self._key)}: {len(found)} {kind}s have this name", fix=fix)
        close = nearest(rest.partition(".")[0], given)
        fix = f"did you mean `{close}`?" if close else f"known are {', '.join(given) or 'none'}"
        raise RecipeError(f"`{visible(self._key)}` names no {kind} of the recipe", fix=fix)

    def _split(self, rest: str) -> tuple[str, str]:
        """The name of a setting, and what stands after it: `[1]`, `[0].value`."""
        found = re.match(r"[A-Za-z_]\w*", rest)
        if found is None or not re.fullmatch(rf"(?:{_TAIL.pattern})*", rest[found.end() :]):
            fix = "write a setting, or where it stands: lambda, models.NAME.weight, parameters.t[0], merges.NAME.lambda"
            raise RecipeError(f"`{visible(shorten(self._key))}` names no setting", fix=fix)
        return found[0], rest[found.end() :]

    def _with_tail(self, path: KeyPath, tail: str) -> KeyPath:
        """Further into a setting that is there: a number of a gradient, the value of a case."""
        self._check_known(str(path[-1]), path[:2] if path[0] == "merges" else ())
        for step in _TAIL.finditer(tail):
            value = self._at(path)
            key: str | int = int(step[1]) if step[1] is not None else step[2]
            there = isinstance(value, list) and isinstance(key, int) and key < len(value)
            if not there and not (isinstance(value, dict) and key in value):
                where = self._recipe.where(*path)
                raise RecipeError(f"{self._key}: there is no {dotted((*path, key))} in the recipe", where=where)
            path = (*path, key)
        return path

    def _check_known(self, name: str, body: KeyPath) -> None:
        """Raise RecipeError unless the method of this merge has the setting."""
        method = (self._at(body) or {}).get("merge_method")
        if method not in api.names():
            return  # told when the recipe is checked
        info = api.get(method)
        if name in info.fields:
            return
        if name in info.ignored:
            raise RecipeError(f"{method} takes `{name}` without effect: {info.ignored[name]}", fix="sweep over another")
        close = nearest(name, info.fields)
        takes = f"{method} takes {', '.join(info.fields) or 'no parameters'}"
        fix = f"did you mean `{close}`?" if close else takes
        raise RecipeError(f"{method} has no parameter `{visible(name)}` to sweep over", fix=fix)

    def _at(self, path: KeyPath) -> Any:
        node: Any = self._tree
        for key in path:
            if isinstance(node, dict):
                node = node.get(key)
            elif isinstance(node, list) and isinstance(key, int) and key < len(node):
                node = node[key]
            else:
                return None
        return node


def _places(node: Any, at: KeyPath) -> Iterator[KeyPath]:
    """Every place of a merge where a setting stands; other merges within the recipe are not looked at."""
    if isinstance(node, dict):
        for name in node.get("parameters") or {}:
            yield (*at, "parameters", name)
        for part in ("models", "slices", "sources"):
            for number, entry in enumerate(node.get(part) or []):
                yield from _places(entry, (*at, part, number))
        for name, module in (node.get("modules") or {}).items():
            yield from _places(module, (*at, "modules", name))


def _refuse_overlap(overs: Sequence[Over], places: Sequence[KeyPath]) -> None:
    for (one, first), (other, second) in product(zip(overs, places, strict=True), repeat=2):
        if one is not other and second[: len(first)] == first:
            raise RecipeError(f"{one.key} and {other.key} set the same number", fix="sweep over one of the two")


def _tree(recipe: Recipe) -> dict[str, Any]:
    value = recipe._document.value
    copied: dict[str, Any] = _copy(value if isinstance(value, dict) else canonical(recipe))
    return copied


def _copy(value: Any) -> Any:
    """Values of their own everywhere: what YAML's aliases made the same must not change together."""
    if isinstance(value, dict):
        return {key: _copy(entry) for key, entry in value.items()}
    return [_copy(entry) for entry in value] if isinstance(value, list | tuple) else value


def _put(tree: dict[str, Any], path: KeyPath, value: Plain) -> None:
    node: Any = tree
    for key in path[:-1]:
        if isinstance(node, dict) and node.get(key) is None:
            node[key] = {}
        node = node[key]
    node[path[-1]] = value
