"""Runs of smelt with a fault in them: killed at the k-th file operation, or with that operation failing.

The product knows nothing of this: what is replaced is `smelt.storage.files.system`, through which every call to the
operating system goes. As a script it is the command line with faults asked for by the environment:

    SMELT_TEST_KILL_AT=17 SMELT_TEST_KILL_AFTER=1 SMELT_TEST_SYNC_BYTES=0 python tests/faulty.py merge recipe.yml out

`forked` does the same in a child of this process, which saves the start of an interpreter for every point of a sweep.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from smelt.storage import files, journal

NEVER = -1


class KillAt:
    """Stands in for `files.system`: SIGKILL to this process at call `at`, before or after it takes place.

    `within` restricts the count to calls on paths in which it stands.
    """

    def __init__(self, at: int, *, after: bool = False, within: str = "") -> None:
        self.at = at
        self.within = within
        self.after = after
        self.calls: list[str] = []
        self._real = files.system
        self._lock = threading.Lock()

    def __call__(self, what: str, path: Any, call: Callable[..., Any], *args: Any, needed: int = 0) -> Any:
        with self._lock:
            number = NEVER
            if self.within in os.fspath(path):
                number = len(self.calls)
                self.calls.append(what)
        fatal = number == self.at != NEVER
        if fatal and not self.after:
            _die()
        try:
            return self._real(what, path, call, *args, needed=needed)
        finally:
            if fatal:
                _die()


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)  # the signal ends the process, not this call


class FailAt:
    """Stands in for `files.system`: call `at` fails with `number`; a write may do half of its work first.

    `only` restricts the count to calls whose verb begins so ("rename"). `lasting` lets all later ones fail too, as a
    full disk does; but what is to be removed can be.
    """

    def __init__(self, at: int, number: int, *, only: str = "", lasting: bool = False) -> None:
        self.at = at
        self.number = number
        self.only = only
        self.lasting = lasting
        self.failed: str | None = None
        self.count = 0
        self._real = files.system
        self._lock = threading.Lock()

    def __call__(self, what: str, path: Any, call: Callable[..., Any], *args: Any, needed: int = 0) -> Any:
        with self._lock:
            number = NEVER
            if what.startswith(self.only):
                number, self.count = self.count, self.count + 1
            fails = number == self.at or (self.lasting and number > self.at)
            if fails and self.failed is None:
                self.failed = what
        if not fails or (self.lasting and what.startswith("remove")):
            return self._real(what, path, call, *args, needed=needed)
        if what == "close":  # a close that fails has closed all the same
            self._real(what, path, call, *args)
        return self._real(what, path, self._fail, needed=needed)

    def _fail(self) -> None:
        raise OSError(self.number, os.strerror(self.number))


@contextlib.contextmanager
def failing(at: int, number: int = errno.EIO, *, only: str = "", lasting: bool = False) -> Iterator[FailAt]:
    """File operation `at` fails inside the block."""
    double = FailAt(at, number, only=only, lasting=lasting)
    with mock.patch.object(files, "system", double):
        yield double


@contextlib.contextmanager
def short_writes() -> Iterator[None]:
    """Every write and read inside the block does at most 1000 bytes of what it was asked for, as the system may."""
    write, read = files._write_some, files._read_some

    def less(real: Callable[..., int]) -> Callable[..., int]:
        return lambda descriptor, view, offset, lock: real(descriptor, view[:1000], offset, lock)

    with mock.patch.object(files, "_write_some", less(write)), mock.patch.object(files, "_read_some", less(read)):
        yield


@contextlib.contextmanager
def eager_journal(nbytes: int = 0) -> Iterator[None]:
    """The journal is synced and written after every `nbytes` bytes, not after a GiB: small merges have one too."""
    with mock.patch.object(journal, "SYNC_BYTES", nbytes):
        yield


@dataclass(frozen=True)
class Ended:
    """How a forked run ended: its exit code, or minus the number of the signal; and what it printed."""

    code: int
    out: str
    err: str
    calls: int


def forked(words: list[object], folder: Path, *, at: int = NEVER, after: bool = False, within: str = "") -> Ended:
    """Run the command line in a child of this process, killed at file operation `at`; its output goes to `folder`.

    With `within`, operations count on paths in which that stands.
    """
    paths = [folder / name for name in ("stdout", "stderr", "calls")]
    child = os.fork()
    if child == 0:
        code = 1
        try:
            for number, path in ((1, paths[0]), (2, paths[1])):
                os.dup2(os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY), number)
            sys.stdout, sys.stderr = (os.fdopen(os.dup(number), "w", encoding="utf-8") for number in (1, 2))
            journal.SYNC_BYTES = 0
            kill = KillAt(at, after=after, within=within)
            files.system = kill  # type: ignore[assignment]
            from smelt.cli.main import run

            code = run([str(word) for word in words])
            paths[2].write_text(str(len(kill.calls)))
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    out, err, calls = (path.read_text() if path.exists() else "" for path in paths)
    for path in paths:
        path.unlink(missing_ok=True)
    return Ended(os.waitstatus_to_exitcode(status), out, err, int(calls or 0))


if __name__ == "__main__":
    from smelt.cli.main import main

    journal.SYNC_BYTES = int(os.environ.get("SMELT_TEST_SYNC_BYTES", journal.SYNC_BYTES))
    if "SMELT_TEST_KILL_AT" in os.environ:
        at = int(os.environ["SMELT_TEST_KILL_AT"])
        files.system = KillAt(at, after="SMELT_TEST_KILL_AFTER" in os.environ)  # type: ignore[assignment]
    main()
