"""What the benchmarks share: processes measured from outside, and a folder that is gone afterwards."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import smelt
from floor import SECTOR

MARGIN = 1 << 30
"""Bytes of memory or disk that a benchmark leaves to others."""
_STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_IN_MEMORY = frozenset({"tmpfs", "ramfs"})


@dataclass(frozen=True, slots=True)
class Process:
    """A finished process: wall seconds, resident peak in MB, bytes that it read from a disk, its standard output."""

    seconds: float
    memory: float
    disk_bytes: int
    printed: str


def measured(command: Sequence[str]) -> Process:
    """Run a command to its end. Raises RuntimeError with its last words if it fails."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=out, stderr=errors)
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:  # interrupted: the child must not go on writing where all will be removed
            process.kill()
            process.wait()
            raise
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        errors.seek(0)
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{errors.read().decode(errors='replace')[-2000:]}")
        out.seek(0)
        memory = usage.ru_maxrss / 1024 if sys.platform != "darwin" else usage.ru_maxrss / 1024**2
        return Process(seconds, memory, SECTOR * usage.ru_inblock, out.read().decode())


def smelt_command(*arguments: str | Path) -> list[str]:
    """The command line of smelt in this interpreter."""
    return [sys.executable, "-m", "smelt", *(str(argument) for argument in arguments)]


def machine() -> str:
    """A line that says what was measured, on what and when."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    system = f"{platform.system()} {platform.machine()}"
    day = time.strftime("%Y-%m-%d")
    return f"smelt {smelt.__version__}, Python {platform.python_version()}, {system}, {cores} cores, {day}"


def file_system(folder: Path) -> str:
    """The type of the file system of `folder`, as the kernel names it; empty where that cannot be told."""
    found = ("", "")
    real = os.path.realpath(folder)
    with contextlib.suppress(OSError), open("/proc/mounts", encoding="utf-8") as mounts:
        for line in mounts:
            _, place, kind, *_ = line.split()
            inside = real == place or real.startswith(place.rstrip("/") + "/")
            if inside and len(place) >= len(found[0]):
                found = (place, kind)
    return found[1]


def in_memory(folder: Path) -> bool:
    """Whether files in `folder` live in memory."""
    return file_system(folder) in _IN_MEMORY


@contextlib.contextmanager
def workplace(parent: Path, *, needed: int, memory: int = 0) -> Iterator[Path]:
    """A new folder below `parent`, removed at the end whatever happens short of a kill.

    `needed` are the bytes that will lie in it, `memory` those that the processes will take beside. Ends the program
    with a message, before anything is made, where there is not so much.
    """
    if not parent.is_dir():
        raise SystemExit(f"error: there is no folder {parent}")
    free = shutil.disk_usage(parent).free
    if needed + MARGIN > free:
        raise SystemExit(f"error: {parent} has {_gb(free)} free, and this needs {_gb(needed + MARGIN)}")
    wanted = memory + (needed if in_memory(parent) else 0) + MARGIN
    if wanted > (available := _available_memory()):
        raise SystemExit(f"error: {_gb(available)} of memory are available, and this needs {_gb(wanted)}")
    before = {number: signal.signal(number, _end) for number in _STOPS}
    folder = Path(tempfile.mkdtemp(prefix="smelt-bench-", dir=parent))
    try:
        yield folder
    finally:
        for number in _STOPS:
            signal.signal(number, signal.SIG_IGN)  # a second Ctrl-C must not leave gigabytes behind
        shutil.rmtree(folder)
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _available_memory() -> int:
    with contextlib.suppress(OSError), open("/proc/meminfo", encoding="utf-8") as lines:
        for line in lines:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    return sys.maxsize


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"


def table_head(heads: Sequence[str]) -> str:
    """The first two lines of a Markdown table."""
    return f"| {' | '.join(heads)} |\n|---{'|---:' * (len(heads) - 1)}|"


def table_row(cells: Sequence[str]) -> str:
    """A further line of it."""
    return f"| {' | '.join(cells)} |"
