"""Compiled loops: loaded from disk as machine code, or compiled by numba and kept there for the next time.

numba takes 0.3 s to be imported and set up, llvmlite 0.03 s to link what numba has made: so numba is imported only
where a loop has not been compiled before, on this machine, from these sources, by this version. A loop is a C function
of a block of 64-bit words (`loops.building`), called without the interpreter's lock.
"""

from __future__ import annotations

import ctypes
import logging
import os
import struct
import sys
import threading
import time
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import llvmlite
import numpy as np
import xxhash
from llvmlite import binding

from smelt.errors import SmeltError
from smelt.storage import files

_log = logging.getLogger(__name__)
"""Tells at INFO when a loop is being compiled, and when that is done."""
_HERE = Path(__file__).parent
_SOURCES = (
    *sorted(_HERE.rglob("*.py")),
    _HERE.parent / "tiles.py",
    *(_HERE.parents[1] / "methods" / name for name in ("nearswap.py", "reducers.py", "stages.py")),
)
"""What compiled code is made of, constants of other modules included."""
_SOURCE_LIMIT = 1 << 20
_CODE_LIMIT = 1 << 26
_DIGEST = 16
"""Bytes at the start of a file: the digest of what follows."""

_NATIVE = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)
"""As numba's own calls: (where the result goes, where an error's description would go, the arguments) -> 0, or not."""
_ONE_AT_A_TIME = threading.Lock()
_DIGITS = "0123456789"
_WORDS = {np.dtype(np.uint32): "I", np.dtype(np.uint64): "Q"}


class Loop:
    """A compiled function of `loops`, called as that is, with arrays, numbers and tuples of them; gives an integer.

    Arrays must be contiguous. Raises OSError where the loop could not read a file, of which nothing more is known.
    """

    def __init__(self, module: str, name: str) -> None:
        self._module, self._name = module, name
        self._compiled: dict[tuple[str, ...], tuple[Any, struct.Struct]] = {}

    def __call__(self, *arguments: Any) -> int:
        codes: list[str] = []
        words: list[Any] = []
        _flatten(arguments, codes, words)
        signature = tuple(codes)
        try:
            function, block = self._compiled[signature]
        except KeyError:
            function, block = self._compiled[signature] = self._load(signature)
        result = ctypes.c_int64()
        problem = ctypes.c_void_p()
        if function(ctypes.byref(result), ctypes.byref(problem), block.pack(*words)):
            raise OSError("a file could not be read, or an index was out of bounds where those are checked")
        return result.value

    def _load(self, signature: tuple[str, ...]) -> tuple[Any, struct.Struct]:
        with _ONE_AT_A_TIME:
            address = _linker().function(self._module, self._name, signature)
        return _NATIVE(address), struct.Struct("".join(_packed(code) for code in signature))


def _flatten(arguments: Sequence[Any], codes: list[str], words: list[Any]) -> None:
    """Add each argument's type to `codes`, and what it is to `words`: of an array its address and its shape."""
    for argument in arguments:
        if isinstance(argument, np.ndarray):
            flags, shape = argument.flags, argument.shape
            if not flags.c_contiguous:
                raise ValueError("a loop takes contiguous arrays")
            codes.append(argument.dtype.char + _DIGITS[len(shape)])
            words.append(_address(argument, flags))
            words += shape
        elif isinstance(argument, tuple):
            codes.append("(")
            _flatten(argument, codes, words)
            codes.append(")")
        elif isinstance(argument, float):
            codes.append("d")
            words.append(argument)
        elif isinstance(argument, int):
            codes.append("q")
            words.append(argument)
        else:
            codes.append(_WORDS[argument.dtype])
            words.append(int(argument))


def _address(array: Any, flags: Any) -> int:
    """Where the elements lie: to ask NumPy takes three times as long as to ask the buffer, which must be writable."""
    if flags.writeable and array.size:
        return ctypes.addressof(ctypes.c_char.from_buffer(array))
    return int(array.__array_interface__["data"][0])


def _packed(code: str) -> str:
    """How `struct` packs the words of a code."""
    if code in "()":
        return ""
    if code in ("d", "q"):
        return code
    return "Q" if len(code) == 1 else "Q" * (1 + int(code[1:]))


