"""The safetensors header: parsed strictly, built plainly.

A file is: the length of the header (u64, little endian), the header (a JSON object), the data. Each entry of the header
gives a tensor's dtype, shape and [begin, end) within the data. Nothing in it is believed before it is checked, and
nothing is allocated on its word. What the safetensors library accepts and this parser refuses is listed in the tests.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import xxhash

from smelt import dtypes
from smelt.dtypes import DType
from smelt.errors import InputError
from smelt.specs import TensorSpec
from smelt.storage import strict_json
from smelt.storage.files import Buffer, size_text

MAX_LENGTH = 100_000_000
"""Longest header in bytes, the limit of the safetensors format."""
PREFIX = 8
"""Bytes of the header length at the start of a file."""
_FIELDS = frozenset({"dtype", "shape", "data_offsets"})
_METADATA = "__metadata__"
_TOO_MANY = 1 << 63
_PICKLE = (b"PK\x03\x04", b"\x80\x02")
_FETCH_AGAIN = "fetch the file again"


@dataclass(frozen=True, slots=True)
class Header:
    """A checked header: `tensors` in the order of their bytes, at absolute offsets of the file.

    `digest` is the XXH3-128 (hex) of the header's bytes, its length included: it identifies every name, dtype, shape
    and place, though not the data.
    """

    tensors: dict[str, TensorSpec]
    metadata: dict[str, str]
    digest: str


class Ranges(Protocol):
    """A file of `size` bytes of which any range can be read, on this machine or another."""

    @property
    def size(self) -> int: ...

    def read_into(self, offset: int, buffer: Buffer) -> None:
        """Fill the whole writable `buffer` from byte `offset`."""


def read(file: Ranges, name: str) -> Header:
    """Read and check the header of a safetensors file; `name` is what errors and specs call it.

    Raises InputError naming the file, and the tensor if it is one tensor's fault.
    """
    if file.size < PREFIX:
        raise InputError(f"not a safetensors file: it has only {file.size} bytes", where=[name], fix=_FETCH_AGAIN)
    prefix = bytearray(PREFIX)
    file.read_into(0, prefix)
    (length,) = struct.unpack("<Q", prefix)
    if length == 0:
        raise InputError(
            "an unfinished or empty safetensors file: its header length is zero",
            where=[name],
            fix="use a checkpoint that was written to its end",
        )
    if length > MAX_LENGTH:
        raise _not_safetensors(bytes(prefix), length, name)
    if PREFIX + length > file.size:
        if prefix.startswith(_PICKLE):
            raise _not_safetensors(bytes(prefix), length, name)
        raise InputError(
            f"the file is cut off: its header has {length} bytes, the whole file {file.size}",
            where=[name],
            fix=_FETCH_AGAIN,
        )
    text = bytearray(length)
    file.read_into(PREFIX, text)
    return parse(bytes(text), data_bytes=file.size - PREFIX - length, file=name)


def parse(data: bytes, *, data_bytes: int, file: str) -> Header:
    """Check the JSON text `data` of a header in front of `data_bytes` bytes of tensor data.

    Raises InputError naming `file`, and the tensor if it is one tensor's fault.
    """
    if len(data) > MAX_LENGTH:
        raise InputError(f"the header has {len(data)} bytes, at most {MAX_LENGTH} are allowed", where=[file])
    if data[:1] != b"{":
        raise InputError("not a safetensors file: its header does not start with '{'", where=[file])
    tree = strict_json.parse(data, where=[file], depth=8)
    assert isinstance(tree, dict)  # it starts with a brace
    metadata = _metadata(tree.pop(_METADATA, {}), file)
    entries = [(*_entry(name, entry, file), name) for name, entry in tree.items()]
    entries.sort(key=lambda entry: (entry[0], entry[1]))
    start = PREFIX + len(data)
    tensors: dict[str, TensorSpec] = {}
    position, before = 0, ""
    for begin, end, dtype, shape, name in entries:
        if begin != position:
            raise _misplaced(name, begin, position, before, file)
        tensors[name] = TensorSpec(name, dtype, shape, file, start + begin)
        position, before = end, name
    if position != data_bytes:
        raise _wrong_end(position, data_bytes, before, file)
    digest = xxhash.xxh3_128_hexdigest(struct.pack("<Q", len(data)) + data)
    return Header(tensors, metadata, digest)


def build(tensors: Iterable[TensorSpec], metadata: Mapping[str, str]) -> bytes:
    """The header (length and JSON) of a file that holds `tensors` one after the other, in the order given.

    Their own file and offset do not matter. The JSON is padded with spaces so that the data starts at a multiple of
    eight bytes. Raises InputError for a name that a header cannot hold, or too many tensors for one file.
    """
    tree: dict[str, object] = {_METADATA: dict(metadata)} if metadata else {}
    position = 0
    for spec in tensors:
        if spec.name == _METADATA or spec.name in tree:
            why = "is reserved" if spec.name == _METADATA else "is given twice"
            raise InputError(f"the tensor name {spec.name!r} {why}", fix="rename the tensor")
        end = position + spec.nbytes
        tree[spec.name] = {
            "dtype": spec.dtype.code,
            "shape": list(spec.shape),
            "data_offsets": [position, end],
        }
        position = end
    try:
        text = json.dumps(tree, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"a tensor name is not valid Unicode: {error.object[:200]!r}") from error
    text += b" " * (-(PREFIX + len(text)) % 8)
    if len(text) > MAX_LENGTH:
        raise InputError(
            f"too many tensors for one file: the header would have {size_text(len(text))}",
            fix="choose a smaller shard size",
        )
    return struct.pack("<Q", len(text)) + text


# --- one entry ------------------------------------------------------------------------------------------------------


def _entry(name: str, entry: Any, file: str) -> tuple[int, int, DType, tuple[int, ...]]:
    """Check one tensor by itself: [begin, end) within the data, dtype and shape, which must agree."""
    if not isinstance(entry, dict) or entry.keys() != _FIELDS:
        keys = f"it has {sorted(entry)}" if isinstance(entry, dict) else f"it is {_short(entry)}"
        raise _bad(name, file, f"an entry must have exactly dtype, shape and data_offsets; {keys}")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    dtype = dtypes.BY_CODE.get(code) if isinstance(code, str) else None
    if dtype is None:
        raise _bad(name, file, f"unknown dtype {_short(code)}")
    if not _are_sizes(shape):
        raise _bad(name, file, f"the shape must be a list of integers, zero or more; it is {_short(shape)}")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _bad(name, file, f"data_offsets must be [begin, end] with begin <= end, not {_short(offsets)}")
    count = 1
    for length in shape:  # step by step, so that a zero at the end does not hide an overflow
        count *= length
        if count >= _TOO_MANY or length >= _TOO_MANY:
            raise _bad(name, file, f"the shape {_short(shape)} has more elements than can be counted")
    begin, end = offsets
    try:
        expected = dtype.nbytes(count)
    except ValueError as error:
        raise _bad(name, file, str(error)) from error
    if end - begin != expected:
        raise _bad(
            name,
            file,
            f"its shape {_short(shape)} and dtype {code} need {expected} bytes, data_offsets give {end - begin}",
        )
    return begin, end, dtype, tuple(shape)


def _are_sizes(value: Any) -> bool:
    # `type(...) is int`: a JSON true is a Python int as well
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _metadata(value: Any, file: str) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise InputError(f"the header's {_METADATA} must map strings to strings", where=[file])
    return value


# --- the words of errors ----------------------------------------------------------------------------------------


def _bad(name: str, file: str, problem: str) -> InputError:
    return InputError(f"tensor {_short(name)} has a bad header entry", where=[file, problem])


def _short(value: object) -> str:
    """The start of a value that came from the file, so that an error stays readable whatever it is."""
    text = repr(value) if not isinstance(value, list) else repr(value[:12])
    return text if len(text) <= 120 else text[:117] + "..."


def _misplaced(name: str, begin: int, position: int, before: str, file: str) -> InputError:
    after = f"tensor {_short(before)} ends at byte {position}" if before else f"the data start at byte {position}"
    what = "overlaps the tensor before it" if begin < position else "has a hole before it"
    return InputError(f"tensor {_short(name)} {what}", where=[file, f"it begins at byte {begin}, {after}"])


def _wrong_end(position: int, data_bytes: int, last: str, file: str) -> InputError:
    where: Sequence[str] = [file, f"the header describes {position} bytes of data, the file has {data_bytes}"]
    if position > data_bytes:
        return InputError(f"the file is cut off before the end of tensor {_short(last)}", where=where, fix=_FETCH_AGAIN)
    return InputError("the file has bytes after its last tensor", where=where, fix=_FETCH_AGAIN)


def _not_safetensors(prefix: bytes, length: int, name: str) -> InputError:
    if prefix.startswith(b"version "):
        return InputError(
            "not a safetensors file but a git-lfs pointer",
            where=[name],
            fix="run `git lfs pull` in its folder",
        )
    if prefix.startswith(_PICKLE):
        return InputError("not a safetensors file but a pickle", where=[name], fix="convert the model to safetensors")
    return InputError(
        f"not a safetensors file: a header of {length} bytes is impossible (at most {MAX_LENGTH})",
        where=[name],
        fix=_FETCH_AGAIN,
    )
