"""The journal of an unfinished output: which of its tensors are on the disk, and of which merge they are.

It lies beside the build folder and not in it, so that it can stay until the output has its name: at no moment is work
lost that was finished. A line is a checksum and a JSON object; the first is the head (what the merge is), the others a
finished tensor each. A line is appended only when the data it speaks of were synced, by a thread of the journal's own,
every GiB or ten seconds. What was torn off by a crash is ignored, and whoever trusts a line reads the tensor again.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from dataclasses import fields as dataclass_fields
from functools import partial
from pathlib import Path
from typing import Any

import xxhash

from smelt.errors import InputError, StorageError
from smelt.storage import digests, files
from smelt.storage.files import Buffer, WriteFile
from smelt.storage.layout import Layout

SYNC_BYTES = 1 << 30
"""Finished bytes after which the journal syncs and is written."""
SYNC_SECONDS = 10.0
"""Seconds after which it does so in any case."""
_LIMIT = 1 << 30
"""Most bytes of a journal."""


@dataclass(frozen=True, slots=True)
class Finished:
    """A tensor that is written whole: its digest, and its numbers that are NaN or infinite (inherited, created)."""

    name: str
    digest: str
    inherited: int = 0
    created: int = 0


@dataclass(frozen=True, slots=True)
class Found:
    """What a journal says: its head, its tensors by name, and how many of its bytes are sound."""

    head: Mapping[str, Any]
    finished: Mapping[str, Finished]
    size: int


def read(path: Path) -> Found | None:
    """The sound lines of a journal; None where there is no journal, or no sound head."""
    if files.is_link(path) or files.kind(path) != "file":
        return None
    try:
        content = files.read_bytes(path, limit=_LIMIT)
    except InputError:  # nothing that we wrote
        return None
    lines: list[dict[str, Any]] = []
    size = 0
    for line in content.split(b"\n")[:-1]:  # what follows the last line's end is torn
        checksum, _, text = line.partition(b" ")
        if checksum != xxhash.xxh3_64_hexdigest(text).encode():
            break
        lines.append(json.loads(text))
        size += len(line) + 1
    if not lines:
        return None
    fields = {field.name for field in dataclass_fields(Finished)}
    entries = [Finished(**line) for line in lines[1:] if line.keys() == fields]  # another version may write others
    return Found(lines[0], {entry.name: entry for entry in entries}, size)


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What two heads do not have in common, a line each."""
    lines = []
    for key in dict.fromkeys((*now, *then)):
        old, new = then.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            for name in dict.fromkeys((*new, *old)):
                if old.get(name) != new.get(name):
                    what = "is new" if name not in old else "is gone" if name not in new else "was changed"
                    lines.append(f"{key}: {name} {what}")
        elif old != new:
            lines.append(f"{key}: {_short(old)} then, {_short(new)} now")
    return lines


def _short(value: Any) -> str:
    text = ", ".join(map(str, value)) or "nothing" if isinstance(value, list) else str(value)
    return text if len(text) <= 24 else f"{text[:12]}..."


def trusted(found: Found, layout: Layout, read: Callable[[str, int, int, Buffer], None]) -> list[Finished]:
    """The tensors of a journal that are what it says: each is read (`read(name, start, stop, buffer)`) and hashed."""
    sound = []
    for finished in found.finished.values():
        try:
            nbytes = layout.spec(finished.name).nbytes
        except KeyError:
            continue
        if digests.of_stored(nbytes, partial(read, finished.name)) == finished.digest:
            sound.append(finished)
    return sound


class Journal:
    """A journal that is being written. `add` may be called from any thread."""

    def __init__(self, file: WriteFile, sync: Callable[[Iterable[str]], None]) -> None:
        self.written: set[str] = set()
        """The names of the tensors that stand in it by now."""
        self._file = file
        self._sync = sync
        self._changed = threading.Condition()
        self._pending: list[tuple[Finished, str]] = []
        self._bytes = 0
        self._ending = False
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None

    @classmethod
    def create(cls, path: Path, head: Mapping[str, Any], sync: Callable[[Iterable[str]], None]) -> Journal:
        """Begin a journal where there is none; `sync` makes the data of the weight files it is given durable."""
        file = files.create(path, 0)
        try:
            file.append(_line(head))
        except BaseException:
            with file:
                pass
            raise
        return cls(file, sync)

    @classmethod
    def go_on(cls, path: Path, found: Found, sync: Callable[[Iterable[str]], None]) -> Journal:
        """Go on with a journal behind its last sound line."""
        file = files.reopen(path)
        try:
            file.cut(found.size)
        except BaseException:
            with file:
                pass
            raise
        return cls(file, sync)

    def add(self, finished: Finished, *, file: str, nbytes: int) -> None:
        """Note that a tensor of `nbytes` bytes in `file` is written whole. Raises what the thread failed with."""
        with self._changed:
            if self._error is not None:
                raise self._error
            self._pending.append((finished, file))
            self._bytes += nbytes
            if self._thread is None:
                thread = threading.Thread(target=self._work, name="smelt-journal", daemon=True)
                try:
                    thread.start()
                except RuntimeError as error:  # what Python says where the system gives no more of them
                    raise MemoryError(str(error)) from error
                self._thread = thread
            if self._bytes >= SYNC_BYTES:
                self._changed.notify_all()

    def close(self, *, flush: bool) -> None:
        """End the thread, with `flush` after it has written what is pending. Raises what it failed with."""
        with self._changed:
            if not flush:
                self._pending, self._bytes = [], 0
            self._ending = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
        with self._file:
            if self._error is not None:
                raise self._error

    def _work(self) -> None:
        try:
            ending = False
            while not ending:
                with self._changed:
                    self._changed.wait_for(self._due, timeout=SYNC_SECONDS)
                    ending = self._ending
                    batch, self._pending, self._bytes = self._pending, [], 0
                if batch:
                    self._sync({file for _, file in batch})
                    self._file.append(b"".join(_line(asdict(finished)) for finished, _ in batch))
                    self._file.sync()
                    self.written |= {finished.name for finished, _ in batch}
        except BaseException as error:
            self._error = error

    def _due(self) -> bool:
        return self._ending or (bool(self._pending) and self._bytes >= SYNC_BYTES)


def _line(tree: Mapping[str, Any]) -> bytes:
    text = json.dumps(tree).encode("ascii")
    return xxhash.xxh3_64_hexdigest(text).encode() + b" " + text + b"\n"


def cannot_go_on(build: Path, lines: Iterable[str]) -> StorageError:
    """The error for a journal of another merge."""
    return StorageError(
        "cannot resume: the unfinished output is that of another merge",
        where=[str(build), *lines],
        fix="make it the same merge again, or leave --resume out: the unfinished output is then removed",
    )
