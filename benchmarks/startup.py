"""What does not grow with the bytes: starting, planning, and the cost of each tensor.

usage: python benchmarks/startup.py [--size full] [--folder /dev/shm] [--rounds 3]

Prints seconds and resident memory of `smelt --help` and of `smelt plan` for 7 B models and for mixtures of experts of
60 000 tensors, next to their limits; these models are headers alone, and take no space. Then merges mixtures of 60 000
tensors of 8 KB, where nearly all the time is what a tensor costs by itself (1.5 GB, removed at the end).
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import recipes
from measure import machine, measured, smelt_command, table_head, table_row, workplace
from synthetic import (
    SIZES,
    Mixture,
    config,
    expert_config,
    expert_tensors,
    make,
    make_experts,
    make_headers,
    tensors,
)

LARGE = {"full": "7b", "tiny": "tiny"}
MANY = {
    "full": Mixture(layers=60, experts=332, hidden=7168, ffn=2048),
    "tiny": Mixture(layers=2, experts=8, hidden=64, ffn=64),
}
"""Of the width of the largest open mixtures of experts: 0.9 T parameters."""
SMALL = {
    "full": Mixture(layers=60, experts=332, hidden=64, ffn=64, vocab=64),
    "tiny": Mixture(layers=2, experts=8, hidden=64, ffn=64, vocab=64),
}
"""Every matrix of an expert has 8 KB."""
METHODS = ("linear", "slerp", "ties")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="full", choices=list(MANY), help="tiny: to see that the program runs")
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"))
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    small = list(expert_tensors(SMALL[given.size]))
    needed = 3 * 2 * sum(_count(shape) for _, shape in small) + (200 << 20)  # two models, an output, headers
    with workplace(given.folder, needed=needed) as folder:
        print(f"{machine()}; least of {given.rounds} rounds\n")
        print(table_head(["command", "tensors", "s", "at most", "peak MB", "at most"]))
        print(timed("smelt --help", 0, smelt_command("--help"), given.rounds, at_most=0.2))
        large = SIZES[LARGE[given.size]]
        shapes = list(tensors(large))
        models = make_headers(shapes, config(large), folder / "large", 3)
        command = smelt_command("plan", recipes.write("ties", models, folder))
        print(timed(f"smelt plan, ties of three {LARGE[given.size]} models", len(shapes), command, given.rounds, 1.0))
        shapes = list(expert_tensors(MANY[given.size]))
        models = make_headers(shapes, expert_config(MANY[given.size]), folder / "many", 2)
        for method in ("linear", "ties"):
            command = smelt_command("plan", recipes.write(method, models, folder))
            name = f"smelt plan, {method} of two mixtures of experts"
            print(timed(name, len(shapes), command, given.rounds, at_most=10, memory=1000))
        shutil.rmtree(folder / "many")
        merges(given.size, folder, given.rounds)


def _count(shape: tuple[int, ...]) -> int:
    rows, *columns = shape
    return rows * (columns[0] if columns else 1)


def timed(name: str, count: int, command: list[str], rounds: int, at_most: float, memory: float | None = None) -> str:
    """A line of the first table."""
    runs = [measured(command) for _ in range(rounds)]
    return table_row(
        [
            name,
            str(count) if count else "–",
            f"{min(run.seconds for run in runs):.2f}",
            f"{at_most:g}",
            f"{max(run.memory for run in runs):.0f}",
            f"{memory:g}" if memory is not None else "–",
        ]
    )


def merges(size: str, folder: Path, rounds: int) -> None:
    """The second table: merges of two models of many small tensors."""
    print(f"\n{table_head(['merge of two', 'tensors', 'engine s', 'µs a tensor', 'process s', 'peak MB'])}")
    models = make_experts(SMALL[size], folder / "small", 2)
    warm = make("160m", folder / "warm", 2) if size == "full" else models
    for method in METHODS:
        for first in (warm, models):  # the first compiles and caches the kernels, done once on a machine
            path = recipes.write(method, first, folder)
            runs, reports = [], []
            for _ in range(rounds if first is models else 1):
                runs.append(measured(smelt_command("merge", path, folder / "out", "--json")))
                reports.append(json.loads(runs[-1].printed))
                shutil.rmtree(folder / "out")
        seconds = min(report["engine_seconds"] for report in reports)
        count = reports[0]["tensors"]
        cells = [method, str(count), f"{seconds:.2f}", f"{1e6 * seconds / count:.0f}"]
        whole, memory = min(run.seconds for run in runs), max(run.memory for run in runs)
        print(table_row([*cells, f"{whole:.2f}", f"{memory:.0f}"]), flush=True)


if __name__ == "__main__":
    main()
