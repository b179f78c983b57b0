"""The runs of the study: every method of every group on `dev`, the chosen ones on `test`; each result is kept at once.

The file of results has one JSON object a line, so that a run that was cut off goes on where it was.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scoring import Measured, Zoo, score
from sweeps import SWEEPS, Setting, Sweep

from candidates import merged_skills
from smelt.engine.blas import single_threaded

SEEDS = (0, 1, 2)
GROUPS = (("legal", "math"), ("legal", "code"), ("legal", "math", "code"), ("legal", "minus"))
"""Two skills, two skills that both read text, three skills, and the pair that averaging loses."""
GENERAL = "general"
SINGLE = "single"
"""The group of the models that are no merges."""


@dataclass(frozen=True, slots=True)
class Run:
    """One model measured: which, on which half, with what result; CPU seconds of its merge, None for a given model.

    `random` says whether another seed gives other weights; it is asked of the merges measured on test.
    """

    group: str
    title: str
    label: str
    seed: int
    split: str
    measured: Measured
    seconds: float | None
    random: bool | None = None
    parameters: Mapping[str, Any] | None = None

    @property
    def key(self) -> tuple[str, str, str, int, str]:
        return self.group, self.title, self.label, self.seed, self.split


class Study:
    """Merges and measures what is not in the file of results yet."""

    def __init__(self, zoo: Zoo, state: Path) -> None:
        self.zoo, self.state = zoo, state
        self.runs: dict[tuple[str, str, str, int, str], Run] = {}
        of = {"zoo": zoo.fingerprint()}
        if not state.exists():
            state.write_text(json.dumps(of) + "\n", encoding="utf-8")
        first, *others = [json.loads(line) for line in state.read_text(encoding="utf-8").splitlines() or ["{}"]]
        if first != of:
            raise SystemExit(
                f"error: {state} holds results of other models or data; remove it, or name another --state"
            )
        for given in others:
            self._keep(_from_json(given))

    def groups(self) -> list[tuple[str, ...]]:
        """The groups whose skills the zoo has."""
        return [group for group in GROUPS if all(skill in self.zoo.weights for skill in group)]

    def everything(self, sweeps: Sequence[Sweep] = SWEEPS) -> Iterator[Run]:
        """Each run as it is done, or at once where it is known."""
        tasks = tuple(dict.fromkeys([GENERAL, *(skill for group in self.groups() for skill in group)]))
        with single_threaded():
            for name in ("base", *(task for task in tasks if task in self.zoo.weights)):
                for split in ("dev", "test"):
                    yield self._single(name, tasks, split)
            for group in self.groups():
                for sweep in sweeps:
                    yield from self._sweep(group, sweep)

    def _single(self, name: str, tasks: Sequence[str], split: str) -> Run:
        key = (SINGLE, name, "", 0, split)
        if key not in self.runs:
            measured = self.zoo.measure(self.zoo.weights[name], tasks, split=split)
            self._add(Run(*key, measured, None))
        return self.runs[key]

    def _sweep(self, group: tuple[str, ...], sweep: Sweep) -> Iterator[Run]:
        """All settings on dev; the best of them and the default on test, with three seeds where they matter."""
        tried = sweep.settings(len(group))
        for setting in tried:
            yield self._run(group, sweep, setting, 0, "dev")
        best = self.chosen(group, sweep)
        for setting in dict.fromkeys((best.label, *(one.label for one in tried if one.default))):
            found = next(one for one in tried if one.label == setting)
            first = self._run(group, sweep, found, 0, "test")
            yield first
            if setting == best.label and first.random:
                yield from (self._run(group, sweep, found, seed, "test") for seed in SEEDS[1:])

    def chosen(self, group: tuple[str, ...], sweep: Sweep) -> Setting:
        """The setting with the best score on dev."""
        base, experts = self.references(group, "dev")

        def reached(setting: Setting) -> float:
            run = self.runs[" + ".join(group), sweep.title, setting.label, 0, "dev"]
            return score(run.measured, base, experts)

        return max((one for one in sweep.settings(len(group)) if one.candidate), key=reached)

    def references(self, group: Sequence[str], split: str) -> tuple[Measured, dict[str, Measured]]:
        """The base, and each skill's expert."""
        single = {name: self.runs[SINGLE, name, "", 0, split].measured for name in ("base", *group)}
        return single["base"], {skill: single[skill] for skill in group}

    def _run(self, group: tuple[str, ...], sweep: Sweep, setting: Setting, seed: int, split: str) -> Run:
        key = (" + ".join(group), sweep.title, setting.label, seed, split)
        parameters = dict(setting.parameters)
        if key not in self.runs or self.runs[key].parameters != parameters:  # sweeps.py may have changed since
            merged, seconds = merged_skills(self.zoo.weights, group, sweep, setting, seed=seed)
            random = None
            if split == "test" and seed == 0:
                other, _ = merged_skills(self.zoo.weights, group, sweep, setting, seed=1)
                random = any(not np.array_equal(merged[name], other[name]) for name in merged)
            measured = self.zoo.measure(merged, (GENERAL, *group), split=split)
            self._add(Run(*key, measured, seconds, random, parameters))
        return self.runs[key]

    def _add(self, run: Run) -> None:
        self._keep(run)
        with self.state.open("a", encoding="utf-8") as file:
            file.write(json.dumps(_as_json(run)) + "\n")

    def _keep(self, run: Run) -> None:
        self.runs[run.key] = run


def _as_json(run: Run) -> dict[str, Any]:
    names = ("group", "title", "label", "seed", "split")
    beside = {"seconds": run.seconds, "random": run.random, "parameters": run.parameters}
    return dict(zip(names, run.key, strict=True)) | beside | run.measured.as_json()


def _from_json(given: Mapping[str, Any]) -> Run:
    names = ("group", "title", "label", "seed", "split")
    key = [given[name] for name in names]
    return Run(*key, Measured.from_json(given), given["seconds"], given["random"], given["parameters"])
