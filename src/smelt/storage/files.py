"""The only module that opens, reads, writes, syncs, renames and removes.

Every call to the operating system goes through `system`, so a test can make call k fail by replacing that one function,
and every refusal becomes a `StorageError` that says what was tried, on which path, and what to do. A given path that is
missing or not a regular file is the caller's input and becomes an `InputError`.

Reads and writes are positional (`pread`, `pwrite`), hence safe for many threads on one file. Where the platform lacks
those calls (`PORTABLE`), seek and read or write under a lock per file stand in for them. Copying
within the system (`storage.copying`) and the lock (`storage.locking`) go through `system` too.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import shutil
import stat as stat_bits
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias, TypeVar, cast

import numpy as np

from smelt.errors import InputError, SmeltError, StorageError
from smelt.storage import caching
from smelt.storage.reserving import UNSUPPORTED, reserve

if sys.platform != "win32":  # imported here, for the import needs a descriptor of its own
    import resource

T = TypeVar("T")
StrPath: TypeAlias = str | os.PathLike[str]
Buffer: TypeAlias = bytes | bytearray | memoryview | np.ndarray[Any, Any]
Stamp: TypeAlias = tuple[int, int, int]
"""Size, modification time in nanoseconds, inode: if one differs, the file is not what it was."""

PORTABLE = not (hasattr(os, "preadv") and hasattr(os, "pwrite"))
"""True where positional calls are missing; the one switch between them and their portable stand-ins."""

_FLAGS = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
_COPY_CHUNK = 8 << 20
_NOT_THERE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG})
_NO_SPACE = frozenset({errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)})


# --- the one door ---------------------------------------------------------------------------------------------------


def system(what: str, path: StrPath, call: Callable[..., T], *args: Any, needed: int = 0) -> T:
    """Make one call to the operating system. Raises StorageError in place of any OSError.

    `what` is the verb of the message ("read"), `needed` the bytes of space the call asks for, if any.
    """
    try:
        return call(*args)
    except OSError as error:
        raise _refusal(what, path, error, needed) from error


def _refusal(what: str, path: StrPath, error: OSError, needed: int) -> StorageError:
    """The error for people that stands for `error`."""
    reason = error.strerror or str(error)
    fix = None
    if error.errno in _NO_SPACE:
        reason = f"no space left on the device ({size_text(needed)} needed)" if needed else "no space left"
        fix = "free some space, or choose another disk"
    elif error.errno in {errno.EACCES, errno.EPERM, errno.EROFS}:
        fix = "check the permissions, or choose another folder"
    return StorageError(f"cannot {what}: {reason}", where=[os.fspath(path)], fix=fix)


def code(error: SmeltError) -> int | None:
    """The errno behind an error of this module, or None."""
    return error.__cause__.errno if isinstance(error.__cause__, OSError) else None


def flat(buffer: Buffer) -> memoryview:
    """The bytes of any contiguous buffer, as one line of uint8; shared, not copied."""
    view = memoryview(cast(Any, buffer))  # an array has the buffer protocol, though its stubs tell only from 3.12 on
    return view.cast("B") if view.nbytes else memoryview(b"")


def size_text(size: int) -> str:
    """A number of bytes for people.

    >>> size_text(999), size_text(5_368_709_120)
    ('999 bytes', '5.37 GB')
    """
    value, unit = float(size), "bytes"
    for larger in ("KB", "MB", "GB", "TB", "PB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{size} bytes" if unit == "bytes" else f"{value:.3g} {unit}"


# --- reading --------------------------------------------------------------------------------------------------------


class ReadFile:
    """A regular file, open for positional reads from many threads. Close it when no read is under way."""

    __slots__ = ("_ahead", "_descriptor", "_lock", "path", "size")

    def __init__(self, descriptor: int, path: Path, size: int) -> None:
        self._descriptor = descriptor
        self._ahead = caching.Ahead(size)
        self._lock = threading.Lock()
        self.path = path
        self.size = size

    def read_into(self, offset: int, buffer: Buffer) -> None:
        """Fill the whole writable `buffer` from byte `offset`. Raises InputError if the file ends before that."""
        self.announce(offset, len(flat(buffer)))
        _read_fully(self._descriptor, self.path, self._lock, offset, buffer)

    def announce(self, offset: int, size: int) -> None:
        """Tell the system of a read, so that it fetches what will probably be read next."""
        if (span := self._ahead.behind(offset, size)) is not None:
            with contextlib.suppress(StorageError):  # it is a hint
                system("look ahead in", self.path, caching.fetch, self._descriptor, *span)

    def stream(self) -> None:
        """Fetch further ahead from now on: the file is read by a merge larger than memory."""
        self._ahead.streamed = True

    def let_go(self, start: int, stop: int) -> None:
        """Tell the system that bytes [start, stop) need be kept in memory no longer."""
        _let_go(self._descriptor, self.path, start, stop)

    @property
    def descriptor(self) -> int:
        """The system's number for the open file, for calls that this module has no function for."""
        return self._descriptor

    def stamp(self) -> Stamp:
        """What the open file is now: size, modification time, inode."""
        return stamp_of(self._descriptor, self.path)

    def close(self) -> None:
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            system("close", self.path, os.close, descriptor)

    def __enter__(self) -> ReadFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, _e: object, _t: TracebackType | None) -> None:
        with contextlib.suppress(*(() if kind is None else (StorageError,))):  # the first error matters more
            self.close()


