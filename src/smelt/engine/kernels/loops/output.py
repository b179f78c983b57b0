"""The end of loops that are written out for a number of models: each number is stored as an element of the output."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from smelt.engine.kernels.loops.elements import infinity, least, magnitude, narrow, rounded_bfloat16, widen

_ROUNDED_TO_INFINITY = 0x7F7F8000
"""The bits of the least float32 that is infinite as a bfloat16."""


def made(head: list[str], body: list[str], value: str, out: Any) -> Any:
    """The function with these lines: a head, and for each j a body and a `value` that is stored as out[j].

    It gives whether a number of `out` is not finite. bfloat16 is first rounded as if there were no NaN, which is a
    tenth quicker; where a number is not finite all is done once more with care.
    """
    lines = list(head)
    if isinstance(out.dtype, numba.types.Integer):
        lines += ["    largest = np.uint32(0)", "    for j in range(out.size):", *body]
        lines += [f"        x = np.float32({value}).view(np.uint32)", "        out[j] = rounded_bfloat16(x)"]
        lines += ["        largest = max(largest, np.uint32(x & np.uint32(0x7FFFFFFF)))"]
        lines += [f"    if largest < np.uint32({_ROUNDED_TO_INFINITY}):", "        return False"]
    lines += ["    worst = least(out)", "    for j in range(out.size):", *body]
    lines += [f"        y = narrow(np.float32({value}), out)", "        out[j] = y"]
    lines += ["        worst = max(worst, magnitude(y))", "    return worst >= infinity(out)"]
    return function(lines)


def function(lines: list[str]) -> Any:
    """The function that these lines define."""
    space: dict[str, Any] = {"np": np, "widen": widen, "narrow": narrow, "rounded_bfloat16": rounded_bfloat16}
    space |= {"magnitude": magnitude, "infinity": infinity, "least": least}
    known = set(space)
    exec("\n".join(lines), space)
    (name,) = set(space) - known - {"__builtins__"}
    return space[name]
