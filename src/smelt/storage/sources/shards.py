"""Which weight files make a checkpoint, and whether they agree with one another: one set of rules wherever they lie.

What is accepted: `model.safetensors`; shards with `model.safetensors.index.json`; safetensors files without an index.
The index is not believed: each tensor must be in the file it is listed for, each tensor of a listed file must be
listed, none may be in two files. All problems are reported together.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from smelt.errors import InputError, SmeltError, raise_all
from smelt.specs import TensorSpec
from smelt.storage import header, paths, strict_json
from smelt.storage.checkpoint import FileInfo
from smelt.storage.header import Header, Ranges
from smelt.storage.layout import INDEX, SINGLE

CONVERT = "convert the model to safetensors first (load it with transformers and save_pretrained), or use another"
TRUST = "convert the model to safetensors first; or have torch read it in a process apart: --trust-pickles"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
"""What the names of pickled weights end in."""
PIPELINE = "model_index.json"
"""What diffusers puts beside the subfolders of a pipeline's models."""
_ADAPTER = "adapter_model.safetensors"
_SHARD = re.compile(r"(.*)-(\d{5,})-of-(\d{5,})\.safetensors")
_OF_FOLDER = re.compile(
    r"(?:model|pytorch_model|diffusion_pytorch_model)(?:\.[\w-]+|-\d{5,}-of-\d{5,})*\.(?:safetensors|bin|pt|pth|ckpt)"
)
_OTHER_WEIGHTS = re.compile(r".*\.(bin|pt|pth|ckpt|gguf|h5|msgpack|onnx)|adapter_model\..*")
_SHOWN = 8


@dataclass(frozen=True, slots=True)
class Part:
    """One weight file with its checked header."""

    info: FileInfo
    header: Header


def gather(
    names: Sequence[str], index: Mapping[str, str] | None, *, name: str, place: str, read: Callable[[str], Part]
) -> list[Part]:
    """The weight files of a model with files `names`, sorted, each read by `read` and all of them in agreement.

    `index` is the model's map tensor -> file, if it has one; `name` its label and `place` where its files lie, both
    for messages. Raises InputError (or ManyProblems, with those that `read` raised) when files are missing or
    contradict one another.
    """
    problems: list[SmeltError] = []
    listed: dict[str, set[str]] = {}
    if index is not None:
        for tensor, file in index.items():
            listed.setdefault(file, set()).add(tensor)
        problems.extend(_stray(names, listed, name))
    parts: dict[str, Part] = {}
    for file in weight_names(names, index, name=name, place=place):
        try:
            parts[file] = read(file)
        except SmeltError as error:
            problems.append(error)
    problems.extend(contradictions(parts, index, name=name))
    raise_all(problems)
    return list(parts.values())


def contradictions(parts: Mapping[str, Part], index: Mapping[str, str] | None, *, name: str) -> Iterable[InputError]:
    """What the files, by name, and the index say against each other: tensors misplaced, left out, or there twice."""
    if index is not None:
        listed: dict[str, set[str]] = {}
        for tensor, file in index.items():
            listed.setdefault(file, set()).add(tensor)
        yield from _disagreements(listed, parts, name)
    yield from _twice(parts.values(), name)


def stands_for_folder(file: str) -> bool:
    """Whether a weight file is called as libraries call those of a folder: then the config beside it is its own.

    >>> stands_for_folder("diffusion_pytorch_model.fp16.safetensors"), stands_for_folder("dreamy-v2.safetensors")
    (True, False)
    """
    return _OF_FOLDER.fullmatch(file) is not None


def weight_names(names: Sequence[str], index: Mapping[str, str] | None, *, name: str, place: str) -> list[str]:
    """The weight files of a model with files `names`, whether or not they are there and sound; sorted.

    Raises InputError when there are none, or when they cannot be told apart.
    """
    return _choose(names, name, place) if index is None else sorted(set(index.values()))