def open_read(path: StrPath) -> ReadFile:
    """Open a regular file for reading; never blocks on a pipe or a device.

    Raises InputError when there is no such file or it is not a regular one, StorageError when the system refuses.
    """
    path = Path(path)
    found = _stat_input(path)  # before the open: opening alone can block on a pipe, or start a device
    if not stat_bits.S_ISREG(found.st_mode):
        raise InputError(f"not a regular file but {_kind(found.st_mode)}", where=[str(path)])
    descriptor = open_descriptor(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0))
    try:
        opened = system("look at", path, os.fstat, descriptor)
        if (opened.st_ino, opened.st_dev) != (found.st_ino, found.st_dev):
            raise InputError("the file was replaced while it was being opened", where=[str(path)])
    except BaseException:
        os.close(descriptor)
        raise
    return ReadFile(descriptor, path, opened.st_size)


def read_bytes(path: StrPath, *, limit: int) -> bytes:
    """The whole content of a small file. Raises InputError when it has more than `limit` bytes."""
    with open_read(path) as file:
        if file.size > limit:
            too_large = f"the file is too large: {size_text(file.size)}, at most {size_text(limit)} are allowed"
            raise InputError(too_large, where=[str(path)])
        content = bytearray(file.size)
        file.read_into(0, content)
    return bytes(content)


def stamp(path: StrPath) -> Stamp | None:
    """What the file at `path` is now, or None when there is none."""
    try:
        return _stamp(system("look at", path, os.stat, path))
    except StorageError as error:
        if code(error) in _NOT_THERE:
            return None
        raise


def stamp_of(descriptor: int, path: StrPath) -> Stamp:
    """What an open file is now."""
    return _stamp(system("look at", path, os.fstat, descriptor))


# --- writing --------------------------------------------------------------------------------------------------------


class WriteFile:
    """A new file of known size, open for positional writes and reads from many threads."""

    __slots__ = ("_descriptor", "_lock", "path", "size")

    def __init__(self, descriptor: int, path: Path, size: int) -> None:
        self._descriptor = descriptor
        self._lock = threading.Lock()
        self.path = path
        self.size = size

    def write_at(self, offset: int, data: Buffer) -> None:
        """Write all of `data` at byte `offset`. Raises ValueError outside the size given at creation."""
        view = flat(data)
        if offset < 0 or offset + len(view) > self.size:
            raise ValueError(f"bytes {offset} to {offset + len(view)} are outside {self.path}")
        while len(view):
            args = (self._descriptor, view, offset, self._lock)
            written = system("write", self.path, _write_some, *args, needed=len(view))
            view, offset = view[written:], offset + written

    def append(self, data: Buffer) -> None:
        """Write `data` at the end, which moves. After an error, what stands there is unknown."""
        offset, self.size = self.size, self.size + len(flat(data))
        self.write_at(offset, data)

    def cut(self, size: int) -> None:
        """Drop what lies beyond byte `size`."""
        system("cut", self.path, os.ftruncate, self._descriptor, size)
        self.size = size

    def reserve(self) -> None:
        """Reserve disk space for what is not there yet of the file's size."""
        if self.size:
            system("reserve space for", self.path, _reserve, self._descriptor, self.size, needed=self.size)

    def read_into(self, offset: int, buffer: Buffer) -> None:
        """Read back what was written, filling the whole `buffer`."""
        _read_fully(self._descriptor, self.path, self._lock, offset, buffer)

    @property
    def descriptor(self) -> int:
        """As `ReadFile.descriptor`."""
        return self._descriptor

    def sync(self) -> None:
        """Return when the content is on the disk. After an error, what is on the disk is unknown: do not retry."""
        system("sync", self.path, _sync, self._descriptor)

    def begin_writing(self) -> None:
        """Have the system write to the disk what it holds, without waiting for it; only `sync` tells how that went."""
        with contextlib.suppress(StorageError):
            system("begin to write", self.path, caching.begin_writing, self._descriptor, self.size)

    def let_go(self) -> None:
        """Tell the system that what is on the disk need be kept in memory no longer."""
        _let_go(self._descriptor, self.path, 0, self.size)

    def close(self) -> None:
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            system("close", self.path, os.close, descriptor)

    def __enter__(self) -> WriteFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, _e: object, _t: TracebackType | None) -> None:
        with contextlib.suppress(*(() if kind is None else (StorageError,))):  # the first error matters more
            self.close()


