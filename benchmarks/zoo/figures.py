"""Draw zoo.json: scores of all methods, the score against the strength, and against the cost of a merge.

usage: python benchmarks/zoo/figures.py [docs/benchmarks]      the folder that holds zoo.json; the pictures go there
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = {
    "average": "#0072b2",
    "sum of task vectors": "#000000",
    "sign election": "#d55e00",
    "random drop, added": "#cc79a7",
    "entries chosen": "#009e73",
    "singular directions": "#e69f00",
    "no merge": "#888888",
}
"""Of the Okabe-Ito palette, which the colour-blind can tell apart; the markers differ too."""
MARKERS = dict(zip(COLOURS, "osD^vPX", strict=True))
NAMES = {"legal": "law", "math": "addition", "code": "code", "minus": "subtraction"}
CURVES = {
    "lambda, of what adds task vectors": (
        "task_arithmetic",
        "dare_linear",
        "dare_ties",
        "breadcrumbs_ties",
        "tsv",
        "iso_c",
        "wudi",
    ),
    "lambda of what averages, density of what chooses": ("ties", "della", "consensus", "localize", "pcb"),
    "share of the first skill, or t": ("linear", "slerp", "nuslerp", "multislerp", "geometric_median"),
}
"""Each panel's axis and its methods."""
LINES = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "font.size": 10,
    "legend.frameon": False,
    "savefig.dpi": 130,
}


def draw(folder: Path) -> list[Path]:
    """Write the pictures for `folder`/zoo.json; gives their paths."""
    found = json.loads((folder / "zoo.json").read_text(encoding="utf-8"))
    drawn = []
    with plt.rc_context(STYLE):
        for name, plot in (("zoo", _scores), ("zoo-strength", _strength), ("zoo-cost", _cost)):
            figure = plot(found["groups"])
            drawn.append(folder / f"{name}.png")
            figure.savefig(drawn[-1], metadata={"Software": None})
            plt.close(figure)
    return drawn


def _title(group: str) -> str:
    return " + ".join(NAMES[skill] for skill in group.split(" + "))


