"""Does the measuring agree with what the zoo says of itself? `scores.json` and `merges.txt`, where they are there.

`merges.txt` is of the first 40 windows of each text and the first 100 problems, as examples/evaluate.py measures;
`scores.json` of all windows. Bits per byte there are spread over the 192 tokens of a window, here over the 191 that are
predicted, so that the numbers here are 192/191 times as high, and are divided by that before they are compared.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from scoring import SUMS, TEXTS, Weights, Zoo, evaluate
from sweeps import Setting, Sweep, cases

from candidates import merged_skills
from smelt.engine.blas import single_threaded

_NUMBERS = re.compile(r"^(?P<name>.*?)\s{2,}(?P<numbers>[\d.]+(?:\s+[\d.]+){4})")
_TASKS = (*TEXTS, *SUMS)
MERGES: dict[str, tuple[tuple[str, ...], str, dict[str, Any]]] = {
    "average legal + math": (("legal", "math"), "linear", {"weight": 0.5}),
    "average legal + code": (("legal", "code"), "linear", {"weight": 0.5}),
    "task arithmetic legal+code .6": (("legal", "code"), "task_arithmetic", {"weight": 0.6}),
    "base + 0.5 (legal - base)": (("legal",), "task_arithmetic", {"weight": 0.5}),
    "base + 0.7 (legal - base)": (("legal",), "task_arithmetic", {"weight": 0.7}),
    "average legal + minus": (("legal", "minus"), "linear", {"weight": 0.5}),
    "task arithmetic legal+minus 1": (("legal", "minus"), "task_arithmetic", {"weight": 1.0}),
    "ties legal+minus density .5": (("legal", "minus"), "ties", {"weight": 1.0, "density": 0.5}),
}
"""Rows of merges.txt and what they are here."""


@dataclass(frozen=True, slots=True)
class Compared:
    """A number of the zoo's own, and the same one measured here."""

    source: str
    model: str
    task: str
    theirs: float
    here: float


def compared(zoo: Zoo) -> Iterator[Compared]:
    """Every number of the zoo's files that can be measured here."""
    with single_threaded():
        yield from _scores(zoo)
        yield from _merges(zoo)


def _scores(zoo: Zoo) -> Iterator[Compared]:
    path = zoo.folder / "scores.json"
    if not path.exists():
        return
    for name, given in json.loads(path.read_text(encoding="utf-8")).items():
        if name in zoo.weights:
            for key, theirs in given.items():
                task = key.rpartition("_")[0]
                here = _measured(zoo, zoo.weights[name], task, windows=None, problems=None)
                yield Compared(path.name, name, task, theirs, here)


def _merges(zoo: Zoo) -> Iterator[Compared]:
    path = zoo.folder / "merges.txt"
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        found = _NUMBERS.match(line)
        if found is None:
            continue
        name = found["name"].strip()
        if name in zoo.weights:
            weights: Weights = zoo.weights[name]
        elif name in MERGES and all(skill in zoo.weights for skill in MERGES[name][0]):
            skills, method, parameters = MERGES[name]
            how = "averaged" if method == "linear" else "skills"
            sweep = Sweep(method, how, "", "", cases())
            weights, _ = merged_skills(zoo.weights, skills, sweep, Setting("", None, parameters))
        else:
            continue
        for task, theirs in zip(_TASKS, map(float, found["numbers"].split()), strict=True):
            here = _measured(zoo, weights, task, windows=evaluate.WINDOWS, problems=evaluate.PROBLEMS)
            yield Compared(path.name, name, task, theirs, here)


def _measured(zoo: Zoo, weights: Weights, task: str, *, windows: int | None, problems: int | None) -> float:
    zoo.model.load(weights)
    if task in SUMS:
        given = zoo.problems[task]
        asked = given[:problems] if problems is not None else given[: -evaluate.SHOTS]
        return float(np.mean(evaluate.answered(zoo.model, zoo.tokenizer, asked, solved=given[-evaluate.SHOTS :])))
    text = (zoo.folder / "eval" / f"{task}.txt").read_text(encoding="utf-8")
    most = windows if windows is not None else len(text)
    return (
        evaluate.bits_per_byte(zoo.model, zoo.tokenizer, text, windows=most) * (evaluate.WINDOW - 1) / evaluate.WINDOW
    )
