"""One thread for each call into BLAS and LAPACK: their sums, and so their bits, depend on how many there are.

Methods of grain TENSOR may use linear algebra. The engine works on as many tensors at once as it has workers, so that
all cores are busy all the same. NumPy's wheels bring OpenBLAS, whose number of threads can be set while it runs; with
another BLAS nothing is changed here, and its own variable (OMP_NUM_THREADS, MKL_NUM_THREADS) decides.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

_PREFIXES = ("scipy_openblas", "openblas")
_SUFFIXES = ("64_", "")


@cache
def _controls() -> tuple[Callable[[], int], Callable[[int], None]] | None:
    """How to ask for and set the number of threads of NumPy's own OpenBLAS; None where it has none."""
    try:
        listed = importlib.metadata.files("numpy") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    for path in listed:
        if "openblas" not in path.name or not path.name.endswith((".so", ".dylib", ".dll")):
            continue
        try:
            library = ctypes.CDLL(str(path.locate()))  # loaded already: the same one that NumPy uses
        except OSError:
            continue
        for prefix in _PREFIXES:
            for suffix in _SUFFIXES:
                get = getattr(library, f"{prefix}_get_num_threads{suffix}", None)
                put = getattr(library, f"{prefix}_set_num_threads{suffix}", None)
                if get is not None and put is not None:
                    return get, put
    return None


def threads() -> int | None:
    """How many threads OpenBLAS uses now; None where that is not known."""
    found = _controls()
    return None if found is None else int(found[0]())


_lock = threading.Lock()
_holders = 0
_before = 1


@contextmanager
def single_threaded() -> Iterator[None]:
    """Hold OpenBLAS at one thread, for the whole process; the last of several holders gives back what was before."""
    global _holders, _before
    found = _controls()
    if found is None:
        yield
        return
    get, put = found
    with _lock:
        if _holders == 0:
            _before = int(get())
            put(1)
        _holders += 1
    try:
        yield
    finally:
        with _lock:
            _holders -= 1
            if _holders == 0:
                put(_before)
