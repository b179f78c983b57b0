"""What is tried of each method: one line a method, with the setting that scales it and the values it takes.

A method that adds task vectors is scaled by `lambda`, one that averages them too but about a greater value; one without
a scale is swept over what it has (density, epsilon, t), an average over the share of the first skill. The method's own
defaults come first in each line (with weights of 1 and the example's value where one is required).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

How = Literal["skills", "averaged", "pair", "one", "alone"]
"""Which models a method is given:
skills    all skills, on the base
averaged  all skills, no base
pair      the first skill is the base, and the average of the others is the model
versus    the first skill and the average of the others, on the base
one       the average of all skills, on the base
alone     one skill, on the base: no merge of skills, but what they are compared with
"""

SUMS = (0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
"""lambda of what adds task vectors: with two skills 0.5 is their average."""
MEANS = (0.4, 0.6, 0.8, 1.0, 1.3, 2.0)
"""lambda of what averages task vectors: with two skills 2 is their sum."""
DIRECTIONS = (0.4, 0.6, 0.8, 1.0, 1.3, 1.6)
"""lambda of the methods on singular directions, whose default of 1 is no sum: each direction is shortened or kept."""
DENSITIES = (0.05, 0.1, 0.2, 0.4, 0.7, 1.0)
SHARES = (0.2, 0.35, 0.5, 0.65, 0.8)
"""Share of the first skill; the others have the rest in equal parts."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting. `strength` is its place on the axis of a curve, `first` the place of the skill that comes first.

    One that is not a `candidate` is measured for comparison only: the defaults of a method that drops entries drop
    none, which makes it another method.
    """

    label: str
    strength: float | None
    parameters: Mapping[str, Any]
    default: bool = False
    first: int = 0
    candidate: bool = True


Values = Callable[[int], list[Setting]]
"""The settings for so many skills."""


@dataclass(frozen=True, slots=True)
class Sweep:
    """A method, how it is given the models, the setting that is swept, and the family it belongs to."""

    method: str
    how: How
    axis: str
    family: str
    values: Values
    name: str = ""

    @property
    def title(self) -> str:
        return self.name or self.method

    def settings(self, skills: int) -> list[Setting]:
        """The candidates for so many skills, the default first, none twice."""
        distinct: list[Setting] = []
        for setting in self.values(skills):
            same = (setting.parameters, setting.first)
            if all((known.parameters, known.first) != same for known in distinct):
                distinct.append(setting)
        return distinct


def swept(name: str, values: Iterable[float], *, default: Mapping[str, Any], **fixed: Any) -> Values:
    """The default, then `name` at each of `values` beside what is `fixed`."""
    key = "lambda_" if name == "lambda" else name

    def settings(_: int) -> list[Setting]:
        tried = [Setting(f"{name} {value:g}", value, {**fixed, key: value}) for value in values]
        same = next((one for one in tried if one.parameters == default), None)
        label = same.label if same else "defaults"
        first = Setting(label, same.strength if same else None, default, default=True, candidate=same is not None)
        return [first, *tried]

    return settings


def shares(name: str = "weight") -> Values:
    """Equal parts (the default), then the first skill's share at each of SHARES."""

    def settings(skills: int) -> list[Setting]:
        def one(share: float, default: bool = False) -> Setting:
            parts = [share, *[(1 - share) / (skills - 1)] * (skills - 1)]
            return Setting(f"share {share:.2g}", share, {name: [round(part, 6) for part in parts]}, default)

        return [one(1 / skills, default=True), *(one(share) for share in SHARES)]

    return settings


def cases(*candidates: Setting) -> Values:
    """Candidates as they stand."""
    return lambda _: list(candidates)


def alone(values: Sequence[float] = (0.5, 0.7, 1.0)) -> Values:
    """Each skill by itself, part of the way from the base."""

    def settings(skills: int) -> list[Setting]:
        return [
            Setting(f"skill {i + 1} × {v:g}", None, {"weight": 1.0, "lambda_": v}, default=v == 1.0 and i == 0, first=i)
            for i in range(skills)
            for v in values
        ]

    return settings


W1 = {"weight": 1.0}
AVERAGE, SUM, ELECT = "average", "sum of task vectors", "sign election"
DROP, SELECT, SINGULAR = "random drop, added", "entries chosen", "singular directions"

