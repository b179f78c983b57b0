"""Kernels that read by themselves: a piece of every model at a time, worked on while it is in the second cache.

A task is large, so that workers seldom meet at the interpreter's lock; what it reads would be in memory again by the
time that a kernel comes to it. Read within the kernel, in pieces and without the lock, it is not.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba.extending import overload

from smelt.dtypes import BF16, F8_E4M3, F8_E5M2, F16, F32
from smelt.engine.given import Given
from smelt.engine.kernels.compiled import JIT

MOST_MODELS = 12
"""Above this many models a method's own function is called."""
STORED: dict[str, Any] = {
    BF16.code: np.uint16,
    F16.code: np.int16,
    F8_E4M3.code: np.uint8,
    F8_E5M2.code: np.int8,
    F32.code: np.float32,
}
"""How kernels see stored elements of their inputs: `widen` knows each type by its kind of integer."""

_int64, _address = numba.types.int64, numba.types.uintp
_pread: Any = numba.types.ExternalFunction("pread", _int64(numba.types.int32, _address, _address, _int64))
_IN_MEMORY = np.full((MOST_MODELS, 2), -1, dtype=np.int64)


def feed(given: Given) -> tuple[Any, tuple[Any, ...]] | None:
    """(files, arrays) as kernels take them, for `fetch`; None where the models' types differ or have no kernel."""
    stored = given.stored
    first = stored.buffers[0][1]
    kind = STORED.get(first.code)
    if kind is None or len(stored.buffers) > MOST_MODELS or any(dtype is not first for _, dtype in stored.buffers):
        return None
    arrays = tuple([raw.view(kind) for raw, _ in stored.buffers])
    return _IN_MEMORY if stored.files is None else stored.files, arrays


@JIT
def fetch(files: Any, stored: Any, low: int, high: int) -> int:
    """Where in the arrays elements [low, high) of the range are, once they have been read if they were not.

    `low` is a multiple of PIECE, and `high` at most one more. Raises OSError, of which nothing more is known: the
    ordinary way of reading will say what is wrong.
    """
    at: int = low % max(stored[0].size, 1)
    for i in range(len(stored)):
        if files[i, 0] < 0:
            break
        part = stored[i][at : at + high - low]
        address, left = part.ctypes.data, part.size * part.itemsize
        position = files[i, 1] + low * part.itemsize
        while left > 0:
            got = _pread(files[i, 0], address, left, position)
            if got <= 0:
                raise OSError("a file could not be read")
            address, left, position = address + got, left - got, position + got
    return at


def cut(stored: Any, low: int, high: int) -> Any:
    """Elements [low, high) of each array."""
    raise NotImplementedError  # numba replaces it


@overload(cut)
def _cut(stored, low, high):
    parts = ", ".join(f"stored[{i}][low:high]" for i in range(len(stored)))
    space: dict[str, Any] = {}
    exec(f"def cut(stored, low, high):\n    return ({parts},)", space)
    return space["cut"]
