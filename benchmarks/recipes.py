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
_SPARSE = frozenset({"ties", "dare_ties", "della"})


def recipe(method: str, models: Sequence[Path]) -> dict[str, Any]:
    """A recipe of these models; the first is the base where the method wants one."""
    base, *others = (str(model) for model in models)
    tree: dict[str, Any] = {"merge_method": method, "dtype": "bfloat16"}
    if method == "linear":
        share = 1 / len(models)
        return tree | {"models": [{"model": model, "parameters": {"weight": share}} for model in (base, *others)]}
    if method == "slerp":
        listed = [{"model": base}, {"model": others[0]}]
        return tree | {"base_model": base, "models": listed, "parameters": {"t": 0.4}}
    if method == "passthrough":
        return tree | {"models": [{"model": base}]}
    parameters = {} if method == "model_stock" else {"weight": 0.5}
    if method in _SPARSE:
        parameters["density"] = 0.5
    return tree | {"base_model": base, "models": [{"model": model, "parameters": parameters} for model in others]}


def write(method: str, models: Sequence[Path], folder: Path) -> Path:
    """The recipe as a file that both programs read: JSON is YAML."""
    path = folder / f"{method}.yml"
    path.write_text(json.dumps(recipe(method, models), indent=1), encoding="utf-8")
    return path
