"""From a loop and the types of its arguments to machine code that needs nothing of numba or of Python when it runs.

The code is one C function. Its argument is a block of 64-bit words: of each array its address and shape, of each number
its bits. What numba adds for callers in Python is cut off; a loop that would need it is refused.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
from llvmlite import binding
from numba.extending import intrinsic, overload

from smelt.engine.kernels.loading import host_features

_numba: Any = numba
if _numba.config.CPU_NAME is None and _numba.config.CPU_FEATURES is None:  # else the user has said what to compile for
    _numba.config.CPU_FEATURES = host_features()
_KNOWN = frozenset({"pread", "memcpy", "memmove", "memset"})
"""What code may call: the C library's."""


_COUNTED = re.compile(r"^define [^\n]*@(NRT_(?:in|de)cref)\(.*?^}", re.DOTALL | re.MULTILINE)
_UNCOUNTED = r"define internal void @\1(ptr %0) alwaysinline {\n  ret void\n}"
"""No array is counted: none is made by a loop, all belong to its caller or lie in the room of its functions."""


@intrinsic
def _pointer(typing_context, word, element):
    """A word as the address of elements of a type."""
    pointer = numba.types.CPointer(element.instance_type)

    def generate(context: Any, builder: Any, signature: Any, arguments: Sequence[Any]) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(pointer))

    return pointer(numba.types.int64, element), generate


def word(result: Any) -> Any:
    """What a loop gives, as a word: 0 for nothing."""
    raise NotImplementedError


@overload(word)
def _word(result):
    if isinstance(result, numba.types.NoneType):
        return lambda result: np.int64(0)
    return lambda result: np.int64(result)


def build(module: str, name: str, signature: Sequence[str], *, symbol: str, machine: Any) -> bytes:
    """The code of a loop for arguments of these types, as `kernels.loading` tells them, of a function `symbol`."""
    loop = getattr(importlib.import_module(f"smelt.engine.kernels.loops.{module}"), name)
    compiled = _numba.cfunc("int64(CPointer(int64))", nopython=True, error_model="numpy")(_entry(loop, signature))
    code = binding.parse_assembly(_COUNTED.sub(_UNCOUNTED, compiled.inspect_llvm()))
    _strip(code, compiled.native_name.removeprefix("cfunc."), symbol, machine)
    return bytes(machine.emit_object(code))


def _entry(loop: Any, signature: Sequence[str]) -> Any:
    """A function of the block that takes it apart and calls the loop."""
    space: dict[str, Any] = {"loop": loop, "carray": _numba.carray, "pointer": _pointer, "np": np, "word": word}
    terms: list[str] = []
    at = 0
    for code in signature:
        if code == "(":
            terms.append("(")
        elif code == ")":
            terms.append("),")
        elif code == "q":
            terms.append(f"block[{at}],")
            at += 1
        elif code == "d":
            terms.append(f"np.int64(block[{at}]).view(np.float64),")
            at += 1
        elif len(code) == 1:
            terms.append(f"np.{np.dtype(code).name}(block[{at}]),")
            at += 1
        else:
            kind, dimensions = np.dtype(code[0]), int(code[1:])
            space[kind.name] = numba.from_dtype(kind)
            shape = "".join(f"block[{at + 1 + k}], " for k in range(dimensions))
            terms.append(f"carray(pointer(block[{at}], {kind.name}), ({shape})),")
            at += 1 + dimensions
    exec(f"def entry(block):\n    return word(loop({' '.join(terms)}))", space)
    return space["entry"]


def _strip(code: Any, entry: str, symbol: str, machine: Any) -> None:
    """Leave the function `entry`, now named `symbol`, and what it needs."""
    for part in [*code.functions, *code.global_variables]:
        if not part.is_declaration and part.name != entry:
            part.linkage = "internal"
    code.get_function(entry).name = symbol
    tuning = binding.create_pipeline_tuning_options(speed_level=3)
    tuning.loop_vectorization = True
    builder = binding.create_pass_builder(machine, tuning)
    builder.getModulePassManager().run(code, builder)
    needed = {part.name for part in [*code.functions, *code.global_variables] if part.is_declaration}
    if unknown := sorted(name for name in needed - _KNOWN if not name.startswith("llvm.")):
        raise RuntimeError(f"the loop {symbol} needs {', '.join(unknown)}, which is not there when it runs")
