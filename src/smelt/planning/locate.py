"""A recipe's model names -> opened checkpoints with their config and anatomy.

`x/y` means an existing folder beside the recipe, then in the working folder, then the hub cache, then the hub. A name
that begins with `./`, `../`, `~` or is absolute never means the hub.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from smelt.errors import InputError, RecipeError, SmeltError, nearest, raise_all
from smelt.planning.anatomy import Anatomy, anatomy, check
from smelt.planning.entries import PlannedModel
from smelt.recipe.references import ModelName, resolve_name
from smelt.specs import ModelRef
from smelt.storage.checkpoint import TensorSource
from smelt.storage.sources.hub import HubFolder, resolve
from smelt.storage.sources.local import open_folder
from smelt.storage.sources.pickles import has_pickles, open_pickles
from smelt.storage.sources.remote import open_remote
from smelt.storage.sources.scaled import read_as_weights

_WINDOWS = re.compile(r"\\|^[A-Za-z]:")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True, slots=True)
class Model:
    """An opened model: where its tensors come from, its raw config.json, what its tensors are."""

    planned: PlannedModel
    source: TensorSource
    config: dict[str, object] | None
    anatomy: Anatomy

    @property
    def name(self) -> str:
        return self.planned.published


def open_models(
    names: Mapping[ModelName, Sequence[str]],
    *,
    beside: Path | None,
    stack: ExitStack,
    weights: bool = True,
    trust_pickles: bool = False,
    merges: Sequence[str] = (),
) -> dict[str, Model]:
    """Open every model of a recipe; `beside` is the recipe's folder. All that cannot be opened is told at once.

    `names` gives, for each model, where the recipe first mentions it (for messages).

    Two names that lead to the same folder give the same Model. The checkpoints are closed with `stack`. With `weights`
    false, no weights are downloaded: of a model that the hub cache does not hold completely, tensors cannot be read.
    With `trust_pickles`, models that are stored as pickles are read, by a child process. `merges` are the names of the
    recipe's own merges: no model is published under one of them.
    """
    models: dict[str, Model] = {}
    by_place: dict[tuple[str, str | None], Model] = {}
    taken: set[str] = set(merges)
    problems: list[SmeltError] = []
    for name, mention in names.items():
        try:
            ref = resolve_name(name, folders=_roots(beside))
            place, published, hub = _find(ref, beside, weights)
            commit = hub.commit if hub is not None else None
            key = (os.path.realpath(place), commit)
            if key not in by_place:
                unique = _unique(published, taken)
                taken.add(unique)
                source = _open(place, hub, unique, stack, trust_pickles=trust_pickles)
                config = source.json("config.json")
                parts = anatomy(source.tensors, config)
                problems.extend(_at(mention, problem) for problem in check(parts, config, unique))
                repository = published.partition("@")[0] if commit is not None else None
                planned = PlannedModel(ref, unique, str(place), commit, repository)
                by_place[key] = Model(planned, source, config, parts)
            models[name.text] = by_place[key]
        except SmeltError as error:
            problems.extend(_at(mention, problem) for problem in error.problems)
            if name.text not in models and (close := nearest(name.text, merges)):
                problems[-1].fix = f"did you mean the merge `{close}`?"
    raise_all(problems)
    return models


def clashes(names: Mapping[str, Sequence[str]], *, beside: Path | None) -> list[SmeltError]:
    """Names of merges (with where the recipe has them) that are folders too: it would not be plain which is meant."""
    problems: list[SmeltError] = []
    for name, where in names.items():
        for root in _roots(beside):
            if os.path.lexists(root / name):
                fix = f"rename the merge; the folder can always be named as ./{name}"
                there = [*where, f"folder {root / name}"]
                problems.append(
                    RecipeError(f"'{name}' is a merge of this recipe and a folder too", where=there, fix=fix)
                )
                break
    return problems


def open_recorded(
    name: str, place: Path, *, commit: str | None, stack: ExitStack, trust_pickles: bool = False
) -> Model:
    """Open a model again under the name by which a record knows it, wherever it lies now; closed with `stack`.

    Raises InputError (or ManyProblems) as `open_models` does.
    """
    source = _open(place, None, name, stack, trust_pickles=trust_pickles)
    config = source.json("config.json")
    planned = PlannedModel(ModelRef(name, name), name, str(place), commit)
    return Model(planned, source, config, anatomy(source.tensors, config))


def _at(mention: Sequence[str], problem: SmeltError) -> SmeltError:
    """The problem, with the place in the recipe that names the model."""
    return type(problem)(problem.message, where=[*mention, *problem.where], fix=problem.fix)


def _roots(beside: Path | None) -> list[Path]:
    """Where relative paths begin: the recipe's folder, then the working folder."""
    roots = [] if beside is None else [beside]
    with contextlib.suppress(OSError):  # the working folder may have been deleted
        roots.append(Path.cwd())
    return list(dict.fromkeys(roots))


