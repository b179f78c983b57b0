"""The results as JSON, and as tables of a page."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from check import Compared
from scoring import SUMS, TEXTS
from study import GENERAL, GROUPS, SEEDS, Study
from summary import absolute_rows, curve, group_rows, single_rows
from sweeps import LEFT_OUT, SWEEPS, Sweep

_MARKED = re.compile(r"(<!-- tables: (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def groups_left_out(study: Study) -> list[str]:
    """Groups whose models or data are not there."""
    there = study.groups()
    return [" + ".join(group) for group in GROUPS if group not in there]


def results(study: Study, sweeps: Sequence[Sweep] = SWEEPS, checked: Sequence[Compared] = ()) -> dict[str, Any]:
    """All numbers, as plain values."""
    tasks = [task for task in (*TEXTS, *SUMS) if task in study.zoo.windows or task in study.zoo.problems]
    found: dict[str, Any] = {
        "data": {
            "windows": {name: len(cut) for name, (cut, _) in study.zoo.windows.items()},
            "problems": {name: len(given) for name, given in study.zoo.problems.items()},
            "seeds": len(SEEDS),
        },
        "left_out": LEFT_OUT,
        "check": [asdict(one) for one in checked],
        "models": absolute_rows(study, tasks),
        "groups": {},
    }
    for group in study.groups():
        found["groups"][" + ".join(group)] = {
            "single": single_rows(study, group),
            "rows": [asdict(row) | {"verdict": row.verdict} for row in group_rows(study, group, sweeps)],
            "curves": {
                sweep.title: {"axis": sweep.axis, "points": points}
                for sweep in sweeps
                if len(points := curve(study, group, sweep)) > 1
            },
        }
    short: dict[str, Any] = _short(found)
    return short


def _short(value: Any) -> Any:
    """Floats with as many digits as mean something."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, Mapping):
        return {key: _short(one) for key, one in value.items()}
    return [_short(one) for one in value] if isinstance(value, list | tuple) else value


def write_json(found: Mapping[str, Any], folder: Path) -> Path:
    path = folder / "zoo.json"
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return path


def write_tables(found: Mapping[str, Any], page: Path) -> Path:
    """Put each table between its marks."""
    made = {name: "\n".join(lines) + "\n" for name, lines in _named(found)}

    def filled(match: re.Match[str]) -> str:
        if match["name"] not in made:
            raise SystemExit(f"error: {page} asks for the table {match['name']!r}; there are {', '.join(made)}")
        return match[1] + made[match["name"]] + match[3]

    page.write_text(_MARKED.sub(filled, page.read_text(encoding="utf-8")), encoding="utf-8")
    return page


def tables(found: Mapping[str, Any]) -> Iterator[str]:
    """All tables, one after another."""
    for name, lines in _named(found):
        yield f"\n{name}"
        yield from lines


def _named(found: Mapping[str, Any]) -> Iterator[tuple[str, list[str]]]:
    yield "models", list(_models(found["models"]))
    for name, group in found["groups"].items():
        yield name.replace(" + ", "-"), list(_group(group))
    yield "defaults", list(_defaults(found["groups"]))


def _models(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    tasks = [task for task in (*TEXTS, *SUMS) if any(task in row for row in rows)]
    yield "| model | " + " | ".join(f"{task}, {'bits/byte' if task in TEXTS else 'solved'}" for task in tasks) + " |"
    yield "|---|" + "---:|" * len(tasks)
    for row in rows:
        yield f"| {row['model']} | " + " | ".join(f"{row[task]:.3f}" for task in tasks) + " |"


def _group(group: Mapping[str, Any]) -> Iterator[str]:
    skills = list(group["rows"][0]["shares"])
    general = group["rows"][0]["lost"] is not None
    heads = ["method", "setting chosen", "score ± error", "against the yardstick", "seeds ±", *skills]
    heads += [*([f"{GENERAL} lost"] if general else []), "merge s"]
    yield "| " + " | ".join(heads) + " |"
    yield "|---|---|" + "---:|" * (len(heads) - 2)
    for row in group["rows"]:
        sign = {"better": "**", "worse": "", "same": "", "yardstick": ""}[row["verdict"]]
        against = "yardstick" if row["verdict"] == "yardstick" else f"{row['difference']:+.3f} {row['verdict']}"
        cells = [
            row["method"],
            row["setting"],
            f"{row['score']:.3f} ± {row['error']:.3f}",
            f"{sign}{against}{sign}",
            "" if row["spread"] is None else f"{row['spread']:.3f}",
            *(f"{row['shares'][skill]:.2f}" for skill in skills),
        ]
        cells += [*_lost(row), f"{row['seconds']:.2f}"]
        yield "| " + " | ".join(cells) + " |"
    for row in group["single"]:
        cells = [f"*{row['model']}*", "no merge", f"{row['score']:.3f}", "", ""]
        cells += [f"{row['shares'][skill]:.2f}" for skill in skills]
        cells += [*_lost(row), ""]
        yield "| " + " | ".join(cells) + " |"


def _lost(row: Mapping[str, Any]) -> list[str]:
    return [] if row["lost"] is None else [f"{row['lost']:+.3f}"]


def _defaults(groups: Mapping[str, Any]) -> Iterator[str]:
    """The score at the defaults beside that at the setting chosen."""
    yield "| method | " + " | ".join(groups) + " |"
    yield "|---|" + "---:|" * len(groups)
    places = [{row["method"]: row for row in group["rows"]} for group in groups.values()]
    for method in sorted(places[0]):
        cells = [f"{rows[method]['default_score']:.2f} → {rows[method]['score']:.2f}" for rows in places]
        yield f"| {method} | " + " | ".join(cells) + " |"


def agreement(checked: Sequence[Compared]) -> Iterator[str]:
    """How far the zoo's own numbers and those measured here are apart."""
    for source in dict.fromkeys(one.source for one in checked):
        mine = [one for one in checked if one.source == source]
        for kind, tasks in (("bits per byte", TEXTS), ("share solved", SUMS)):
            apart = sorted((abs(one.here - one.theirs), i, one) for i, one in enumerate(mine) if one.task in tasks)
            if apart:
                most, _, worst = apart[-1]
                yield (
                    f"{source}: {len(apart)} numbers in {kind}, {most:.4f} apart at most"
                    f" ({worst.model}, {worst.task}: {worst.theirs} there, {worst.here:.4f} here)"
                )
