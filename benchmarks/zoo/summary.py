"""From the runs to the numbers of the tables: scores on the test half, their noise, what they cost."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scoring import Measured, resampled, score, shares
from study import GENERAL, SEEDS, SINGLE, Run, Study
from sweeps import SWEEPS, Sweep

YARDSTICKS = ("linear", "task_arithmetic")
"""The better of these on dev is what all are compared with: weighted sums, with one number to choose."""
DRAWS = 1000
CLEAR = 2.0
"""Standard errors from which a difference counts as seen."""
LEAST = 0.0005
"""What a table rounds away is no difference, however sure."""


@dataclass(frozen=True, slots=True)
class Row:
    """A method in a group, at the setting chosen on dev; scores are of the test half.

    `error` is the standard error from drawing windows and problems again, `difference` that to the yardstick, with its
    own (the draws are the same for both, so it is smaller), `spread` the standard deviation over seeds, None where the
    seed changes nothing; `lost` bits per byte more than the base on general text; `seconds` CPU seconds of a merge.
    """

    method: str
    family: str
    setting: str
    dev: float
    score: float
    error: float
    difference: float
    difference_error: float
    spread: float | None
    shares: Mapping[str, float]
    lost: float | None
    default_setting: str
    default_score: float
    seconds: float
    yardstick: bool

    @property
    def verdict(self) -> str:
        """Whether it is seen to be better or worse than the yardstick."""
        if self.yardstick:
            return "yardstick"
        if abs(self.difference) < max(CLEAR * self.difference_error, LEAST):
            return "same"
        return "better" if self.difference > 0 else "worse"


def group_rows(study: Study, group: Sequence[str], sweeps: Sequence[Sweep] = SWEEPS) -> list[Row]:
    """All methods of a group, the best first."""
    base, experts = study.references(group, "test")
    picks = _picks({task: values.size for task, values in {**base.bits, **base.right}.items()})
    cheap = [sweep for sweep in sweeps if sweep.title in YARDSTICKS] or list(sweeps[:1])
    yardstick = max(cheap, key=lambda sweep: _dev(study, group, _chosen_runs(study, group, sweep)[0]))
    against = _drawn(_chosen_runs(study, group, yardstick), base, experts, picks)
    rows = []
    for sweep in sweeps:
        runs = _chosen_runs(study, group, sweep)
        drawn = _drawn(runs, base, experts, picks)
        scores = [score(run.measured, base, experts) for run in runs]
        spread = statistics.stdev(scores) if len(scores) > 1 else None
        seeds = (spread or 0.0) / len(scores) ** 0.5
        default = _default_run(study, group, sweep)
        gains = [shares(run.measured, base, experts) for run in runs]
        own = statistics.mean(scores)
        rows.append(
            Row(
                method=sweep.title,
                family=sweep.family,
                setting=runs[0].label,
                dev=_dev(study, group, runs[0]),
                score=own,
                error=float(np.hypot(drawn.std(), seeds)),
                difference=own - _mean_score(_chosen_runs(study, group, yardstick), base, experts),
                difference_error=float(np.hypot((drawn - against).std(), seeds)),
                spread=spread,
                shares={skill: statistics.mean(one[skill] for one in gains) for skill in group},
                lost=_lost(runs, base),
                default_setting=default.label,
                default_score=score(default.measured, base, experts),
                seconds=_seconds(study, group, sweep),
                yardstick=sweep is yardstick,
            )
        )
    return sorted(rows, key=lambda row: -row.score)


def curve(study: Study, group: Sequence[str], sweep: Sweep) -> list[tuple[float, float]]:
    """(strength, score on dev) of the settings that lie on the method's axis."""
    base, experts = study.references(group, "dev")
    points = [
        (setting.strength, score(_run(study, group, sweep, setting.label, 0, "dev").measured, base, experts))
        for setting in sweep.settings(len(group))
        if setting.strength is not None
    ]
    return sorted(points)


def single_rows(study: Study, group: Sequence[str]) -> list[dict[str, object]]:
    """The base and each expert by the same score, on test."""
    base, experts = study.references(group, "test")
    return [
        {
            "model": name,
            "score": score(measured, base, experts),
            "shares": shares(measured, base, experts),
            "lost": _lost_of(measured, base),
        }
        for name, measured in (("base", base), *experts.items())
    ]


def absolute_rows(study: Study, tasks: Sequence[str]) -> list[dict[str, object]]:
    """What the given models reach on the test half, in bits per byte and shares of problems solved."""
    rows = []
    for key, run in study.runs.items():
        if key[0] == SINGLE and key[4] == "test":
            reached = {
                task: float(values.mean()) for task, values in {**run.measured.bits, **run.measured.right}.items()
            }
            rows.append({"model": key[1], **{task: reached[task] for task in tasks if task in reached}})
    return rows


def _run(study: Study, group: Sequence[str], sweep: Sweep, label: str, seed: int, split: str) -> Run:
    return study.runs[" + ".join(group), sweep.title, label, seed, split]


def _chosen_runs(study: Study, group: Sequence[str], sweep: Sweep) -> list[Run]:
    """The test runs of the chosen setting, one for each seed where the seed matters."""
    label = study.chosen(tuple(group), sweep).label
    first = _run(study, group, sweep, label, 0, "test")
    return [first, *(_run(study, group, sweep, label, seed, "test") for seed in SEEDS[1:] if first.random)]


def _default_run(study: Study, group: Sequence[str], sweep: Sweep) -> Run:
    default = next(setting for setting in sweep.settings(len(group)) if setting.default)
    return _run(study, group, sweep, default.label, 0, "test")


def _picks(sizes: Mapping[str, int]) -> dict[str, NDArray[np.intp]]:
    """DRAWS draws with replacement of the windows or problems of each task; the same on every machine."""
    generator = np.random.Generator(np.random.PCG64(0))
    return {task: generator.integers(0, size, (DRAWS, size)) for task, size in sizes.items()}


def _drawn(
    runs: Sequence[Run], base: Measured, experts: Mapping[str, Measured], picks: Mapping[str, NDArray[np.intp]]
) -> NDArray[np.float64]:
    """The score of each draw, [draws], the mean over seeds."""
    each = [np.mean(list(resampled(run.measured, base, experts, picks).values()), axis=0) for run in runs]
    drawn: NDArray[np.float64] = np.mean(each, axis=0)
    return drawn


def _mean_score(runs: Sequence[Run], base: Measured, experts: Mapping[str, Measured]) -> float:
    return statistics.mean(score(run.measured, base, experts) for run in runs)


def _dev(study: Study, group: Sequence[str], run: Run) -> float:
    base, experts = study.references(group, "dev")
    return score(study.runs[(*run.key[:3], 0, "dev")].measured, base, experts)


def _lost(runs: Sequence[Run], base: Measured) -> float | None:
    each = [_lost_of(run.measured, base) for run in runs]
    return statistics.mean(one for one in each if one is not None) if None not in each else None


def _lost_of(measured: Measured, base: Measured) -> float | None:
    if GENERAL not in measured.bits:
        return None
    return float(measured.bits[GENERAL].mean() - base.bits[GENERAL].mean())


def _seconds(study: Study, group: Sequence[str], sweep: Sweep) -> float:
    """The median over all merges of the method in this group."""
    name = " + ".join(group)
    return statistics.median(
        run.seconds for run in study.runs.values() if run.key[:2] == (name, sweep.title) and run.seconds is not None
    )
