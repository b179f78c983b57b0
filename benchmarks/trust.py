"""What safety costs: seconds of the journal, of syncing, of hashing and of `smelt verify`, as shares of a merge.

usage: python benchmarks/trust.py [--size 160m] [--folder .] [--rounds 5]

The folder should be on the disk that outputs are written to: on a file system in memory a sync costs nothing. Every
number is the least of the rounds. "journal" is a merge whose journal syncs and is written after every 32 MB, which is
as often as it ever can matter (a GiB or ten seconds in earnest), next to one without any; "sync at the end" is what
the commit waits for the disk, with or without a journal.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import recipes
import smelt
from smelt.storage import digests, files, journal
from smelt.storage.writer import Build
from synthetic import SIZES, make

OFTEN = 32 << 20
"""Bytes after which the journal of the benchmark is written."""


def timed(action: Callable[[], Any]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


@contextlib.contextmanager
def synced() -> Any:
    """Seconds that this thread, and those of the journal, wait in syncs of files and folders."""
    spent = {"commit": 0.0, "journal": 0.0}
    real = files.system

    def watched(what: str, path: Any, call: Any, *args: Any, needed: int = 0) -> Any:
        if not what.startswith("sync"):
            return real(what, path, call, *args, needed=needed)
        where = "journal" if threading.current_thread().name == "smelt-journal" else "commit"
        started = time.perf_counter()
        try:
            return real(what, path, call, *args, needed=needed)
        finally:
            spent[where] += time.perf_counter() - started

    with mock.patch.object(files, "system", watched):
        yield spent


def without_journal() -> Any:
    """Builds that are given no head, and so keep no journal."""
    start = Build.start.__func__  # type: ignore[attr-defined]

    def bare(cls: type[Build], out: Path, layout: Any, *, overwrite: bool, **_: Any) -> Build:
        return start(cls, out, layout, overwrite=overwrite)

    return mock.patch.object(Build, "start", classmethod(bare))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="160m", choices=list(SIZES))
    parser.add_argument("--folder", type=Path, default=Path())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--method", default="ties", choices=["linear", "ties", "dare_ties", "task_arithmetic"])
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="smelt-trust-", dir=arguments.folder))
    try:
        models = make(arguments.size, folder, 3)
        recipe = recipes.write(arguments.method, models, folder)
        out = folder / "out"
        least: dict[str, float] = {}

        def note(name: str, seconds: float) -> None:
            least[name] = min(seconds, least.get(name, seconds))

        def merge() -> smelt.MergeReport:
            shutil.rmtree(out, ignore_errors=True)
            os.sync()
            return smelt.merge(recipe, out)

        merge()  # compiles, and warms the page cache
        for _ in range(arguments.rounds):
            with without_journal(), synced() as spent:
                report = merge()
            note("merge without a journal", report.seconds - spent["commit"])
            note("sync at the end, without a journal", spent["commit"])
            with synced() as spent:
                report = merge()
            note("merge with the journal as it is", report.seconds - spent["commit"])
            note("sync at the end, with the journal", spent["commit"])
            with synced() as spent, mock.patch.object(journal, "SYNC_BYTES", OFTEN):
                report = merge()
            note("merge with a journal every 32 MB", report.seconds - spent["commit"])
            note("its syncs in the background", spent["journal"])
            data = (out / "model.safetensors").read_bytes()
            note("hashing the output (in the merge)", timed(lambda data=data: digests.of_blocks(memoryview(data))))
            note("smelt verify", timed(lambda: smelt.verify(out)))
        size = sum(path.stat().st_size for path in models[0].glob("*.safetensors"))
        print(f"smelt {smelt.__version__}, {time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores, {arguments.method}")
        print(f"three models of {size / 1e6:.0f} MB; least of {arguments.rounds} rounds, syncs on lines of their own\n")
        print("| what | seconds | of a merge |\n|---|---:|---:|")
        whole = least["merge without a journal"]
        for name, seconds in least.items():
            share = (seconds - whole if name.startswith("merge") else seconds) / whole
            print(f"| {name} | {seconds:.3f} | {'' if seconds == whole else f'{100 * share:+.1f} %'} |")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
