"""A checkpoint, open for reading: name -> TensorSpec, byte ranges into a caller's buffer, and the small files beside.

`TensorSource` is what everything else asks for; `Checkpoint` reads it from files, `sources.memory.MemoryCheckpoint`
from arrays. Which files make a checkpoint is decided by `sources`.
"""

from __future__ import annotations

import builtins
import contextlib
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from smelt.errors import InputError, StorageError
from smelt.specs import TensorSpec
from smelt.storage import files, paths, strict_json
from smelt.storage.files import Buffer, ReadFile, Stamp

_WORTH_LETTING_GO = 1 << 20
"""Bytes of a tensor from which on it is let go by itself."""
LARGE_LIMIT = 64 << 20
"""Most bytes of a tokenizer file or an index."""
SMALL_LIMIT = 16 << 20
"""Most bytes of any other file that is read whole."""
_LARGE = frozenset({"tokenizer.json", "tokenizer.model"})
WEIGHT_SUFFIXES = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".gguf",
    ".h5",
    ".msgpack",
    ".onnx",
    ".index.json",
)
"""File names that end so hold weights, or say where they are; everything else in a folder is an other file."""


@dataclass(frozen=True, slots=True)
class FileInfo:
    """A weight file of a checkpoint as it was when it was opened.

    `header_digest` is XXH3-128 of its header; `path` the real path, links followed; `blob_sha256` the sha256 of the
    whole file where the hub cache tells it.
    """

    name: str
    size: int
    header_digest: str
    path: Path
    stamp: Stamp
    blob_sha256: str | None = None


class TensorSource(Protocol):
    """What can be read of a model: its tensors' bytes and the small files beside them."""

    @property
    def name(self) -> str:
        """The label for messages."""

    @property
    def root(self) -> Path | None:
        """The folder, if there is one."""

    @property
    def tensors(self) -> Mapping[str, TensorSpec]:
        """All tensors in the order they lie on the disk."""

    @property
    def files(self) -> tuple[FileInfo, ...]:
        """The weight files."""

    @property
    def metadata(self) -> Mapping[str, str]:
        """The `__metadata__` of the weight files."""

    def read_into(self, spec: TensorSpec, start: int, stop: int, buffer: Buffer) -> None:
        """Fill `buffer` (stop - start bytes) with bytes [start, stop) of the tensor; safe from many threads."""

    def json(self, name: str) -> dict[str, Any] | None:
        """A JSON file that holds an object, strictly parsed, or None when there is no such file."""

    def text(self, name: str) -> str | None:
        """A UTF-8 file (a byte-order mark is dropped), or None when there is no such file."""

    def bytes(self, name: str) -> builtins.bytes | None:
        """A small file, or None when there is no such file."""

    def other_files(self) -> list[str]:
        """The names of the files that hold no weights, sorted."""

    def changed(self) -> list[str]:
        """The names of the weight files that are no longer what they were."""

    def close(self) -> None:
        """Let go of what is open."""


class Documents:
    """The small files of a model that has no folder: `_documents`, by name."""

    name: str
    _documents: Mapping[str, builtins.bytes]

    def bytes(self, name: str) -> builtins.bytes | None:
        """A document, or None."""
        return self._documents.get(name)

    def text(self, name: str) -> str | None:
        """A document as UTF-8 text, or None. Raises InputError if it is not that."""
        return decode_text(self.bytes(name), name, label=self.name)

    def json(self, name: str) -> dict[str, Any] | None:
        """A document as a strict JSON object, or None. Raises InputError if it is not that."""
        return decode_json(self.bytes(name), name, label=self.name)

    def other_files(self) -> list[str]:
        """The names of the documents, sorted."""
        return sorted(self._documents)


