"""Checking an output against its record: every file is listed and as it was written, every tensor has its digest.

What a publisher does to a folder is a warning: an edited card, files beside the model that no loader reads.
"""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from smelt.errors import InputError, SmeltError
from smelt.lineage.card import CARD
from smelt.lineage.record import FORMAT, RECORD, checksum, file_digest
from smelt.planning.companions import OF_TOKENIZER
from smelt.storage import digests, files
from smelt.storage.checkpoint import LARGE_LIMIT, WEIGHT_SUFFIXES, TensorSource
from smelt.storage.sources.local import open_folder
from smelt.storage.writer import heal

_THREADS = 4
"""Most threads that hash: more would wait for the disk, or for memory."""


@dataclass(frozen=True, slots=True)
class Verification:
    """What a check found: `problems` is empty when all is as recorded.

    `recomputed` names the tensors that were made again from the inputs, chosen by `seed`; `notes` say why none were.
    """

    folder: Path
    tensors: int
    bytes: int
    problems: tuple[SmeltError, ...]
    warnings: tuple[str, ...] = ()
    recomputed: tuple[str, ...] = ()
    seed: int | None = None
    notes: tuple[str, ...] = ()


def verify(folder: str | Path, *, progress: Callable[[int, int], None] | None = None) -> Verification:
    """Re-hash an output and compare with its `smelt.json`. Raises InputError if there is no usable record.

    `progress` is called with (bytes done, bytes in all).
    """
    folder = Path(folder)
    heal(folder)  # of an interrupted replacement the whole one of the two is put in its place
    if files.kind(folder) != "folder":
        raise InputError(f"there is no folder {folder}", fix="give the output folder of a merge")
    with open_folder(folder, name=Path(os.path.realpath(folder)).name) as checkpoint:
        tree = read_record(checkpoint, folder)
        problems, warnings = _check_files(checkpoint, tree, folder)
        if _has_no_checksum(tree):
            warnings.append(f"{RECORD} has no checksum: it was written by an early version")
        recorded = tree["tensors"]
        missing = sorted(set(recorded) - set(checkpoint.tensors))
        extra = sorted(set(checkpoint.tensors) - set(recorded))
        if missing:
            problems.append(InputError(f"{_tensors(missing)} missing that the record names", where=missing[:5]))
        if extra:
            problems.append(InputError(f"{_tensors(extra)} not in the record", where=extra[:5]))
        total = sum(spec.nbytes for spec in checkpoint.tensors.values())
        done = 0
        for name, digest in _digests(checkpoint, [name for name in checkpoint.tensors if name in recorded]):
            spec = checkpoint.tensors[name]
            if digest != recorded[name]["digest"]:
                where = [f"{folder / spec.file}  bytes {spec.offset} to {spec.offset + spec.nbytes}"]
                problems.append(_other_bytes(name, where, trusted=recorded[name].get("trusted") is True))
            done += spec.nbytes
            if progress is not None:
                progress(done, total)
        return Verification(folder, len(checkpoint.tensors), total, tuple(problems), tuple(warnings))


def _digests(source: TensorSource, names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The digests of stored tensors, in this order; several threads read and hash."""
    pool = ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1), thread_name_prefix="smelt-verify")
    try:
        yield from zip(names, pool.map(partial(tensor_digest, source), names), strict=True)
    finally:
        pool.shutdown(cancel_futures=True)


def tensor_digest(source: TensorSource, name: str) -> str:
    """The digest of a stored tensor, as `smelt.storage.digests` defines it."""
    spec = source.tensors[name]
    return digests.of_stored(spec.nbytes, partial(source.read_into, spec))


def _other_bytes(name: str, where: list[str], *, trusted: bool) -> InputError:
    """The problem of a tensor whose digest is not the recorded one, which `trusted` says was never computed here."""
    if not trusted:
        fix = "merge again, or fetch the file again"
        return InputError(f"tensor '{name}' is not what was written", where=where, fix=fix)
    return InputError(
        f"tensor '{name}' does not have the digest that --trust-digests took over",
        where=where,
        fix="check the model that it was copied from with `smelt verify`, and merge again without --trust-digests",
    )


def read_record(checkpoint: TensorSource, folder: Path) -> dict[str, Any]:
    """The record of an output. Raises InputError when there is none, or it is damaged or of another form."""
    tree = checkpoint.json(RECORD)
    if tree is None:
        raise InputError(f"{folder} has no {RECORD}", fix="only outputs of smelt can be verified")
    if (
        tree.get("format") != FORMAT
        or not isinstance(tree.get("tensors"), dict)
        or not isinstance(tree.get("files"), dict)
    ):
        raise InputError(
            f"{folder / RECORD} is not a record that this version reads", fix="use the version that wrote it"
        )
    if tree.get("checksum") != checksum(tree) and not _has_no_checksum(tree):
        where = ["its checksum does not fit what it says"]
        raise InputError(f"{folder / RECORD} is damaged", where=where, fix="merge again, or fetch the file again")
    damaged = [f"tensors: {n}" for n, row in tree["tensors"].items() if not _has_digest(row)]
    damaged += [f"files: {n}" for n, row in tree["files"].items() if not isinstance(row, dict)]
    if damaged:
        raise InputError(f"{folder / RECORD} is damaged", where=damaged[:5], fix="merge again")
    return tree


_BEFORE_CHECKSUMS = frozenset(
    (
        *("format", "smelt", "recipe", "method", "method_files", "inputs", "donor", "tokenizer"),
        *("digest", "files", "tensors", "ignored", "notes", "warnings"),
    )
)
"""The fields of a record as smelt 0.1.0 wrote it."""


def _has_no_checksum(tree: dict[str, Any]) -> bool:
    """Whether a record is one from before they had checksums, and not one whose checksum was damaged away."""
    return tree.keys() == _BEFORE_CHECKSUMS


def _tensors(names: list[str]) -> str:
    return "1 tensor is" if len(names) == 1 else f"{len(names)} tensors are"


def _has_digest(row: object) -> bool:
    return isinstance(row, dict) and isinstance(row.get("digest"), str)


def _check_files(checkpoint: TensorSource, tree: dict[str, Any], folder: Path) -> tuple[list[SmeltError], list[str]]:
    problems: list[SmeltError] = []
    warnings: list[str] = []
    weights = {info.name: info for info in checkpoint.files}
    present = set(files.list_folder(folder)) - {RECORD}
    for name in sorted(set(tree["files"]) - present):
        problems.append(InputError(f"file {name} is missing", where=[str(folder)], fix="merge again"))
    for name in sorted(present - set(tree["files"])):
        what = f"file {name} is not in the record"
        if _is_read(name):
            problems.append(InputError(what, where=[str(folder)], fix="remove it"))
        else:
            warnings.append(what)
    for name, row in tree["files"].items():
        if name not in present:
            continue
        if name in weights:
            found = (weights[name].size, weights[name].header_digest)
            if found != (row.get("size"), row.get("header")):
                problems.append(
                    InputError(f"file {name} has another size or header than was written", where=[str(folder)])
                )
        elif file_digest(files.read_bytes(folder / name, limit=LARGE_LIMIT)) != row.get("sha256"):
            if name == CARD:
                warnings.append(f"file {name} is not what was written")
            else:
                problems.append(InputError(f"file {name} is not what was written", where=[str(folder)]))
    return problems, warnings


def _is_read(name: str) -> bool:
    """Whether a model library may read a file of this name, beside or in place of what was written: weights, code,
    configs, tokenizers, chat templates."""
    if name.endswith((*WEIGHT_SUFFIXES, ".py", "config.json")):
        return True
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in OF_TOKENIZER)
