"""Which names inside a model's folder may be followed, and where they lead.

Names come from a checkpoint (an index, a folder listing) and are not trusted: no path leaves its folder. The one
exception is the layout of the hub cache, where a snapshot holds links into the blobs of the same repository.
"""

from __future__ import annotations

import re
from pathlib import Path

from smelt.errors import InputError
from smelt.storage import files

_SHA256 = re.compile(r"[0-9a-f]{64}")


def is_plain_name(name: str) -> bool:
    """Whether `name` is one file name and nothing more: no separator, no parent, no drive, no control character.

    >>> is_plain_name("model.safetensors"), is_plain_name("../model.safetensors"), is_plain_name("C:x")
    (True, False, False)
    """
    if name in {"", ".", ".."} or len(name) > 255:
        return False
    return not any(character in '/\\:\x7f"*?<>|' or character < " " for character in name) and _encodes(name)


def _encodes(name: str) -> bool:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def inside(folder: Path, name: str, *, label: str) -> Path:
    """The real path of file `name` of `folder`, all links followed.

    `label` is the model's name in errors. Raises InputError when the name is not a plain one, when there is nothing,
    or when a link leads out of the folder (or, in a hub cache, out of the repository's folder in that cache).
    """
    if not is_plain_name(name):
        raise InputError(
            f"{name!r} is not a plain file name",
            where=[label],
            fix="remove the file, or do not use this model",
        )
    real = files.resolve(folder / name)
    home = files.resolve(folder)
    if real.is_relative_to(home) or real.is_relative_to(cache_folder(home) or home):
        return real
    raise InputError(
        f"the file {name!r} is a link that leaves the model's folder",
        where=[label, f"folder {folder}"],
        fix="put the file itself in the folder, if you trust it",
    )


def cache_folder(folder: Path) -> Path | None:
    """The repository's folder in the hub cache, when `folder` (a real path) is a snapshot in it.

    >>> print(cache_folder(Path("/c/models--org--name/snapshots/abc")))
    /c/models--org--name
    """
    for parent in folder.parents:
        if parent.name == "snapshots" and parent.parent.name.startswith("models--"):
            return parent.parent
    return None


def blob_sha256(real: Path) -> str | None:
    """The sha256 that a hub-cache blob's file name tells (large files only), or None."""
    return real.name if real.parent.name == "blobs" and _SHA256.fullmatch(real.name) else None
