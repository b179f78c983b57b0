"""Draw the curves that `sweep.py` measured.

usage: python benchmarks/figures.py [docs/benchmarks]      the folder that holds curves.json; the pictures go there
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = {"linear": "#0072b2", "slerp": "#d55e00", "ties": "#009e73", "consensus": "#cc79a7"}
"""Of the Okabe-Ito palette, which the colour-blind can tell apart; the markers differ too."""
MARKERS = {"linear": "o", "slerp": "s", "ties": "^", "consensus": "D"}
SIZE = (6.4, 4.0)
STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "font.size": 10,
    "legend.frameon": False,
    "savefig.dpi": 140,
}


def draw(folder: Path) -> list[Path]:
    """Write a picture for each sweep in `folder`/curves.json; gives their paths."""
    curves = json.loads((folder / "curves.json").read_text(encoding="utf-8"))
    drawn = []
    with plt.rc_context(STYLE):
        for name, plot in (("bytes", _bytes), ("models", _models), ("tiles", _tiles), ("threads", _threads)):
            figure, axes = plt.subplots(figsize=SIZE, layout="constrained")
            plot(axes, curves)
            figure.text(0.995, 0.005, curves["machine"], ha="right", va="bottom", fontsize=6.5, color="0.45")
            figure.get_layout_engine().set(rect=(0, 0.025, 1, 0.975))
            drawn.append(folder / f"{name}.png")
            figure.savefig(drawn[-1], metadata={"Software": None})
            plt.close(figure)
    return drawn


def _lines(axes: Any, points: Sequence[dict[str, Any]], at: Callable[[dict[str, Any]], float]) -> None:
    for method in dict.fromkeys(point["method"] for point in points):
        mine = sorted((at(point), point["seconds"]) for point in points if point["method"] == method)
        x, y = zip(*mine, strict=True)
        axes.plot(x, y, color=COLOURS[method], marker=MARKERS[method], label=method)
    axes.set_ylabel("seconds")
    axes.set_ylim(bottom=0)


def _bytes(axes: Any, curves: dict[str, Any]) -> None:
    """Time against bytes read and written, with the straight line through it."""
    for method, fit in curves["fits"].items():
        mine = [(point["bytes"] / 1e9, point["seconds"]) for point in curves["bytes"] if point["method"] == method]
        x, y = zip(*mine, strict=True)
        axes.scatter(x, y, color=COLOURS[method], marker=MARKERS[method], zorder=3)
        ends = [0, 1.05 * max(x)]
        line = [fit["start"] + 1e9 * end / fit["rate"] for end in ends]
        label = f"{method}: {fit['rate'] / 1e9:.2f} GB/s, R² = {fit['r_squared']:.4f}"
        axes.plot(ends, line, color=COLOURS[method], linewidth=1.2, label=label)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("GB read and written")
    axes.set_ylabel("seconds")
    axes.set_title("Time against bytes, with fitted lines")
    axes.legend(loc="upper left")


def _models(axes: Any, curves: dict[str, Any]) -> None:
    _lines(axes, curves["models"], lambda point: point["x"])
    axes.set_xlim(left=0)
    axes.set_xlabel(f"models of {curves['model_bytes'] / 1e9:.2g} GB, the base included")
    axes.set_title("Time against number of models")
    axes.legend(loc="upper left")


def _tiles(axes: Any, curves: dict[str, Any]) -> None:
    _lines(axes, curves["tiles"], lambda point: point["x"])
    axes.set_xscale("log", base=2)
    places = sorted({point["x"] for point in curves["tiles"]})
    axes.set_xticks(places, [_elements(place) for place in places])
    axes.minorticks_off()
    axes.set_xlabel("elements of a tile")
    axes.set_title("Time against tile size")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))


def _elements(count: float) -> str:
    return f"{count / (1 << 20):.0f} Mi" if count >= 1 << 20 else f"{count / 1024:.0f} Ki"


def _threads(axes: Any, curves: dict[str, Any]) -> None:
    """Grouped bars: wall seconds of each number of threads and cores, with the CPU seconds above them as a mark."""
    points = curves["threads"]
    methods = list(dict.fromkeys(point["method"] for point in points))
    settings = list(dict.fromkeys((point["threads"], point["cores"]) for point in points))
    width = 0.8 / len(settings)
    shades = plt.get_cmap("viridis")
    for place, (threads, cores) in enumerate(settings):
        mine = {p["method"]: p for p in points if (p["threads"], p["cores"]) == (threads, cores)}
        x = [i + (place - (len(settings) - 1) / 2) * width for i in range(len(methods))]
        label = f"{threads} thread{'s' * (threads > 1)} on {cores} core{'s' * (cores > 1)}"
        colour = shades(0.15 + 0.7 * place / max(len(settings) - 1, 1))
        axes.bar(x, [mine[m]["seconds"] for m in methods], width * 0.92, color=colour, label=label)
        cpu = [mine[m]["user"] + mine[m]["system"] for m in methods]
        axes.scatter(
            x,
            cpu,
            marker="D",
            s=22,
            color="white",
            edgecolor="black",
            zorder=3,
            label="CPU time" if place == 0 else None,
        )
    axes.set_xticks(range(len(methods)), methods)
    axes.grid(axis="x", visible=False)
    axes.set_ylabel("seconds")
    axes.set_title("Threads and cores: time, and CPU time of all threads")
    axes.legend(loc="upper left")


if __name__ == "__main__":
    for path in draw(Path(sys.argv[1] if len(sys.argv) > 1 else "docs/benchmarks")):
        print(path)
