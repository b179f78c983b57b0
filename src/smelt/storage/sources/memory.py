"""A checkpoint that lives in memory: the same reading interface over arrays of bytes."""

from __future__ import annotations

import builtins
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import numpy as np

from smelt.dtypes import Bytes
from smelt.specs import TensorSpec
from smelt.storage.checkpoint import Documents, FileInfo, check_range
from smelt.storage.files import Buffer, flat


class MemoryCheckpoint(Documents):
    """A model given as name -> (TensorSpec, its stored bytes as a uint8 array); no folder, no files.

    `documents` are the small files beside it, such as `config.json`. The arrays are not copied. Raises ValueError
    when an array does not have its tensor's bytes.
    """

    def __init__(
        self,
        name: str,
        tensors: Mapping[str, tuple[TensorSpec, Bytes]],
        *,
        documents: Mapping[str, builtins.bytes] | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.root: Path | None = None
        self.files: tuple[FileInfo, ...] = ()
        self.tensors = {key: spec for key, (spec, _) in tensors.items()}
        self.metadata: dict[str, str] = dict(metadata or {})
        self._documents = dict(documents or {})
        self._data: dict[str, Bytes] = {}
        for key, (spec, data) in tensors.items():
            if key != spec.name or data.dtype != np.uint8 or data.size != spec.nbytes:
                raise ValueError(f"{key}: not the {spec.nbytes} bytes (uint8) of {spec}")
            self._data[key] = np.ascontiguousarray(data).reshape(-1)

    def read_into(self, spec: TensorSpec, start: int, stop: int, buffer: Buffer) -> None:
        """Fill `buffer` (stop - start bytes) with bytes [start, stop) of the tensor. Raises ValueError outside it."""
        check_range(spec, start, stop, buffer)
        if stop > start:
            flat(buffer)[:] = flat(self._data[spec.name][start:stop])

    def data(self, name: str) -> Bytes:
        """All stored bytes of a tensor, not copied. Raises KeyError when there is no such tensor."""
        return self._data[name]

    def changed(self) -> list[str]:
        """Nothing: arrays in memory are the caller's to keep."""
        return []

    def close(self) -> None:
        """Let go of the arrays."""
        self._data.clear()

    def __enter__(self) -> MemoryCheckpoint:
        return self

    def __exit__(self, kind: type[BaseException] | None, _e: object, _t: TracebackType | None) -> None:
        self.close()
