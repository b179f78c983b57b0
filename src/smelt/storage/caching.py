"""What the system keeps of files in memory: what it is told to fetch, to write and to let go.

Files that fit in memory are left there: the next merge of them is quicker. Where they do not, they are streamed, since
the beginning of one would be gone when it is read again, and all else that is kept with it. What was read for the last
time and what is on the disk is let go, so pages are used again and no new ones are sought; the output goes to the disk
while it is written, and not in a flood; and the disk fetches ahead while passes go over what it has fetched.

These are hints: where the system has no such call nothing is lost but time.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

_AHEAD = 32 << 20
"""Bytes behind a read that are fetched meanwhile: what served best on cold files (docs/log.md)."""
_FAR = 128 << 20
"""As many behind the farthest read, where a file is streamed."""
_WORTH_HINT = 1 << 18
"""Bytes of a read from which on something is fetched behind it."""
_LEAST = 4 << 20
"""Bytes that are worth a call."""
_PAUSE = 0.05
"""Seconds between two calls to write what is there."""
_START_WRITING = 2
"""SYNC_FILE_RANGE_WRITE. It waits for nothing and reports no failed write, so that the next sync does."""
_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""Where a container's limit of memory stands, files in memory included."""


class Ahead:
    """Which bytes of a file of `size` bytes are to be fetched, as reads of it go on. Safe from many threads."""

    def __init__(self, size: int) -> None:
        self.streamed = False
        self._size = size
        self._farthest = 0
        self._fetched = 0
        self._lock = threading.Lock()

    def behind(self, offset: int, size: int) -> tuple[int, int] | None:
        """What to fetch during a read, (start, stop); None where that is little, or was told before.

        Files are mostly read from front to back. Of a streamed one each read moves on what is fetched by twice its
        size, those of a second pass too, up to a limit.
        """
        if size < _WORTH_HINT:
            return None
        with self._lock:
            return self._move_on(offset, size)

    def _move_on(self, offset: int, size: int) -> tuple[int, int] | None:
        end = offset + size
        self._farthest = max(self._farthest, end)
        start = max(self._fetched, end)
        if self.streamed:
            stop = min(max(start + 2 * size, end + _AHEAD), self._farthest + _FAR, self._size)
        else:
            stop = min(end + _AHEAD, self._size)
        if start >= stop or stop - start < min(_LEAST if self.streamed else _AHEAD // 4, self._size - start):
            return None
        self._fetched = stop
        return start, stop


class Writeback:
    """Has the system write to the disk what it holds of files, now and then, while others fill them."""

    def __init__(self) -> None:
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, calls: Sequence[Callable[[], None]]) -> None:
        """Begin to make these calls, which tell the system, again and again until `stop`."""
        self._thread = threading.Thread(target=self._work, args=(calls,), name="smelt-writeback", daemon=True)
        with contextlib.suppress(RuntimeError):  # no thread to be had: the system writes when it thinks fit
            self._thread.start()

    def stop(self) -> None:
        """Return when no call is under way, nor will be."""
        self._stopped.set()
        if self._thread is not None and self._thread.ident is not None:
            self._thread.join()

    def _work(self, calls: Sequence[Callable[[], None]]) -> None:
        while not self._stopped.wait(_PAUSE):
            for call in calls:
                call()


def available_bytes() -> int | None:
    """Memory that programs and files could take without others being pushed out; None where the system tells nothing.

    A container's limit counts as far as it is seen from within.
    """
    found = [limit for path in _LIMITS if (limit := _number(path)) is not None]
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
        found.append(next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")))
    if not found and hasattr(os, "sysconf"):
        with contextlib.suppress(OSError, ValueError):
            found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(found, default=None)


def _number(path: Path) -> int | None:
    with contextlib.suppress(OSError, ValueError):
        return int(path.read_text("ascii"))  # "max" where there is no limit
    return None


# --- the calls themselves; they raise OSError -----------------------------------------------------------------------


def fetch(descriptor: int, start: int, stop: int) -> None:
    """Begin to read bytes [start, stop) into memory."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, start, stop - start, os.POSIX_FADV_WILLNEED)


def let_go(descriptor: int, start: int, stop: int) -> None:
    """Keep bytes [start, stop) no longer in memory, as far as they are on the disk."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, start, stop - start, os.POSIX_FADV_DONTNEED)


def begin_writing(descriptor: int, size: int) -> None:
    """Begin to write to the disk what is in memory of the first `size` bytes; no word of whether that goes well."""
    if sys.platform.startswith("linux"):
        offset = ctypes.c_int64
        ctypes.CDLL(None).sync_file_range(descriptor, offset(0), offset(size), _START_WRITING)
