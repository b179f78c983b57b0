"""How the time of a merge grows: with bytes, with models, with tiles, and what it gains from threads.

usage: python benchmarks/sweep.py [--size 160m] [--folder /dev/shm] [--rounds 3] [--out docs/benchmarks] [--no-figures]

Merges synthetic models in this process through the Python API, prints a table for each question, and writes the numbers
(curves.json, curves.md) and a picture of each (needs matplotlib) to the folder --out. SIZE is that of the models of all
sweeps; `bytes` also takes a quarter, half and three quarters of its layers. Eight models and an output lie in --folder.
Time is of the merge from the checked plan to the finished output, least of the rounds; CPU time is of the same span.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

import smelt
from lock import LockProbe, calibrated, held_during
from measure import machine, table_head, table_row, workplace
from recipes import recipe
from synthetic import SIZES, make, size_bytes

MOST_MODELS = 8
PARTS = (0.25, 0.5, 0.75, 1.0)
TILES = tuple(1 << power for power in range(16, 21))
GROWING = {"bytes": ("slerp", "ties"), "models": ("linear", "ties"), "tiles": ("linear", "slerp", "ties", "consensus")}
"""The methods of each sweep; consensus has no kernel, so that its tiles are NumPy's."""
THREADED = ("linear", "slerp", "ties")


@dataclass(frozen=True, slots=True)
class Point:
    """One measurement: the method, where it stands on the axis, seconds, CPU seconds, and bytes read and written."""

    method: str
    x: float
    seconds: float
    user: float
    system: float
    bytes: int


@dataclass(frozen=True, slots=True)
class ThreadPoint:
    """One merge with so many threads on so many cores; all in seconds."""

    method: str
    threads: int
    cores: int
    seconds: float
    user: float
    system: float


@dataclass(frozen=True, slots=True)
class LockPoint:
    """The share of one worker's time in which the interpreter lock is held."""

    method: str
    held: float


@dataclass(frozen=True, slots=True)
class Fit:
    """seconds = `start` + bytes / `rate`, by least squares, and how much of the variance it explains."""

    start: float
    rate: float
    r_squared: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="160m", choices=list(SIZES))
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[1] / "docs" / "benchmarks")
    parser.add_argument("--no-figures", dest="figures", action="store_false")
    given = parser.parse_args()
    if given.figures:
        try:
            import figures
        except ImportError:
            raise SystemExit("error: the figures need matplotlib: pip install '.[bench]', or --no-figures") from None
    with workplace(given.folder, needed=(MOST_MODELS + 3) * size_bytes(given.size)) as folder:
        curves = measure(given.size, folder, given.rounds)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "curves.json").write_text(json.dumps(curves, indent=1) + "\n", encoding="utf-8")
    text = "\n".join(page(curves))
    (given.out / "curves.md").write_text(text + "\n", encoding="utf-8")
    print(text)
    if given.figures:
        figures.draw(given.out)


def measure(size: str, folder: Path, rounds: int) -> dict[str, object]:
    """All sweeps, as plain values."""
    out = folder / "out"
    models = make(size, folder / "whole", MOST_MODELS)
    for method in {method for methods in (*GROWING.values(), THREADED) for method in methods}:
        once(method, models[:3], out)  # compiles the kernels
    curves: dict[str, object] = {"machine": machine(), "rounds": rounds, "model_bytes": size_bytes(size), "size": size}
    counts = range(2, MOST_MODELS + 1)
    many = [(m, float(count), models[:count], None) for m in GROWING["models"] for count in counts]
    curves["models"] = [asdict(point) for point in swept(many, out, rounds)]
    tiled = [(m, float(tile), models[: 2 if m == "slerp" else 3], tile) for m in GROWING["tiles"] for tile in TILES]
    curves["tiles"] = [asdict(point) for point in swept(tiled, out, rounds)]
    curves["threads"] = [asdict(point) for point in threaded(models, out, rounds)]
    curves["lock"] = locked(models, out)
    shutil.rmtree(folder / "whole" / f"ft{MOST_MODELS - 1}")  # room for the shortened ones
    points: list[Point] = []
    for part in PARTS:
        layers = max(1, round(part * SIZES[size]["layers"]))
        fewer = make(size, folder / "part", 3, layers=layers) if part < 1 else models[:3]
        some = [(m, part, fewer[: 2 if m == "slerp" else 3], None) for m in GROWING["bytes"]]
        points += swept(some, out, rounds)
        shutil.rmtree(folder / "part", ignore_errors=True)
    curves["bytes"] = [asdict(point) for point in points]
    curves["fits"] = {method: asdict(fitted([p for p in points if p.method == method])) for method in GROWING["bytes"]}
    return curves


