"""Where every output byte will lie, decided in full before the first is written.

Tensors fill shards in the order given. Inside a shard they are ordered by falling element size, so that each begins at
a multiple of its element size and can be mapped into memory.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from smelt.dtypes import DType
from smelt.errors import InputError
from smelt.specs import TensorSpec
from smelt.storage import header

STEM = "model"
"""What weight files are called, unless asked otherwise."""
SINGLE = f"{STEM}.safetensors"
INDEX = f"{SINGLE}.index.json"
METADATA: Mapping[str, str] = {"format": "pt"}
"""What transformers expects to find in the `__metadata__` of a weight file."""


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """A tensor that is to be written."""

    name: str
    dtype: DType
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Shard:
    """One weight file: its header (length and JSON), its tensors at absolute offsets, and its size in bytes."""

    file: str
    header: bytes
    tensors: dict[str, TensorSpec]
    size: int


@dataclass(frozen=True, slots=True)
class Layout:
    """All weight files of an output, and the index over them (None when one file holds everything) with its name."""

    shards: tuple[Shard, ...]
    index: bytes | None
    total_bytes: int
    _specs: dict[str, TensorSpec] = field(repr=False)
    index_name: str = INDEX

    def spec(self, name: str) -> TensorSpec:
        """The place of a tensor in the output. Raises KeyError when there is no such tensor."""
        return self._specs[name]


def layout(
    tensors: Sequence[OutputTensor], *, shard_bytes: int, metadata: Mapping[str, str] = METADATA, stem: str = STEM
) -> Layout:
    """Lay out `tensors` in files of at most `shard_bytes` bytes of data each; a larger tensor gets a file alone.

    `stem` is what the files' names begin with.

    Raises InputError for a name that occurs twice or that a header cannot hold, ValueError for a shard size below 1.
    """
    if shard_bytes < 1:
        raise ValueError("shard_bytes must be at least 1")
    groups = _groups([TensorSpec(t.name, t.dtype, t.shape) for t in tensors], shard_bytes)
    shards = []
    specs: dict[str, TensorSpec] = {}
    for number, group in enumerate(groups, 1):
        part = "" if len(groups) == 1 else f"-{number:05d}-of-{len(groups):05d}"
        file = f"{stem}{part}.safetensors"
        shard = _shard(file, group, metadata)
        if not specs.keys().isdisjoint(shard.tensors):
            twice = sorted(specs.keys() & shard.tensors.keys())[0]
            raise InputError(f"the tensor name {twice!r} is given twice", fix="rename the tensor")
        specs.update(shard.tensors)
        shards.append(shard)
    index = _index(specs) if len(shards) > 1 else None
    total = sum(shard.size for shard in shards) + len(index or b"")
    return Layout(tuple(shards), index, total, specs, f"{stem}.safetensors.index.json")


def _groups(specs: Sequence[TensorSpec], shard_bytes: int) -> list[list[TensorSpec]]:
    groups: list[list[TensorSpec]] = [[]]
    filled = 0
    for spec in specs:
        size = spec.nbytes
        if groups[-1] and filled + size > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(spec)
        filled += size
    return groups


def _shard(file: str, group: list[TensorSpec], metadata: Mapping[str, str]) -> Shard:
    ordered = sorted(group, key=lambda spec: -spec.dtype.bits)
    head = header.build(ordered, metadata)
    position = len(head)
    tensors: dict[str, TensorSpec] = {}
    for spec in ordered:
        tensors[spec.name] = TensorSpec(spec.name, spec.dtype, spec.shape, file, position)
        position += spec.nbytes
    return Shard(file, head, tensors, position)


def _index(specs: Mapping[str, TensorSpec]) -> bytes:
    """`model.safetensors.index.json` as transformers writes and reads it (it demands the metadata)."""
    metadata = {
        "total_parameters": sum(spec.size for spec in specs.values()),
        "total_size": sum(spec.nbytes for spec in specs.values()),
    }
    weight_map = {name: specs[name].file for name in sorted(specs)}
    return (json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2) + "\n").encode("ascii")
