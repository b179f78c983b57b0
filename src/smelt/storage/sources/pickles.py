"""Models stored as pickles (`pytorch_model.bin` and the like): refused, unless the user trusts them; never run here.

A pickle is a program. Even a trusted one is read in a child process (`unpickle`), by torch with `weights_only=True`,
which builds tensors and refuses every other name. The child hands the tensors over as safetensors files in a private
temporary folder; from there on they are read, and distrusted, as any other checkpoint. The folder goes with the model.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from smelt.errors import InputError, SmeltError, StorageError, raise_all
from smelt.storage import digests, files, paths
from smelt.storage.checkpoint import LARGE_LIMIT, Checkpoint, FileInfo
from smelt.storage.files import Stamp, size_text
from smelt.storage.signals import held
from smelt.storage.sources import shards, unpickle
from smelt.storage.sources.shards import PICKLES, Part

INDEX = "pytorch_model.bin.index.json"
_SINGLE = "pytorch_model.bin"
_SHARD = re.compile(r"(.*)-(\d{5,})-of-(\d{5,})\.(?:bin|pt|pth|ckpt)")
_NOT_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|rng_state\w*|scaler)\.(bin|pt|pth)|adapter_model\..*")
_MARGIN = 1 << 20
"""Bytes that the tensors' names and shapes may take beyond the size of the pickle."""
_ASKED_FOR = re.compile(r"(?:GLOBAL|global|Unsupported class|call to) `?([\w.]+)`?")
_SAFE_FIX = "use the model's safetensors files, or another model"


def has_pickles(place: Path) -> bool:
    """Whether a model's folder (or the one file of it) holds pickles and no safetensors."""
    if files.kind(place) == "file":
        return place.name.endswith(PICKLES)
    if files.kind(place) != "folder":
        return False
    names = files.list_folder(place)
    weights = [name for name in names if name.endswith(".safetensors") and not name.startswith("adapter_model")]
    return not weights and bool(_candidates(names))


def open_pickles(place: Path, *, name: str) -> Checkpoint:
    """Open a model stored as pickles; `name` is its label in messages. Takes as much temporary space as the model has.

    Raises InputError when torch is missing, or when a file is not what it should be or asks for more than tensors;
    StorageError when the temporary space does not suffice.
    """
    if importlib.util.find_spec("torch") is None:
        raise _no_torch(name)
    single = files.kind(place) == "file"
    folder = place.parent if single else place
    names = [place.name] if single else files.list_folder(place)
    index = None if single or INDEX not in names else _read_index(folder, name)
    wanted = [place.name] if single else _choose(names, index, name)
    problems: list[SmeltError] = []
    found: dict[str, Path] = {}
    for file in wanted:
        try:
            found[file] = _find(folder, file, name, given=place if single else None)
        except SmeltError as error:
            problems.append(error)
    raise_all(problems)
    workspace = files.make_temporary_folder("smelt-pickle-")

    def remove() -> None:
        with held(), contextlib.suppress(StorageError):  # what made us remove it matters more
            files.remove_tree(workspace)

    try:
        _check_space(workspace, sum(_size(path) for path in found.values()), name)
        parts: dict[str, Part] = {}
        read = _read_all([(path, f"{name}: {file}", file) for file, path in found.items()], workspace)
        for file, part in zip(found, read, strict=True):
            if isinstance(part, Part):
                parts[file] = part
            else:
                problems.append(part)
        problems.extend(shards.contradictions(parts, index, name=name))
        raise_all(problems)
    except BaseException:
        remove()
        raise
    alone = single and not shards.stands_for_folder(place.name)
    return _Unpickled(name, folder, list(parts.values()), remove, alone=alone)


class _Unpickled(Checkpoint):
    """A checkpoint whose weights lie in a temporary folder, which is removed when it is closed."""

    def __init__(
        self, name: str, folder: Path, parts: Sequence[Part], remove: Callable[[], None], *, alone: bool
    ) -> None:
        tensors, metadata = shards.merged(parts)
        infos = [part.info for part in parts]
        super().__init__(name, folder, tensors=tensors, weight_files=infos, metadata=metadata, alone=alone)
        self._remove = remove

    def close(self) -> None:
        super().close()
        self._remove()


# --- which files ----------------------------------------------------------------------------------------------------


def _candidates(names: Sequence[str]) -> list[str]:
    return [name for name in names if name.endswith(PICKLES) and not _NOT_WEIGHTS.fullmatch(name) and name[0] != "."]


def _choose(names: Sequence[str], index: Mapping[str, str] | None, name: str) -> list[str]:
    """The pickles that make the model. Raises InputError where that cannot be told."""
    if index is not None:
        return sorted(set(index.values()))
    found = _candidates(names)
    if _SINGLE in found:
        return [_SINGLE]
    numbers: dict[tuple[str, int], set[int]] = {}
    for entry in found:
        if match := _SHARD.fullmatch(entry):
            numbers.setdefault((match[1], int(match[3])), set()).add(int(match[2]))
    if len(found) == 1 and not numbers:
        return found
    whole = [key for key, present in numbers.items() if present == set(range(1, key[1] + 1))]
    if len(whole) == len(numbers) == 1 and len(found) == whole[0][1]:
        return found
    raise InputError(
        "several pickles, and no index that says which of them are the model",
        where=[name, *found[:8]],
        fix="give the path of one file, or leave only one set in the folder",
    )


