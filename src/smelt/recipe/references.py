"""Model names: as a recipe writes them, and what they refer to (a path, or a hub id with a revision)."""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from smelt.errors import RecipeError, nearest
from smelt.recipe.faults import Fault, describe, refuse
from smelt.specs import ModelRef

_HUB = re.compile(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)?", re.ASCII)
_PATH = re.compile(r"\.{1,2}$|\.{1,2}[/\\]|[/\\~]|[A-Za-z]:[/\\]")
_DRIVE = re.compile(r"[A-Za-z]:[/\\]")
_KEYS = ("model", "path", "revision", "lora", "override_architecture")


@dataclass(frozen=True, slots=True)
class ModelName:
    """A model as a recipe names it.

    `text` is the name in one line, the same for the same model however it is written. `path` is set where the recipe
    wrote a mapping: then path and revision were given apart, and `@` in the path is just a character.
    """

    text: str
    path: str | None = None
    revision: str | None = None
    lora: str | None = None
    override_architecture: str | None = None

    def __str__(self) -> str:
        return self.text

    @property
    def key(self) -> str:
        """The same for names that differ in spelling alone: `./models/a/` and `models/a`."""
        return self.text if "://" in self.text or not self.text.strip("/") else posixpath.normpath(self.text)

    @property
    def is_one_line(self) -> bool:
        """Whether `text` alone says as much as path and revision apart: no `@` or `+` in them misleads."""
        if self.path is None:
            return True
        if self.revision is None:
            return not set("@+") & set(self.path)
        return _HUB.fullmatch(self.path) is not None and not set("@+") & set(self.revision)


def read_model_name(value: Any) -> ModelName:
    """A name from its forms: text, {path, revision}, or {model: <either>, lora, override_architecture}."""
    if isinstance(value, ModelName):
        return value
    faults: list[Fault] = []
    name = _read(value, (), faults)
    if faults or name is None:
        refuse(faults)
    return name


def parse_reference(text: str, *, folders: Sequence[Path] = (Path(),)) -> ModelRef:
    """What a model name refers to: `org/name@revision` is taken apart, a path is left alone.

    Paths are what begins with `./`, `../`, `/`, `~` or a drive letter, what looks like no hub id, and what exists in
    one of `folders`. Raises RecipeError for an empty name and for `+adapter`, which is not supported yet.

    >>> parse_reference("org/name@main").revision
    'main'
    """
    if not text.strip():
        raise RecipeError("a model name is empty")
    if _exists(text, folders):
        return ModelRef(text, text)
    if "+" in text:
        base, _, adapter = text.rpartition("+")
        raise adapter_error(text, base=base, adapter=adapter)
    if _PATH.match(text):
        return ModelRef(text, text)
    path, at, revision = text.partition("@")
    if not at or not _HUB.fullmatch(path):
        return ModelRef(text, text)
    if not revision or "@" in revision:
        raise RecipeError(
            f"the model name '{text}' has {'two @' if revision else 'no revision after its @'}",
            fix=f"write {path}@REVISION, or {path} alone for its default branch",
        )
    return ModelRef(text, path, revision)


def resolve_name(name: ModelName, *, folders: Sequence[Path] = (Path(),)) -> ModelRef:
    """As `parse_reference`, for a name in any of the recipe's forms."""
    if name.lora is not None:
        raise adapter_error(name.text, base=name.path or name.text.removesuffix(f"+{name.lora}"), adapter=name.lora)
    if name.path is not None:
        return ModelRef(name.text, name.path, name.revision)
    return parse_reference(name.text, folders=folders)


def adapter_error(text: str, *, base: str, adapter: str) -> RecipeError:
    """The refusal of `model+adapter`."""
    return RecipeError(
        f"'{text}' asks for an adapter, and adapters are not supported yet",
        fix=f"merge '{adapter}' into '{base}' first (peft: merge_and_unload, save_pretrained) and name that folder",
    )


def windows_path_fix(text: str, *, separator: str = os.sep) -> str | None:
    r"""What to do about a path of Windows where paths are written otherwise; None where it is none, or all is well.

    >>> windows_path_fix(r".\models\tiny", separator="/")
    'write ./models/tiny; `/` works on every system'
    """
    if separator == "\\":
        return None
    if _DRIVE.match(text) or text.startswith("\\\\"):
        return "name the folder as it is called here, such as /data/models/NAME or ./NAME"
    return f"write {text.replace(chr(92), '/')}; `/` works on every system" if "\\" in text else None


def _exists(text: str, folders: Sequence[Path]) -> bool:
    try:
        return any(os.path.lexists(folder / text) for folder in folders)
    except (OSError, ValueError):  # a name that no file can have
        return False


def _read(value: Any, path: tuple[str | int, ...], faults: list[Fault]) -> ModelName | None:
    if isinstance(value, str):
        if value.strip():
            return ModelName(value)
        faults.append(Fault("a model name is empty", path))
        return None
    if not isinstance(value, dict):
        quoted = f'put it in quotes: "{value}"' if isinstance(value, (int, float)) else None
        faults.append(Fault(f"a model must be a name, not {describe(value)}", path, quoted))
        return None
    for key in value:
        if key not in _KEYS:
            close = nearest(key, _KEYS)
            known = f"did you mean `{close}`?" if close else f"known here: {', '.join(_KEYS)}"
            faults.append(Fault(f"unknown key `{key}`", (*path, key), known))
    texts = {key: value[key] for key in _KEYS[1:] if value.get(key) is not None and key != "lora"}
    for key, text in texts.items():
        if not isinstance(text, str) or not text.strip():
            fix = f'put it in quotes: "{text}"' if isinstance(text, (int, float)) else None
            faults.append(Fault(f"`{key}` must be text, not {describe(text)}", (*path, key), fix))
    lora = _read(value["lora"], (*path, "lora"), faults) if value.get("lora") is not None else None
    inner = None
    if value.get("model") is not None:
        if "path" in texts or "revision" in texts:
            fix = "write `model: {path: ..., revision: ...}`"
            faults.append(Fault("`path` and `revision` belong inside `model`", path, fix))
        inner = _read(value["model"], (*path, "model"), faults)
    elif "path" not in texts and not any(nearest(key, ["path", "model"]) for key in value if key not in _KEYS):
        faults.append(Fault("a model without `path`", path, "write `path: org/name`, or just the name"))
    if faults:
        return None
    architecture = texts.get("override_architecture")
    if inner is not None:
        name = replace(inner, override_architecture=architecture or inner.override_architecture)
    else:
        location, revision = texts["path"], texts.get("revision")
        name = ModelName(f"{location}@{revision}" if revision else location, location, revision, None, architecture)
    return name if lora is None else replace(name, text=f"{name.text}+{lora.text}", lora=lora.text)
