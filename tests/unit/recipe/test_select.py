"""Settings -> numbers, by hand and against a plain reading of the rules."""

from __future__ import annotations

import fnmatch
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smelt.recipe.parse import parse
from smelt.recipe.select import Found, Level, gradient_at, resolve, unmatched
from smelt.recipe.settings import read_setting

Q = "model.layers.3.self_attn.q_proj.weight"


def level(label: str, **parameters: Any) -> Level:
    return Level(label, {name: read_setting(value) for name, value in parameters.items()})


def value(setting: Any, tensor: str = Q, t: float = 0.0) -> Any:
    found = resolve("x", [level("recipe", x=setting)], tensor=tensor, t=t)
    return None if found is None else found.value


@pytest.mark.parametrize(
    ("values", "t", "expected"),
    [
        ([0, 1], 0.0, 0),
        ([0, 1], 1.0, 1),
        ([0, 1], 0.25, 0.25),
        ([0, 0.5, 0.3, 0.7, 1], 0.5, 0.3),
        ([0, 0.5, 0.3, 0.7, 1], 0.625, 0.5),  # halfway between 0.3 and 0.7
        ([1, 0.7, 0.1], 1 / 3, 0.8),  # s = 2/3
        ([0.4], 0.0, 0.4),
        ([0.4], 1.0, 0.4),
        ([True, False], 0.0, True),
        ([True, False], 0.99, True),
        ([True, False], 1.0, False),
        (["a", "b", "c"], 0.49, "a"),
        (["a", "b", "c"], 0.5, "b"),
        ([0, True], 0.5, 0),
    ],
)
def test_gradients(values: list[Any], t: float, expected: Any) -> None:
    found = value(values, t=t)
    assert found == (pytest.approx(expected) if isinstance(expected, float) else expected)
    assert isinstance(found, bool) == isinstance(expected, bool)


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=9), st.integers(0, 80), st.integers(1, 81))
def test_gradients_against_a_plain_reading(values: list[float], layer: int, layers: int) -> None:
    t = 1.0 if layers == 1 else min(layer, layers - 1) / (layers - 1)
    place = t * (len(values) - 1)
    low = int(place)
    high = min(low + 1, len(values) - 1)
    expected = (1 - (place - low)) * values[low] + (place - low) * values[high]
    assert gradient_at(values, t) == expected
    assert min(values) - 1e-12 <= expected <= max(values) + 1e-12


def test_first_case_that_fits_holds() -> None:
    cases = [{"filter": "self_attn", "value": 1}, {"filter": "q_proj", "value": 2}, {"value": 3}]
    assert value(cases) == 1
    assert value(cases, "model.q_proj") == 2
    assert value(cases, "lm_head.weight") == 3


def test_filters_are_plain_substrings() -> None:
    assert value([{"filter": "layers.3.", "value": 1}]) == 1
    assert value([{"filter": "layers.*.self_attn", "value": 1}]) is None
    assert value([{"filter": "*", "value": 1}]) == 1
    assert value([{"filter": "SELF_ATTN", "value": 1}]) is None


@pytest.mark.parametrize(
    ("glob", "fits"),
    [
        ("*", True),
        ("model.*.weight", True),
        ("model.layers.?.self_attn.[qk]_proj.weight", True),
        ("model.layers.[!3].*", False),
        ("self_attn", False),
        ("*self_attn*", True),
        ("MODEL.*", False),
    ],
)
def test_globs_are_held_against_the_whole_name(glob: str, fits: bool) -> None:
    assert value([{"match": glob, "value": 1}]) == (1 if fits else None)
    assert fnmatch.fnmatchcase(Q, glob) is fits


def test_a_hostile_glob_ends() -> None:
    assert value([{"match": "*a" * 40 + "b", "value": 1}], "a" * 5000) is None


def test_no_match_falls_to_the_next_level() -> None:
    levels = [
        level("model a", weight=[{"filter": "mlp", "value": 1}]),
        level("slice 2", weight=[{"filter": "self_attn", "value": [0, 1]}]),
        level("recipe", weight=3),
    ]
    assert resolve("weight", levels, tensor="x.mlp", t=0.5) == Found(1, "model a", "filter: mlp", "scalar")
    assert resolve("weight", levels, tensor=Q, t=0.5) == Found(
        0.5, "slice 2", "filter: self_attn", "gradient [0, 1] at 0.5 -> 0.5"
    )
    assert resolve("weight", levels, tensor="norm", t=0.5) == Found(3, "recipe", None, "scalar")
    assert resolve("density", levels, tensor="norm", t=0.5) is None
    assert resolve("weight", levels[:2], tensor="norm", t=0.5) is None


def test_found_says_where_from() -> None:
    found = resolve("x", [level("model a", x=[{"filter": "mlp", "value": [0, 1]}])], tensor="mlp", t=0.25)
    assert str(found) == "model a, filter: mlp, gradient [0, 1] at 0.25 -> 0.25"
    assert str(resolve("x", [level("recipe", x=1)], tensor="mlp", t=0)) == "recipe"


def test_one_setting_at_several_levels_keeps_its_labels() -> None:
    shared = {"x": read_setting([0, 1])}
    for label in ("model a", "model b", "model a"):
        found = resolve("x", [Level(label, shared)], tensor=Q, t=0.5)
        assert found is not None
        assert found.level == label


RECIPE = """\
merge_method: slerp
base_model: a
models:
  - model: a
  - model: b
parameters:
  t:
    - {filter: modelnorm, value: 1}
    - {filter: self_attn, value: 1}
    - {filter: lm_head, value: 1}
    - {match: "model.layers.*.self_atn.*", value: 1}
    - {match: "*.mlp.*", value: 1}
    - value: 0.5
"""


def test_unmatched() -> None:
    names = [f"model.layers.{i}.{part}.weight" for i in range(40) for part in ("self_attn.q_proj", "mlp.up_proj")]
    names += ["model.embed_tokens.weight", "model.norm.weight"]
    first, second, third = unmatched(parse(RECIPE, source="recipe.yml"), names)
    assert first.startswith("recipe.yml:8:8: filter 'modelnorm' fits no tensor; near it are model.norm")
    assert second == "recipe.yml:10:8: filter 'lm_head' fits no tensor"
    assert third.startswith("recipe.yml:11:8: match 'model.layers.*.self_atn.*' fits no tensor; near it are")
    assert "model.layers.*.self_attn.q_proj.weight" in third
    assert unmatched(parse(RECIPE), [*names, "lm_head.weight", "modelnorm", "model.layers.0.self_atn.q"]) == []


def test_speed() -> None:
    """300 000 look-ups; a large merge makes three million, in a few seconds."""
    names = [f"model.layers.{i}.{part}.weight" for i in range(300) for part in ("self_attn.q_proj", "mlp.up_proj") * 50]
    settings = {
        "a": read_setting([{"filter": "mlp", "value": [0, 1]}, {"match": "*.self_attn.*", "value": 1}]),
        "b": read_setting([0, 1, 0]),
        "c": read_setting(1),
    }
    for index, name in enumerate(names):
        for key in settings:
            for _ in range(3):
                resolve(key, [Level("model", settings), Level("recipe", {})], tensor=name, t=(index // 100) / 299)
