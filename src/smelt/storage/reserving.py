"""Disk space for files before they are written; in memory, pages for them while they are.

On a tmpfs there is no disk to reserve, and to make all pages takes a fifth of a second for 2 GB: one thread makes them
while the others work, some steps before they are written.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import sys
import threading
from collections.abc import Sequence

UNSUPPORTED = frozenset({errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP})
"""What a file system answers to a call that it does not have."""
_TMPFS = 0x01021994
_STEP = 16 << 20
"""Bytes made at a time: writers wait for so long."""
_WORDS = 64
"""Room for what the system says of a file system, whose first word is its type."""


def reserve(descriptor: int, size: int) -> None:
    """Give the file this size, and reserve what it will take on the disk where the system can do so. Raises OSError."""
    if hasattr(os, "posix_fallocate") and not lies_in_memory(descriptor):  # macOS has no such call
        try:
            os.posix_fallocate(descriptor, 0, size)
            return
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
    os.ftruncate(descriptor, size)


def lies_in_memory(descriptor: int) -> bool:
    """Whether an open file lies on a tmpfs, as far as the system tells."""
    if not sys.platform.startswith("linux") or not hasattr(os, "posix_fallocate"):
        return False
    found = (ctypes.c_long * _WORDS)()
    return ctypes.CDLL(None).fstatfs(descriptor, found) == 0 and found[0] == _TMPFS


class Pages:
    """Makes the pages of files in memory, in their order, until it is done or stopped. Others may write meanwhile."""

    def __init__(self) -> None:
        self._stopped = False
        self._thread: threading.Thread | None = None

    def start(self, opened: Sequence[tuple[int, int]]) -> None:
        """Begin with the (descriptor, size) of those that lie in memory; they stay open until `stop` has returned."""
        wanted = [(descriptor, size) for descriptor, size in opened if size and lies_in_memory(descriptor)]
        if wanted:
            self._thread = threading.Thread(target=self._make, args=(wanted,), name="smelt-pages", daemon=True)
            with contextlib.suppress(RuntimeError):  # no thread to be had: whoever writes makes the pages
                self._thread.start()

    def stop(self) -> None:
        """Return when no file is touched any more."""
        self._stopped = True
        if self._thread is not None and self._thread.ident is not None:
            self._thread.join()

    def _make(self, wanted: Sequence[tuple[int, int]]) -> None:
        for descriptor, size in wanted:
            for start in range(0, size, _STEP):
                if self._stopped:
                    return
                try:
                    os.posix_fallocate(descriptor, start, min(_STEP, size - start))
                except OSError:  # whoever writes there will be told
                    return
