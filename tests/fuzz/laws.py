"""What must hold of any bytes at all: the laws that fuzzing tries to break, and the list of allowed differences.

Header: what smelt accepts, the safetensors library accepts, with the same names, types, shapes and bytes. What the
library accepts and smelt refuses is refused for a reason of `STRICTER_HEADERS`. Index: what smelt accepts, Python's
JSON reader (which transformers uses) reads as the same map, and the files of the map hold exactly the tensors that the
library finds in them. What it reads as a sound map and smelt refuses is refused for a reason of `STRICTER_INDEXES`.

Whatever the bytes, smelt ends with a value or an InputError that a person can read.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors

from smelt.errors import InputError, SmeltError
from smelt.storage import header
from smelt.storage.checkpoint import FileInfo
from smelt.storage.files import Buffer, flat
from smelt.storage.layout import INDEX
from smelt.storage.sources import shards

Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]
Condition = Callable[[bytes, Any], bool]
READABLE = 4000
"""Most characters of an error that still is for people."""


class Broken(AssertionError):
    """A law does not hold for these bytes."""


# --- allowed differences: name -> (how smelt says it, what must then be true of the input) ---------------------------


def _entries(tree: Any) -> list[Any]:
    return [value for key, value in tree.items() if key != "__metadata__"] if isinstance(tree, dict) else []


def _extra_fields(text: bytes, tree: Any) -> bool:
    known = {"dtype", "shape", "data_offsets"}
    return any(
        isinstance(entry, list) or (isinstance(entry, dict) and entry.keys() > known) for entry in _entries(tree)
    )


def _of_any_length(text: bytes, tree: Any) -> bool:
    return any(
        isinstance(length, int) and length >= 1 << 62
        for entry in _entries(tree)
        if isinstance(entry, dict) and isinstance(entry.get("shape"), list)
        for length in entry["shape"]
    )


def _has_twice(text: bytes, tree: Any) -> bool:
    found: list[bool] = []

    def collect(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found.append(len(dict(pairs)) < len(pairs))
        return dict(pairs)

    json.loads(text.decode("utf-8-sig"), object_pairs_hook=collect)
    return any(found)


def _unread(text: bytes, tree: Any) -> bool:
    """Whether there is something that no reader looks at: a further field, or a value that a later one replaces."""
    return _extra_fields(text, tree) or _has_twice(text, tree)


STRICTER_HEADERS: dict[str, tuple[str, Condition]] = {
    "a key twice": ("JSON has the key .* twice", _has_twice),
    "white space first": ("does not start with", lambda text, tree: text[:1] in b" \t\r\n"),
    "metadata null": ("must map strings to strings", lambda text, tree: tree.get("__metadata__", 0) is None),
    "entry as a list, or with further fields": ("an entry must have exactly", _extra_fields),
    "a length beyond 2^62 beside a zero": ("more elements than can be counted", _of_any_length),
    "dtype as an object": (
        "unknown dtype",
        lambda text, tree: any(isinstance(e, dict) and isinstance(e.get("dtype"), dict) for e in _entries(tree)),
    ),
    "nesting in what nobody reads": ("JSON is nested", _unread),
}
"""All for which smelt refuses a header that the safetensors library takes."""

STRICTER_INDEXES: dict[str, tuple[str, Condition]] = {
    "a key twice": ("JSON has the key .* twice", _has_twice),
    "empty": ("non-empty weight_map", lambda text, tree: not tree["weight_map"]),
    "another file than a safetensors file of the folder": (
        "is not the name of a safetensors file",
        lambda text, tree: any(not re.fullmatch(r"[\w.-]+\.safetensors", file) for file in tree["weight_map"].values()),
    ),
    "nesting": ("JSON is nested", lambda text, tree: max(text.count(b"["), text.count(b"{")) > 32),
    "a number of absurd length": ("a number of", lambda text, tree: re.search(rb"\d{401}", text) is not None),
    "NaN or Infinity": ("is not a JSON number", lambda text, tree: b"NaN" in text or b"Infinity" in text),
    "half a surrogate pair": ("not valid Unicode", lambda text, tree: re.search(rb"\\u[dD]", text) is not None),
}
"""All for which smelt refuses an index that Python's JSON reader takes and that maps names to names."""


def _unexpected(allowed: dict[str, tuple[str, Condition]], error: SmeltError, text: bytes, tree: Any) -> bool:
    said = [str(problem) for problem in error.problems]
    fitting = [holds for pattern, holds in allowed.values() if any(re.search(pattern, one) for one in said)]
    return not any(holds(text, tree) for holds in fitting)


def _readable(error: SmeltError) -> None:
    if error.exit_code != 3 or len(error.render()) > READABLE:
        raise Broken(f"not an error for people: exit code {error.exit_code}, {len(error.render())} characters")


# --- headers --------------------------------------------------------------------------------------------------------


