"""A checkpoint in a local folder: which files it consists of, and whether they agree with one another.

What is accepted: `model.safetensors`; shards with `model.safetensors.index.json`; safetensors files without an index;
one safetensors file given directly. The index is not believed: each tensor must be in the file it is listed for, each
tensor of a listed file must be listed, none may be in two files. All problems are reported together.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from smelt.errors import InputError, SmeltError, raise_all
from smelt.specs import TensorSpec
from smelt.storage import files, header, paths, strict_json
from smelt.storage.checkpoint import LARGE_LIMIT, Checkpoint, FileInfo
from smelt.storage.header import Header
from smelt.storage.layout import INDEX, SINGLE

ADAPTER = "adapter_model.safetensors"
_SHARD = re.compile(r"(.*)-(\d{5,})-of-(\d{5,})\.safetensors")
_OTHER_WEIGHTS = re.compile(r".*\.(bin|pt|pth|ckpt|gguf|h5|msgpack|onnx)|adapter_model\..*")
_SHOWN = 8
_CONVERT = "convert the model to safetensors first (load it with transformers and save_pretrained), or use another"


@dataclass(frozen=True, slots=True)
class _Part:
    """One weight file with its checked header."""

    info: FileInfo
    header: Header


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
    if INDEX in names:
        return _open_indexed(path, name, names)
    return _open_parts(path, name, _choose(path, name, names))


def weight_files(folder: Path, *, name: str) -> list[str]:
    """The names of the weight files that `open_folder` would read, whether or not they are there and sound.

    Raises InputError when the folder has none, or they cannot be told apart.
    """
    names = files.list_folder(folder)
    if INDEX in names:
        return sorted(set(_read_index(folder, name).values()))
    return _choose(folder, name, names)


# --- which files ------------------------------------------------------------------------------------------------


def _open_file(path: Path, name: str) -> Checkpoint:
    if not path.name.endswith(".safetensors"):
        raise InputError("the model is not a safetensors file", where=[name, str(path)], fix=_CONVERT)
    part = _read_part(path.parent, path.name, name, real=files.resolve(path))
    return _assemble(path.parent, name, [part])


def _choose(folder: Path, name: str, names: Sequence[str]) -> list[str]:
    """The weight files of a folder without an index."""
    weights = [entry for entry in names if entry.endswith(".safetensors") and entry != ADAPTER]
    weights = [entry for entry in weights if not entry.startswith(".")]
    shards = [entry for entry in weights if _SHARD.fullmatch(entry)]
    if SINGLE in weights:
        stale = [entry for entry in shards if entry.startswith("model-")]
        if stale:
            raise InputError(
                f"{SINGLE} and shards are both there, and nothing says which of them is the model",
                where=[name, *_listed(stale)],
                fix="remove the one that is stale",
            )
        return [SINGLE]
    if not weights:
        raise _no_weights(folder, name, names)
    if shards and shards != weights:
        raise InputError(
            "several sets of safetensors files, and no index that says which is the model",
            where=[name, *_listed(weights)],
            fix="give the path of one file, or leave only one set in the folder",
        )
    if shards:
        raise_all(_incomplete(shards, name))
    return weights


def _incomplete(shards: Sequence[str], name: str) -> Iterable[InputError]:
    """A problem for each set of `NAME-00001-of-0000N` files that lacks some, or for more than one set."""
    sets: dict[tuple[str, int], set[int]] = {}
    for entry in shards:
        match = _SHARD.fullmatch(entry)
        assert match
        sets.setdefault((match[1], int(match[3])), set()).add(int(match[2]))
    if len(sets) > 1:
        yield InputError(
            "shards of several sets, and no index that says which is the model",
            where=[name, *_listed(shards)],
            fix="leave only one set in the folder",
        )
    for (stem, total), numbers in sets.items():
        if numbers != set(range(1, total + 1)):
            yield InputError(
                f"{len(numbers)} of {total} shards {stem!r} are there",
                where=[name],
                fix="fetch the missing shards",
            )


def _no_weights(folder: Path, name: str, names: Sequence[str]) -> InputError:
    others = [entry for entry in names if _OTHER_WEIGHTS.fullmatch(entry)]
    if others and all(entry.startswith("adapter_") for entry in others):
        fix = "merge the adapter into its base model first (peft: merge_and_unload)"
    else:
        fix = _CONVERT if others else "check the path; a model has model.safetensors or shards with an index"
    found = [f"found {entry}" for entry in _listed(others)] or [f"no weight files in {folder}"]
    return InputError("the model has no safetensors files", where=[name, *found], fix=fix)


# --- with an index ------------------------------------------------------------------------------------------------


def _open_indexed(folder: Path, name: str, names: Sequence[str]) -> Checkpoint:
    weight_map = _read_index(folder, name)
    listed: dict[str, set[str]] = {}
    for tensor, file in weight_map.items():
        listed.setdefault(file, set()).add(tensor)
    problems: list[SmeltError] = []
    if SINGLE in names and listed.keys() != {SINGLE}:
        raise InputError(
            f"{SINGLE} and {INDEX} contradict each other: the index points at other files",
            where=[name, *_listed(sorted(listed))],
            fix="remove the one that is stale; transformers would load model.safetensors",
        )
    stray = [entry for entry in names if entry not in listed and _looks_like_shard(entry)]
    if stray:
        problems.append(
            InputError(
                f"{INDEX} does not list shards that are in the folder",
                where=[name, *_listed(stray)],
                fix="remove them if they are stale, or fetch the index again",
            )
        )
    parts: dict[str, _Part] = {}
    for file in sorted(listed):
        try:
            parts[file] = _read_part(folder, file, name)
        except SmeltError as error:
            problems.append(error)
    problems.extend(_disagreements(listed, parts, name))
    raise_all(problems)
    return _assemble(folder, name, [parts[file] for file in sorted(parts)])


def _looks_like_shard(name: str) -> bool:
    return name.startswith("model-") and _SHARD.fullmatch(name) is not None


def _read_index(folder: Path, name: str) -> dict[str, str]:
    """The index's map tensor -> file, its form checked and every file name a plain one."""
    where = [f"{name}: {INDEX}"]
    content = files.read_bytes(paths.inside(folder, INDEX, label=name), limit=LARGE_LIMIT)
    tree = strict_json.parse(content, where=where)
    weight_map = tree.get("weight_map") if isinstance(tree, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError("the index must be an object with a non-empty weight_map", where=where)
    checked: dict[str, str] = {}
    problems: list[SmeltError] = []
    for tensor, file in weight_map.items():
        if isinstance(file, str) and paths.is_plain_name(file) and file.endswith(".safetensors"):
            checked[tensor] = file
        elif len(problems) < _SHOWN:
            said = repr(file)[:200]
            problems.append(
                InputError(
                    f"the index lists a tensor in {said}, which is not the name of a safetensors file",
                    where=[*where, f"tensor {tensor[:200]!r}"],
                )
            )
    raise_all(problems)
    return checked


def _disagreements(listed: dict[str, set[str]], parts: dict[str, _Part], name: str) -> Iterable[InputError]:
    """Tensors that the index lists and their file lacks, and the other way round; one problem for each file."""
    homes: dict[str, str] = {}
    for file, part in parts.items():
        for tensor in part.header.tensors:
            homes.setdefault(tensor, file)
    for file, part in parts.items():
        present = part.header.tensors
        missing = sorted(listed[file] - present.keys())
        if missing:
            lines = [f"{t} (it is in {homes[t]})" if t in homes else t for t in missing[:_SHOWN]]
            yield InputError(
                f"{len(missing)} tensors that the index lists for {file} are not in it",
                where=[name, *lines, *_more(missing)],
                fix="fetch the index and the shards again, from one revision",
            )
        unlisted = [tensor for tensor in present if tensor not in listed[file]]
        if unlisted:
            yield InputError(
                f"{len(unlisted)} tensors of {file} are not listed for it in the index",
                where=[name, *_listed(unlisted)],
                fix="fetch the index and the shards again, from one revision",
            )
    yield from _twice(parts.values(), name)


# --- without an index, and in the end -----------------------------------------------------------------------------


def _open_parts(folder: Path, name: str, weights: Sequence[str]) -> Checkpoint:
    parts: list[_Part] = []
    problems: list[SmeltError] = []
    for file in weights:
        try:
            parts.append(_read_part(folder, file, name))
        except SmeltError as error:
            problems.append(error)
    problems.extend(_twice(parts, name))
    raise_all(problems)
    return _assemble(folder, name, parts)


def _read_part(folder: Path, file: str, name: str, *, real: Path | None = None) -> _Part:
    """Check one weight file's place and header. Raises InputError naming model and file."""
    label = f"{name}: {file}"
    if real is None:
        if files.kind(folder / file) is None:
            raise InputError("a weight file is missing", where=[label], fix="fetch the missing file")
        real = paths.inside(folder, file, label=name)
    with files.open_read(real) as opened:
        try:
            checked = header.read(opened, file)
        except InputError as error:  # it names the file; the model is known here
            where = [label, *(line for line in error.where if line != file)]
            raise InputError(error.message, where=where, fix=error.fix) from error
        info = FileInfo(file, opened.size, checked.digest, real, opened.stamp(), paths.blob_sha256(real))
    return _Part(info, checked)


def _twice(parts: Iterable[_Part], name: str) -> Iterable[InputError]:
    homes: dict[str, str] = {}
    again: list[str] = []
    for part in parts:
        for tensor in part.header.tensors:
            if tensor in homes:
                again.append(f"{tensor}: in {homes[tensor]} and {part.info.name}")
            homes.setdefault(tensor, part.info.name)
    if again:
        yield InputError(
            f"{len(again)} tensors are in more than one file",
            where=[name, *_listed(again)],
            fix="remove the files that do not belong to the model",
        )


def _assemble(folder: Path, name: str, parts: Sequence[_Part]) -> Checkpoint:
    tensors: dict[str, TensorSpec] = {}
    metadata: dict[str, str] = {}
    for part in parts:
        tensors.update(part.header.tensors)
        metadata = {**part.header.metadata, **metadata}
    infos = [part.info for part in parts]
    return Checkpoint(name, folder, tensors=tensors, weight_files=infos, metadata=metadata)


def _listed(entries: Sequence[str]) -> list[str]:
    return [*entries[:_SHOWN], *_more(entries)]


def _more(entries: Sequence[str]) -> list[str]:
    return [f"and {len(entries) - _SHOWN} more"] if len(entries) > _SHOWN else []
