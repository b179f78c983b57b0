"""Candidates of a sweep beside merges one after the other: bytes read, and seconds for the first and each further one.

usage: python benchmarks/candidates.py [--size 160m] [--count 5] [--rounds 3] [--folder /dev/shm]

Three models (a base and two fine-tunes) and the outputs of all candidates lie in --folder. *merges* is `smelt.merge`
called once for each candidate, *sweep* is `smelt.sweep_to` of all, *in memory* `smelt.sweep`, whose first candidate
loads the inputs. Of the rounds the least counts. *write* is the time to write one candidate's bytes, and no more.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import smelt
from measure import machine, table_head, table_row, workplace
from synthetic import SIZES, make, tensors

SWEEPS: dict[str, tuple[dict[str, Any], str, float]] = {
    "task_arithmetic over lambda": ({"merge_method": "task_arithmetic", "parameters": {"weight": 0.5}}, "lambda", 1.0),
    "slerp over t": ({"merge_method": "slerp"}, "t", 0.9),
    "ties over lambda": ({"merge_method": "ties", "parameters": {"weight": 0.5, "density": 0.5}}, "lambda", 1.0),
    "ties over density": ({"merge_method": "ties", "parameters": {"weight": 0.5}}, "density", 0.9),
    "dare_ties over lambda": (
        {"merge_method": "dare_ties", "parameters": {"weight": 0.5, "density": 0.5}},
        "lambda",
        1.0,
    ),
}
"""Recipe, setting, and its largest value."""
HEADS = (
    *("sweep", "read GB, merges", "read GB, sweep", "s a merge", "s first", "s each further", "s write"),
    *("s first in memory", "s each further in memory"),
    *("CPU s a merge", "CPU s each further", "CPU s each further in memory"),
)


@dataclass(frozen=True, slots=True)
class Time:
    """Seconds on the clock, and of the processor on all cores; these are calmer on a busy machine."""

    wall: float
    cpu: float

    @classmethod
    def now(cls) -> Time:
        return cls(time.perf_counter(), time.process_time())

    def since(self, before: Time) -> Time:
        return Time(self.wall - before.wall, self.cpu - before.cpu)

    def shared(self, count: int) -> Time:
        """Of `count` equal parts each."""
        return Time(self.wall / count, self.cpu / count)


def timed(work: Callable[[], Any]) -> tuple[Time, Any]:
    """The time that a call takes, and what it gives."""
    started = Time.now()
    found = work()
    return Time.now().since(started), found


def written(folder: Path, size: int) -> float:
    """Seconds to write so many bytes to a file, a MiB at a time."""
    piece = bytes(1 << 20)

    def write() -> None:
        with open(folder / "plain", "wb", buffering=0) as file:
            for _ in range(size >> 20):
                file.write(piece)

    took, _ = timed(write)
    (folder / "plain").unlink()
    return took.wall


def measured(recipe: dict[str, Any], over: dict[str, list[float]], folder: Path) -> list[float]:
    """One round: the numbers of a row after its name."""
    out = folder / "out"
    (key, values), merges = next(iter(over.items())), []
    read, more = 0, len(values) - 1
    for value in values:
        tree = recipe | {"parameters": recipe.get("parameters", {}) | {key: value}}
        took, report = timed(lambda tree=tree: smelt.merge(tree, out))  # type: ignore[misc]
        merges.append(took)
        read += report.bytes_read
        shutil.rmtree(out)
    first, _ = timed(lambda: smelt.sweep_to(recipe, {key: values[:1]}, out))
    shutil.rmtree(out)
    whole, report = timed(lambda: smelt.sweep_to(recipe, over, out))
    shutil.rmtree(out)
    further = whole.since(first).shared(more)
    plain = written(folder, report.bytes_written // len(values))
    started = Time.now()
    times = [Time.now().since(started) for _ in smelt.sweep(recipe, over, tensors="torch" if _torch() else "numpy")]
    later = times[-1].since(times[0]).shared(more)
    return [
        *(read / 1e9, report.bytes_read / 1e9, min(one.wall for one in merges), first.wall, further.wall, plain),
        *(times[0].wall, later.wall, min(one.cpu for one in merges), further.cpu, later.cpu),
    ]


def _torch() -> bool:
    try:
        import ml_dtypes  # noqa: F401
    except ImportError:
        return True
    return False


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--size", choices=list(SIZES), default="160m")
    parser.add_argument("--count", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="part of the names of rows")
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"))
    given = parser.parse_args()
    if given.count < 2:
        parser.error("--count must be at least 2")
    size = 2 * sum(rows * columns for rows, columns in _shapes(given.size))
    with workplace(given.folder, needed=(3 + given.count) * size, memory=5 * size) as folder:
        base, *tuned = make(given.size, folder, 3)
        print(f"{machine()}; {given.count} candidates of models of {size / 1e9:.2f} GB in {given.folder}")
        print(table_head(HEADS), flush=True)
        for name, (head, key, most) in SWEEPS.items():
            if given.only not in name:
                continue
            models = [{"model": str(path)} for path in (tuned[:1] if key == "t" else tuned)]
            recipe = {**head, "base_model": str(base), "models": models}
            over = {key: [round(most * (i + 1) / given.count, 4) for i in range(given.count)]}
            rounds = [measured(recipe, over, folder) for _ in range(given.rounds)]
            best = [min(numbers) for numbers in zip(*rounds, strict=True)]
            print(table_row([name, *(f"{number:.2f}" for number in best)]), flush=True)


def _shapes(size: str) -> list[tuple[int, int]]:
    return [(shape[0], 1 if len(shape) == 1 else shape[1]) for _, shape in tensors(SIZES[size])]


if __name__ == "__main__":
    main()
