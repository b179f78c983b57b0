"""Settings over several levels, how a value is told, and the hints for filters that fit nothing."""

from __future__ import annotations

from typing import Any

import pytest

from smelt.recipe.parse import parse
from smelt.recipe.select import Found, Level, gradient_at, resolve, unmatched
from smelt.recipe.settings import read_setting

NAMES = [
    *(f"model.layers.{i}.{part}.weight" for i in range(3) for part in ("self_attn.q_proj", "self_attn.k_proj")),
    *(f"model.layers.{i}.mlp.up_proj.weight" for i in range(3)),
    "model.embed_tokens.weight",
    "model.norm.weight",
]


def level(label: str, **parameters: Any) -> Level:
    return Level(label, {name: read_setting(value) for name, value in parameters.items()})


def found(*levels: Level, name: str = "x", tensor: str = "a.mlp", t: float = 0.5) -> Found:
    result = resolve(name, levels, tensor=tensor, t=t)
    assert result is not None
    return result


# Levels


def test_a_level_without_the_setting_is_passed_over() -> None:
    levels = [level("model a", y=1), level("slice 1"), level("recipe", x=3, y=4)]
    assert found(*levels) == Found(3, "recipe", None, "scalar")
    assert found(*levels, name="y") == Found(1, "model a", None, "scalar")
    assert resolve("z", levels, tensor="a", t=0.0) is None
    assert resolve("x", [], tensor="a", t=0.0) is None


def test_a_level_whose_cases_do_not_fit_is_passed_over() -> None:
    levels = [level("model a", x=[{"filter": "attn", "value": 1}]), level("slice 1"), level("recipe", x=2)]
    assert found(*levels).level == "recipe"
    assert found(*levels, tensor="self_attn").value == 1


def test_false_and_zero_are_values() -> None:
    assert found(level("model a", x=0), level("recipe", x=1)).value == 0
    assert found(level("model a", x=False), level("recipe", x=True)).value is False


def test_cases_are_tried_in_order_until_one_fits() -> None:
    cases = [
        {"match": "b.*", "value": 1},
        {"filter": "attn", "value": 2},
        {"match": "*.mlp", "value": 3},
        {"filter": "mlp", "value": 4},
        {"filter": "*", "value": 5},
    ]
    for tensor, value in (("b.attn", 1), ("a.attn", 2), ("a.mlp", 3), ("a.mlp.up", 4), ("norm", 5)):
        assert found(level("recipe", x=cases), tensor=tensor).value == value
    assert found(level("recipe", x=[*cases[:3], {"value": 6}]), tensor="norm").value == 6


def test_where_a_value_comes_from() -> None:
    assert found(level("recipe", x=[{"match": "*.mlp", "value": 3}])) == Found(3, "recipe", "match: *.mlp", "scalar")
    assert found(level("recipe", x=[{"value": [0, 1]}])) == Found(0.5, "recipe", "all", "gradient [0, 1] at 0.5 -> 0.5")
    assert str(found(level("recipe", x=[{"value": 3}]))) == "recipe, all"
    assert str(found(level("recipe", x=3))) == "recipe"
    assert str(found(level("recipe", x=[0, 1]), t=1 / 3)) == "recipe, gradient [0, 1] at 0.3333 -> 0.333333"
    assert found(level("recipe", x=[True, False]), t=0.9).place == "gradient [true, false] at 0.9 -> true"
    assert found(level("recipe", x=["a", "b"]), t=1.0).place == "gradient [a, b] at 1 -> b"


def test_long_gradients_are_shortened() -> None:
    place = found(level("recipe", x=list(range(60)))).place
    assert "…" in place
    assert place.endswith("] at 0.5 -> 29.5")


# Gradients


@pytest.mark.parametrize(
    ("values", "t", "expected"),
    [
        ((2,), 0.5, 2),
        ((2, 6), 0.5, 4.0),
        ((2, 6), 0.75, 5.0),
        ((8, 2, 6), 0.5, 2),
        ((8, 2, 6), 0.75, 4.0),
        ((8, 2, 6), 1.0, 6),
        ((True, False, True), 0.75, False),
        (("a", "b", "c"), 0.25, "a"),
        (("a", "b", "c"), 0.99, "b"),
        ((1, "b"), 0.99, 1),
    ],
)
def test_gradients(values: tuple[Any, ...], t: float, expected: Any) -> None:
    got = gradient_at(values, t)
    assert got == expected
    assert type(got) is type(expected)


