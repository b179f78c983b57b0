"""Writing a checkpoint whole or not at all.

A `Build` fills a hidden folder beside the output, `.OUT.smelt-build`, under a lock. Until `commit` the length at the
start of every weight file is zero, so no program takes an unfinished file for a checkpoint. The commit:

1. sync the data of all weight files; write the header lengths; sync again
2. write and sync the index, then sync the folder
3. rename the folder to OUT, and sync OUT's parent folder

With `overwrite`, an existing OUT is first renamed to `.OUT.smelt-old`, and removed after step 3. A crash between
the two renames leaves no OUT but a whole `.OUT.smelt-old`; the next run on OUT (or `heal`) puts it back.

A build that is given a head (what the merge is) keeps a journal of its finished tensors. A later one with the same head
goes on where it ended, whatever ended it.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from smelt.errors import SmeltError, StorageError
from smelt.storage import files, journal, paths
from smelt.storage.caching import Writeback
from smelt.storage.copying import copy_range
from smelt.storage.files import Buffer, ReadFile, WriteFile, flat
from smelt.storage.header import PREFIX
from smelt.storage.journal import Finished, Found, Journal
from smelt.storage.layout import Layout, OutputTensor, Shard, layout
from smelt.storage.locking import Lock, lock_folder
from smelt.storage.places import (
    Places,
    check_out,
    check_space,
    check_target,
    heal,
    heal_locked,
    make_parents,
    remove,
    remove_stale,
    unmake,
)
from smelt.storage.reserving import Pages
from smelt.storage.signals import held

__all__ = ["Build", "Layout", "OutputTensor", "Shard", "check_out", "heal", "layout"]

_log = logging.getLogger(__name__)
_FINAL = frozenset({2, 3, 5})
"""Exit codes of errors that would come again: what was written before them is of no use."""


class Build:
    """An output under construction. Use as a context manager: it is abandoned unless committed.

    `write`, `take` and `read_back` are safe from many threads; the other methods belong to one thread.
    """

    def __init__(
        self,
        places: Places,
        layout: Layout,
        *,
        overwrite: bool,
        resume: bool,
        stream: bool,
        lock: Lock,
        made: list[Path],
    ) -> None:
        self.out = places.out
        self.folder = places.build
        self.layout = layout
        self.resumed: tuple[Finished, ...] = ()
        """The tensors that an earlier build has written, found to be as they were."""
        self.discarded = False
        """Whether the unfinished output of an earlier build was removed."""
        self._places = places
        self._overwrite = overwrite
        self._resume = resume
        self._lock = lock
        self._made = made
        self._open: dict[str, WriteFile] = {}
        self._written: dict[str, int] = {}
        self._counting = threading.Lock()
        self._journal: Journal | None = None
        self._journaled = False
        self._known: set[str] = set()
        self._anchored = False
        self._unsound = False
        self._done = False
        self._pages = Pages()
        self._writeback = Writeback() if stream else None

    @classmethod
    def start(
        cls,
        out: Path,
        layout: Layout,
        *,
        overwrite: bool,
        head: Mapping[str, Any] | None = None,
        resume: bool = False,
        stream: bool = False,
    ) -> Build:
        """Check that `out` can be written, and lay out all files with their disk space reserved.

        With a `head` (JSON values that say what merge this is) a journal is kept. With `resume`, an unfinished output
        of the same head is taken over: its sound tensors are in `resumed`, and need not be written again. Then an
        interrupt or an error of the system leaves what was written, for another build to go on with. With `stream`
        the output goes to the disk while it is written, and is not kept in memory.

        Raises StorageError, before anything is changed, when `out` is a file, a dangling link, a non-empty folder
        (without `overwrite`) or where another run is writing, when the space does not suffice, and when what is to
        be resumed has another head.
        """
        places = Places.of(Path(out))
        made = make_parents(places.out)
        try:
            lock = lock_folder(places.build)
        except BaseException:
            unmake(made)
            raise
        going_on = resume and head is not None
        build = cls(places, layout, overwrite=overwrite, resume=going_on, stream=stream, lock=lock, made=made)
        try:
            heal_locked(places)
            check_target(places.out, overwrite=overwrite)
            found = build._to_resume(head) if resume and head is not None else None
            if found is None:
                build.discarded = remove_stale(places)
                check_space(places.out.parent, layout.total_bytes)
        except BaseException:
            lock.release()
            unmake(made)
            raise
        try:
            if found is None:
                build._lay_out(head)
            else:
                build._take_over(found)
            if build._writeback is not None:
                build._writeback.start([file.begin_writing for file in build._open.values()])
        except BaseException as error:
            build._end_after(error)
            raise
        return build

    def _lay_out(self, head: Mapping[str, Any] | None) -> None:
        files.make_folder(self.folder)
        for shard in self.layout.shards:
            file = files.create(self.folder / shard.file, shard.size)
            self._open[shard.file] = file
            file.write_at(PREFIX, shard.header[PREFIX:])  # the length stays zero until commit
        self._pages.start([(file.descriptor, file.size) for file in self._open.values()])
        if head is not None:
            self._journaled = True
            self._journal = Journal.create(self._places.journal, head, self._sync_weights)

    def _to_resume(self, head: Mapping[str, Any]) -> Found | None:
        """The journal of an unfinished output that is there whole; None where there is none."""
        if files.is_link(self.folder) or files.kind(self.folder) != "folder":
            return None
        found = journal.read(self._places.journal)
        if found is None:
            return None
        if lines := journal.differences(found.head, head):
            raise journal.cannot_go_on(self.folder, lines)
        for shard in self.layout.shards:
            there = files.stamp(self.folder / shard.file)
            if there is None or there[0] != shard.size or files.kind(self.folder / shard.file) != "file":
                return None
        return found

    def _take_over(self, found: Found) -> None:
        """Open the weight files of an earlier build, and see which of its tensors are what its journal says."""
        self._journaled = True
        self._known = set(found.finished)
        self._journal = Journal.go_on(self._places.journal, found, self._sync_weights)
        for shard in self.layout.shards:
            file = files.reopen(self.folder / shard.file)
            self._open[shard.file] = file
            file.write_at(0, bytes(PREFIX) + shard.header[PREFIX:])
            file.reserve()
        for name in files.list_folder(self.folder):
            if name not in self._open:  # the small files, of a build that ended in its commit
                remove(self.folder / name)
        self.resumed = tuple(journal.trusted(found, self.layout, self.read_back))
        self._known = {finished.name for finished in self.resumed}
        self._written = {name: self.layout.spec(name).nbytes for name in self._known}

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

    def finished(self, tensor: Finished) -> None:
        """Note in the journal that a tensor is written whole. Raises StorageError when the journal cannot be kept."""
        if self._journal is not None:
            spec = self.layout.spec(tensor.name)
            self._journal.add(tensor, file=spec.file, nbytes=spec.nbytes)

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

    def _sync(self, file: WriteFile) -> None:
        """Make a weight file durable. Where that fails, a later sync may pass though data were lost: trust no more."""
        try:
            file.sync()
        except StorageError:
            self._unsound = True
            raise
        if self._writeback is not None:
            file.let_go()

    def _sync_weights(self, names: Iterable[str]) -> None:
        """What the journal asks for before it speaks of tensors in these files."""
        for name in sorted(names):
            self._sync(self._open[name])
        if not self._anchored:
            files.sync_folder(self.folder)
            files.sync_folder(self.folder.parent)
            self._anchored = True

    # --- ending it ----------------------------------------------------------------------------------------------

    def commit(self) -> None:
        """Make the output durable, and visible under its name. Raises StorageError; then OUT is what it was.

        Raises ValueError when a tensor has not been written to its end. The one failure after which the new output
        is in place, that of the last sync, says so.
        """
        if self._done:
            raise ValueError("the build is already committed or abandoned")
        self._check_complete()
        self._stop_helpers()
        if self._journal is not None:
            self._journal.close(flush=self._resume)  # where the commit may fail and be tried again
        opened = [(self._open[shard.file], shard.header[:PREFIX]) for shard in self.layout.shards]
        for file, _ in opened:
            self._sync(file)
        for file, length in opened:
            file.write_at(0, length)
        for file, _ in opened:
            self._sync(file)
            file.close()
        if self.layout.index is not None:
            files.write_bytes(self.folder / self.layout.index_name, self.layout.index)
        files.sync_folder(self.folder)
        with held():  # from the rename on the output is complete, and what is left is soon done
            replaced = self._take_the_name()
            self._done = True
            try:
                self._make_name_durable()
                self._remove_leftovers(replaced=replaced)
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
        check_target(out, overwrite=self._overwrite)  # somebody may have put something there meanwhile
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
        except BaseException as error:  # an interrupt can come after either rename, so look what is there
            try:
                if files.kind(out) is None and files.kind(old) is not None:
                    files.rename(old, out)
            except StorageError:
                error.add_note(f"the former output is in {old}: the next merge to {out.name} puts it back")
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

    def _remove_leftovers(self, *, replaced: bool) -> None:
        try:
            if self._journaled:
                files.remove_file(self._places.journal)
            if replaced:
                files.remove_tree(self._places.old)
        except StorageError as error:  # the output is complete; the next run on it tries again
            _log.warning("what is no longer needed could not be removed: %s", error)

    def abandon(self) -> None:
        """Close and remove everything that was begun; OUT is untouched. Does nothing after commit."""
        if self._done:
            return
        self._done = True
        with held():
            try:
                self._close(flush=False)
                if self._journaled:
                    files.remove_file(self._places.journal)
                files.remove_tree(self.folder)
            finally:
                self._lock.release()
                unmake(self._made)

    def _close(self, *, flush: bool) -> None:
        """Close all files, the journal's first; nobody will miss what the system refuses here."""
        self._stop_helpers()
        if self._journal is not None:
            with contextlib.suppress(SmeltError):
                self._journal.close(flush=flush)
        for file in self._open.values():
            with contextlib.suppress(StorageError):
                file.close()

    def _stop_helpers(self) -> None:
        self._pages.stop()
        if self._writeback is not None:
            self._writeback.stop()

    def _end_after(self, error: BaseException) -> None:
        """Give up because of `error`: what was written is removed, or with `resume` kept where it may be of use."""
        if self._done:
            return
        final = isinstance(error, SmeltError) and error.exit_code in _FINAL
        if self._resume and self._journal is not None and not final and not self._unsound:
            with held():
                self._close(flush=True)
                if not self._unsound:
                    self._done = True
                    self._lock.release()
                    error.add_note(self._kept(self._journal.written))
                    return
        try:
            self.abandon()
        except SmeltError as second:  # what made us give up matters more
            _log.warning("the unfinished output could not be removed: %s", second)

    def _kept(self, written: set[str]) -> str:
        total = sum(len(shard.tensors) for shard in self.layout.shards)
        return (
            f"{len(self._known | written)} of {total} tensors are finished and kept: run again with --resume to go on, "
            f"or remove them with `smelt clean {self.out.parent}`"
        )

    def __enter__(self) -> Build:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _t: TracebackType | None) -> None:
        if error is None:
            self.abandon()
        else:
            self._end_after(error)
