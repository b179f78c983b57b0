"""Frozen records that every layer shares: where a tensor lies, which model it came from, how it may be cut."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass

from smelt.dtypes import DType


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A stored tensor: `nbytes` bytes at byte `offset` of `file` (a file name inside its checkpoint)."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    file: str = ""
    offset: int = 0

    @property
    def size(self) -> int:
        """Number of elements; 1 for a 0-d tensor."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.dtype.nbytes(self.size)

    def __str__(self) -> str:
        return f"{self.name} {list(self.shape)} {self.dtype}"


@dataclass(frozen=True, slots=True)
class ModelRef:
    """A model as a recipe names it: a folder path or a hub id, with an optional revision (`org/name@rev`)."""

    text: str
    path: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.text


class Grain(enum.Enum):
    """How a tensor may be cut into tiles."""

    ELEMENT = "element"
    """Between any two elements; tiles are [n, t]."""
    ROW = "row"
    """Between rows along the last dimension; tiles are [n, r, last]. A 1-D tensor is one row."""
    SLAB = "slab"
    """Between entries of the first dimension; tiles are [n, r, rest]."""
    TENSOR = "tensor"
    """Not at all; the one tile is [n, *shape]."""
