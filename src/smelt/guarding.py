"""What a merge must leave alone: its inputs, which no output may touch, and which nobody may change meanwhile."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from smelt import keeping
from smelt.errors import InputError, SmeltError, StorageError
from smelt.keeping import Kept
from smelt.planning.locate import Model
from smelt.prepared import Prepared
from smelt.storage.writer import check_out


def inputs_of(recipe: object, prepared: Prepared) -> list[Path]:
    """The folders and files that a merge reads: models, the recipe, method files."""
    models = dict.fromkeys(model.planned.place for model in prepared.opened.values() if model.source.root is not None)
    path = Path(recipe) if isinstance(recipe, str | Path) else None
    return [*(Path(os.path.realpath(place)) for place in models), *beside_models(path, prepared.method_files)]


def beside_models(path: Path | None, method_files: Iterable[str]) -> list[Path]:
    """The recipe, if it is a file, and the method files that it names."""
    if path is None:
        return []
    methods = [Path(os.path.realpath(path)).parent / file for file in method_files]
    return [Path(os.path.realpath(place)) for place in (path, *methods)]


def unusable(out: Path, overwrite: bool, inputs: Sequence[Path]) -> list[SmeltError]:
    """Why `out` cannot be the output, as far as that is known before a model is opened.

    That it is an input is told first, as advice to replace or clear it would be bad advice then.
    """
    try:
        check_out(out, overwrite=overwrite)
    except SmeltError as error:
        try:
            refuse_overlap(out, inputs)
        except SmeltError as worse:
            return [worse]
        return [error]
    return []


def refuse_places(out: Path, inputs: Sequence[Path], kept: Mapping[str, Kept]) -> None:
    """The output, and the merges that the recipe keeps, must lie apart from the inputs and from each other."""
    refuse_overlap(out, inputs)
    keeping.refuse_inside(out, kept)
    for one in kept.values():
        refuse_overlap(one.folder, inputs)


def refuse_overlap(out: Path, inputs: Sequence[Path]) -> None:
    """The output must not be, hold, or lie in a folder (or be a file) that the merge reads."""
    target = Path(os.path.realpath(out))
    for given in inputs:
        if target == given or target.is_relative_to(given) or given.is_relative_to(target):
            relation = "is" if target == given else "lies in" if target.is_relative_to(given) else "holds"
            raise StorageError(
                f"the output folder {relation} an input",
                where=[f"output {target}", f"input  {given}"],
                fix="choose an output folder apart from models and recipe: inputs are never touched",
            )


def refuse_changed(models: Iterable[Model]) -> None:
    """Raise InputError where a weight file is no longer what it was when it was opened."""
    changed = dict.fromkeys(f"{model.name}: {name}" for model in models for name in model.source.changed())
    if changed:
        raise InputError(
            "input files were changed while they were being read",
            where=list(changed),
            fix="run again, and leave the inputs alone meanwhile",
        )