class Whole:
    """The bytes of a file as `header.read` reads them; counts what it is asked for."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.size = len(data)

    def read_into(self, offset: int, buffer: Buffer) -> None:
        view = flat(buffer)
        if offset + len(view) > self.size:
            raise Broken(f"{len(view)} bytes were allocated and read at {offset} of a file of {self.size}")
        view[:] = self.data[offset : offset + len(view)]


def library(data: bytes) -> Tensors | None:
    """What the safetensors library makes of a file, or None when it refuses (or panics)."""
    try:
        found = safetensors.deserialize(data)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # a panic of Rust is no Exception
        return None
    return {name: (entry["dtype"], tuple(entry["shape"]), bytes(entry["data"])) for name, entry in found}


def ours(data: bytes) -> Tensors | SmeltError:
    """What smelt makes of the same file, or its refusal."""
    try:
        parsed = header.read(Whole(data), "f")
    except InputError as error:
        return error
    return {
        name: (spec.dtype.code, spec.shape, data[spec.offset : spec.offset + spec.nbytes])
        for name, spec in parsed.tensors.items()
    }


def file_law(data: bytes) -> bool:
    """Hold a whole file against the library. True when both accept it; raises Broken."""
    mine, theirs = ours(data), library(data)
    if not isinstance(mine, SmeltError):
        if mine != theirs:
            raise Broken(f"smelt reads {mine}, the library {theirs}")
        return True
    _readable(mine)
    if theirs is None:
        return False
    text = data[8 : 8 + struct.unpack("<Q", data[:8])[0]]
    if _unexpected(STRICTER_HEADERS, mine, text, json.loads(text)):
        raise Broken(f"the library takes it, and smelt refuses without an allowed reason: {mine.render()}")
    return False


def header_law(text: bytes, data_bytes: int) -> bool:
    """The same for a header in front of `data_bytes` bytes."""
    return file_law(struct.pack("<Q", len(text)) + text + bytes(number % 251 for number in range(data_bytes)))


# --- indexes --------------------------------------------------------------------------------------------------------

ONE, TWO, OTHER = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "extra.safetensors"


def _file(names: str) -> bytes:
    entries = {name: {"dtype": "U8", "shape": [1], "data_offsets": [i, i + 1]} for i, name in enumerate(names)}
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + bytes(range(len(names)))


FOLDER = {ONE: _file("ab"), TWO: _file("c"), OTHER: _file("ad")}
"""The weight files beside a fuzzed index: the first two are a whole model, the third has one of its tensors again."""


def index_law(content: bytes) -> bool:
    """Hold an index, and the folder it stands in, against Python's JSON and the library. True when smelt accepts."""
    theirs = _their_map(content)
    try:
        mine = shards.parse_index(content, name="m")
    except SmeltError as error:
        _readable(error)
        if theirs is not None and _unexpected(STRICTER_INDEXES, error, content, _their_tree(content)):
            raise Broken(f"a sound map, refused without an allowed reason: {error.render()}") from error
        return False
    if mine != theirs:
        raise Broken(f"smelt reads {mine}, Python's JSON {theirs}")
    _gather_law(mine)
    return True


def _their_tree(content: bytes) -> Any:
    return json.loads(content.decode("utf-8-sig"))


def _their_map(content: bytes) -> dict[str, str] | None:
    try:
        weight_map = _their_tree(content)["weight_map"]
        names = {**weight_map}
    except (ValueError, RecursionError, KeyError, TypeError):
        return None
    return names if all(isinstance(file, str) for file in names.values()) else None


def _read(file: str) -> shards.Part:
    if file not in FOLDER:
        raise shards.missing(f"m: {file}")
    parsed = shards.read_header(Whole(FOLDER[file]), file, label=f"m: {file}")
    return shards.Part(FileInfo(file, len(FOLDER[file]), parsed.digest, Path(file), (0, 0, 0)), parsed)


def _gather_law(index: dict[str, str]) -> None:
    """What is gathered by an index is what a loader that trusts it finds: each tensor once, in the file it names."""
    found: dict[str, str] = {}
    sound = True
    for file in sorted(set(index.values())):
        tensors = library(FOLDER[file]) if file in FOLDER else None
        sound = sound and tensors is not None and found.keys().isdisjoint(tensors)
        found.update(dict.fromkeys(tensors or (), file))
    sound = sound and found == index and {ONE, TWO} <= set(index.values())  # no shard of the folder is left out
    try:
        parts = shards.gather([*sorted(FOLDER), INDEX], index, name="m", place="m", read=_read)
    except SmeltError as error:
        _readable(error)
        if sound:
            raise Broken(f"a sound folder is refused: {error.render()}") from error
        return
    tensors, _ = shards.merged(parts)
    if not sound or {name: spec.file for name, spec in tensors.items()} != index:
        raise Broken(f"an unsound folder is accepted: {index}")