def parse_index(
    content: bytes, *, name: str, file: str = INDEX, suffixes: tuple[str, ...] = (".safetensors",)
) -> dict[str, str]:
    """An index's map tensor -> file, its form checked and every file name a plain one. Raises InputError.

    `file` is the index's own name, `suffixes` what the names of weight files may end in.
    """
    where = [f"{name}: {file}"]
    tree = strict_json.parse(content, where=where)
    weight_map = tree.get("weight_map") if isinstance(tree, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError("the index must be an object with a non-empty weight_map", where=where)
    checked: dict[str, str] = {}
    problems: list[SmeltError] = []
    for tensor, home in weight_map.items():
        if isinstance(home, str) and paths.is_plain_name(home) and home.endswith(suffixes):
            checked[tensor] = home
        elif len(problems) < _SHOWN:
            kind = "safetensors" if suffixes == (".safetensors",) else "weight"
            problems.append(
                InputError(
                    f"the index lists a tensor in {repr(home)[:200]}, which is not the name of a {kind} file",
                    where=[*where, f"tensor {tensor[:200]!r}"],
                )
            )
    raise_all(problems)
    return checked


def read_header(opened: Ranges, file: str, *, label: str) -> Header:
    """The checked header of a weight file; `label` names model and file. Raises InputError."""
    try:
        return header.read(opened, file)
    except InputError as error:  # it names the file; the model is known here
        where = [label, *(line for line in error.where if line not in (file, label))]
        raise InputError(error.message, where=where, fix=error.fix) from error


def missing(label: str) -> InputError:
    """The problem of a weight file that is not there."""
    return InputError("a weight file is missing", where=[label], fix="fetch the missing file")


def merged(parts: Sequence[Part]) -> tuple[dict[str, TensorSpec], dict[str, str]]:
    """The tensors and the metadata of all parts; of two values for one key of the metadata the first counts."""
    tensors: dict[str, TensorSpec] = {}
    metadata: dict[str, str] = {}
    for part in parts:
        tensors.update(part.header.tensors)
        metadata = {**part.header.metadata, **metadata}
    return tensors, metadata


# --- without an index -----------------------------------------------------------------------------------------------


def _choose(names: Sequence[str], name: str, place: str) -> list[str]:
    """The weight files of a model without an index."""
    weights = [entry for entry in names if entry.endswith(".safetensors") and entry != _ADAPTER]
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
        raise _no_weights(names, name, place)
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


def _no_weights(names: Sequence[str], name: str, place: str) -> InputError:
    if PIPELINE in names:
        return pipeline(name, [], example=None)
    others = [entry for entry in names if _OTHER_WEIGHTS.fullmatch(entry)]
    if others and all(entry.startswith("adapter_") for entry in others):
        fix = "merge the adapter into its base model first (peft: merge_and_unload)"
    elif any(entry.endswith(PICKLES) for entry in others):
        fix = TRUST
    else:
        fix = CONVERT if others else "check the path; a model has model.safetensors or shards with an index"
    found = [f"found {entry}" for entry in _listed(others)] or [f"no weight files in {place}"]
    pickled = ", but pickles, which are programs" if fix == TRUST else ""
    return InputError(f"the model has no safetensors files{pickled}", where=[name, *found], fix=fix)


def pipeline(name: str, nested: Sequence[str], *, example: str | None) -> InputError:
    """The refusal of a folder that holds several models in subfolders; `nested` are some of their files."""
    way = f"such as {example}" if example is not None else "after fetching the repository with `hf download`"
    return InputError(
        "the model is a pipeline of several models, whose weights lie in subfolders",
        where=[name, *_listed([f"found {entry}" for entry in nested])],
        fix=f"merge each part by itself: name its subfolder, {way}, and put the outputs into a copy of the pipeline",
    )


# --- with an index --------------------------------------------------------------------------------------------------


def _stray(names: Sequence[str], listed: Mapping[str, set[str]], name: str) -> Iterable[InputError]:
    """Shards that the index does not list. Raises InputError when index and single file contradict each other."""
    if SINGLE in names and listed.keys() != {SINGLE}:
        raise InputError(
            f"{SINGLE} and {INDEX} contradict each other: the index points at other files",
            where=[name, *_listed(sorted(listed))],
            fix="remove the one that is stale; transformers would load model.safetensors",
        )
    stray = [entry for entry in names if entry not in listed and _looks_like_shard(entry)]
    if stray:
        yield InputError(
            f"{INDEX} does not list shards that are in the folder",
            where=[name, *_listed(stray)],
            fix="remove them if they are stale, or fetch the index again",
        )


def _looks_like_shard(name: str) -> bool:
    return name.startswith("model-") and _SHARD.fullmatch(name) is not None


def _disagreements(listed: Mapping[str, set[str]], parts: Mapping[str, Part], name: str) -> Iterable[InputError]:
    """Tensors that the index lists and their file lacks, and the other way round; one problem for each file."""
    homes: dict[str, str] = {}
    for file, part in parts.items():
        for tensor in part.header.tensors:
            homes.setdefault(tensor, file)
    for file, part in parts.items():
        present = part.header.tensors
        lost = sorted(listed[file] - present.keys())
        if lost:
            lines = [f"{t} (it is in {homes[t]})" if t in homes else t for t in lost[:_SHOWN]]
            yield InputError(
                f"{len(lost)} tensors that the index lists for {file} are not in it",
                where=[name, *lines, *_more(lost)],
                fix="fetch the index and the shards again, from one revision",
            )
        unlisted = [tensor for tensor in present if tensor not in listed[file]]
        if unlisted:
            yield InputError(
                f"{len(unlisted)} tensors of {file} are not listed for it in the index",
                where=[name, *_listed(unlisted)],
                fix="fetch the index and the shards again, from one revision",
            )


# --- with and without -----------------------------------------------------------------------------------------------


def _twice(parts: Iterable[Part], name: str) -> Iterable[InputError]:
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


def _listed(entries: Sequence[str]) -> list[str]:
    return [*entries[:_SHOWN], *_more(entries)]


def _more(entries: Sequence[str]) -> list[str]:
    return [f"and {len(entries) - _SHOWN} more"] if len(entries) > _SHOWN else []
