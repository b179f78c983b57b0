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
from matplotlib.text import Text
from matplotlib.transforms import Bbox

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
    "lambda": ("task_arithmetic", "dare_linear", "ties", "della", "consensus"),
    "lambda, singular directions": ("task_arithmetic", "tsv", "iso_c", "iso_cts", "wudi"),
    "share of entries kept": ("localize", "pcb", "sce"),
    "share of the first skill": ("linear", "nuslerp", "multislerp", "geometric_median"),
}
"""Each panel's axis and its methods."""
LINES = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7")
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
        yardstick = next(row for row in group["rows"] if row["yardstick"])
        axes.axvline(yardstick["score"], color="black", linewidth=0.8, linestyle="--")
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
        plt.Line2D([], [], color="black", linewidth=0.8, linestyle="--", label="the best weighted sum"),
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
        figsize=(3.2 * len(CURVES), 1.1 + 2.1 * len(groups)),
        sharex="col",
        squeeze=False,
        layout="constrained",
    )
    for row, (name, group) in zip(panels, groups.items(), strict=True):
        for axes, methods in zip(row, CURVES.values(), strict=True):
            for method, colour, marker in zip(methods, LINES, "osD^vPX", strict=False):
                if method in group["curves"]:
                    x, y = zip(*group["curves"][method]["points"], strict=True)
                    axes.plot(x, y, color=colour, marker=marker, markersize=4, linewidth=1.2, label=method)
            axes.set_ylim(-0.25, 1.05)
        row[0].set_ylabel(f"{_title(name)}\nscore")
    for axes, axis in zip(panels[-1], CURVES, strict=True):
        axes.set_xlabel(axis)
    for column in panels.T:
        if labels := column[0].get_legend_handles_labels()[0]:
            column[0].legend(
                handles=labels, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, fontsize=8.5, columnspacing=1
            )
    figure.suptitle(
        "Score against the strength of a merge, on the data that chooses it (scores below −0.25 are not shown)"
    )
    return figure


def _cost(groups: Mapping[str, Any]) -> Any:
    """Of the group with the most skills: score against CPU seconds of a merge, and against the loss on general text."""
    name = max(groups, key=lambda group: group.count("+"))
    rows = [row for row in groups[name]["rows"] if row["family"] != "no merge"]
    columns = {"seconds": "CPU seconds of one merge, one worker (log scale)"}
    if all(row["lost"] is not None for row in rows):
        columns["lost"] = "bits per byte lost on general text, beside the base"
    figure, panels = plt.subplots(
        1, len(columns), figsize=(7.4 * len(columns), 5.6), sharey=True, squeeze=False, layout="constrained"
    )
    yardstick = next((row for row in rows if row["yardstick"]), None)
    for axes, (column, label) in zip(panels[0], columns.items(), strict=True):
        for family in COLOURS:
            mine = [(row[column], row["score"]) for row in rows if row["family"] == family]
            if mine:
                axes.scatter(
                    *zip(*mine, strict=True), color=COLOURS[family], marker=MARKERS[family], s=42, label=family
                )
        if yardstick is not None:
            axes.axhline(
                yardstick["score"], color="black", linewidth=0.8, linestyle="--", label="the best weighted sum"
            )
        places = [row[column] for row in rows]
        if column == "seconds":
            axes.set_xscale("log")
            axes.set_xlim(0.8 * min(places), 2.2 * max(places))
            ticks = [tick for tick in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2) if min(places) <= tick <= 2 * max(places)]
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axes.minorticks_off()
        else:
            axes.set_xlim(min(0.0, *places) - 0.01, 1.2 * max(places))
        axes.set_xlabel(label)
    low, high = min(row["score"] for row in rows), max(row["score"] for row in rows)
    panels[0][0].set_ylim(low - 0.06 * (high - low), high + 0.08 * (high - low))
    panels[0][0].set_ylabel(f"score: {_title(name)}")
    handles = panels[0][0].get_legend_handles_labels()[0]
    figure.legend(handles=handles, loc="outside lower center", ncols=4 * len(columns), fontsize=9)
    figure.suptitle(f"Score, cost and side effect of merges of {name.count('+') + 1} models of 1.4 M parameters")
    figure.canvas.draw()
    for axes, column in zip(panels[0], columns, strict=True):
        _label(axes, [(row[column], row["score"], row["method"], COLOURS[row["family"]]) for row in rows])
    return figure


def _label(axes: Any, points: list[tuple[float, float, str, str]]) -> None:
    """Names beside their points, moved until none lies on another name or point; moves are in points of the page."""
    moves = [(right, rise) for right in (6, -7, 30, -30, 60) for rise in range(-60, 61, 3)]
    tried = sorted(moves, key=lambda move: abs(move[0]) + abs(move[1]))
    placed: list[Bbox] = []
    for x, y, *_ in points:
        place = axes.transData.transform((x, y))
        placed.append(Bbox([place - 6, place + 6]))
    for x, y, name, colour in sorted(points, key=lambda point: -point[1]):
        for right, rise in tried:
            far = abs(right) > 7 or abs(rise) > 9
            text = axes.annotate(
                name,
                (x, y),
                xytext=(right, rise),
                textcoords="offset points",
                horizontalalignment="left" if right > 0 else "right",
                verticalalignment="center",
                fontsize=7.5,
                color=colour,
                arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5, "alpha": 0.7} if far else None,
            )
            text.update_positions(axes.figure.canvas.get_renderer())
            box = Text.get_window_extent(text)  # an annotation's own has its line in it
            if not any(box.overlaps(other) for other in placed):
                placed.append(box)
                break
            text.remove()


if __name__ == "__main__":
    for path in draw(Path(sys.argv[1] if len(sys.argv) > 1 else "docs/benchmarks")):
        print(path)
