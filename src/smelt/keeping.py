"""Merges that a recipe asks to keep: written once, each under a digest of all that its numbers follow from.

So a merge that was edited, or whose inputs were, is made again, and another one is read from where it lies. A kept
merge is a whole checkpoint with its record; whatever is not that, is made again too.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from smelt._version import __version__
from smelt.engine.nesting import Step
from smelt.errors import InputError, StorageError
from smelt.lineage.trusted import check_record
from smelt.planning.entries import Plan
from smelt.planning.locate import Model
from smelt.recipe.canonical import canonical, digest
from smelt.recipe.nesting import needed
from smelt.recipe.schema import Recipe
from smelt.storage import files
from smelt.storage.checkpoint import Checkpoint
from smelt.storage.sources.local import open_folder

FOLDER = ".smelt-kept"
"""Where kept merges lie, beside the output, unless asked otherwise."""


@dataclass(frozen=True, slots=True)
class Kept:
    """Where a merge is kept, and whether it is there; if not, it will be made."""

    folder: Path
    there: bool


@dataclass(frozen=True, slots=True)
class Alone:
    """A merge that is written by itself: its recipe, its plan, and the merges that it is made of."""

    recipe: Recipe
    plan: Plan
    steps: tuple[Step, ...]


def look(
    steps: Sequence[Step],
    opened: Mapping[str, Model],
    folder: Path,
    *,
    allow: Collection[str],
    device: str,
    method_files: Mapping[str, str],
) -> dict[str, Kept]:
    """For each of the merges that are to be kept its place in `folder`."""
    names = {text: model.name for text, model in opened.items()}
    shared = {"smelt": __version__, "allow": sorted(allow), "device": device, "methods": sorted(method_files.values())}
    contents: dict[str, str] = {}
    found: dict[str, Kept] = {}
    for step in steps:
        tree = {
            **shared,
            "recipe": canonical(step.recipe, rename=names),
            "seed": step.plan.seed,
            "inputs": [_input(model, contents) for model in step.models],
        }
        text = json.dumps(tree, sort_keys=True, ensure_ascii=False)
        contents[step.name] = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]
        if step.keep:
            place = folder / contents[step.name]
            found[step.name] = Kept(place, _is_there(step, place))
    return found


def refuse_inside(out: Path, kept: Mapping[str, Kept]) -> None:
    """Raise StorageError where a merge would be kept in the folder that is to be written, or the other way round."""
    for one in kept.values():
        target, place = Path(os.path.realpath(out)), Path(os.path.realpath(one.folder))
        if target.is_relative_to(place) or place.is_relative_to(target):
            raise StorageError(
                "the output and a merge that is kept would lie in one another",
                where=[f"output {target}", f"kept   {place}"],
                fix="choose another folder with --keep-folder",
            )


def read_kept(step: Step, folder: Path, stack: ExitStack) -> None:
    """Have the merge read from the folder in which it is kept; closed with `stack`. Raises InputError if it is not."""
    step.source.read_from(stack.enter_context(_opened(step, folder)))


def by_itself(step: Step, recipe: Recipe, steps: Sequence[Step], names: Mapping[str, str]) -> Alone:
    """A merge of `recipe` as one that is written by itself: with the merges that it is made of, and no others.

    `names` are what papers call the models of the recipe, by the recipe's names.
    """
    alone = step.recipe.model_copy(update={"merges": recipe.merges, "methods": recipe.methods})
    inner = set(needed(alone))
    merges = {name: one for name, one in (recipe.merges or {}).items() if name in inner}
    alone = alone.model_copy(update={"merges": merges or None})
    plan = replace(step.plan, recipe_digest=digest(alone, rename=names))
    return Alone(alone, plan, tuple(one for one in steps if one.name in inner))


def _input(model: Model, contents: Mapping[str, str]) -> Any:
    """What tells one input from another: of a merge what it is made of, of a file its header, and sha256 or stamp."""
    if model.planned.merged:
        return contents[model.name]
    return [
        [info.name, info.size, info.header_digest, info.blob_sha256 or list(info.stamp)] for info in model.source.files
    ]


def _is_there(step: Step, folder: Path) -> bool:
    if files.kind(folder) != "folder":
        return False
    try:
        _opened(step, folder).close()
    except InputError:
        return False
    return True


def _opened(step: Step, folder: Path) -> Checkpoint:
    """The kept checkpoint, as far as headers and record show the merge's. Raises InputError."""
    checkpoint = open_folder(folder, name=step.name)
    try:
        check_record(checkpoint, folder)
        there = {name: (spec.dtype, spec.shape) for name, spec in checkpoint.tensors.items()}
        if there != {name: (spec.dtype, spec.shape) for name, spec in step.source.tensors.items()}:
            raise InputError("the folder holds other tensors than the merge has", where=[str(folder)])
    except BaseException:
        checkpoint.close()
        raise
    return checkpoint
