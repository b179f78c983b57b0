"""Which passes over a tensor a method asks for with which settings, and how tensors may be cut: no more than needed."""

from __future__ import annotations

from typing import Any

import pytest

from smelt.methods import api
from smelt.methods.api import Grain

TIES_LIKE = ["ties", "breadcrumbs", "breadcrumbs_ties"]
DROPPING = ["dare_linear", "dare_ties", "della", "della_linear"]


def method(name: str, **values: Any) -> Any:
    """A method for two models (or as many as it takes), with defaults for what is not given."""
    info = api.get(name)
    n = max(info.models[0], min(2, info.models[1] or 2))
    full: dict[str, Any] = {}
    for key, field in info.fields.items():
        value = values.pop(key, 0.5 if field.is_required else field.default)
        full[key] = (value if isinstance(value, tuple) else (value,) * n) if field.per_model else value
    assert not values
    return info.type(full, models=n)


def passes(name: str, **values: Any) -> list[str]:
    return [reduction.name for reduction in method(name, **values).active()]


@pytest.mark.parametrize("name", TIES_LIKE)
@pytest.mark.parametrize(
    ("density", "cut"), [((1.0, 1.0), []), ((1.5, 1.0), []), ((1.0, 0.99), ["cut"]), ((0.5, 1.0), ["cut"])]
)
def test_a_cut_is_sought_where_a_density_is_below_one(name: str, density: tuple[float, ...], cut: list[str]) -> None:
    assert passes(name, density=density, rescale=False) == cut
    assert passes(name, density=density, rescale="density") == cut
    assert passes(name, density=density, rescale=True) == [*cut, "whole", "kept"]


@pytest.mark.parametrize("name", DROPPING)
def test_norms_are_taken_where_they_are_matched(name: str) -> None:
    assert passes(name, rescale=True) == ["whole", "kept"]
    assert passes(name, rescale=False) == []
    assert passes(name, rescale="density") == []


@pytest.mark.parametrize(
    ("topk", "expected"),
    [(1.0, ["energy"]), (1.5, ["energy"]), (0.99, ["varying", "cut", "energy"]), (0.0, ["varying", "cut", "energy"])],
)
def test_sce(topk: float, expected: list[str]) -> None:
    assert passes("sce", select_topk=topk) == expected


def test_angles() -> None:
    assert passes("model_stock") == ["products"]
    assert passes("model_stock", filter_wise=True) == []
    assert passes("model_stock", granularity="row") == []
    assert passes("model_stock", granularity="model") == ["products"]
    assert passes("nuslerp") == ["products"]
    assert passes("nuslerp", nuslerp_row_wise=True) == ["products"], "nuslerp_flatten goes first"
    assert passes("nuslerp", nuslerp_flatten=False) == []
    assert passes("nuslerp", nuslerp_flatten=False, nuslerp_row_wise=True) == ["column_products"]


@pytest.mark.parametrize(
    ("name", "values", "grain"),
    [
        ("linear", {}, Grain.ELEMENT),
        ("ties", {}, Grain.ELEMENT),
        ("della", {}, Grain.ROW),
        ("della_linear", {}, Grain.ROW),
        ("arcee_fusion", {}, Grain.ROW),
        ("model_stock", {}, Grain.ELEMENT),
        ("model_stock", {"filter_wise": True}, Grain.ROW),
        *(
            (name, {"granularity": "row"}, Grain.ROW)
            for name in ("model_stock", "pcb", "localize", "geometric_median", "breadcrumbs", "breadcrumbs_ties")
        ),
        *((name, {"granularity": "model"}, Grain.ELEMENT) for name in ("model_stock", "pcb", "ties", "nuslerp")),
        ("nuslerp", {}, Grain.ELEMENT),
        ("nuslerp", {"nuslerp_flatten": False}, Grain.ROW),
        ("nuslerp", {"nuslerp_flatten": False, "nuslerp_row_wise": True}, Grain.SLAB),
        ("nuslerp", {"nuslerp_row_wise": True}, Grain.ELEMENT),
    ],
)
def test_grains(name: str, values: dict[str, Any], grain: Grain) -> None:
    assert method(name, **values).grain is grain


def test_bytes_are_copied_only_without_a_factor() -> None:
    assert method("passthrough").copies() is True
    assert method("passthrough", scale=0.5).copies() is False
    linear = api.get("linear").type
    assert linear({"weight": (0.3,), "normalize": True}, models=1).copies() is True
    assert linear({"weight": (1.0,), "normalize": False}, models=1).copies() is True
    assert linear({"weight": (0.3,), "normalize": False}, models=1).copies() is False
    assert method("linear", weight=(1.0, 0.0)).copies() is False  # 0 · y may be NaN, and -0 + 0 is 0