def create(path: StrPath, size: int) -> WriteFile:
    """Create a file that must not exist yet, with disk space reserved for `size` bytes; it reads as zeros."""
    path = Path(path)
    descriptor = open_descriptor(path, os.O_CREAT | os.O_EXCL | os.O_RDWR)
    file = WriteFile(descriptor, path, size)
    try:
        file.reserve()
    except BaseException:
        os.close(descriptor)
        with contextlib.suppress(OSError):
            os.unlink(path)
        raise
    return file


def reopen(path: StrPath) -> WriteFile:
    """Open a regular file that is there, for writing and reading; a link is not followed. Raises StorageError."""
    path = Path(path)
    descriptor = open_descriptor(path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    try:
        found = system("look at", path, os.fstat, descriptor)
        if not stat_bits.S_ISREG(found.st_mode):
            raise StorageError(f"not a regular file but {_kind(found.st_mode)}", where=[str(path)])
    except BaseException:
        os.close(descriptor)
        raise
    return WriteFile(descriptor, path, found.st_size)


def write_bytes(path: StrPath, data: bytes) -> None:
    """Create `path`, which must not exist, with `data`; durable on return."""
    with create(path, len(data)) as file:
        file.write_at(0, data)
        file.sync()


def copy_file(source: StrPath, target: StrPath) -> None:
    """Copy the bytes of a regular file (following a link) to a new file; durable on return."""
    with open_read(source) as old, create(target, old.size) as new:
        chunk = memoryview(bytearray(min(_COPY_CHUNK, old.size)))
        for offset in range(0, old.size, _COPY_CHUNK):
            part = chunk[: min(_COPY_CHUNK, old.size - offset)]
            old.read_into(offset, part)
            new.write_at(offset, part)
        new.sync()


# --- folders --------------------------------------------------------------------------------------------------------


def kind(path: StrPath) -> str | None:
    """What lies at `path`: "file", "folder", "link" (one that leads nowhere), "other", or None for nothing."""
    try:
        mode = system("look at", path, os.stat, path).st_mode
    except StorageError as error:
        if code(error) not in _NOT_THERE:
            raise
        return "link" if os.path.islink(path) else None
    if stat_bits.S_ISDIR(mode):
        return "folder"
    return "file" if stat_bits.S_ISREG(mode) else "other"


def is_link(path: StrPath) -> bool:
    """Whether `path` itself is a symbolic link."""
    return os.path.islink(path)


def resolve(path: StrPath) -> Path:
    """The real path, all links followed. Raises InputError when it leads nowhere or in a circle."""
    try:
        return Path(system("follow", path, _real, path))
    except StorageError as error:
        if code(error) in _NOT_THERE:
            raise InputError("no such file, or a link that leads nowhere", where=[str(path)]) from error
        raise


def make_folder(path: StrPath) -> None:
    """Create one folder, which must not exist yet."""
    system("create folder", path, os.mkdir, path)


def list_folder(path: StrPath) -> list[str]:
    """The names in a folder, sorted."""
    return sorted(system("list", path, os.listdir, path))


def is_empty_folder(path: StrPath) -> bool:
    """Whether `path` is a folder with nothing in it."""
    return kind(path) == "folder" and not list_folder(path)


def sync_folder(path: StrPath) -> None:
    """Make the names in a folder durable (Windows has no such call and needs none)."""
    if sys.platform != "win32":
        system("sync folder", path, _sync_folder, path)


def rename(source: StrPath, target: StrPath) -> None:
    """Move a file or folder within one file system."""
    system(f"rename to {os.path.basename(target)}", source, os.rename, source, target)


def remove_file(path: StrPath) -> None:
    """Remove a file or a link. Nothing there is no error."""
    try:
        system("remove", path, os.unlink, path)
    except StorageError as error:
        if code(error) not in _NOT_THERE:
            raise


def remove_folder(path: StrPath) -> None:
    """Remove an empty folder; refuses one that is not empty."""
    system("remove folder", path, os.rmdir, path)


def remove_tree(path: StrPath) -> None:
    """Remove a folder and all in it; links are removed, never followed. Nothing there is no error."""
    system("remove", path, _remove_tree, path)


def refuses_writes(folder: StrPath) -> str:
    """Why no file can be made in a folder, as far as that is known beforehand; else an empty text."""
    if system("look at", folder, os.statvfs, folder).f_flag & os.ST_RDONLY:
        return os.strerror(errno.EROFS)
    return "" if system("look at", folder, os.access, folder, os.W_OK | os.X_OK) else os.strerror(errno.EACCES)


def make_temporary_folder(prefix: str) -> Path:
    """A new folder that this user alone can read, where the system keeps temporary files (TMPDIR)."""
    return Path(system("create a temporary folder", f"{prefix}*", tempfile.mkdtemp, "", prefix))


def free_bytes(path: StrPath) -> int:
    """Bytes that may still be written to the file system of `path`."""
    return system("measure the free space at", path, shutil.disk_usage, path).free


# --- the calls themselves: each makes one system call, or its portable stand-in ------------------------------------


def open_descriptor(path: Path, flags: int) -> int:
    """The system's number for a file opened with these flags; where they ran out, more are asked for."""
    try:
        return system("open", path, os.open, path, flags | _FLAGS, 0o666)
    except StorageError as error:
        if code(error) != errno.EMFILE or not _allow_more_descriptors():
            raise
    return system("open", path, os.open, path, flags | _FLAGS, 0o666)


def _allow_more_descriptors() -> bool:
    """Raise the soft limit of open files to the hard one: three models of 300 shards need more than 1024."""
    if sys.platform == "win32":
        return False
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65536 if hard == resource.RLIM_INFINITY else hard
    if wanted <= soft:
        return False
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return True


def _stat_input(path: Path) -> os.stat_result:
    try:
        return system("look at", path, os.stat, path)
    except StorageError as error:
        if code(error) in _NOT_THERE:
            raise InputError("no such file, or a link that leads nowhere", where=[str(path)]) from error
        raise


def _kind(mode: int) -> str:
    names = {
        stat_bits.S_IFDIR: "a folder",
        stat_bits.S_IFIFO: "a pipe",
        stat_bits.S_IFSOCK: "a socket",
        stat_bits.S_IFCHR: "a device",
        stat_bits.S_IFBLK: "a device",
    }
    return names.get(stat_bits.S_IFMT(mode), "something else")


def _stamp(found: os.stat_result) -> Stamp:
    return found.st_size, found.st_mtime_ns, found.st_ino


def _read_fully(descriptor: int, path: Path, lock: threading.Lock, offset: int, buffer: Buffer) -> None:
    view = flat(buffer)
    while len(view):
        count = system("read", path, _read_some, descriptor, view, offset, lock)
        if count == 0:
            raise InputError(
                "the file ends early: it was cut off",
                where=[str(path), f"nothing is there at byte {offset}"],
                fix="fetch the file again",
            )
        view, offset = view[count:], offset + count


def _read_some(descriptor: int, view: memoryview, offset: int, lock: threading.Lock) -> int:
    if not PORTABLE:
        return os.preadv(descriptor, [view], offset)
    with lock:
        os.lseek(descriptor, offset, os.SEEK_SET)
        return io.FileIO(descriptor, "rb", closefd=False).readinto(view) or 0


def _let_go(descriptor: int, path: Path, start: int, stop: int) -> None:
    with contextlib.suppress(StorageError):
        system("let go of", path, caching.let_go, descriptor, start, stop)


def _write_some(descriptor: int, view: memoryview, offset: int, lock: threading.Lock) -> int:
    if not PORTABLE:
        return os.pwrite(descriptor, view, offset)
    with lock:
        os.lseek(descriptor, offset, os.SEEK_SET)
        return os.write(descriptor, view)


def _reserve(descriptor: int, size: int) -> None:
    (os.ftruncate if PORTABLE else reserve)(descriptor, size)


def _sync(descriptor: int) -> None:
    if sys.platform == "darwin":  # there, fsync only reaches the drive's cache
        import fcntl

        fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
    else:
        os.fsync(descriptor)


def _sync_folder(path: StrPath) -> None:
    descriptor = os.open(path, os.O_RDONLY | _FLAGS)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED:  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)


def _real(path: StrPath) -> str:
    return os.path.realpath(path, strict=True)


def _remove_tree(path: StrPath) -> None:
    if not os.path.lexists(path):
        return
    if sys.version_info >= (3, 12):
        shutil.rmtree(path, onexc=_unless_gone)
    else:
        shutil.rmtree(path, onerror=lambda call, below, failure: _unless_gone(call, below, failure[1]))


def _unless_gone(_call: object, _path: str, error: BaseException) -> None:
    if not isinstance(error, FileNotFoundError):  # somebody else removed it first: as wanted
        raise error
