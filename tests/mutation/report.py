"""What became of the mutants: printed, and written as a page."""

from __future__ import annotations

import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from changes import Change

WANTED = 0.9
"""Share of the mutants that must not survive."""

_INTRO = """\
# Mutants: would a test notice?

Written by `tests/mutation/mutants.py` (`make mutants`); do not edit. The tool changes the source of the methods and of
`recipe/select.py` in one place (a comparison, an operator, a number, a condition, a returned value, an argument that
can be left out, ...) and runs tests that touch the line. A mutant that fails a test is killed; one that no test notices
shows a gap, or a change that makes no difference.

A fixed sample (seed {seed}) is drawn from each file in proportion to its places. A mutant meets 25 tests at first,
spread over files and functions; what survives them meets further tests that touch the line, then the file, up to 15
seconds of each, and if the line runs at import, one test of each function. One that has not ended after 60 seconds
counts as killed, and has a column of its own.

The suites are those of `tests/unit/` for methods, recipes and engine, `tests/reference/`, `tests/property/`,
`tests/conformance/` (without the kernels, which are compared with these very definitions), `tests/golden/` and
`tests/e2e/test_own_methods.py`; hypothesis draws the same examples in each run. Equivalent mutants, which no test can
tell from the program, are counted as survivors; `tests/mutation/survivors.toml` says why each survives.

"""


@dataclass(frozen=True, slots=True)
class Row:
    """One mutant and its fate."""

    change: Change
    line: str
    reply: Mapping[str, Any]

    @property
    def fate(self) -> str:
        outcome = self.reply["outcome"]
        return "survived" if outcome == "empty" else str(outcome)

    @property
    def place(self) -> str:
        return f"{self.change.file.removeprefix('src/smelt/')}:{self.change.line}"

    @property
    def key(self) -> tuple[str, str, str]:
        """What a reason is found by: line numbers move."""
        return self.change.file.removeprefix("src/smelt/"), self.line, self.change.told()


def write_report(rows: Sequence[Row], places: Mapping[str, int], *, reasons: Path, out: Path | None, seed: int) -> int:
    """Print the result and write the page; 1 if too many survive, or one of them without a reason."""
    known = {(one["file"], one["line"], one["change"]): one for one in _read(reasons)}
    survivors = [row for row in rows if row.fate == "survived"]
    table = _table(rows, places)
    print("\n".join(table))
    told, missing = [], 0
    for row in survivors:
        reason = known.get(row.key)
        missing += reason is None
        words = "no reason written yet" if reason is None else f"{reason['verdict']}: {reason['why']}"
        told.append(f"- `{row.place}` {row.change.told()}: {words}")
        if reason is None:
            print(f"{row.place}\n    line = '''{row.line}'''\n    change = '''{row.change.told()}'''")
    verdicts = Counter(known[row.key]["verdict"] for row in survivors if row.key in known)
    share = 1.0 - len(survivors) / max(len(rows), 1)
    kinds = ", ".join(f"{count} {verdict}" for verdict, count in verdicts.most_common())
    first = sum(row.fate != "survived" and row.reply["round"] == 1 for row in rows)
    total = f"{len(rows)} mutants of {sum(places.values())} places: {share:.1%} killed ({first} by the first tests), "
    total += f"{len(survivors)} survive" + (f" ({kinds})" if kinds else "")
    print(total)
    if out is not None:
        page = [_INTRO.format(seed=seed) + total + ".", "", *table, "", "## Survivors", "", *told]
        out.write_text("\n".join(page) + "\n", encoding="utf-8")
    if missing:
        print(f"{missing} survivors without a reason in {reasons.name}")
    return 1 if missing or share < WANTED else 0


def _read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    found: list[dict[str, str]] = tomllib.loads(path.read_text(encoding="utf-8"))["survivor"]
    return found


def _table(rows: Sequence[Row], places: Mapping[str, int]) -> list[str]:
    lines = ["| file | places | mutants | killed | timed out | survived |", "|---|---|---|---|---|---|"]
    for file, count in places.items():
        fates = Counter(row.fate for row in rows if row.change.file == file)
        lines.append(_cells(f"`{file.removeprefix('src/smelt/')}`", count, fates))
    lines.append(_cells("all", sum(places.values()), Counter(row.fate for row in rows)))
    return lines


def _cells(name: str, places: int, fates: Mapping[str, int]) -> str:
    numbers = (places, sum(fates.values()), fates["killed"], fates["timeout"], fates["survived"])
    return f"| {name} | {' | '.join(map(str, numbers))} |"
