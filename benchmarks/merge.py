"""Time and memory of merges next to the I/O floor, and next to MergeKit where it is installed.

usage: python benchmarks/merge.py [--size 1b] [--folder /dev/shm] [--rounds 5] [--only linear,ties,small]
                                  [--peer /path/to/environment/bin/mergekit-yaml | --no-peer] [--peer-rounds 1]
       python benchmarks/merge.py --disk FOLDER [--cold] [--size 7b] ...

Makes synthetic checkpoints in a temporary folder (removed at the end, after Ctrl-C too; for 1b three models and
an output: 9 GB), runs floor, smelt and the peer in turn, and prints the least time of each. The ratio to the floor is
of the engine's time (inputs opened -> all tensors written); the ratio to the peer is of whole processes. Memory is the
resident peak. The row `small` is a linear merge of three models of 0.16 B, where starting up counts. `--only more` has
MergeKit's other methods; with --size 160m, for some take MergeKit minutes on larger models.

With --disk the files lie in FOLDER, and a second line for each recipe tells what it takes until all is durable: the
floor's fsync, and smelt's commit. With --cold the page cache forgets the inputs before each measurement.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import recipes
from floor import Floor, drop_from_cache, floor
from measure import Process, in_memory, machine, measured, smelt_command, table_head, table_row, workplace
from synthetic import SIZES, make, size_bytes

SMALL, ALL_OTHERS = "small", "more"
COUNTS = recipes.TABLE | recipes.MORE
"""How many models the rows merge."""
AT_MOST = {"linear": 1.5, "slerp": 2.0, "dare_ties": 2.5, "ties": 3.0}
"""engine / floor that a warm merge is to stay below."""
AT_MOST_COLD = 1.2
AT_LEAST = {"linear": 8, "slerp": 7, "dare_ties": 15, "ties": 35, SMALL: 5}
"""Whole process of the peer / that of smelt, to reach on models of 1.1 B."""
AT_LEAST_7B = 3
NOTHING = "–"


@dataclass(frozen=True, slots=True)
class Options:
    """How a row is measured."""

    rounds: int
    peer: str | None
    peer_rounds: int
    threads: int | None
    disk: bool
    cold: bool
    size: str


@dataclass(slots=True)
class Row:
    """What the rounds of one recipe gave."""

    floors: list[Floor] = field(default_factory=list)
    merges: list[Process] = field(default_factory=list)
    reports: list[dict[str, float]] = field(default_factory=list)
    peers: list[Process] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="1b", choices=list(SIZES))
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"), help="where the files of the warm table lie")
    parser.add_argument("--disk", type=Path, default=None, metavar="FOLDER", help="measure on the disk of FOLDER")
    parser.add_argument("--cold", action="store_true", help="with --disk: read the inputs from the disk each time")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default=None, help="rows to measure; for 7b slerp alone, otherwise all")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--peer", default=shutil.which("mergekit-yaml"), help="a mergekit-yaml program")
    parser.add_argument("--no-peer", dest="peer", action="store_const", const=None)
    parser.add_argument("--peer-rounds", type=int, default=None, help="rounds of the peer, if fewer")
    given = parser.parse_args()
    rows = ["slerp"] if given.size == "7b" else [*recipes.TABLE, SMALL]
    if given.only:
        rows = [row for name in given.only.split(",") for row in (recipes.MORE if name == ALL_OTHERS else [name])]
    if unknown := set(rows) - {*COUNTS, SMALL}:
        known = ", ".join([*COUNTS, SMALL, ALL_OTHERS])
        parser.error(f"no such row: {', '.join(sorted(unknown))}; known are {known}")
    if given.cold and (given.disk is None or in_memory(given.disk)):
        parser.error("--cold needs --disk FOLDER, and FOLDER must not be in memory: there is nothing to forget there")
    options = Options(
        rounds=given.rounds,
        peer=given.peer,
        peer_rounds=given.rounds if given.peer_rounds is None else given.peer_rounds,
        threads=given.threads,
        disk=given.disk is not None,
        cold=given.cold,
        size=given.size,
    )
    run(rows, options, given.disk or given.folder)


def run(rows: Sequence[str], options: Options, parent: Path) -> None:
    """Make the models below `parent`, and print the table."""
    small = "tiny" if options.size == "tiny" else "160m"
    large = [name for name in rows if name != SMALL]
    count = max((COUNTS[name] for name in large), default=0)
    one = size_bytes(options.size)
    needed = (count + 1 if count else 0) * one + 4 * size_bytes(small)
    with workplace(parent, needed=needed, memory=int(4.6 * one) if options.peer else 0) as folder:
        print(machine())
        warm = make(small, folder / "small", 3)
        for name in large:  # compiles and caches the kernels, which is done once on a machine
            one_merge(recipes.write(name, warm[: COUNTS[name]], folder), folder / "out", options)
            shutil.rmtree(folder / "out")
        models = make(options.size, folder, count) if count else []
        state = "cold" if options.cold else "warm"
        place = f"on disk, {state} page cache" if options.disk else "in memory"
        if models:
            print(f"models of {one / 1e9:.2f} GB each, {place}; least of {options.rounds} rounds")
        print(f"\n{table_head(heads(options))}", flush=True)
        for name in rows:
            used = warm if name == SMALL else models[: COUNTS[name]]
            path = recipes.write("linear" if name == SMALL else name, used, folder)
            for cells in lines(name, rounds(path, used, folder, options), options):
                print(table_row(cells), flush=True)


def rounds(recipe: Path, models: Sequence[Path], folder: Path, options: Options) -> Row:
    """Floor, smelt and the peer in turn, as often as asked."""
    row = Row()
    out = folder / "out"
    for number in range(options.rounds):
        if options.cold:
            drop_from_cache(models)
        row.floors.append(floor(folder / "floor.bin", models, sync=options.disk))
        if options.cold:
            drop_from_cache(models)
        process = one_merge(recipe, out, options)
        row.merges.append(process)
        row.reports.append(json.loads(process.printed))
        shutil.rmtree(out)
        if options.peer is not None and number < options.peer_rounds:
            if options.cold:
                drop_from_cache(models)
            command = [options.peer, str(recipe), str(out), "--no-write-model-card", "--no-copy-tokenizer"]
            row.peers.append(measured(command))
            shutil.rmtree(out)
    return row


def one_merge(recipe: Path, out: Path, options: Options) -> Process:
    threads = [] if options.threads is None else ["--threads", str(options.threads)]
    return measured(smelt_command("merge", recipe, out, "--json", *threads))


def heads(options: Options) -> list[str]:
    """The columns."""
    from_disk = ["from disk GB: floor", "smelt"] if options.cold else []
    return [
        "recipe",
        "read GB",
        "written GB",
        *from_disk,
        "floor s",
        "engine s",
        "engine / floor",
        "at most",
        "process s",
        "peak MB (at most 500)",
        "peer s",
        "peer MB",
        "peer / smelt",
        "at least",
    ]


def lines(name: str, row: Row, options: Options) -> list[list[str]]:
    """The line of a recipe, and on a disk a second one for what it takes to be durable."""
    floor_seconds = min(one.seconds for one in row.floors)
    engine = min(report["engine_seconds"] for report in row.reports)
    whole = min(process.seconds for process in row.merges)
    peer = min((process.seconds for process in row.peers), default=None)
    at_most, at_least = limits(name, options)
    from_disk = [f"{row.floors[0].disk_bytes / 1e9:.2f}", f"{row.merges[0].disk_bytes / 1e9:.2f}"]
    first = [
        name,
        f"{row.reports[0]['bytes_read'] / 1e9:.2f}",
        f"{row.reports[0]['bytes_written'] / 1e9:.2f}",
        *(from_disk if options.cold else []),
        f"{floor_seconds:.2f}",
        f"{engine:.2f}",
        f"{engine / floor_seconds:.2f}",
        at_most,
        f"{whole:.2f}",
        f"{max(process.memory for process in row.merges):.0f}",
        f"{peer:.1f}" if peer is not None else NOTHING,
        f"{max(process.memory for process in row.peers):.0f}" if row.peers else NOTHING,
        f"{peer / whole:.1f} ×" if peer is not None else NOTHING,
        at_least,
    ]
    if not options.disk:
        return [first]
    sync = min(one.sync_seconds for one in row.floors)
    commit = min(report["commit_seconds"] for report in row.reports)
    ratio = f"{commit / sync:.2f}" if sync >= 0.01 else NOTHING
    blank = [""] * (4 if options.cold else 2)
    return [first, [f"{name}, fsync", *blank, f"{sync:.2f}", f"{commit:.2f}", ratio, *[""] * 7]]


def limits(name: str, options: Options) -> tuple[str, str]:
    """What engine / floor may be at most, and peer / smelt at least; only where a limit was set."""
    large_enough = options.size in {"1b", "7b"}
    at_most = AT_MOST_COLD if options.cold and name != SMALL else None if options.disk else AT_MOST.get(name)
    at_least = AT_LEAST.get(name)
    if options.size == "7b" and name != SMALL:
        at_least = AT_LEAST_7B if name == "slerp" else None
    elif options.disk:
        at_least = None
    return (
        f"{at_most}" if at_most is not None and large_enough else NOTHING,
        f"{at_least} ×" if at_least is not None and large_enough else NOTHING,
    )


if __name__ == "__main__":
    main()