def swept(jobs: Sequence[tuple[str, float, Sequence[Path], int | None]], out: Path, rounds: int) -> list[Point]:
    """The quickest round of each job; a round goes through all jobs, so that a slow minute harms none of them alone."""
    found: list[list[Point]] = [[] for _ in jobs]
    for _ in range(rounds):
        for place, (method, x, models, tile) in enumerate(jobs):
            seconds, user, system, moved = once(method, models, out, tile=tile)
            found[place].append(Point(method, x, seconds, user, system, moved))
    return [min(points, key=lambda point: point.seconds) for points in found]


def once(
    method: str,
    models: Sequence[Path],
    out: Path,
    *,
    threads: int | None = None,
    tile: int | None = None,
    probe: LockProbe | None = None,
) -> tuple[float, float, float, int]:
    """One merge from its plan to its end: wall, user and system seconds, and the bytes read and written.

    `probe` is started when the plan is made, and stopped at the end.
    """
    begun: list[tuple[float, resource.struct_rusage]] = []

    def planned(_: object) -> None:
        begun.append((time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)))
        if probe is not None:
            probe.start()

    report = smelt.merge(recipe(method, models), out, workers=threads, tile=tile, on_plan=planned)
    ended, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
    if probe is not None:
        probe.stop()
    shutil.rmtree(out)
    started, before = begun[0]
    user, system = used.ru_utime - before.ru_utime, used.ru_stime - before.ru_stime
    return ended - started, user, system, report.bytes_read + report.bytes_written


def fitted(points: Sequence[Point]) -> Fit:
    """The straight line through time against bytes."""
    moved = np.array([point.bytes for point in points], dtype=float)
    seconds = np.array([point.seconds for point in points])
    slope, start = np.polyfit(moved, seconds, 1)
    left = seconds - (start + slope * moved)
    total = float(((seconds - seconds.mean()) ** 2).sum())
    return Fit(float(start), float(1 / slope), 1 - float((left**2).sum()) / total)


@contextmanager
def on_cores(count: int) -> Iterator[None]:
    """This process and the threads that it starts run on `count` of its cores."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, set(sorted(cores)[:count]))
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def threaded(models: Sequence[Path], out: Path, rounds: int) -> Iterator[ThreadPoint]:
    """Each number of threads on one core and on all, up to one thread a core."""
    cores = len(os.sched_getaffinity(0))
    counts = sorted({1, 2, cores})
    for method in THREADED:
        used = models[: 2 if method == "slerp" else 3]
        for core_count in [count for count in counts if count <= cores]:
            for threads in [count for count in counts if count <= max(2, core_count)]:
                with on_cores(core_count):
                    runs = [once(method, used, out, threads=threads) for _ in range(rounds)]
                seconds, user, system, _ = min(runs)
                yield ThreadPoint(method, threads, core_count, seconds, user, system)


def locked(models: Sequence[Path], out: Path) -> dict[str, object] | None:
    """The interpreter lock while one worker merges, and the probe's own check; None with a single core."""
    if len(os.sched_getaffinity(0)) < 2:
        return None
    true, seen = calibrated()
    points = []
    for method in THREADED:
        used = models[: 2 if method == "slerp" else 3]
        share = held_during(lambda probe, m=method, u=used: once(m, u, out, threads=1, probe=probe))
        points.append(asdict(LockPoint(method, share.held)))
    return {"check": {"true": true, "seen": seen.held}, "shares": points}


