"""The recipes that the benchmarks merge, for any number of models."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TABLE = {
    "linear": 3,
    "slerp": 2,
    "dare_ties": 3,
    "ties": 3,
    "task_arithmetic": 3,
    "model_stock": 3,
    "passthrough": 1,
}
"""The methods of the table of `merge.py`, and how many models each merges (the base is one of them)."""
MORE = {
    "breadcrumbs": 3,
    "breadcrumbs_ties": 3,
    "della": 3,
    "della_linear": 3,
    "dare_linear": 3,
    "sce": 3,
    "ram": 3,
    "ramplus_tl": 3,
    "nuslerp": 3,
    "multislerp": 3,
    "karcher": 2,
    "nearswap": 2,
    "arcee_fusion": 2,
}
"""MergeKit's other methods, as a second table: `merge.py --only more --size 160m`."""
_SPARSE = frozenset({"ties", "dare_ties", "dare_linear", "della", "della_linear"})
_BAND = frozenset({"breadcrumbs", "breadcrumbs_ties"})
_UNWEIGHTED = frozenset({"model_stock", "sce", "ram", "ramplus_tl", "karcher", "arcee_fusion"})


def recipe(method: str, models: Sequence[Path]) -> dict[str, Any]:
    """A recipe of these models; the first is the base where the method wants one."""
    base, *others = (str(model) for model in models)
    tree: dict[str, Any] = {"merge_method": method, "dtype": "bfloat16"}
    if method == "linear":
        share = 1 / len(models)
        return tree | {"models": [{"model": model, "parameters": {"weight": share}} for model in (base, *others)]}
    if method in ("slerp", "nearswap"):
        listed = [{"model": base}, {"model": others[0]}]
        return tree | {"base_model": base, "models": listed, "parameters": {"t": 0.4 if method == "slerp" else 0.001}}
    if method == "passthrough":
        return tree | {"models": [{"model": base}]}
    if method == "karcher":
        return tree | {"models": [{"model": base}, {"model": others[0]}]}
    parameters = {} if method in _UNWEIGHTED else {"weight": 0.5}
    if method in _SPARSE:
        parameters["density"] = 0.5
    if method in _BAND:
        parameters |= {"density": 0.9, "gamma": 0.01}
    listed = [{"model": model, "parameters": parameters} for model in others]
    chosen = {"parameters": {"select_topk": 0.1}} if method == "sce" else {}
    return tree | {"base_model": base, "models": listed} | chosen


def write(method: str, models: Sequence[Path], folder: Path) -> Path:
    """The recipe as a file that both programs read: JSON is YAML."""
    path = folder / f"{method}.yml"
    path.write_text(json.dumps(recipe(method, models), indent=1), encoding="utf-8")
    return path
