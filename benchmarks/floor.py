"""The I/O floor of a merge: every input byte read once, as many bytes written as the output has, and no arithmetic.

No merge of these files can take less. Two threads, blocks of 4 MiB, reused buffers.
usage: python benchmarks/floor.py OUT_FILE MODEL_FOLDER...
"""

from __future__ import annotations

import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

BLOCK = 4 << 20


def floor(out: Path, folders: list[Path], *, threads: int = 2) -> float:
    """Seconds for reading all weights of `folders` and writing those of one; `out` is removed afterwards."""
    weights = [sorted(folder.glob("*.safetensors")) for folder in folders]
    out_size = sum(path.stat().st_size for path in weights[0])
    started = time.perf_counter()
    opened = {path: os.open(path, os.O_RDONLY) for group in weights for path in group}
    target = os.open(out, os.O_CREAT | os.O_RDWR | os.O_TRUNC)
    os.posix_fallocate(target, 0, out_size)
    local = threading.local()

    def work(job: tuple[int, int | None]) -> None:
        start, source = job
        if not hasattr(local, "buffer"):
            local.buffer = bytearray(BLOCK)
        if source is None:
            os.pwrite(target, memoryview(local.buffer)[: min(BLOCK, out_size - start)], start)
        else:
            os.preadv(source, [local.buffer], start)

    jobs: list[tuple[int, int | None]] = [(start, None) for start in range(0, out_size, BLOCK)]
    for path, descriptor in opened.items():
        jobs += [(start, descriptor) for start in range(0, path.stat().st_size, BLOCK)]
    jobs.sort(key=lambda job: job[0])
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, jobs))
    os.close(target)
    seconds = time.perf_counter() - started
    for descriptor in opened.values():
        os.close(descriptor)
    out.unlink()
    return seconds


if __name__ == "__main__":
    print(f"floor {floor(Path(sys.argv[1]), [Path(p) for p in sys.argv[2:]]):.2f} s")
