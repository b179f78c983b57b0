"""What is wrong with a recipe's shape, in our words: pydantic's findings translated, and the laws between keys."""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Union

from pydantic import BaseModel, ValidationError

from smelt.errors import RecipeError, nearest
from smelt.recipe.document import Document, KeyPath, visible
from smelt.recipe.faults import FAULT, Fault, describe
from smelt.recipe.schema import Lines, Module, Recipe, Slice, Source, Step, Tokenizer, TokenRule

_PLACES: dict[type[BaseModel], str] = {
    Recipe: "to the top of the recipe",
    Source: "beside `model:`",
    Slice: "into an entry of `slices:`",
    Module: "into an entry of `modules:`",
    Lines: "under `lines:`",
    Tokenizer: "under `tokenizer:`",
    TokenRule: "under a token of `tokenizer: tokens:`",
}
_STRUCTURE = frozenset({*Recipe.model_fields, *Slice.model_fields, *Source.model_fields} - {"name", "allow", "methods"})

_OF_STEPS = "into an entry of `merges:`"
"""Where the keys belong that only merges by name have."""

_NAMES_OF_MODELS = ("name", "path", "id", "repo", "repo_id", "model_name", "model_path", "model_id")
"""What stands in the place of `model:` now and then."""

_TYPES = {
    "string_type": "text",
    "bool_type": "true or false",
    "int_type": "a whole number",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a mapping (`key: value` lines)",
    "model_type": "a mapping (`key: value` lines)",
    "model_attributes_type": "a mapping (`key: value` lines)",
}


def in_words(error: ValidationError, document: Document) -> list[RecipeError]:
    """Each problem that pydantic and the laws found, with its place, in the order of the text."""
    if other := _other_recipe(document.value):
        return _placed([other], document)
    found = list(_laws(document.value))
    misplaced = [fault.path for fault in found if fault.path[-2:-1] == ("parameters",)]
    details = error.errors(include_url=False)
    meant: set[KeyPath] = set()
    for detail in details:
        path: KeyPath = detail["loc"]
        if detail["type"] != "extra_forbidden":
            continue
        fault, key = _unknown_key(path, document.value)
        found.append(fault)
        if key is not None:
            meant.add((*path[:-1], key))
    for detail in details:
        path = detail["loc"]
        if detail["type"] == "extra_forbidden" or any(path[: len(key)] == key for key in misplaced):
            continue
        if detail["type"] == "missing" and path in meant:
            continue  # the misspelt key is already reported
        if detail["type"] == "too_short" and detail["input"]:
            continue  # not empty: its entries failed, and that is reported
        fault = _translate(path, detail)
        unknown = fault.message.startswith("unknown key")
        found.append(replace(fault, at_value=not unknown and _is_single(_at(document.value, path))))
    return _placed(found, document)


def law_problems(document: Document) -> list[RecipeError]:
    """The problems between keys of a tree whose keys are fine one by one."""
    return _placed(list(_laws(document.value)), document)


def _placed(faults: list[Fault], document: Document) -> list[RecipeError]:
    """Faults as errors, in the order of the text."""
    placed = []
    for fault in faults:
        place = document.find(fault.path, value=fault.at_value)
        where = document.where(fault.path, value=fault.at_value)
        error = RecipeError(fault.message, where=where, fix=fault.fix or None)
        placed.append(((place.line, place.column) if place else (0, 0), error))
    return [error for _, error in sorted(placed, key=lambda pair: pair[0])]


