"""Merge tiny trained models by several methods, and measure what each merge can still do.

    python examples/demo.py

Every recipe in `examples/recipes/` is merged with smelt into `examples/out/NAME`, then run with NumPy on law text and
additions it never saw. Writes `examples/out/results.json` and `results.md`. No torch, no download.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from evaluate import PROBLEMS, WINDOW, WINDOWS, evaluate
from rich.console import Console
from rich.table import Table

import smelt
from smelt.errors import SmeltError

HERE = Path(__file__).parent
OUT = HERE / "out"
BASE, LAW, ADDITION = "base", "legal", "math"
MERGES = {  # recipe -> what it is, in a few words
    "linear": "average of legal and math",
    "healing": "legal, half-way back to base",
    "slerp": "along the arc, late layers nearer to legal",
    "task_arithmetic": "base + 0.6 of what each learned",
    "ties": "the largest changes, where signs agree",
    "dare_ties": "a random part of the changes, signs elected",
    "nuslerp": "arc between the two changes",
    "model_stock": "as far as the angle between them allows",
}


@dataclass(frozen=True, slots=True)
class Row:
    """One model of the table; `seconds` is the time of its merge, None for a model that was trained."""

    name: str
    what: str
    law: float
    addition: float
    seconds: float | None


def main() -> None:
    """Measure the parents, make and measure every merge, then show and save what came out."""
    console = Console(width=None if sys.stdout.isatty() else 100)
    OUT.mkdir(exist_ok=True)
    started = time.perf_counter()
    rows = []
    trained = {
        BASE: "what both grew from",
        LAW: "base, then licences alone",
        ADDITION: "base, then additions alone",
    }
    for name, what in trained.items():
        rows.append(measure(name, what, HERE / "zoo" / name, None))
        console.print(progress(rows[-1]), highlight=False)
    for name, what in MERGES.items():
        report = smelt.merge(HERE / "recipes" / f"{name}.yml", OUT / name, overwrite=True)
        rows.append(measure(name, what, OUT / name, report.seconds))
        console.print(progress(rows[-1]), highlight=False)

    told = story({row.name: row for row in rows})
    console.print()
    console.print(as_table(rows))
    for sentence in told:
        console.print(sentence, highlight=False)
    save(rows, told)
    seconds = time.perf_counter() - started
    console.print(f"\n{len(MERGES)} merges made and {len(rows)} models measured in {seconds:.0f} s.", highlight=False)


def measure(name: str, what: str, folder: Path, seconds: float | None) -> Row:
    scores = evaluate(folder)
    return Row(name=name, what=what, law=scores.law, addition=scores.addition, seconds=seconds)


def progress(row: Row) -> str:
    merged = "trained        " if row.seconds is None else f"merged in {row.seconds:.2f} s"
    return f"{row.name:<16} {merged:<17} law {row.law:.3f}   addition {row.addition:.2f}"


def cells(rows: Sequence[Row]) -> list[list[tuple[str, bool]]]:
    """The numbers of each row as text, each with whether it is the best of its column (equal ones share that)."""
    law = _marked([f"{row.law:.3f}" for row in rows], best=min)
    addition = _marked([f"{row.addition:.2f}" for row in rows], best=max)
    seconds = _marked(["" if row.seconds is None else f"{row.seconds:.2f}" for row in rows], best=min)
    return [list(row) for row in zip(law, addition, seconds, strict=True)]


def _marked(column: list[str], *, best: Callable[[list[float]], float]) -> list[tuple[str, bool]]:
    # Compared as shown: two models that read the same to the last printed digit are equally good.
    leader = best([float(text) for text in column if text])
    return [(text, bool(text) and float(text) == leader) for text in column]


def as_table(rows: Sequence[Row]) -> Table:
    table = Table(caption="best of each column in green; law: lower is better, addition: higher is better")
    table.add_column("model")
    table.add_column("what it is", style="dim")
    for title in ("law\nbits/byte", "addition\nexact", "merge\nseconds"):
        table.add_column(title, justify="right")
    for row, numbers in zip(rows, cells(rows), strict=True):
        shown = [f"[bold green]{text}[/]" if best else text for text, best in numbers]
        table.add_row(row.name, row.what, *shown, end_section=row.name == ADDITION)
    return table


def story(rows: dict[str, Row]) -> list[str]:
    """What the numbers say, in two or three sentences that follow them, whichever way they fall."""
    base, law = rows[BASE], rows[LAW]
    gain, loss = base.law - law.law, base.addition - law.addition
    if gain <= 0 or loss <= 0:
        return [
            f"The law expert did not trade addition for law: it gained {gain:+.3f} bits per byte, {-loss:+.2f} exact."
        ]

    def kept(row: Row) -> float:  # share of the expert's gain in law
        return (base.law - row.law) / gain

    def recovered(row: Row) -> float:  # share of the addition it forgot
        return (row.addition - law.addition) / loss

    def verdict(row: Row) -> str:
        return f"{kept(row):.0%} of the gain in law and {row.addition:.0%} of the additions"

    merges = [row for name, row in rows.items() if name in MERGES]
    best = max(merges, key=lambda row: kept(row) + recovered(row))
    average, healed = rows["linear"], rows["healing"]
    return [
        f"Training on licences alone took the base from {base.law:.3f} to {law.law:.3f} bits per byte of law, and from "
        f"{base.addition:.0%} to {law.addition:.0%} of the additions solved: it gained one thing and forgot another.",
        f"Averaged with the addition expert it has {verdict(average)}; half-way back to its base, with no second "
        f"expert at all, {verdict(healed)}.",
        f"The best of both here is {best.name}, with {verdict(best)}; no merge took a single training step.",
    ]


def save(rows: Sequence[Row], told: Sequence[str]) -> None:
    """`results.json` and `results.md` beside the merged models."""
    protocol = {"windows": WINDOWS, "tokens_per_window": WINDOW, "problems": PROBLEMS}
    record = {"protocol": protocol, "rows": [asdict(row) for row in rows], "story": list(told)}
    (OUT / "results.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    lines = [
        "| model | what it is | law bits/byte | addition exact | merge seconds |",
        "|---|---|---:|---:|---:|",
    ]
    for row, numbers in zip(rows, cells(rows), strict=True):
        shown = " | ".join(f"**{text}**" if best else text for text, best in numbers)
        lines.append(f"| {row.name} | {row.what} | {shown} |")
    (OUT / "results.md").write_text("\n".join([*lines, "", " ".join(told), ""]), encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except SmeltError as error:
        print(error.render(), file=sys.stderr)
        sys.exit(error.exit_code)
