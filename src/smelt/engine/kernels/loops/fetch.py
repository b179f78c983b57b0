"""Loops that read by themselves: a piece of every model at a time, worked on while it is in the second cache.

A task is large, so that workers seldom meet at the interpreter's lock; what it reads would be in memory again by the
time that a loop comes to it. Read within the loop, in pieces and without the lock, it is not.
"""

from __future__ import annotations

from typing import Any

import numba
from numba.extending import overload

from smelt.engine.kernels.loops.elements import JIT

_int64, _address = numba.types.int64, numba.types.uintp
_pread: Any = numba.types.ExternalFunction("pread", _int64(numba.types.int32, _address, _address, _int64))


@JIT
def fetch(files: Any, stored: Any, low: int, high: int) -> int:
    """Where in the arrays elements [low, high) of the range are, once they have been read if they were not.

    The arrays have room for the range, or for one piece; then two pieces together are more than they hold. Raises
    OSError, of which nothing more is known: the ordinary way of reading will say what is wrong.
    """
    at: int = low if high <= stored[0].size else 0
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
