"""From a recipe to its opened models and the plan: all that a merge, a sweep, a check and a trial have in common."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from smelt import keeping
from smelt.engine.backends import CPU, check_name
from smelt.engine.forecast import Within, forecast, within
from smelt.engine.inputs import lies_in_files
from smelt.engine.nesting import Step, open_steps, with_steps
from smelt.errors import RecipeError, raise_all
from smelt.guarding import beside_models, unusable
from smelt.keeping import Kept
from smelt.methods.loading import MethodFile, load_file
from smelt.planning.build import build
from smelt.planning.locate import Model, clashes, local_folders, missing_folders, open_models
from smelt.prepared import Prepared
from smelt.recipe.check import check_parameters
from smelt.recipe.nesting import mentions
from smelt.recipe.parse import from_dict, load
from smelt.recipe.schema import Recipe, Relaxation

ALLOWED = get_args(Relaxation)
"""What `allow` may relax."""

_ON_DEVICE = "worked out on the device {}: numbers may differ in the last place from those of a merge on the CPU"
_SAID = {
    "workers": "the number of threads",
    "tile": "the tile size",
    "memory": "the memory",
    "shard_bytes": "the shard size",
}


@contextmanager
def prepare(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    *,
    allow: Iterable[str] = (),
    strict: bool = False,
    seed: int = 0,
    workers: int | None = None,
    tile: int | None = None,
    device: str = CPU,
    memory: int | None = None,
    trust_methods: bool = False,
    trust_pickles: bool = False,
    weights: bool = True,
    out: Path | None = None,
    overwrite: bool = False,
    keep_folder: Path | None = None,
    change: Callable[[Recipe], Recipe] | None = None,
) -> Iterator[Prepared]:
    """Parse, open and plan; the models are closed when the context ends.

    `recipe` is a path, a mapping or a Recipe. `strict` makes warnings errors. `memory` (bytes) cuts threads and buffers
    until the predicted peak is below it. With `weights` false, no weights are downloaded: the headers of a model on the
    hub are enough for a plan. Where the merge is to write into `out`, an `out` that cannot be is told before any model
    is opened, with the models that are not there. In `keep_folder` the merges are looked for that the recipe keeps:
    beside `out`, or in the working folder, unless it is given. `change` gives the recipe that is meant for the one that
    was read, before it is checked. Raises RecipeError, InputError or StorageError with
    every problem that was found.
    """
    allowed = allowances(allow)
    check_numbers(workers=workers, tile=tile, memory=memory)
    check_name(device)
    beside = path = None
    if isinstance(recipe, str | Path):
        path = Path(recipe)
        recipe = load(path)
        beside = Path(os.path.realpath(path)).parent
    elif not isinstance(recipe, Recipe):
        recipe = from_dict(recipe)
    with ExitStack() as stack:
        method_files = _load_methods(recipe, beside or Path.cwd(), stack, trust=trust_methods)
        recipe = recipe if change is None else change(recipe)
        problems = check_parameters(recipe)
        problems += clashes({name: recipe.where("merges", name) for name in recipe.merges or {}}, beside=beside)
        named = mentions(recipe)
        if problems:  # then nothing is fetched, but what is surely missing is told too
            raise_all([*problems, *missing_folders(named, beside=beside)])
        if out is not None:
            known = [*local_folders(named, beside=beside), *beside_models(path, method_files)]
            if problems := unusable(out, overwrite, known):
                raise_all([*problems, *missing_folders(named, beside=beside)])
        opened = open_models(
            named,
            beside=beside,
            stack=stack,
            weights=weights,
            trust_pickles=trust_pickles,
            merges=tuple(recipe.merges or ()),
        )
        opened, steps = open_steps(recipe, opened, allow=allowed, seed=seed)
        place = keep_folder or (Path(os.path.realpath(out)).parent if out is not None else Path()) / keeping.FOLDER
        kept = keeping.look(steps, opened, place, allow=allowed, device=device, method_files=method_files)
        yield planned(
            recipe,
            opened,
            steps,
            kept=kept,
            method_files=method_files,
            allow=allowed,
            strict=strict,
            seed=seed,
            workers=workers,
            tile=tile,
            device=device,
            memory=memory,
        )


def planned(
    recipe: Recipe,
    opened: Mapping[str, Model],
    steps: tuple[Step, ...],
    *,
    kept: Mapping[str, Kept],
    method_files: Mapping[str, str],
    allow: frozenset[str],
    strict: bool,
    seed: int,
    workers: int | None,
    tile: int | None,
    device: str,
    memory: int | None,
) -> Prepared:
    """The plan of a checked recipe over its opened models and merges, and what it will cost. Raises as `prepare`."""
    plan = with_steps(build(recipe, opened, allow=allow, seed=seed), recipe, steps)
    if device != CPU:
        plan = replace(plan, notes=(*plan.notes, _ON_DEVICE.format(device)))
    models = tuple({id(opened[name.text]): opened[name.text] for name in recipe.model_names()}.values())
    if strict and plan.warnings:
        raise RecipeError(strictly(len(plan.warnings)), where=list(plan.warnings))
    tokenizer = next(model for model in opened.values() if model.name == plan.tokenizer)
    within_it = Within({step.name: step.plan for step in steps}, {name: one.there for name, one in kept.items()})
    placed = {model.name for model in opened.values() if lies_in_files(model.source)}
    in_files = {i for i, model in enumerate(plan.models) if model.published in placed}
    if memory is None:
        cost = forecast(plan, workers=workers, tile=tile, device=device, merges=within_it, in_files=in_files)
    else:
        cost = within(memory, plan, workers=workers, tile=tile, device=device, merges=within_it, in_files=in_files)
    return Prepared(recipe, opened, models, tokenizer, plan, cost, method_files, steps, kept)


def allowances(allow: Iterable[str]) -> frozenset[str]:
    """The words to allow, checked. Raises RecipeError."""
    allowed = frozenset([allow] if isinstance(allow, str) else allow)
    if unknown := sorted(allowed - set(ALLOWED)):
        raise RecipeError(f"unknown word to allow: {', '.join(unknown)}", fix=f"known are {', '.join(ALLOWED)}")
    return allowed


def check_numbers(**numbers: int | None) -> None:
    """Numbers that must be 1 or more where they are given. Raises RecipeError."""
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise RecipeError(f"{_SAID[name]} must be at least 1, not {number}", fix="leave it out for the default")


def strictly(count: int) -> str:
    return (
        "a warning, and --strict makes it an error"
        if count == 1
        else f"{count} warnings, and --strict makes them errors"
    )


def _load_methods(recipe: Recipe, folder: Path, stack: ExitStack, *, trust: bool) -> dict[str, str]:
    """Load the method files that a recipe names: code, so only if the user trusts it. Gives the sha256 of each.

    Their methods are forgotten when `stack` ends.
    """
    if recipe.methods and not trust:
        raise RecipeError(
            f"the recipe names a method file, which is code: {', '.join(recipe.methods)}",
            where=recipe.where("methods"),
            fix="read the file, and pass --trust-methods (trust_methods=True) if you trust it",
        )
    loaded: dict[Path, MethodFile] = {}
    for file in recipe.methods:
        path = (folder / file).resolve()
        if path not in loaded:
            loaded[path] = load_file(path)
            stack.callback(loaded[path].unload)
    return {file: loaded[(folder / file).resolve()].sha256 for file in recipe.methods}
