"""Disk space for a file before it is written."""

from __future__ import annotations

import ctypes
import errno
import os
import sys

UNSUPPORTED = frozenset({errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP})
"""What a file system answers to a call that it does not have."""
_TMPFS = 0x01021994
_WORDS = 64
"""Room for what the system says of a file system, whose first word is its type."""


def reserve(descriptor: int, size: int) -> None:
    """Give the file this size, and reserve what it will take on the disk where the system can do so.

    Not in memory: there it would make every page before the first is written, by one thread, and save none of the work.
    Raises OSError.
    """
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
    if not sys.platform.startswith("linux"):
        return False
    found = (ctypes.c_long * _WORDS)()
    return ctypes.CDLL(None).fstatfs(descriptor, found) == 0 and found[0] == _TMPFS