def page(curves: dict[str, object]) -> Iterator[str]:
    """The numbers as a Markdown page."""
    read = json.loads(json.dumps(curves))
    yield f"# How the time grows\n\nWritten by `benchmarks/sweep.py`: {read['machine']}; models of "
    yield f"{read['model_bytes'] / 1e9:.3g} GB each; least of {read['rounds']} rounds. `slerp` merges two models and"
    yield "the others three, the base included, unless said otherwise; bytes are those that the engine moved.\n"
    yield "## Bytes\n\n![time against bytes](bytes.png)\n"
    yield table_head(["method", "GB", "s", "CPU s"])
    for p in read["bytes"]:
        yield table_row(
            [p["method"], f"{p['bytes'] / 1e9:.2f}", f"{p['seconds']:.3f}", f"{p['user'] + p['system']:.2f}"]
        )
    yield ""
    for method, fit in read["fits"].items():
        yield f"- {method}: {fit['start']:.2f} s + bytes / {fit['rate'] / 1e9:.2f} GB/s, R² = {fit['r_squared']:.4f}"
    yield "\n## Models\n\n![time against models](models.png)\n"
    yield from across(read["models"], "models", lambda x: f"{x:.0f}")
    yield "\n## Tiles\n\nElements that a method sees at once.\n\n![time against tiles](tiles.png)\n"
    yield from across(read["tiles"], "tile", tile_label)
    yield "\n## Threads and cores\n\n![time against threads](threads.png)\n"
    yield table_head(["method", "threads", "cores", "s", "user s", "system s", "speed-up"])
    alone: dict[str, float] = {}
    for p in read["threads"]:
        one = alone.setdefault(p["method"], p["seconds"])
        cells = [p["method"], str(p["threads"]), str(p["cores"]), f"{p['seconds']:.3f}"]
        yield table_row([*cells, f"{p['user']:.2f}", f"{p['system']:.2f}", f"{one / p['seconds']:.2f}"])
    if read["lock"]:
        yield "\n## The interpreter lock\n"
        yield "The share of one worker's time in which it holds the lock, seen by a probe on"
        yield "another core (`benchmarks/lock.py`): n threads can go at most 1 / share times as fast.\n"
        yield table_head(["method", "lock held", "speed-up at most"])
        for p in read["lock"]["shares"]:
            most = f"{1 / p['held']:.0f}" if p["held"] else "–"
            yield table_row([p["method"], f"{100 * p['held']:.1f} %", most])
        check = read["lock"]["check"]
        yield f"\nThe probe's check: a thread that held the lock for {100 * check['true']:.1f} % of the time was"
        yield f"seen as {100 * check['seen']:.1f} %. Where these are far apart, the machine was not quiet."


def tile_label(elements: float) -> str:
    """Elements as people say them: 64 Ki."""
    return f"{elements / (1 << 20):.0f} Mi" if elements >= 1 << 20 else f"{elements / 1024:.0f} Ki"


def across(points: Sequence[dict[str, float]], name: str, label: Callable[[float], str]) -> Iterator[str]:
    """A table with a line for each method and a column for each place on the axis."""
    places = sorted({point["x"] for point in points})
    yield table_head([f"s, by {name}", *(label(x) for x in places)])
    for method in dict.fromkeys(str(point["method"]) for point in points):
        found = {point["x"]: point["seconds"] for point in points if point["method"] == method}
        yield table_row([method, *(f"{found[x]:.3f}" for x in places)])


if __name__ == "__main__":
    main()