def _scores(groups: Mapping[str, Any]) -> Any:
    """A panel for each group, a line for each method, the best on average over the groups on top."""
    by_method: dict[str, list[dict[str, Any]]] = {}
    for group in groups.values():
        for row in group["rows"]:
            by_method.setdefault(row["method"], []).append(row)
    order = sorted(by_method, key=lambda method: statistics.mean(row["score"] for row in by_method[method]))
    figure, panels = plt.subplots(
        1,
        len(groups),
        figsize=(max(9.0, 2.2 + 2.6 * len(groups)), 1.6 + 0.22 * len(order)),
        sharey=True,
        layout="constrained",
    )
    for axes, (name, group) in zip([panels] if len(groups) == 1 else panels, groups.items(), strict=True):
        for row in group["rows"]:
            y = order.index(row["method"])
            colour, marker = COLOURS[row["family"]], MARKERS[row["family"]]
            axes.plot([row["default_score"]], [y], marker="|", color=colour, markersize=9, linestyle="", alpha=0.7)
            axes.errorbar(row["score"], y, xerr=row["error"], color=colour, marker=marker, markersize=5, linewidth=1)
        for one in group["single"]:
            if one["model"] != "base":
                axes.axvline(one["score"], color="0.6", linewidth=0.8, linestyle=":")
        rows = {row["method"]: row for row in group["rows"]}
        if "task_arithmetic" in rows:
            axes.axvline(rows["task_arithmetic"]["score"], color="black", linewidth=0.8, linestyle="--")
        best = max(row["score"] + row["error"] for row in group["rows"])
        axes.set_xlim(max(-0.05, min(row["score"] for row in group["rows"]) - 0.1), min(1.1, best + 0.05))
        axes.set_title(_title(name))
        axes.set_xlabel("score")
        axes.set_yticks(range(len(order)), order)
        axes.set_ylim(-0.7, len(order) - 0.3)
    used = [family for family in COLOURS if any(row["family"] == family for rows in by_method.values() for row in rows)]
    handles = [
        plt.Line2D([], [], color=COLOURS[family], marker=MARKERS[family], linestyle="", label=family) for family in used
    ]
    handles += [
        plt.Line2D([], [], color="0.3", marker="|", markersize=9, linestyle="", label="at the defaults"),
        plt.Line2D([], [], color="black", linewidth=0.8, linestyle="--", label="task_arithmetic"),
        plt.Line2D([], [], color="0.6", linewidth=0.8, linestyle=":", label="the experts, unmerged"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, fontsize=9)
    figure.suptitle("What a merge keeps of its experts' skills (1 = all of each), setting chosen on other data")
    return figure


def _strength(groups: Mapping[str, Any]) -> Any:
    """Rows are groups, columns are kinds of strength; the score on the half on which settings are chosen."""
    figure, panels = plt.subplots(
        len(groups),
        len(CURVES),
        figsize=(4.0 * len(CURVES), 0.6 + 2.5 * len(groups)),
        squeeze=False,
        layout="constrained",
    )
    for row, (name, group) in zip(panels, groups.items(), strict=True):
        for axes, (axis, methods) in zip(row, CURVES.items(), strict=True):
            for method, colour, marker in zip(methods, LINES, "osD^vPX", strict=False):
                if method in group["curves"]:
                    x, y = zip(*group["curves"][method]["points"], strict=True)
                    axes.plot(x, y, color=colour, marker=marker, markersize=4, linewidth=1.2, label=method)
            axes.set_ylim(-0.05, 1.05)
            if row is panels[-1]:
                axes.set_xlabel(axis)
        row[0].set_ylabel(f"{_title(name)}\nscore")
    for column in panels.T:
        if labels := column[0].get_legend_handles_labels()[0]:
            column[0].legend(handles=labels, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, fontsize=8.5)
    figure.suptitle("Score against the strength of a merge, on the half of the data that chooses it")
    return figure


def _cost(groups: Mapping[str, Any]) -> Any:
    """Of the group with the most skills: CPU seconds of a merge against its score."""
    name = max(groups, key=lambda group: group.count("+"))
    rows = [row for row in groups[name]["rows"] if row["family"] != "no merge"]
    figure, axes = plt.subplots(figsize=(8.4, 5.2), layout="constrained")
    for family in COLOURS:
        mine = [row for row in rows if row["family"] == family]
        if mine:
            x, y = [row["seconds"] for row in mine], [row["score"] for row in mine]
            axes.scatter(x, y, color=COLOURS[family], marker=MARKERS[family], s=42, label=family, zorder=3)
    _label(axes, [(row["seconds"], row["score"], row["method"], COLOURS[row["family"]]) for row in rows])
    axes.set_xscale("log")
    axes.set_xlabel("CPU seconds of one merge, one worker (log scale)")
    axes.set_ylabel(f"score: {_title(name)}")
    axes.set_title(f"Cost and score of a merge of {name.count('+') + 1} models of 1.4 M parameters")
    axes.legend(loc="lower right", fontsize=9)
    return figure


def _label(axes: Any, points: list[tuple[float, float, str, str]]) -> None:
    """Names beside their points, moved up or down until none lies on another (in points of the page)."""
    axes.set_xscale("log")
    low, high = min(y for _, y, *_ in points), max(y for _, y, *_ in points)
    axes.set_ylim(low - 0.06 * (high - low), high + 0.08 * (high - low))
    axes.set_xlim(0.8 * min(x for x, *_ in points), 2.0 * max(x for x, *_ in points))
    axes.figure.canvas.draw()
    placed: list[Any] = []
    for x, y, name, colour in sorted(points, key=lambda point: -point[1]):
        for rise in sorted(range(-120, 121, 3), key=abs):
            text = axes.annotate(
                name,
                (x, y),
                xytext=(6, rise - 3),
                textcoords="offset points",
                fontsize=7.5,
                color=colour,
                arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.4, "alpha": 0.6} if rise else None,
            )
            box = text.get_window_extent()
            if not any(box.overlaps(other) for other in placed):
                placed.append(box)
                break
            text.remove()


if __name__ == "__main__":
    for path in draw(Path(sys.argv[1] if len(sys.argv) > 1 else "docs/benchmarks")):
        print(path)