# Filters that fit nothing


def warnings(*cases: str, names: list[str] = NAMES) -> list[str]:
    lines = "\n".join(f"    - {case}" for case in cases)
    text = f"merge_method: slerp\nbase_model: a\nmodels:\n  - model: a\n  - model: b\nparameters:\n  t:\n{lines}\n"
    return unmatched(parse(text, source="recipe.yml"), names)


def test_what_fits_every_tensor_is_never_a_mistake() -> None:
    assert warnings("{filter: mlp, value: 1}", '{filter: "*", value: 0}') == []
    assert warnings('{match: "*", value: 1}', "{value: 0}") == []


def test_one_that_fits_is_followed_by_one_that_does_not() -> None:
    """Each is judged by itself, in the order of the recipe, with its line."""
    said = warnings(
        "{filter: up_proj, value: 1}", "{filter: lm_head, value: 1}", '{match: "x.*", value: 1}', "{value: 0}"
    )
    assert said == [
        "recipe.yml:9:8: filter 'lm_head' fits no tensor",
        "recipe.yml:10:8: match 'x.*' fits no tensor",
    ]


def test_a_glob_fits_if_it_fits_any_tensor() -> None:
    assert warnings('{match: "model.norm.*", value: 1}', "{value: 0}") == []
    assert len(warnings('{match: "norm.*", value: 1}', "{value: 0}")) == 1


def test_a_filter_lies_within_one_name() -> None:
    assert len(warnings(r'{filter: "weight\nmodel", value: 1}', "{value: 0}")) == 1


def hint(case: str) -> list[str]:
    (said,) = warnings(case, "{value: 0}")
    return said.partition("; near it are ")[2].split(", ")


def test_hints_for_a_filter_are_parts_of_names() -> None:
    assert hint("{filter: selfattention, value: 1}")[0] == "self_attn"
    assert "self_attn.q_proj" in hint("{filter: self_attn.qproj, value: 1}")
    assert "self_attn.q_proj.weight" in hint("{filter: self_attn.q_proj.weigth, value: 1}")
    assert hint("{filter: q_proj.weigth, value: 1}")[0] == "q_proj.weight"
    assert "embed_tokens" in hint("{filter: embedding, value: 1}"), "a little more than half alike"
    assert hint("{filter: lm_head, value: 1}") == [""]


def test_hints_for_a_glob_are_names_with_stars_for_numbers() -> None:
    assert hint('{match: "model.layers.*.mlp.up_prj.weight", value: 1}')[0] == "model.layers.*.mlp.up_proj.weight"


def test_at_most_three_hints() -> None:
    assert len(hint("{filter: proj, value: 1}".replace("proj", "q_proj.k_proj"))) == 3


def test_long_filters_are_shortened() -> None:
    (said,) = warnings(f"{{filter: {'x' * 100}, value: 1}}", "{value: 0}")
    assert f"'{'x' * 79}…'" in said


def test_a_mistake_is_told_once_for_each_place() -> None:
    """Two models with the same filter are two places; slices that share a level are one."""
    text = """\
merge_method: linear
slices:
  - sources:
      - {model: a, layer_range: [0, 1], parameters: {weight: [{filter: nope, value: 1}, {value: 0}]}}
      - {model: b, layer_range: [0, 1], parameters: {weight: [{filter: nope, value: 1}, {value: 0}]}}
  - sources:
      - {model: a, layer_range: [1, 2], parameters: {weight: 1}}
      - {model: b, layer_range: [1, 2], parameters: {weight: [{filter: norm, value: 1}, {filter: never, value: 1}]}}
parameters:
  normalize:
    - {filter: nowhere, value: true}
    - value: false
"""
    said = unmatched(parse(text, source="r"), NAMES)
    assert [(line.split(":")[1], line.split("'")[1]) for line in said] == [
        ("4", "nope"),
        ("5", "nope"),
        ("11", "nowhere"),
        ("8", "never"),
    ]
