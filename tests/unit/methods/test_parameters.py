"""What a recipe means that leaves a parameter out: defaults, ranges, arities, written down apart from the declarations.

A default is part of what a published recipe says. Changing one changes results without an error.
"""

from __future__ import annotations

from typing import Any

import pytest

from smelt.methods import api
from smelt.methods.fields import required

WEIGHT = {"weight": required}
TRIMMED = {**WEIGHT, "density": 1.0}
DELLA = {**TRIMMED, "epsilon": 0.15}
BREADCRUMBS = {**TRIMMED, "gamma": 0.01}
SVD = {"decompose": True, "rank": 0, "randomized": False, "oversampling": 10, "power": 2}
EACH = {"granularity": "tensor"}
ROWS = {"breadcrumbs", "breadcrumbs_ties", "geometric_median", "localize", "model_stock", "pcb"}

DEFAULTS: dict[str, dict[str, Any]] = {
    "arcee_fusion": {},
    "breadcrumbs": {**BREADCRUMBS, "normalize": False, "rescale": False, "lambda": 1.0, **EACH},
    "breadcrumbs_ties": {**BREADCRUMBS, "normalize": False, "rescale": False, "lambda": 1.0, **EACH},
    "consensus": {"weight": 1.0, "threshold": 0.4, "agreement": 2, "lambda": 1.0},
    "dare_linear": {**TRIMMED, "normalize": False, "rescale": True, "lambda": 1.0},
    "dare_ties": {**TRIMMED, "normalize": False, "rescale": True, "lambda": 1.0},
    "della": {**DELLA, "normalize": True, "rescale": True, "lambda": 1.0},
    "della_linear": {**DELLA, "normalize": False, "rescale": True, "lambda": 1.0},
    "ema": {"alpha": 0.2},
    "expo": {"alpha": required},
    "geometric_median": {"weight": 1.0, "max_iter": 100, "tol": 1e-9, **EACH},
    "iso_c": {"weight": 1.0, "lambda": 1.0, **SVD},
    "iso_cts": {"weight": 1.0, "common": 0.8, "lambda": 1.0, **SVD},
    "karcher": {"max_iter": 10, "tol": 1e-5, **EACH},
    "linear": {**WEIGHT, "normalize": True},
    "localize": {"density": 0.05, "lambda": 1.0, **EACH},
    "model_stock": {"filter_wise": False, **EACH},
    "multislerp": {**WEIGHT, "normalize_weights": True, "eps": 1e-8, **EACH},
    "nearswap": {"t": required},
    "nuslerp": {**WEIGHT, "nuslerp_flatten": True, "nuslerp_row_wise": False, **EACH},
    "passthrough": {"scale": 1.0},
    "pcb": {"density": 0.1, "lambda": 1.0, **EACH},
    "ram": {"epsilon": 1e-5},
    "ramplus_tl": {"r": 0.1, "alpha": 0.2, "epsilon": 1e-5, **EACH},
    "sce": {"select_topk": 1.0, **EACH},
    "slerp": {"t": required, **EACH},
    "sma": {},
    "task_arithmetic": {**WEIGHT, "normalize": False, "lambda": 1.0},
    "ties": {**TRIMMED, "normalize": True, "rescale": False, "lambda": 1.0, **EACH},
    "tsv": {"weight": 1.0, "lambda": 1.0, **SVD},
    "wma": {},
    "wudi": {"lambda": 1.0, "ridge": 0.1, "decompose": True},
}
PER_MODEL = {"weight", "density", "gamma", "epsilon", "scale", "threshold"}
METHOD_WIDE = {("ram", "epsilon"), ("ramplus_tl", "epsilon")}
RANGES = {
    "gamma": "[0, 1]",
    "max_iter": "[0, inf)",
    "tol": "[0, inf)",
    "eps": "(0, inf)",
    "threshold": "[0, inf)",
    "agreement": "[0, inf)",
    "common": "[0, 1]",
    "rank": "[0, inf)",
    "ridge": "[0, inf)",
    "oversampling": "[2, inf)",
    "power": "[0, inf)",
    ("ema", "alpha"): "(0, 1]",
    ("geometric_median", "weight"): "[0, inf)",
    ("ram", "epsilon"): "[0, inf)",
    ("ramplus_tl", "epsilon"): "[0, inf)",
}
ARITIES = {
    "arcee_fusion": (1, 1),
    "consensus": (2, None),
    "expo": (1, 1),
    "model_stock": (2, None),
    "nearswap": (1, 1),
    "nuslerp": (2, 2),
    "passthrough": (1, 1),
    "slerp": (1, 1),
}
"""The others take one or more."""

OWN = [name for name in api.names() if api.get(name).type.__module__.startswith("smelt.methods.")]


def test_the_list_is_complete() -> None:
    assert set(DEFAULTS) <= set(OWN)


@pytest.mark.parametrize("method", DEFAULTS)
def test_defaults(method: str) -> None:
    found = {name: field.default for name, field in api.get(method).fields.items()}
    assert found == DEFAULTS[method]
    assert {name: type(value) for name, value in found.items()} == {n: type(v) for n, v in DEFAULTS[method].items()}


@pytest.mark.parametrize("method", DEFAULTS)
def test_what_each_model_has_for_itself(method: str) -> None:
    for name, field in api.get(method).fields.items():
        assert field.per_model == (name in PER_MODEL and (method, name) not in METHOD_WIDE), name


@pytest.mark.parametrize("method", DEFAULTS)
def test_ranges(method: str) -> None:
    for name, field in api.get(method).fields.items():
        found = None if field.within is None else field.within.text
        assert found == RANGES.get((method, name), RANGES.get(name)), name


@pytest.mark.parametrize("method", DEFAULTS)
def test_words_beside_numbers(method: str) -> None:
    for name, field in api.get(method).fields.items():
        rows = ("row",) if method in ROWS else ()
        words = {"rescale": ("density",), "granularity": ("tensor", *rows, "model")}
        assert field.words == words.get(name, ()), name


@pytest.mark.parametrize("method", DEFAULTS)
def test_how_many_models(method: str) -> None:
    assert api.get(method).models == ARITIES.get(method, (1, None))