SWEEPS: tuple[Sweep, ...] = (
    Sweep("task_arithmetic", "alone", "part", "no merge", alone(), name="one skill alone"),
    Sweep("linear", "averaged", "share of the first skill", AVERAGE, shares()),
    Sweep("sma", "averaged", "none", AVERAGE, cases(Setting("no setting", None, {}, default=True))),
    Sweep(
        "wma",
        "averaged",
        "order",
        AVERAGE,
        cases(Setting("as listed", None, {}, default=True), Setting("second skill first", None, {}, first=1)),
    ),
    Sweep("ema", "averaged", "alpha", AVERAGE, swept("alpha", (0.2, 0.35, 0.5, 0.65, 0.8), default={"alpha": 0.2})),
    Sweep("geometric_median", "averaged", "share of the first skill", AVERAGE, shares()),
    Sweep("karcher", "averaged", "none", AVERAGE, cases(Setting("no setting", None, {}, default=True))),
    Sweep("multislerp", "skills", "share of the first skill", AVERAGE, shares()),
    Sweep("nuslerp", "versus", "share of the first skill", AVERAGE, lambda _: shares()(2)),
    Sweep("slerp", "pair", "t", AVERAGE, swept("t", SHARES, default={"t": 0.5})),
    Sweep(
        "model_stock",
        "skills",
        "filter_wise",
        AVERAGE,
        cases(
            Setting("filter_wise false", None, {"filter_wise": False}, default=True),
            Setting("filter_wise true", None, {"filter_wise": True}),
        ),
    ),
    Sweep("task_arithmetic", "skills", "lambda", SUM, swept("lambda", SUMS, default={**W1, "lambda_": 1.0}, **W1)),
    Sweep("expo", "one", "alpha", SUM, swept("alpha", (-0.2, 0.1, 0.3, 0.6, 1.0), default={"alpha": 0.3})),
    Sweep(
        "consensus",
        "skills",
        "lambda",
        SELECT,
        swept("lambda", (0.6, 0.8, 1.0, 1.3, 1.6, 2.0), default={"lambda_": 1.0}),
    ),
    Sweep("ties", "skills", "lambda", ELECT, swept("lambda", MEANS, default=W1, **W1, density=0.5)),
    Sweep("breadcrumbs", "skills", "lambda", SUM, swept("lambda", SUMS, default=W1, **W1, density=0.9, gamma=0.01)),
    Sweep(
        "breadcrumbs_ties", "skills", "lambda", ELECT, swept("lambda", SUMS, default=W1, **W1, density=0.9, gamma=0.01)
    ),
    Sweep("dare_linear", "skills", "lambda", DROP, swept("lambda", SUMS, default=W1, **W1, density=0.5)),
    Sweep("dare_ties", "skills", "lambda", ELECT, swept("lambda", SUMS, default=W1, **W1, density=0.5)),
    Sweep("della_linear", "skills", "lambda", DROP, swept("lambda", SUMS, default=W1, **W1, density=0.5)),
    Sweep("della", "skills", "lambda", ELECT, swept("lambda", MEANS, default=W1, **W1, density=0.5)),
    Sweep(
        "sce",
        "skills",
        "select_topk",
        ELECT,
        swept("select_topk", (0.1, 0.25, 0.5, 0.75, 1.0), default={"select_topk": 1.0}),
    ),
    Sweep("localize", "skills", "density", SELECT, swept("density", DENSITIES, default={"density": 0.05})),
    Sweep("pcb", "skills", "density", SELECT, swept("density", DENSITIES, default={"density": 0.1})),
    Sweep(
        "ram", "skills", "epsilon", SELECT, swept("epsilon", (1e-5, 1e-3, 3e-3, 1e-2, 2e-2), default={"epsilon": 1e-5})
    ),
    Sweep("ramplus_tl", "skills", "r", SELECT, swept("r", (0.1, 1.0, 2.0, 4.0, 8.0), default={"r": 0.1})),
    Sweep("nearswap", "pair", "t", SELECT, swept("t", (1e-3, 3e-3, 1e-2, 2e-2, 5e-2), default={"t": 1e-3})),
    Sweep(
        "arcee_fusion",
        "pair",
        "order",
        SELECT,
        cases(
            Setting("into the first skill", None, {}, default=True), Setting("into the second skill", None, {}, first=1)
        ),
    ),
    Sweep("tsv", "skills", "lambda", SINGULAR, swept("lambda", DIRECTIONS, default={"lambda_": 1.0})),
    Sweep("iso_c", "skills", "lambda", SINGULAR, swept("lambda", DIRECTIONS, default={"lambda_": 1.0})),
    Sweep("iso_cts", "skills", "lambda", SINGULAR, swept("lambda", DIRECTIONS, default={"lambda_": 1.0})),
    Sweep("wudi", "skills", "lambda", SINGULAR, swept("lambda", DIRECTIONS, default={"lambda_": 1.0})),
)
LEFT_OUT = {"passthrough": "it takes every tensor from one model, so it combines nothing"}
