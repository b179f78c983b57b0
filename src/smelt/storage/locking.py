"""The lock on an output: who holds it may write there.

Calls go through `files.system`, like all others.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from pathlib import Path

from smelt.errors import StorageError
from smelt.storage import files


class Lock:
    """An exclusive lock held by this process until `release`, or until the process ends, however it ends."""

    __slots__ = ("_descriptor", "path")

    def __init__(self, descriptor: int, path: Path) -> None:
        self._descriptor = descriptor
        self.path = path

    def release(self) -> None:
        """Remove the lock file and let go; a second call does nothing."""
        if self._descriptor < 0:
            return
        descriptor, self._descriptor = self._descriptor, -1
        if sys.platform == "win32":  # an open file cannot be removed there
            os.close(descriptor)
        with contextlib.suppress(OSError):  # an empty file left behind does no harm
            os.unlink(self.path)
        if sys.platform != "win32":  # removed first, so that nobody locks a file that is about to vanish
            os.close(descriptor)


def lock_folder(path: files.StrPath) -> Lock:
    """Lock a folder (which need not exist yet) through the file `PATH.lock` beside it; never waits.

    Raises StorageError when another process, or another part of this one, holds the lock. A lock file left by a
    process that died is no obstacle: the lock is the operating system's, not the file's existence.
    """
    path = Path(os.fspath(path) + ".lock")
    for _ in range(100):
        descriptor = files.open_descriptor(path, os.O_CREAT | os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
        try:
            files.system("lock", path, _lock, descriptor)
            # Between open and lock its last holder may have removed the file; then this lock guards nothing.
            if files.stamp(path) == files.stamp_of(descriptor, path):
                return Lock(descriptor, path)
        except StorageError as error:
            os.close(descriptor)
            if files.code(error) in {errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK}:
                raise StorageError(
                    "another smelt run is writing here",
                    where=[str(path.parent)],
                    fix="wait for it to end, or choose another output folder",
                ) from error
            raise
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
    raise StorageError("cannot lock: others take and release the lock without pause", where=[str(path)])


def _lock(descriptor: int) -> None:
    if sys.platform == "win32":
        import msvcrt

        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
