"""What commands print: sizes, times, and progress that degrades to plain lines where there is no terminal."""

from __future__ import annotations

import logging
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from smelt.errors import RecipeError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def visible(text: str) -> str:
    r"""Text with control characters escaped: names in recipes and checkpoints must not write to the terminal.

    >>> print(visible("a\x1b[2Jb"))
    a\x1b[2Jb
    """
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def size_text(count: float) -> str:
    """Bytes for people.

    >>> size_text(2_200_000_000)
    '2.20 GB'
    """
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}" if count >= 100 * scale else f"{count / scale:.2f} {unit}"
    return f"{count:.0f} B"


def count_text(count: float) -> str:
    """A number of parameters for people: 7.24 B, 1.37 M."""
    for unit, scale in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count:.0f}"


def counted(count: int, word: str) -> str:
    """`1 tensor`, `2 tensors`."""
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


def on_device(device: str, memory: int) -> str:
    """What each thread takes of a device's memory, to follow that of the host; nothing where that is 0, as on the CPU.

    >>> on_device("cuda:1", 350_000_000)
    ', and about 350 MB on cuda:1 for each thread'
    """
    return f", and about {size_text(memory)} on {device} for each thread" if memory else ""


def parse_size(text: str) -> int:
    """Bytes of a text such as `5GB`, `500 MB`, `2GiB` or `1000000`. Raises RecipeError."""
    if re.fullmatch(r"\s*\d+(\.\d+)?\s*B\s*", text):
        fix = "MergeKit reads 5B as 5 billion numbers: write 10GB for these in 16 bits"
        raise RecipeError(f"'{text}' may mean bytes or billions", fix=fix)
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", text, re.IGNORECASE)
    if found is None or found[2].lower() not in _UNITS or float(found[1]) <= 0:
        raise RecipeError(f"'{text}' is not a size", fix="write it like 5GB, 500MB or 2GiB")
    return max(1, int(float(found[1]) * _UNITS[found[2].lower()]))


class Report(Protocol):
    def __call__(self, done: int, total: int) -> None: ...


@contextmanager
def progress(label: str, *, quiet: bool = False) -> Iterator[Report]:
    """A function to call with (bytes done, bytes in all); shows bytes, rate and time left on stderr."""
    if quiet:
        yield lambda done, total: None
        return
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        text = TextColumn("{task.description}")
        columns = (text, BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(label, total=None)
            with _told_of_compiling(lambda busy: bar.update(task, description=f"{label}: {_SHORT}" if busy else label)):
                yield lambda done, total: bar.update(task, completed=done, total=total)
        return
    lines = _Lines(label)
    with _told_of_compiling(lines.compiling):
        yield lines


_SHORT = "compiling loops"
_ONCE = "compiling its loops, once on this machine"
"""What is shown instead of a bar that stands still; the first beside the bar, for which a long text leaves no room."""


@contextmanager
def _told_of_compiling(say: Callable[[bool], None]) -> Iterator[None]:
    """Have `say` called with True when a loop is being compiled, and with False when it is done."""

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            say(record.getMessage().startswith("compiling"))

    log, listener = logging.getLogger(_COMPILER), Listener(logging.INFO)
    level = log.level
    log.addHandler(listener)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(listener)
        log.setLevel(level)


_COMPILER = "smelt.engine.kernels.loading"
"""The log that tells of it: the module is not loaded by merges that have no use for it."""


class _Lines:
    """One line every five seconds."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._start = self._said = time.monotonic()
        self._told = False

    def compiling(self, busy: bool) -> None:
        """The first time that a loop is compiled, say why nothing is seen to be done."""
        if busy and not self._told:
            self._told = True
            print(f"{self._label}: {_ONCE}", file=sys.stderr, flush=True)

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._said < 5 or not done:
            return
        self._said = now
        rate = done / (now - self._start)
        left = (total - done) / rate
        print(
            f"{self._label}: {100 * done / max(total, 1):.0f} %, {size_text(done)} of {size_text(total)}, "
            f"{size_text(rate)}/s, {left:.0f} s left",
            file=sys.stderr,
            flush=True,
        )


def table(rows: Sequence[Sequence[str]], *, indent: str = "  ", gap: str = "  ") -> str:
    """Rows as aligned columns of plain text."""
    if not rows:
        return ""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        lines.append((indent + gap.join([*cells, row[-1]])).rstrip())
    return "\n".join(lines)