def _translate(path: KeyPath, detail: Any) -> Fault:
    kind: str = detail["type"]
    context = detail.get("ctx", {})
    name = next((part for part in reversed(path) if isinstance(part, str)), "recipe")
    shown = f"`{visible(name)}`"
    if path and isinstance(path[-1], int):
        shown = f"an entry of {shown}"
    if not path:
        shown = "a recipe"
    given = detail.get("input")
    if kind == FAULT:
        return Fault(context["message"], path, context["fix"])
    if kind == "missing":
        return Fault(f"`{path[-1]}` is missing", path, _MISSING.get(str(path[-1]), f"add `{path[-1]}: ...`"))
    if kind in _TYPES:
        return Fault(f"{shown} must be {_TYPES[kind]}, not {describe(given)}", path, _type_fix(kind, path, given))
    if kind == "literal_error":
        words = re.findall(r"'([^']*)'", context["expected"])
        close = nearest(given, words) if isinstance(given, str) else None
        fix = f"did you mean `{close}`?" if close else f"use one of {', '.join(words)}"
        return Fault(f"{shown} cannot be {describe(given)}", path, fix)
    if kind == "too_short":
        return Fault(f"{shown} is empty", path, "add an entry, or remove the key")
    if kind == "greater_than_equal":
        return Fault(f"{shown} must be at least {context['ge']}, not {describe(given)}", path)
    return Fault(f"{shown}: {detail['msg']}", path)


_MISSING = {
    "merge_method": "add `merge_method: linear` (`smelt methods` lists them)",
    "model": "add `model: ORG/NAME` or a folder",
    "alpha": "add `alpha: ...`, the factor of the first layer",
    "beta": "add `beta: ...`, how much more the last layer gets than the first",
    "sources": "add `sources:` with a list of `model:` and `layer_range:`",
}


def _type_fix(kind: str, path: KeyPath, given: object) -> str | None:
    if kind == "string_type" and isinstance(given, (bool, int, float)):
        return f'put it in quotes: "{describe(given)}"'
    if kind.startswith("model") and isinstance(given, str) and len(path) > 1 and path[-2] in ("models", "sources"):
        return f"write `- model: {visible(given)}`"
    if kind == "tuple_type" and isinstance(given, dict) and path[-1] in ("models", "sources", "slices"):
        return "begin each entry with `- `"
    return None


def _unknown_key(path: KeyPath, tree: Any) -> tuple[Fault, str | None]:
    """The fault, and the key of the same level that was meant, if one is near."""
    key = str(path[-1])
    message = f"unknown key `{visible(key)}`"
    level = _level(path[:-1])
    given = _at(tree, path[:-1]) or {}
    known = [name for name in level.model_fields if name != key] if level else []
    absent = [name for name in known if name not in given]
    missing = [name for name in absent if level and level.model_fields[name].is_required()]
    own, every = _parameter_names(_body(path, tree)) if "parameters" in known else ([], [])
    if key in every:
        fix = f"it is a parameter of a method: move it under `parameters:`{_here(path)}"
        return Fault(message, path, fix), None
    if "sources" in missing and key in Source.model_fields:
        return Fault(message, path, "move it into an entry of `sources:`, a list"), "sources"
    if "model" in missing and key in _NAMES_OF_MODELS:
        return Fault(message, path, "did you mean `model`?"), "model"
    if "model" in missing and isinstance(given[key], dict | None):
        fix = f"write `- model: {visible(key)}`, and its settings under `parameters:`"
        return Fault(message, path, fix), "model"
    homes = [place for record, place in _PLACES.items() if key in record.model_fields and record is not level]
    if key in Step.model_fields and key not in Recipe.model_fields and level is not Step:
        homes.append(_OF_STEPS)
    if homes:
        return Fault(message, path, f"move it {' or '.join(homes)}"), None
    if close := nearest(key, missing) or nearest(key, absent) or _same_word(key, missing) or _same_word(key, absent):
        return Fault(message, path, f"did you mean `{close}`?"), close
    if close := nearest(key, own) or nearest(key, every):
        return Fault(message, path, f"did you mean `{close}`, under `parameters:`{_here(path)}?"), None
    return Fault(message, path, f"known here: {', '.join(known)}"), None