class Checkpoint:
    """A model in a folder of safetensors files. Safe from many threads; files are opened at first use and kept.

    `alone`: the model is one file, and the other files of its folder are none of its own.
    """

    def __init__(
        self,
        name: str,
        root: Path,
        *,
        tensors: Mapping[str, TensorSpec],
        weight_files: Sequence[FileInfo],
        metadata: Mapping[str, str],
        alone: bool = False,
    ) -> None:
        self.name = name
        self.root: Path | None = root
        self.tensors: dict[str, TensorSpec] = dict(tensors)
        self.files = tuple(weight_files)
        self.metadata: dict[str, str] = dict(metadata)
        self._folder = root
        self._alone = alone
        self._infos = {info.name: info for info in self.files}
        self._open: dict[str, ReadFile] = {}
        self._lock = threading.Lock()
        self._closed = False
        self._streamed = False

    def read_into(self, spec: TensorSpec, start: int, stop: int, buffer: Buffer) -> None:
        """Fill `buffer` (stop - start bytes) with bytes [start, stop) of the tensor.

        Raises InputError when the file was changed or cut off since it was opened, StorageError when the system
        cannot read it, ValueError for a range or a buffer that does not fit.
        """
        check_range(spec, start, stop, buffer)
        self.file_of(spec).read_into(spec.offset + start, buffer)

    def place_of(self, spec: TensorSpec, start: int, stop: int) -> tuple[int, int]:
        """Where bytes [start, stop) of the tensor lie, for a caller that reads them itself: descriptor, position.

        The system is told of the read. What goes wrong with it is for `read_into` to find out and to say.
        """
        file = self.file_of(spec)
        file.announce(spec.offset + start, stop - start)
        return file.descriptor, spec.offset + start

    def file_of(self, spec: TensorSpec) -> ReadFile:
        """The open file that holds the tensor. Raises InputError when it was changed since its header was read."""
        return self._open.get(spec.file) or self._open_file(spec.file)

    def _open_file(self, name: str) -> ReadFile:
        with self._lock:
            if self._closed:
                raise ValueError(f"checkpoint {self.name} is closed")
            if name not in self._open:
                info = self._infos[name]
                file = files.open_read(info.path)
                if file.stamp() != info.stamp:
                    file.close()
                    raise InputError(
                        "the file was changed after smelt had read its header",
                        where=[f"{self.name}: {name}"],
                        fix="run again, and leave the inputs alone meanwhile",
                    )
                if self._streamed:
                    file.stream()
                self._open[name] = file
            return self._open[name]

    def stream(self) -> None:
        """From now on it is read by a merge larger than memory."""
        with self._lock:
            self._streamed = True
            for file in self._open.values():
                file.stream()

    def let_go(self, spec: TensorSpec) -> None:
        """Tell the system that a tensor need be kept in memory no longer."""
        if spec.nbytes >= _WORTH_LETTING_GO and (file := self._open.get(spec.file)) is not None:
            file.let_go(spec.offset, spec.offset + spec.nbytes)

    def path(self, name: str) -> Path | None:
        """The real path of a file of the folder, or None when there is none, or the model is one file alone.

        Raises InputError for a name or link that leaves the folder, and for what is not a regular file.
        """
        if self._alone and name not in self._infos:
            return None
        if paths.is_plain_name(name) and files.kind(self._folder / name) is None:
            return None
        real = paths.inside(self._folder, name, label=self.name)
        if files.kind(real) != "file":
            raise InputError(f"{name!r} is not a regular file", where=[self.name, str(self._folder)])
        return real

    def bytes(self, name: str) -> builtins.bytes | None:
        """A small file of the folder (16 MiB; 64 MiB for a tokenizer), or None. Raises InputError beyond that."""
        real = self.path(name)
        return None if real is None else files.read_bytes(real, limit=limit_of(name))

    def text(self, name: str) -> str | None:
        """A UTF-8 file of the folder without its byte-order mark, or None. Raises InputError if not UTF-8."""
        return decode_text(self.bytes(name), name, label=self.name)

    def json(self, name: str) -> dict[str, Any] | None:
        """A JSON file of the folder, strictly parsed, or None. Raises InputError unless it holds an object."""
        return decode_json(self.bytes(name), name, label=self.name)

    def other_files(self) -> list[str]:
        """The regular files of the folder that hold no weights, sorted; hidden ones are left out."""
        return [
            name
            for name in ([] if self._alone else files.list_folder(self._folder))
            if not name.startswith(".")
            and not name.endswith(WEIGHT_SUFFIXES)
            and files.kind(self._folder / name) == "file"
        ]

    def changed(self) -> list[str]:
        """The names of the weight files whose size, time or inode is no longer what it was."""
        return [info.name for info in self.files if files.stamp(info.path) != info.stamp]

    def close(self) -> None:
        """Close all files. No read may be under way. Nothing is lost by what the system refuses here."""
        with self._lock:
            self._closed = True
            while self._open:
                with contextlib.suppress(StorageError):
                    self._open.popitem()[1].close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, kind: type[BaseException] | None, _e: object, _t: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Checkpoint({self.name!r}, {len(self.tensors)} tensors in {len(self.files)} files)"


# --- what every source does alike -----------------------------------------------------------------------------------


def check_range(spec: TensorSpec, start: int, stop: int, buffer: Buffer) -> None:
    """Raise ValueError unless [start, stop) lies in the tensor and `buffer` has exactly that many bytes."""
    if not 0 <= start <= stop <= spec.nbytes:
        raise ValueError(f"bytes [{start}, {stop}) are outside {spec}")
    if len(files.flat(buffer)) != stop - start:
        raise ValueError(f"a buffer of {len(files.flat(buffer))} bytes for {stop - start} bytes of {spec}")


def limit_of(name: str) -> int:
    """The most bytes that a file of this name may have to be read whole."""
    return LARGE_LIMIT if name in _LARGE else SMALL_LIMIT


def decode_text(content: builtins.bytes | None, name: str, *, label: str) -> str | None:
    """UTF-8 text, with or without a byte-order mark. Raises InputError otherwise."""
    if content is None:
        return None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{name} is not UTF-8 text (byte {error.start})", where=[label]) from error


def decode_json(content: builtins.bytes | None, name: str, *, label: str) -> dict[str, Any] | None:
    """A strict JSON object; NaN and Infinity pass, because real configs hold them. Raises InputError otherwise."""
    if content is None:
        return None
    where = [f"{label}: {name}"]
    value = strict_json.parse(content, where=where, constants=True)
    if not isinstance(value, dict):
        raise InputError("the file must hold a JSON object", where=where)
    return value
