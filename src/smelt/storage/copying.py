"""Bytes from file to file within the system, which may share them instead of copying; by read and write elsewhere.

Calls go through `files.system`, like all others.
"""

from __future__ import annotations

import errno
import os

from smelt.errors import StorageError
from smelt.storage import files
from smelt.storage.files import ReadFile, WriteFile

_CHUNK = 1 << 20
"""Bytes that are read and written at a time: they stay in the cache."""
_BLOCK = 4096
"""Bytes of a file system's block, nearly everywhere; where it is another one, blocks are copied and not shared."""
_REFUSED = frozenset({errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP})
"""How the system says that it does not copy between two files, which can be read and written all the same."""


def copy_range(source: ReadFile, start: int, target: WriteFile, at: int, *, size: int) -> None:
    """Copy `size` bytes from byte `start` of one file to byte `at` of another, within the system where it can do that.

    Blocks that lie alike in both files are asked for by themselves: XFS and Btrfs share them instead of copying. Where
    the system has no such call, or not between these files, bytes are read and written. Raises InputError if the source
    ends too early, StorageError when the system refuses, ValueError outside the size of the target.
    """
    if at < 0 or at + size > target.size:
        raise ValueError(f"bytes {at} to {at + size} are outside {target.path}")
    alike = (start - at) % _BLOCK == 0
    head = min(-start % _BLOCK, size) if alike else 0
    tail = (size - head) % _BLOCK if alike else 0
    place = 0
    for part in (head, size - head - tail, tail):
        if part:
            _copy_part(source, start + place, target, at + place, part)
            place += part


def _copy_part(source: ReadFile, start: int, target: WriteFile, at: int, size: int) -> None:
    able = not files.PORTABLE and hasattr(os, "copy_file_range")
    done = _copy_by_system(source, start, target, at, size) if able else 0
    chunk = memoryview(bytearray(min(_CHUNK, size - done)))
    for place in range(done, size, _CHUNK):
        piece = chunk[: min(_CHUNK, size - place)]
        source.read_into(start + place, piece)
        target.write_at(at + place, piece)


def _copy_by_system(source: ReadFile, start: int, target: WriteFile, at: int, size: int) -> int:
    """Copy as many of the bytes as the system will; how many that are."""
    done = 0
    between = f"{source.path} -> {target.path}"
    while done < size:
        args = (source.descriptor, target.descriptor, size - done, start + done, at + done)
        try:
            count = files.system("copy", between, _copy_some, *args, needed=size - done)
        except StorageError as error:
            if files.code(error) not in _REFUSED:
                raise
            break
        if count == 0:  # the source ends here, which reading will tell, or its file system cannot do it
            break
        done += count
    return done


def _copy_some(source: int, target: int, size: int, start: int, at: int) -> int:
    return os.copy_file_range(source, target, size, start, at)
