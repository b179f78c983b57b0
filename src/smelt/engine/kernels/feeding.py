"""What compiled loops are given of the models: where each lies in its file, or its bytes."""

from __future__ import annotations

from typing import Any

import numpy as np

from smelt.dtypes import BF16, F8_E4M3, F8_E5M2, F16, F32
from smelt.engine.given import Given
from smelt.engine.kernels.sizes import MOST_MODELS
from smelt.engine.tiles import PIECE

ELEMENTS = {BF16.code: np.uint16, F32.code: np.float32}
"""How loops see stored elements of their output; other types are encoded from float32."""
STORED: dict[str, Any] = {
    BF16.code: np.uint16,
    F16.code: np.int16,
    F8_E4M3.code: np.uint8,
    F8_E5M2.code: np.int8,
    F32.code: np.float32,
}
"""How they see those of their inputs: each type is told by its kind of integer."""

_IN_MEMORY = np.full((MOST_MODELS, 2), -1, dtype=np.int64)


def feed(given: Given) -> tuple[Any, tuple[Any, ...]] | None:
    """(files, arrays) as loops take them; None where the models' types differ or have no kernel."""
    stored = given.stored
    first = stored.buffers[0][1]
    kind = STORED.get(first.code)
    if kind is None or len(stored.buffers) > MOST_MODELS or any(dtype is not first for _, dtype in stored.buffers):
        return None
    arrays = tuple([raw.view(kind) for raw, _ in stored.buffers])
    return _IN_MEMORY if stored.files is None else stored.files, arrays


def feed_rows(given: Given) -> tuple[Any, tuple[Any, ...]] | None:
    """As `feed`, for loops on rows; None too where a row is wider than a piece."""
    return feed(given) if given.width <= PIECE else None


def plain(coefficients: Any, kind: Any = float) -> tuple[Any, ...]:
    """Coefficients as a tuple: numbers in registers, which no store into the output can change."""
    return tuple([kind(c) for c in coefficients])
