"""The I/O floor of a merge: every input byte read once, as many bytes written as the output has, and no arithmetic.

No merge of these files can take less. Two threads, blocks of 4 MiB, reused buffers.
usage: python benchmarks/floor.py OUT_FILE MODEL_FOLDER...
"""

from __future__ import annotations

import os
import resource
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

BLOCK = 4 << 20
SECTOR = 512
"""Bytes of the unit in which the kernel counts what a process read from a disk."""


@dataclass(frozen=True, slots=True)
class Floor:
    """What the floor took: `seconds` without the sync, `sync_seconds` of one fsync; bytes, and those from a disk."""

    seconds: float
    sync_seconds: float
    bytes_read: int
    bytes_written: int
    disk_bytes: int


def weights(folder: Path) -> list[Path]:
    """The weight files of a model."""
    return sorted(folder.glob("*.safetensors"))


def floor(out: Path, folders: Sequence[Path], *, threads: int = 2, sync: bool = False) -> Floor:
    """Read all weights of `folders`, write as many bytes as the first has to `out`, which is removed afterwards."""
    out_size = sum(path.stat().st_size for path in weights(folders[0]))
    read_before = resource.getrusage(resource.RUSAGE_SELF).ru_inblock
    started = time.perf_counter()
    opened = {path: os.open(path, os.O_RDONLY) for folder in folders for path in weights(folder)}
    target = os.open(out, os.O_CREAT | os.O_RDWR | os.O_TRUNC)
    try:
        os.posix_fallocate(target, 0, out_size)
        local = threading.local()

        def work(job: tuple[int, int | None]) -> int:
            start, source = job
            if not hasattr(local, "buffer"):
                local.buffer = bytearray(BLOCK)
            if source is None:
                os.pwrite(target, memoryview(local.buffer)[: min(BLOCK, out_size - start)], start)
                return 0
            return os.preadv(source, [local.buffer], start)

        jobs: list[tuple[int, int | None]] = [(start, None) for start in range(0, out_size, BLOCK)]
        for path, descriptor in opened.items():
            jobs += [(start, descriptor) for start in range(0, path.stat().st_size, BLOCK)]
        jobs.sort(key=lambda job: job[0])
        with ThreadPoolExecutor(threads) as pool:
            bytes_read = sum(pool.map(work, jobs))
        seconds = time.perf_counter() - started
        disk_blocks = resource.getrusage(resource.RUSAGE_SELF).ru_inblock - read_before
        if sync:
            os.fsync(target)
        sync_seconds = time.perf_counter() - started - seconds if sync else 0.0
    finally:
        for descriptor in (target, *opened.values()):
            os.close(descriptor)
        out.unlink()
    return Floor(seconds, sync_seconds, bytes_read, out_size, SECTOR * disk_blocks)


def drop_from_cache(folders: Sequence[Path]) -> None:
    """Let the page cache forget the weights of `folders`, so that the next read of them comes from the disk.

    Everything is synced first: a page that is not yet on the disk cannot be dropped, and writing back what an earlier
    run left would slow down the next.
    """
    os.sync()
    for folder in folders:
        for path in weights(folder):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


if __name__ == "__main__":
    print(f"floor {floor(Path(sys.argv[1]), [Path(p) for p in sys.argv[2:]]).seconds:.2f} s")