class _Linker:
    """Puts machine code into the process, that of a folder on disk where it is there."""

    def __init__(self) -> None:
        binding.initialize_native_target()
        binding.initialize_native_asmprinter()
        self._machine = host_machine()
        self._engine = binding.create_mcjit_compiler(binding.parse_assembly(""), self._machine)
        self._folder = cache_folder()
        self._addresses: dict[str, int] = {}
        self._codes: list[bytes] = []
        """What LLVM refers to and does not own."""

    def function(self, module: str, name: str, signature: tuple[str, ...]) -> int:
        """The address of a loop for arguments of these types."""
        symbol = f"smelt.{module}.{name}.{xxhash.xxh3_64_hexdigest(' '.join(signature).encode())}"
        if symbol not in self._addresses:
            code = self._kept(symbol) or self._built(module, name, signature, symbol)
            self._codes.append(code)
            self._engine.add_object_file(binding.ObjectFileRef.from_data(code))
            self._engine.finalize_object()
            self._addresses[symbol] = self._engine.get_function_address(symbol)
        return self._addresses[symbol]

    def _kept(self, symbol: str) -> bytes | None:
        """The code on disk; None where there is none that is whole."""
        try:
            data = files.read_bytes(self._folder / symbol, limit=_CODE_LIMIT)
        except SmeltError:
            return None
        return data[_DIGEST:] if data[:_DIGEST] == xxhash.xxh3_128_digest(data[_DIGEST:]) else None

    def _built(self, module: str, name: str, signature: tuple[str, ...], symbol: str) -> bytes:
        started = time.perf_counter()
        _log.info("compiling %s.%s", module, name)
        from smelt.engine.kernels.loops.building import build

        code = build(module, name, signature, symbol=symbol, machine=self._machine)
        _log.info("compiled %s.%s in %.1f s", module, name, time.perf_counter() - started)
        try:
            _keep(self._folder / symbol, xxhash.xxh3_128_digest(code) + code)
        except (SmeltError, OSError) as error:  # compiled anew in each process
            _log.info("the compiled code is not kept: %s", error)
        return code


def _keep(path: Path, data: bytes) -> None:
    """Put a file into the folder of compiled code at once, whatever other processes do."""
    path.parent.mkdir(parents=True, exist_ok=True)
    own = path.with_name(f"{path.name}.{os.getpid()}")
    files.remove_file(own)
    files.write_bytes(own, data)
    files.rename(own, path)


@cache
def _linker() -> _Linker:
    return _Linker()


def host_machine() -> Any:
    """This machine, as LLVM compiles for it: with all that its processor can do, and the best that LLVM can."""
    static = sys.platform.startswith("linux") and os.uname().machine == "x86_64"
    return binding.Target.from_default_triple().create_target_machine(
        cpu=binding.get_host_cpu_name(),
        features=host_features(),
        opt=3,
        reloc="static" if static else "default",
        codemodel="jitdefault",
        jit=True,
    )


def host_features() -> str:
    """What this processor can do, as LLVM writes it; with vectors of 512 bits where it does not slow down for them.

    LLVM prefers 256 everywhere. The election of ties takes a sixth longer with those (docs/log.md).
    """
    features = binding.get_host_cpu_features()
    return str(features.flatten() + (",-prefer-256-bit" if features.get("avx512vbmi2", False) else ""))


@cache
def cache_folder() -> Path:
    """The folder of the code of these very sources, made by this version of numba for this processor."""
    made = [files.read_bytes(path, limit=_SOURCE_LIMIT) for path in _SOURCES]
    made += [binding.get_host_cpu_name().encode(), host_features().encode()]
    made += [llvmlite.__version__.encode(), _numba_version(), os.environ.get("NUMBA_BOUNDSCHECK", "").encode()]
    digest = xxhash.xxh3_128_hexdigest(b"\0".join(made))
    if asked := os.environ.get("NUMBA_CACHE_DIR"):
        return Path(asked) / digest
    if os.access(_HERE, os.W_OK):
        return _HERE / "__pycache__" / digest
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "smelt" / digest


def _numba_version() -> bytes:
    """numba's file of its own version: to import numba, or to ask for its metadata, would take longer than all else."""
    spec = find_spec("numba")
    if spec is None or spec.origin is None:
        raise ImportError("numba is not installed")
    try:
        return files.read_bytes(Path(spec.origin).with_name("_version.py"), limit=_SOURCE_LIMIT)
    except SmeltError:
        from importlib.metadata import version

        return version("numba").encode()
