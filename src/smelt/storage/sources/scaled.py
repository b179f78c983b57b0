"""A checkpoint whose weights are float8_e4m3fn with a scale for each block, read as what they stand for.

That is the form of DeepSeek-V3 and of transformers' `fp8` models: beside `X` lies `X_scale_inv` with one number for
each block (128 × 128 mostly; the last ones may be ragged), and a weight is its stored number times that. Here it is a
float32 tensor, the product rounded once, and the scales are gone. All else is as in the checkpoint behind.
"""

from __future__ import annotations

import builtins
import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from smelt import dtypes
from smelt.dtypes import BF16, F8_E4M3, F16, F32, Float32
from smelt.specs import TensorSpec
from smelt.storage.checkpoint import FileInfo, TensorSource, check_range, decode_json, decode_text
from smelt.storage.files import Buffer

SUFFIX = "_scale_inv"
"""What the name of a weight has more in the name of its scales."""
_CONFIG = "config.json"
_SETTING = "quantization_config"
_LEAVES = frozenset({"weight", "bias"})
"""What may lie in a module beside scales; anything else there, such as a scale of inputs, is not understood."""


@dataclass(frozen=True, slots=True)
class Scaled:
    """A weight, its scales, and the rows and columns of a block."""

    weight: TensorSpec
    scales: TensorSpec
    block: tuple[int, int]


def read_as_weights(source: TensorSource) -> TensorSource:
    """The source as one of plain weights, if it is understood wholly; else the source itself.

    It is if its config names `fp8` with blocks of two dimensions, and each float8_e4m3fn tensor is a matrix that has
    scales of the fitting shape.
    """
    config = source.json(_CONFIG) or {}
    setting = config.get(_SETTING)
    block = _block(setting) if isinstance(setting, dict) else None
    scaled = _pairs(source.tensors, block) if block is not None else {}
    return ScaledCheckpoint(source, scaled, config) if scaled else source


def _block(setting: Mapping[str, Any]) -> tuple[int, int] | None:
    size = setting.get("weight_block_size")
    if setting.get("quant_method") != "fp8" or not isinstance(size, list) or len(size) != 2:
        return None
    if not all(type(edge) is int and edge > 0 for edge in size):
        return None
    return size[0], size[1]


def _pairs(tensors: Mapping[str, TensorSpec], block: tuple[int, int]) -> dict[str, Scaled]:
    """The scaled weights by name; none where any tensor of the checkpoint does not fit the pattern."""
    found: dict[str, Scaled] = {}
    modules: set[str] = set()
    for name, spec in tensors.items():
        if spec.dtype.bits == 8 and spec.dtype.floating:
            scales = tensors.get(name + SUFFIX)
            if spec.dtype is not F8_E4M3 or scales is None or len(spec.shape) != 2:
                return {}
            blocks = tuple(-(-length // edge) for length, edge in zip(spec.shape, block, strict=True))
            if scales.shape != blocks or scales.dtype not in (F32, BF16, F16):
                return {}
            found[name] = Scaled(spec, scales, block)
            modules.add(name.rpartition(".")[0])
    known = {scaled.scales.name for scaled in found.values()}
    for name in tensors:
        module, _, leaf = name.rpartition(".")
        alone = name.endswith(SUFFIX) and name not in known
        if alone or (module in modules and name not in known and name not in found and leaf not in _LEAVES):
            return {}
    return found


class ScaledCheckpoint:
    """A checkpoint read as plain weights: `scaled` tensors are float32, and their scales are left out."""

    def __init__(self, source: TensorSource, scaled: Mapping[str, Scaled], config: Mapping[str, Any]) -> None:
        self._source = source
        self._scaled = dict(scaled)
        self._config = {key: value for key, value in config.items() if key != _SETTING}
        self._scales: dict[str, Float32] = {}
        self._lock = threading.Lock()
        hidden = {one.scales.name for one in scaled.values()}
        self.name = source.name
        self.root: Path | None = source.root
        self.files: tuple[FileInfo, ...] = source.files
        self.metadata: Mapping[str, str] = source.metadata
        self.tensors: dict[str, TensorSpec] = {
            name: replace(spec, dtype=F32) if name in scaled else spec
            for name, spec in source.tensors.items()
            if name not in hidden
        }

    @property
    def scaled(self) -> Mapping[str, Scaled]:
        """The weights that have scales, by name."""
        return self._scaled

    def read_into(self, spec: TensorSpec, start: int, stop: int, buffer: Buffer) -> None:
        """Fill `buffer` with bytes [start, stop) of the tensor; of a scaled one these are bytes of float32 numbers.

        Raises as the checkpoint behind does.
        """
        one = self._scaled.get(spec.name)
        if one is None:
            self._source.read_into(spec, start, stop, buffer)
            return
        check_range(spec, start, stop, buffer)
        if start == stop:
            return
        width = F32.nbytes(1)
        first, last = start // width, -(-stop // width)
        values = self._values(one, first, last)
        target = np.frombuffer(buffer, dtype=np.uint8)
        target[:] = values.view(np.uint8)[start - first * width : stop - first * width]

    def _values(self, one: Scaled, first: int, last: int) -> Float32:
        """Elements [first, last) of a weight: float32, decoded and multiplied by their blocks' scales."""
        raw: Any = np.empty(last - first, dtype=np.uint8)
        self._source.read_into(one.weight, first, last, memoryview(raw))
        values = np.empty(last - first, dtype=np.float32)
        dtypes.decode(raw, one.weight.dtype, values)
        scales = self._scales_of(one)
        columns = one.weight.shape[1]
        high, wide = one.block
        with np.errstate(all="ignore"):
            start = first
            while start < last:
                row, column = divmod(start, columns)
                factors = np.repeat(scales[row // high], wide)[:columns]
                if column or last - start < columns:  # a part of a row
                    stop = min(last, (row + 1) * columns)
                    values[start - first : stop - first] *= factors[column : column + stop - start]
                else:  # whole rows of one line of blocks
                    stop = min((row // high + 1) * high, last // columns) * columns
                    rows = values[start - first : stop - first].reshape(-1, columns)
                    rows *= factors
                start = stop
        return values

    def _scales_of(self, one: Scaled) -> Float32:
        """The scales of a weight: float32 [lines of blocks, blocks in a line], read when first asked for."""
        with self._lock:
            if one.weight.name not in self._scales:
                raw: Any = np.empty(one.scales.nbytes, dtype=np.uint8)
                self._source.read_into(one.scales, 0, one.scales.nbytes, memoryview(raw))
                values = np.empty(one.scales.size, dtype=np.float32)
                dtypes.decode(raw, one.scales.dtype, values)
                self._scales[one.weight.name] = values.reshape(one.scales.shape)
            return self._scales[one.weight.name]

    def bytes(self, name: str) -> builtins.bytes | None:
        """A small file, or None; the config is that of plain weights."""
        if name == _CONFIG:
            return json.dumps(self._config).encode()
        return self._source.bytes(name)

    def text(self, name: str) -> str | None:
        """A UTF-8 file, or None. Raises InputError if it is not that."""
        return decode_text(self.bytes(name), name, label=self.name)

    def json(self, name: str) -> dict[str, Any] | None:
        """A JSON file that holds an object, or None. Raises InputError if it is not that."""
        return decode_json(self.bytes(name), name, label=self.name)

    def other_files(self) -> list[str]:
        """The names of the files that hold no weights, sorted."""
        return self._source.other_files()

    def changed(self) -> list[str]:
        """The names of the weight files that are no longer what they were."""
        return self._source.changed()

    def close(self) -> None:
        """Let go of what is open."""
        self._source.close()
