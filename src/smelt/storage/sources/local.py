"""A checkpoint in a local folder, or one safetensors file given directly.

Which files it consists of, and what they must agree on, is said in `sources.shards`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from smelt.errors import InputError
from smelt.storage import files, paths
from smelt.storage.checkpoint import LARGE_LIMIT, Checkpoint, FileInfo
from smelt.storage.layout import INDEX
from smelt.storage.sources import shards
from smelt.storage.sources.shards import Part


def open_folder(path: Path, *, name: str) -> Checkpoint:
    """Open the checkpoint in a folder (or one safetensors file); `name` is its label in messages.

    Raises InputError (or ManyProblems of them) when it is missing, incomplete or contradicts itself.
    """
    found = files.kind(path)
    if found == "file":
        return _open_file(path, name)
    if found != "folder":
        what = "does not exist" if found is None else "is neither a folder nor a safetensors file"
        raise InputError(f"the model {what}", where=[name, str(path)], fix="check the path")
    names = files.list_folder(path)
    _refuse_pipeline(path, names, name)
    index = read_index(path, name=name) if INDEX in names else None
    parts = shards.gather(names, index, name=name, place=str(path), read=lambda file: _read_part(path, file, name))
    return _assemble(path, name, parts)


def weight_files(folder: Path, *, name: str) -> list[str]:
    """The names of the weight files that `open_folder` would read, whether or not they are there and sound.

    Raises InputError when the folder has none, or they cannot be told apart.
    """
    names = files.list_folder(folder)
    index = read_index(folder, name=name) if INDEX in names else None
    return shards.weight_names(names, index, name=name, place=str(folder))


def read_index(folder: Path, *, name: str) -> dict[str, str]:
    """The folder's index: tensor -> file name. Raises InputError when it is not there or not sound."""
    content = files.read_bytes(paths.inside(folder, INDEX, label=name), limit=LARGE_LIMIT)
    return shards.parse_index(content, name=name)


def _open_file(path: Path, name: str) -> Checkpoint:
    if not path.name.endswith(".safetensors"):
        pickled = path.name.endswith(shards.PICKLES)
        raise InputError(
            f"the model is not a safetensors file{', but a pickle, which is a program' if pickled else ''}",
            where=[name, str(path)],
            fix=shards.TRUST if pickled else shards.CONVERT,
        )
    part = _read_part(path.parent, path.name, name, real=files.resolve(path))
    return _assemble(path.parent, name, [part], alone=not shards.stands_for_folder(path.name))


def _refuse_pipeline(folder: Path, names: Sequence[str], name: str) -> None:
    """Raise InputError for a folder without weights whose subfolders have some: a pipeline of several models."""
    if any(entry.endswith((".safetensors", *shards.PICKLES)) for entry in names):
        return
    nested = []
    for entry in names:
        if not entry.startswith(".") and files.kind(folder / entry) == "folder":
            weights = [file for file in files.list_folder(folder / entry) if file.endswith(".safetensors")]
            nested += [f"{entry}/{file}" for file in weights[:1]]
    if nested:
        raise shards.pipeline(name, nested, example=str(folder / nested[0].partition("/")[0]))


def _read_part(folder: Path, file: str, name: str, *, real: Path | None = None) -> Part:
    """Check one weight file's place and header. Raises InputError naming model and file."""
    label = f"{name}: {file}"
    if real is None:
        if files.kind(folder / file) is None:
            raise shards.missing(label)
        real = paths.inside(folder, file, label=name)
    with files.open_read(real) as opened:
        checked = shards.read_header(opened, file, label=label)
        info = FileInfo(file, opened.size, checked.digest, real, opened.stamp(), paths.blob_sha256(real))
    return Part(info, checked)


def _assemble(folder: Path, name: str, parts: Sequence[Part], *, alone: bool = False) -> Checkpoint:
    tensors, metadata = shards.merged(parts)
    infos = [part.info for part in parts]
    return Checkpoint(name, folder, tensors=tensors, weight_files=infos, metadata=metadata, alone=alone)