def _same_word(key: str, known: list[str]) -> str | None:
    """The only known key that shares a word with `key`: `base` means `base_model`."""
    words = set(key.lower().replace("-", "_").split("_"))
    found = [name for name in known if words & set(name.split("_"))]
    return found[0] if len(found) == 1 else None


def _body(path: KeyPath, tree: Any) -> Any:
    """The merge that `path` belongs to: one of `merges:`, or the recipe itself."""
    return _at(tree, path[:2]) if path[:1] == ("merges",) and len(path) > 2 else tree


def _is_single(value: Any) -> bool:
    return value is not None and not isinstance(value, dict | list)


def _at(tree: Any, path: KeyPath) -> Any:
    """The part of the tree at `path`; None where there is none."""
    for part in path:
        if isinstance(tree, dict):
            tree = tree.get(part)
        elif isinstance(tree, list) and isinstance(part, int) and part < len(tree):
            tree = tree[part]
        else:
            return None
    return tree


def _here(path: KeyPath) -> str:
    return " of this entry" if len(path) > 1 else ""


def _level(path: KeyPath) -> type[BaseModel] | None:
    """The record that stands at `path`."""
    kind: Any = Recipe
    for part in path:
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            kind = kind.model_fields[str(part)].annotation if part in kind.model_fields else None
            kind = _plain(kind)
        elif typing.get_origin(kind) in (tuple, dict):
            arguments = typing.get_args(kind)
            kind = _plain(arguments[0] if typing.get_origin(kind) is tuple else arguments[1])
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _plain(kind: Any) -> Any:
    """A type without Annotated and None; of a union the record in it."""
    while typing.get_origin(kind) is typing.Annotated:
        kind = typing.get_args(kind)[0]
    if typing.get_origin(kind) in (Union, types.UnionType):
        branches = [_plain(branch) for branch in typing.get_args(kind) if branch is not type(None)]
        records = [b for b in branches if isinstance(b, type) and issubclass(b, BaseModel)]
        return (records or branches)[0]
    return kind


def _parameter_names(tree: Any) -> tuple[list[str], list[str]]:
    """The parameters of the recipe's method, and those of all methods."""
    from smelt.methods import api  # all methods are loaded: only once there is something to explain

    each = {name: {*api.get(name).fields, *api.get(name).ignored} for name in api.names()}
    method = tree.get("merge_method")
    own = each.get(method, set()) if isinstance(method, str) else set()
    return sorted(own), sorted(set().union(*each.values()))


def _other_recipe(tree: Any) -> Fault | None:
    """The refusal of a recipe in another of MergeKit's languages, as a whole: its keys mean nothing here."""
    if not isinstance(tree, dict) or "merge_method" in tree:
        return None
    fix = "a merge of whole models has `merge_method:` and `models:`"
    if "experts" in tree:
        return Fault("this recipe builds a mixture of experts, which is not supported yet", ("experts",), fix)
    if "genome" in tree:
        return Fault("this recipe searches for a merge, which is not supported yet", ("genome",), fix)
    return None


# --- laws between keys ----------------------------------------------------------------------------------------------


def _laws(tree: Any) -> Iterator[Fault]:
    """What no single key can tell. Keys of a wrong type are passed over: pydantic reports them."""
    if not isinstance(tree, dict):
        return
    yield from _body_laws(tree, ())
    for name, step in _entries(tree.get("merges")):
        yield from _body_laws(step, ("merges", name))


def _body_laws(body: dict[str, Any], path: KeyPath) -> Iterator[Fault]:
    yield from _one_of(body, path, ("models", "slices", "modules"))
    if body.get("tokenizer") is not None and body.get("tokenizer_source") is not None:
        fix = "keep `tokenizer:` and remove `tokenizer_source:`"
        yield Fault("`tokenizer` and `tokenizer_source` are both given", (*path, "tokenizer_source"), fix)
    yield from _parts(body, path)
    for name, module in _entries(body.get("modules")):
        yield from _one_of(module, (*path, "modules", name), ("models", "slices"))
        yield from _parts(module, (*path, "modules", name))
    if isinstance(tokenizer := body.get("tokenizer"), dict):
        for token, rule in _entries(tokenizer.get("tokens")):
            if isinstance(source := rule.get("source"), dict):
                yield from _token(source, (*path, "tokenizer", "tokens", token, "source"))


