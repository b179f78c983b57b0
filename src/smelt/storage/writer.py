"""Writing a checkpoint whole or not at all.

A `Build` fills a hidden folder beside the output, `.OUT.smelt-build`, under a lock. Until `commit` the length at the
start of every weight file is zero, so no program takes an unfinished file for a checkpoint. The commit:

1. sync the data of all weight files; write the header lengths; sync again
2. write and sync the index, then sync the folder
3. rename the folder to OUT, and sync OUT's parent folder

With `overwrite`, an existing OUT is first renamed to `.OUT.smelt-old`, and removed after step 3. A crash between
the two renames leaves no OUT but a whole `.OUT.smelt-old`; the next run on OUT (or `heal`) puts it back.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from smelt.errors import SmeltError, StorageError
from smelt.storage import files, paths
from smelt.storage.copying import copy_range
from smelt.storage.files import Buffer, Lock, ReadFile, WriteFile, flat, size_text
from smelt.storage.header import PREFIX
from smelt.storage.layout import SINGLE, Layout, OutputTensor, Shard, layout
from smelt.storage.signals import held

__all__ = ["Build", "Layout", "OutputTensor", "Shard", "check_out", "heal", "layout"]

_log = logging.getLogger(__name__)
_MARGIN = 16 << 20
"""Bytes of free space asked for beyond the weights: configs, tokenizer, record."""


@dataclass(frozen=True, slots=True)
class _Places:
    """The three folders of one output; all in one parent, so that a rename moves them."""

    out: Path
    build: Path
    old: Path

    @classmethod
    def of(cls, out: Path) -> _Places:
        """The places for `out`, links in it followed. Raises StorageError for what cannot be an output folder."""
        if os.path.islink(out) and files.kind(out) == "link":
            raise StorageError("the output is a link that leads nowhere", where=[str(out)], fix="remove the link")
        out = Path(os.path.realpath(out))
        if not out.name:
            raise StorageError("the output cannot be the root folder", where=[str(out)])
        return cls(out, out.with_name(f".{out.name}.smelt-build"), out.with_name(f".{out.name}.smelt-old"))


class Build:
    """An output under construction. Use as a context manager: it is abandoned unless committed.

    `write`, `take` and `read_back` are safe from many threads; the other methods belong to one thread.
    """

    def __init__(self, places: _Places, layout: Layout, *, overwrite: bool, lock: Lock, made: list[Path]) -> None:
        self.out = places.out
        self.folder = places.build
        self.layout = layout
        self._places = places
        self._overwrite = overwrite
        self._lock = lock
        self._made = made
        self._open: dict[str, WriteFile] = {}
        self._written: dict[str, int] = {}
        self._counting = threading.Lock()
        self._done = False

    @classmethod
    def start(cls, out: Path, layout: Layout, *, overwrite: bool) -> Build:
        """Check that `out` can be written, and lay out all files with their disk space reserved.

        Raises StorageError, before anything is changed, when `out` is a file, a dangling link, a non-empty folder
        (without `overwrite`) or where another run is writing, and when the space does not suffice.
        """
        places = _Places.of(Path(out))
        made = _make_parents(places.out)
        try:
            lock = files.lock_folder(places.build)
        except BaseException:
            _unmake(made)
            raise
        build = cls(places, layout, overwrite=overwrite, lock=lock, made=made)
        try:
            _heal(places)
            _check_target(places.out, overwrite=overwrite)
            _remove_stale(places.build)
            _check_space(places.out.parent, layout.total_bytes)
        except BaseException:
            lock.release()
            _unmake(made)
            raise
        try:
            build._lay_out()
        except BaseException:
            build._abandon_quietly()
            raise
        return build

    def _lay_out(self) -> None:
        files.make_folder(self.folder)
        for shard in self.layout.shards:
            file = files.create(self.folder / shard.file, shard.size)
            self._open[shard.file] = file
            file.write_at(PREFIX, shard.header[PREFIX:])  # the length stays zero until commit

    # --- filling it ---------------------------------------------------------------------------------------------

    def write(self, name: str, start: int, data: Buffer) -> None:
        """Write bytes [start, start + len(data)) of tensor `name`. Raises ValueError outside the tensor.

        Each byte is to be written once: `commit` counts them, and refuses a tensor that lacks some.
        """
        size = len(flat(data))
        file, offset = self._locate(name, start, size)
        file.write_at(offset, data)
        self._count(name, size)

    def take(self, name: str, start: int, stop: int, *, source: ReadFile, offset: int) -> None:
        """Write bytes [start, stop) of tensor `name`, copied within the system from byte `offset` of a file on.

        Raises as `write` does, and InputError where the file ends too early.
        """
        file, place = self._locate(name, start, stop - start)
        copy_range(source, offset, file, place, size=stop - start)
        self._count(name, stop - start)

    def read_back(self, name: str, start: int, stop: int, buffer: Buffer) -> None:
        """Fill `buffer` with bytes [start, stop) of tensor `name`, as they were written."""
        size = len(flat(buffer))
        file, offset = self._locate(name, start, size)
        if size != stop - start:
            raise ValueError(f"a buffer of {size} bytes for bytes [{start}, {stop}) of {name}")
        file.read_into(offset, buffer)

    def put(self, file_name: str, data: bytes) -> None:
        """Add a small file; durable on return.

        Raises ValueError for a name that is not a plain one or belongs to the weights, StorageError if it is there.
        """
        files.write_bytes(self._beside(file_name), data)

    def copy(self, file_name: str, source: Path) -> None:
        """Add a copy of a file; durable on return. Raises as `put` does."""
        files.copy_file(source, self._beside(file_name))

    def _count(self, name: str, size: int) -> None:
        with self._counting:
            self._written[name] = self._written.get(name, 0) + size

    def _locate(self, name: str, start: int, size: int) -> tuple[WriteFile, int]:
        """The open file and the absolute offset of `size` bytes of a tensor."""
        spec = self.layout.spec(name)
        if start < 0 or start + size > spec.nbytes:
            raise ValueError(f"bytes [{start}, {start + size}) are outside {spec}")
        return self._open[spec.file], spec.offset + start

    def _beside(self, file_name: str) -> Path:
        taken = {self.layout.index_name, *self._open}
        if not paths.is_plain_name(file_name) or file_name in taken or self._done:
            raise ValueError(f"cannot add {file_name!r} to the output")
        return self.folder / file_name

    # --- ending it ----------------------------------------------------------------------------------------------

    def commit(self) -> None:
        """Make the output durable, and visible under its name. Raises StorageError; then OUT is what it was.

        Raises ValueError when a tensor has not been written to its end. The one failure after which the new output
        is in place, that of the last sync, says so.
        """
        if self._done:
            raise ValueError("the build is already committed or abandoned")
        self._check_complete()
        opened = [(self._open[shard.file], shard.header[:PREFIX]) for shard in self.layout.shards]
        for file, _ in opened:
            file.sync()
        for file, length in opened:
            file.write_at(0, length)
        for file, _ in opened:
            file.sync()
            file.close()
        if self.layout.index is not None:
            files.write_bytes(self.folder / self.layout.index_name, self.layout.index)
        files.sync_folder(self.folder)
        with held():  # from the rename on the output is complete, and what is left is soon done
            replaced = self._take_the_name()
            self._done = True
            try:
                self._make_name_durable()
                if replaced:
                    self._remove_old()
            finally:
                self._lock.release()

    def _check_complete(self) -> None:
        short = [
            name
            for shard in self.layout.shards
            for name, spec in shard.tensors.items()
            if self._written.get(name, 0) < spec.nbytes
        ]
        if short:
            raise ValueError(f"{len(short)} tensors were not written to their end, such as {short[0]!r}")

    def _take_the_name(self) -> bool:
        """Rename the build to OUT; an OUT in the way goes to `.OUT.smelt-old`. True when there was one."""
        out, old = self._places.out, self._places.old
        _check_target(out, overwrite=self._overwrite)  # somebody may have put something there meanwhile
        if files.kind(out) is None:
            files.rename(self.folder, out)
            return False
        if files.is_empty_folder(out):
            files.remove_folder(out)
            files.rename(self.folder, out)
            return False
        try:
            files.rename(out, old)
            files.rename(self.folder, out)
        except BaseException:  # an interrupt can come after either rename, so look what is there
            if files.kind(out) is None and files.kind(old) is not None:
                files.rename(old, out)
            raise
        return True

    def _make_name_durable(self) -> None:
        try:
            for folder in (self.out, *self._made):
                files.sync_folder(folder.parent)
        except StorageError as error:
            raise StorageError(
                f"the output is in place, but may not survive a power failure: {error.message}",
                where=[str(self.out), *error.where],
                fix="check the disk",
            ) from error

    def _remove_old(self) -> None:
        try:
            files.remove_tree(self._places.old)
        except StorageError as error:  # the output is complete; the next run on it tries again
            _log.warning("the replaced output could not be removed: %s", error)

    def abandon(self) -> None:
        """Close and remove everything that was begun; OUT is untouched. Does nothing after commit."""
        if self._done:
            return
        self._done = True
        with held():
            try:
                for file in self._open.values():
                    with contextlib.suppress(StorageError):  # nobody will miss what it held
                        file.close()
                files.remove_tree(self.folder)
            finally:
                self._lock.release()
                _unmake(self._made)

    def _abandon_quietly(self) -> None:
        try:
            self.abandon()
        except SmeltError as error:  # what made us give up matters more
            _log.warning("the unfinished output could not be removed: %s", error)

    def __enter__(self) -> Build:
        return self

    def __exit__(self, kind: type[BaseException] | None, _e: object, _t: TracebackType | None) -> None:
        if kind is None:
            self.abandon()
        else:
            self._abandon_quietly()


def heal(out: Path) -> None:
    """Undo what a crash during an overwriting commit may have left of `out`; usually there is nothing to do.

    OUT gone: the old one is put back. OUT there: it is complete, and the old one is removed. Raises StorageError when
    another run is writing, or when OUT was made anew by somebody else.
    """
    places = _Places.of(Path(out))
    if files.kind(places.old) is None:
        return
    lock = files.lock_folder(places.build)
    try:
        _heal(places)
    finally:
        lock.release()


def _heal(places: _Places) -> None:
    """`heal`, with the lock held: no other run is between its two renames."""
    if files.kind(places.old) is None:
        return
    if files.is_empty_folder(places.out):
        files.remove_folder(places.out)
    if files.kind(places.out) is None:
        files.rename(places.old, places.out)
        files.sync_folder(places.out.parent)
    elif files.kind(places.build) is None:  # the second rename took place: OUT is the new, complete output
        files.remove_tree(places.old)
    else:
        raise StorageError(
            "an interrupted run left the former output aside, and the output was made anew since",
            where=[f"former {places.old}", f"present {places.out}"],
            fix="keep one of the two: move or remove the other",
        )


# --- checks before anything is written ------------------------------------------------------------------------------


def check_out(out: Path, *, overwrite: bool) -> None:
    """Raise StorageError for an output folder that `Build.start` is sure to refuse; nothing is changed.

    What depends on the size of the output, or on other runs, is left to `Build.start`.
    """
    places = _Places.of(Path(out))
    if places.out.name.endswith(".safetensors"):
        raise StorageError(
            "the output is a folder, and this is the name of a file",
            where=[str(out)],
            fix=f"write to {places.out.name.removesuffix('.safetensors') or 'out'}: the weights are in its {SINGLE}, "
            "with the record of what they are beside them",
        )
    if files.kind(places.old) is None:  # else an interrupted run is healed first
        _check_target(places.out, overwrite=overwrite)
    folder = places.out.parent
    while files.kind(folder) is None:
        folder = folder.parent
    if files.kind(folder) != "folder":
        raise StorageError("the output's parent is not a folder", where=[str(folder)], fix="choose another place")
    if not files.may_write(folder):
        raise StorageError(
            "the output's folder cannot be written to",
            where=[str(folder)],
            fix="check the permissions, or choose another folder",
        )


def _check_target(out: Path, *, overwrite: bool) -> None:
    there = files.kind(out)
    if there is None:
        return
    if there != "folder":
        raise StorageError("the output exists and is not a folder", where=[str(out)], fix="choose another name")
    if os.path.ismount(out):
        raise StorageError(
            "the output is a mount point, which cannot be replaced",
            where=[str(out)],
            fix="name a folder in it",
        )
    if files.is_empty_folder(out):
        return
    if not overwrite:
        raise StorageError(
            "the output folder is not empty",
            where=[str(out)],
            fix="choose another folder, or replace it whole with --overwrite",
        )
    places = []
    for find in (Path.cwd, Path.home):
        with contextlib.suppress(OSError, RuntimeError):  # a deleted working folder, a user without a home
            places.append(find().resolve())
    holds = [place for place in places if place.is_relative_to(out)]
    if holds or files.kind(out / ".git") is not None:
        why = f"it holds {holds[0]}" if holds else "it is a git repository"
        raise StorageError(f"refusing to replace the output folder: {why}", where=[str(out)], fix="choose another")


def _check_space(parent: Path, needed: int) -> None:
    free = files.free_bytes(parent)
    if free < needed + _MARGIN:
        raise StorageError(
            f"not enough space: {size_text(needed + _MARGIN)} needed, {size_text(free)} free",
            where=[str(parent)],
            fix=f"free {size_text(needed + _MARGIN - free)}, or choose another disk",
        )


def _remove_stale(build: Path) -> None:
    """Remove what a run that died has left; the lock that we hold says that nobody is at work there."""
    if files.is_link(build) or files.kind(build) not in {None, "folder"}:
        raise StorageError("the build folder's name is taken", where=[str(build)], fix="remove it")
    files.remove_tree(build)


def _make_parents(out: Path) -> list[Path]:
    """Create the folders above `out` that are missing, and return them, the outermost first."""
    missing = []
    folder = out.parent
    while files.kind(folder) is None:
        missing.append(folder)
        folder = folder.parent
    if files.kind(folder) != "folder":
        raise StorageError("the output's parent is not a folder", where=[str(folder)], fix="choose another place")
    made: list[Path] = []
    try:
        for folder in reversed(missing):
            files.make_folder(folder)
            made.append(folder)
    except BaseException:
        _unmake(made)
        raise
    return made


def _unmake(made: list[Path]) -> None:
    """Remove the folders that `_make_parents` made, as far as they are still empty."""
    for folder in reversed(made):
        try:
            files.remove_folder(folder)
        except StorageError:
            return
