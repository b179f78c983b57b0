"""Recipes from text, from a file, or from a dict; every problem with its line and column."""

from __future__ import annotations

import copy
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from smelt.errors import InputError, RecipeError, SmeltError, nearest, raise_all
from smelt.recipe import nesting, problems, yaml
from smelt.recipe.check import check_parameters
from smelt.recipe.document import MAX_BYTES, Document, from_plain
from smelt.recipe.schema import Recipe
from smelt.storage import files

_SUFFIXES = (".yml", ".yaml")


def parse(text: str | bytes, *, source: str = "recipe") -> Recipe:
    """The recipe that a YAML text says; `source` is its name in messages.

    Raises RecipeError or ManyProblems (all problems of the text at once, in its order).
    """
    document, found = yaml.read_leniently(text, source=source)
    return _typed(document, found)


def load(path: str | os.PathLike[str]) -> Recipe:
    """The recipe in a file. Raises RecipeError for what is wrong with it or its path, StorageError if reading fails."""
    name = os.fspath(path)
    if "\0" in name:
        raise RecipeError("a file name cannot hold a NUL character")
    kind = files.kind(name)
    if kind != "file":
        raise _not_a_file(name, kind)
    try:
        text = files.read_bytes(name, limit=MAX_BYTES)
    except InputError as error:
        raise RecipeError(error.message, where=error.where, fix=error.fix) from error
    return parse(text, source=name)


def from_dict(tree: Any, *, source: str = "recipe") -> Recipe:
    """The recipe that plain values say, under the same rules as a text's. Raises RecipeError or ManyProblems."""
    return _typed(from_plain(tree, source=source), [])


def changed(recipe: Recipe, tree: Any) -> Recipe:
    """A recipe of other values, whose messages point to where they stand in this one's text. Raises as `parse` does."""
    return _typed(replace(recipe._document, value=tree), [])


def _typed(document: Document, found: list[SmeltError]) -> Recipe:
    try:
        recipe = Recipe.model_validate(document.value)
    except ValidationError as error:
        raise_all([*found, *problems.in_words(error, document), *_parameter_problems(error, document)])
        raise AssertionError("a ValidationError holds at least one problem") from error
    recipe._document = document
    raise_all([*found, *problems.law_problems(document), *nesting.faults(recipe)])
    return recipe


def _parameter_problems(error: ValidationError, document: Document) -> list[SmeltError]:
    """What is wrong with the parameters of a recipe whose only other faults are unknown keys."""
    if not isinstance(document.value, dict) or document.value.get("methods"):
        return []  # a method of one's own is not known before its file is loaded
    tree = copy.deepcopy(document.value)
    for detail in error.errors(include_url=False):
        if detail["type"] != "extra_forbidden":
            return []
        *outer, key = detail["loc"]
        node = tree
        for part in outer:
            node = node[part]
        node.pop(key, None)
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError:
        return []
    recipe._document = document
    return check_parameters(recipe, present_only=True)


def _not_a_file(name: str, kind: str | None) -> RecipeError:
    path = Path(name)
    if kind == "folder":
        recipes = [entry for entry in files.list_folder(path) if entry.endswith(_SUFFIXES)]
        fix = f"did you mean {path / recipes[0]}?" if recipes else None
        return RecipeError("the recipe is a folder, not a file", where=[name], fix=fix)
    if kind == "other":
        return RecipeError("the recipe is not a regular file", where=[name])
    return RecipeError("there is no such recipe", where=[name], fix=_nearest_file(path))


def _nearest_file(path: Path) -> str | None:
    if files.kind(path.parent) != "folder":
        return None
    near = [entry for entry in files.list_folder(path.parent) if entry.endswith(_SUFFIXES)]
    close = nearest(path.name, near)
    return f"did you mean {path.parent / close}?" if close else None