def _open(
    place: Path, hub: HubFolder | None, name: str, stack: ExitStack, *, trust_pickles: bool = False
) -> TensorSource:
    source: TensorSource
    if hub is not None and not hub.complete:
        source = stack.enter_context(open_remote(hub, name=name))
    elif trust_pickles and has_pickles(place):
        source = stack.enter_context(open_pickles(place, name=name))
    else:
        source = stack.enter_context(open_folder(place, name=name))
    return read_as_weights(source)


def missing_folders(names: Mapping[ModelName, Sequence[str]], *, beside: Path | None) -> list[SmeltError]:
    """Models that are certainly not there: paths, which the hub is not asked for. Nothing is opened.

    So a recipe with a mistake is told all its mistakes, without a download.
    """
    problems: list[SmeltError] = []
    for name, mention in names.items():
        if _WINDOWS.search(name.text):  # the recipe's own check refuses these
            continue
        try:
            _find_folder(resolve_name(name, folders=_roots(beside)), beside)
        except SmeltError as error:
            problems.extend(_at(mention, problem) for problem in error.problems)
    return problems


def local_folders(names: Mapping[ModelName, Sequence[str]], *, beside: Path | None) -> list[Path]:
    """The folders (and files) of the models that are on this machine, outside the hub cache; nothing is opened."""
    found: list[Path] = []
    for name in names:
        with contextlib.suppress(SmeltError):  # told by who opens it
            folder, _ = _find_folder(resolve_name(name, folders=_roots(beside)), beside)
            found += [] if folder is None else [folder]
    return list(dict.fromkeys(found))


def _find_folder(ref: ModelRef, beside: Path | None) -> tuple[Path | None, list[Path]]:
    """The local folder of a model, or None where only the hub can have it; and the places that were tried."""
    text = ref.path.rstrip("/\\") or ref.path
    local_only = text.startswith((".", "~", "/", "\\")) or Path(text).is_absolute() or ":" in text or _is_file(text)
    here = Path(os.path.expanduser(text))
    tried = [here] if here.is_absolute() else [root / here for root in _roots(beside)]
    for folder in tried:
        if os.path.exists(folder):
            if _is_file(folder.name) and folder.is_file():  # a link of that name may lead to a file of any name
                return folder.parent.resolve() / folder.name, tried
            return folder.resolve(), tried
    if local_only or not _HUB_ID.fullmatch(text):
        raise InputError(f"there is no model at '{ref.text}'", where=_missing(tried), fix=_near_folder(tried))
    return None, tried


def _find(ref: ModelRef, beside: Path | None, weights: bool) -> tuple[Path, str, HubFolder | None]:
    """The folder of a model, the name under which it is published, and what is known of it if it is the hub's."""
    folder, tried = _find_folder(ref, beside)
    if folder is not None:
        return folder, folder.name.encode("utf-8", "replace").decode() or "model", None
    try:
        found = resolve(ref.path.rstrip("/\\"), ref.revision, weights=weights)
    except InputError as error:
        where = [*error.where, *_missing(tried)]
        raise InputError(error.message, where=where, fix=_near_folder(tried, error.fix)) from error
    published = found.repo if ref.revision is None else f"{found.repo}@{ref.revision}"
    return found.path, published, found


def _missing(tried: list[Path]) -> list[str]:
    return [f"no such {'file' if _is_file(path.name) else 'folder'}: {path}" for path in tried]


def _is_file(name: str) -> bool:
    """Whether a name is that of a weight file: never a repository of the hub."""
    return name.endswith(".safetensors")


def _near_folder(tried: list[Path], otherwise: str | None = None) -> str:
    """A folder beside the missing one whose name is close, as a question."""
    for folder in tried:
        if os.path.isdir(folder.parent):
            there = (path for path in folder.parent.iterdir() if _is_file(path.name) or path.is_dir())
            alike = [path.name for path in there if _is_file(path.name) == _is_file(folder.name)]
            close = nearest(folder.name, sorted(alike))
            if close:
                return f"did you mean {folder.parent / close}?"
    return otherwise or "paths are relative to the recipe's folder, or to the working folder"


def _unique(name: str, taken: set[str]) -> str:
    """Two folders of the same name are told apart by a number."""
    number, unique = 1, name
    while unique in taken:
        number += 1
        unique = f"{name}-{number}"
    return unique