def _read_index(folder: Path, name: str) -> dict[str, str]:
    content = files.read_bytes(paths.inside(folder, INDEX, label=name), limit=LARGE_LIMIT)
    return shards.parse_index(content, name=name, file=INDEX, suffixes=PICKLES)


def _find(folder: Path, file: str, name: str, *, given: Path | None) -> Path:
    if given is not None:
        return files.resolve(given)
    if files.kind(folder / file) is None:
        raise shards.missing(f"{name}: {file}")
    return paths.inside(folder, file, label=name)


# --- reading them ---------------------------------------------------------------------------------------------------


def _read_all(wanted: Sequence[tuple[Path, str, str]], workspace: Path) -> list[Part | SmeltError]:
    """Let one child turn all pickles (path, label, name) into safetensors files; each is read as any other, or told."""
    before = [_look(path) for path, _, _ in wanted]
    targets = [workspace / f"{number}.safetensors" for number in range(len(wanted))]
    tasks = [
        [str(path), str(target), 2 * stamp[0] + _MARGIN]
        for (path, _, _), target, (stamp, _) in zip(wanted, targets, before, strict=True)
    ]
    told, code = _ask_child(tasks, workspace)
    parts: list[Part | SmeltError] = []
    for number, (path, label, file) in enumerate(wanted):
        stamp, digest = before[number]
        answer = told[number] if number < len(told) else {"refused": "child", "detail": str(code)}
        try:
            if files.stamp(path) != stamp:
                raise InputError("the file was changed while it was being read", where=[label], fix="run again")
            if "refused" in answer:
                raise _refusal(str(answer["refused"]), str(answer.get("detail", "")), label)
            with files.open_read(targets[number]) as converted:
                checked = shards.read_header(converted, file, label=label)
                info = FileInfo(file, stamp[0], checked.digest, targets[number], converted.stamp(), digest)
            parts.append(Part(info, checked))
        except SmeltError as error:
            parts.append(error)
    return parts


def _look(path: Path) -> tuple[Stamp, str]:
    """What a file is now: its stamp and its sha256."""
    with files.open_read(path) as opened:
        return opened.stamp(), digests.sha256(opened)


def _ask_child(tasks: Sequence[Sequence[object]], workspace: Path) -> tuple[list[dict[str, Any]], int]:
    """Run the child to its end; gives its answers, as far as they are answers, and its exit code."""
    kept = {key: os.environ[key] for key in ("PATH", "LD_LIBRARY_PATH", "SYSTEMROOT", "TMPDIR") if key in os.environ}
    child = subprocess.Popen(
        [sys.executable, "-I", os.path.abspath(unpickle.__file__)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=workspace,
        env={**kept, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HOME": str(workspace)},
    )
    try:
        said, _ = child.communicate("".join(json.dumps(task) + "\n" for task in tasks).encode())
    except BaseException:
        child.kill()
        child.wait()
        raise
    answers: list[dict[str, Any]] = []
    for line in said.splitlines():
        try:
            answer = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(answer, dict):
            break
        answers.append(answer)
    return answers, child.returncode


def _refusal(what: str, detail: str, label: str) -> InputError:
    """What the child refused, said for people."""
    first = " ".join(detail.split())[:300]
    if what == "torch":
        return _no_torch(label)
    if what == "old torch":
        return InputError(
            f"torch {first} is too old to read pickles safely", where=[label], fix="pip install 'torch>=2.6'"
        )
    if what == "child":
        return InputError(
            f"the process that reads the pickle failed (exit code {first})",
            where=[label],
            fix=f"the file is damaged, or memory or temporary space ran out; or {_SAFE_FIX}",
        )
    asked = _ASKED_FOR.search(detail)
    if what == "load" and asked:
        return InputError(
            f"the pickle asks for `{asked[1]}`, which is no part of weights: it was not run",
            where=[label],
            fix=f"do not trust this file: {_SAFE_FIX}",
        )
    said = {"load": "torch cannot read the pickle", "size": "the pickle describes more than it holds"}
    return InputError(said.get(what, "the pickle is not a state dict"), where=[label, first], fix=_SAFE_FIX)


def _no_torch(label: str) -> InputError:
    return InputError(
        "reading a pickle needs torch, which is not installed", where=[label], fix="pip install 'smelt[torch]'"
    )


def _size(path: Path) -> int:
    found = files.stamp(path)
    return found[0] if found is not None else 0


def _check_space(workspace: Path, size: int, name: str) -> None:
    free = files.free_bytes(workspace)
    needed = size + size // 50 + 2 * _MARGIN
    if free < needed:
        raise StorageError(
            f"not enough temporary space to read pickles: {size_text(needed)} needed, {size_text(free)} free",
            where=[name, str(workspace.parent)],
            fix="set TMPDIR to a folder on a larger disk",
        )