def _is_range(chosen: Any) -> bool:
    """Whether it is a layer range with layers in it; others are reported as such, and not counted."""
    return (
        isinstance(chosen, list) and len(chosen) == 2 and all(type(n) is int for n in chosen) and chosen[0] < chosen[1]
    )


def _parts(level: dict[str, Any], path: KeyPath) -> Iterator[Fault]:
    yield from _parameters(level, path)
    for index, source in _entries(level.get("models")):
        at = (*path, "models", index)
        yield from _parameters(source, at)
        if source.get("layer_range") is not None:
            fix = "remove it, or write `slices:` with `sources:` to choose layers"
            yield Fault("`layer_range` has no effect under `models:`", (*at, "layer_range"), fix)
    for index, part in _entries(level.get("slices")):
        at = (*path, "slices", index)
        yield from _parameters(part, at)
        lengths: dict[int, list[Any]] = {}
        for place, source in _entries(part.get("sources")):
            yield from _parameters(source, (*at, "sources", place))
            chosen = source.get("layer_range")
            if _is_range(chosen):
                lengths.setdefault(chosen[1] - chosen[0], chosen)
                if len(lengths) == 2:
                    (first, one), (second, other) = lengths.items()
                    message = f"`layer_range` {one} has {first} layers and {other} has {second}, in one slice"
                    yield Fault(
                        message,
                        (*at, "sources", place, "layer_range"),
                        "give every source of a slice the same number of layers",
                    )
                    break


def _one_of(level: dict[str, Any], path: KeyPath, keys: tuple[str, ...]) -> Iterator[Fault]:
    given = [key for key in keys if level.get(key) is not None]
    names = ", ".join(f"`{key}`" for key in keys[:-1]) + f" or `{keys[-1]}`"
    if not given and not any(nearest(key, keys) for key in level if key not in Recipe.model_fields):
        what = f"{str(path[-2]).removesuffix('s')} `{visible(str(path[-1]))}`" if path else "the recipe"
        yield Fault(f"{what} names no models to merge", path, f"add {names}")
    for key in given[1:]:
        yield Fault(f"`{given[0]}` and `{key}` are both given", (*path, key), f"keep one of {names}")


def _parameters(level: dict[str, Any], path: KeyPath) -> Iterator[Fault]:
    for key, _ in _entries(level.get("parameters"), mappings=False):
        if key in _STRUCTURE:
            homes = [place for record, place in _PLACES.items() if key in record.model_fields]
            message = f"`{key}` does not belong under `parameters:`"
            yield Fault(message, (*path, "parameters", key), f"move it {' or '.join(homes)}")


def _token(source: dict[str, Any], path: KeyPath) -> Iterator[Fault]:
    if source.get("kind") == "model_token":
        if source.get("model") is None:
            yield Fault("`kind: model_token` without `model`", path, "add `model: ...`")
        if (source.get("token") is None) == (source.get("token_id") is None):
            yield Fault("`kind: model_token` needs one of `token` and `token_id`", path)
    elif source.get("kind") == "zero":
        for key in ("model", "token", "token_id"):
            if source.get(key) is not None:
                yield Fault(f"`{key}` has no effect with `kind: zero`", (*path, key), "remove it")


def _entries(value: Any, *, mappings: bool = True) -> Iterator[tuple[Any, Any]]:
    """Keys and entries of a list or mapping; those that are mappings, unless asked for all."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    yield from ((key, entry) for key, entry in pairs if isinstance(entry, dict) or not mappings)
