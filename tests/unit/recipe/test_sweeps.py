"""`--over`: values, the places of settings in recipes, names of candidates, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from smelt.errors import RecipeError, SmeltError
from smelt.recipe.canonical import canonical
from smelt.recipe.parse import parse
from smelt.recipe.schema import Recipe
from smelt.recipe.sweeps import over_mapping, read_over, variants

TEXT = """\
merge_method: ties
base_model: models/base
merges:
  mean: {merge_method: linear, models: [{model: org/a.b}, {model: org/c}], parameters: {weight: 1}}
  spare: {merge_method: linear, models: [{model: org/c}], parameters: {weight: 1}}
models:
  - {model: models/legal, parameters: {weight: 0.3}}
  - {model: mean, parameters: {weight: [0.3, 1], density: 0.4}}
  - {model: other/v1.5}
parameters:
  lambda: [0, 1]
  normalize: [{filter: mlp, value: true}, {value: false}]
lines: {alpha: 1, beta: 0.5}
"""


def recipe() -> Recipe:
    return parse(TEXT, source="sweep.yml")


def texts(over: str) -> list[str]:
    return [text for text, _ in read_over([over])[0].values]


@pytest.mark.parametrize(
    ("over", "expected"),
    [
        ("lambda=0.2:1.2:0.2", ["0.2", "0.4", "0.6", "0.8", "1.0", "1.2"]),
        ("lambda=0.1:0.35:0.1", ["0.1", "0.2", "0.3"]),
        ("lambda=1:0:-0.5", ["1.0", "0.5", "0.0"]),
        ("lambda=1:3:1", ["1", "2", "3"]),
        ("lambda=5:5:1", ["5"]),
        ("lambda=0:2e-5:1e-5", ["0.00000", "0.00001", "0.00002"]),
        ("lambda=0.3, 0.50 ,1e-3", ["0.3", "0.50", "1e-3"]),
        ("lambda=-1,0:1:0.5", ["-1", "0.0", "0.5", "1.0"]),
        ("rescale=true,false,l1", ["true", "false", "l1"]),
    ],
)
def test_values_are_decimals_as_they_are_typed(over: str, expected: list[str]) -> None:
    assert texts(over) == expected


def test_values_are_what_a_recipe_reads() -> None:
    assert read_over(["a=0.1:0.3:0.1"])[0].values == (("0.1", 0.1), ("0.2", 0.2), ("0.3", 0.3))
    values = [value for _, value in read_over(["a=2,0.5,true,yes_no,off"])[0].values]
    assert values == [2, 0.5, True, "yes_no", False]
    assert [type(value) for value in values] == [int, float, bool, str, bool]
    assert [value for _, value in read_over(["a=1,true,0,false"])[0].values] == [1, True, 0, False]


def test_values_from_python() -> None:
    import numpy as np

    over = over_mapping({"a": "0.2:0.4:0.2", "b": [1, 0.5, True, "l1"], "c": np.float32([0.5, 2]), "d": 3})
    assert [[text for text, _ in one.values] for one in over] == [
        ["0.2", "0.4"],
        ["1", "0.5", "true", "l1"],
        ["0.5", "2.0"],
        ["3"],
    ]


@pytest.mark.parametrize(
    ("over", "said"),
    [
        ("lambda", "says no setting with values"),
        ("=1", "says no setting with values"),
        ("lambda=", "says no setting with values"),
        ("lambda=1:2", "cannot be '1:2'"),
        ("lambda=a b", "cannot be 'a b'"),
        ("lambda=1,,2", "cannot be ''"),
        ("lambda=0:1:0", "never comes to its end"),
        ("lambda=1:0:0.5", "never comes to its end"),
        ("lambda=0:1:0.0001", "has 10001 values, and 1000 is the most"),
        ("lambda=0:1e30:1e-300", "and 1000 is the most"),
        ("lambda=1e999", "cannot be 1e999"),
        ("lambda=1,1.0", "is given 1 twice"),
    ],
)
def test_values_that_are_none(over: str, said: str) -> None:
    with pytest.raises(RecipeError) as raised:
        read_over([over])
    assert said in raised.value.message
    assert raised.value.fix


def test_too_many_candidates() -> None:
    with pytest.raises(RecipeError, match="40 × 30 = 1200 candidates, and 1000 is the most"):
        variants(recipe(), read_over(["density=0.01:0.4:0.01", "parameters.lambda=1:30:1"]))
    with pytest.raises(RecipeError, match="nothing to sweep over"):
        variants(recipe(), [])


@pytest.mark.parametrize(
    ("key", "path"),
    [
        ("density", ("models", 1, "parameters", "density")),
        ("rescale", ("parameters", "rescale")),
        ("parameters.lambda", ("parameters", "lambda")),
        ("lambda[1]", ("parameters", "lambda", 1)),
        ("parameters.lambda[0]", ("parameters", "lambda", 0)),
        ("normalize[0].value", ("parameters", "normalize", 0, "value")),
        ("models.legal.weight", ("models", 0, "parameters", "weight")),
        ("models.models/legal.parameters.weight", ("models", 0, "parameters", "weight")),
        ("models[1].weight[1]", ("models", 1, "parameters", "weight", 1)),
        ("models[2].parameters.weight", ("models", 2, "parameters", "weight")),
        ("models.v1.5.weight", ("models", 2, "parameters", "weight")),
        ("merges.mean.weight", ("merges", "mean", "parameters", "weight")),
        ("merges.mean.models.a.b.weight", ("merges", "mean", "models", 0, "parameters", "weight")),
        ("lines.beta", ("lines", "beta")),
    ],
)
def test_where_a_setting_stands(key: str, path: tuple[Any, ...]) -> None:
    value = "true" if "value" in key or key == "rescale" else "0.75"
    (found,) = variants(recipe(), read_over([f"{key}={value}"]))
    before, after = canonical(recipe()), canonical(found.recipe)
    node: Any = after
    for step in path:
        node = node[step]
    assert node == (True if value == "true" else 0.75)
    outer_before, outer_after = before, after
    for step in path[:-1]:
        outer_before = outer_before.get(step, {}) if isinstance(outer_before, dict) else outer_before[step]
        outer_after = outer_after[step]
    if isinstance(outer_after, dict):
        outer_before[path[-1]] = node
    else:
        outer_before[path[-1]] = node
    if outer_before is not outer_after and len(outer_after) > 1:
        assert after == before  # nothing else has changed


def test_slices_and_modules() -> None:
    text = """\
merge_method: linear
parameters: {weight: 1}
slices:
  - sources: [{model: a, layer_range: [0, 1]}, {model: b, layer_range: [0, 1]}]
  - {sources: [{model: a, layer_range: [1, 2]}], parameters: {weight: 2}}
"""
    for key, path in (
        ("slices[0].sources.b.weight", ("slices", 0, "sources", 1, "parameters", "weight")),
        ("slices[1].weight", ("slices", 1, "parameters", "weight")),
        ("parameters.weight", ("parameters", "weight")),
    ):
        node: Any = canonical(variants(parse(text), read_over([f"{key}=0.7"]))[0].recipe)
        for step in path:
            node = node[step]
        assert node == 0.7
    module = "merge_method: linear\nmodules: {text: {models: [{model: a}], parameters: {weight: 1}}}\n"
    (one,) = variants(parse(module), read_over(["modules.text.weight=0.7"]))
    assert canonical(one.recipe)["modules"]["text"]["parameters"] == {"weight": 0.7}


@pytest.mark.parametrize(
    ("key", "said", "hint"),
    [
        ("weight", "is set in 2 places", "models[0].parameters.weight"),
        ("lambda", "is a gradient over the layers", "parameters.lambda[0]"),
        ("normalize", "has cases by tensor name", "parameters.normalize[0].value"),
        ("densty", "has no parameter `densty`", "did you mean `density`?"),
        ("merges.mean.density", "linear has no parameter `density`", "linear takes"),
        ("merges.spare.weight", "not made of the merge `spare`", None),
        ("merges.men.weight", "names no merge", "did you mean `mean`?"),
        ("models.legl.weight", "names no model", "did you mean `legal`?"),
        ("models[7].weight", "there is no models[7]", "has 3"),
        ("models.legal.weight[0]", "there is no models[0].parameters.weight[0]", None),
        ("lambda[2]", "there is no parameters.lambda[2]", None),
        ("models.legal", "names no model", None),
        ("weight.filter", "names no setting", None),
        ("int8_mask", "takes `int8_mask` without effect", None),
    ],
)
def test_settings_that_are_none(key: str, said: str, hint: str | None) -> None:
    with pytest.raises(RecipeError) as raised:
        variants(recipe(), read_over([f"{key}=0.5"]))
    assert said in raised.value.message
    if hint is not None:
        assert hint in (raised.value.fix or "")


def test_errors_point_into_the_recipe() -> None:
    with pytest.raises(RecipeError) as raised:
        variants(recipe(), read_over(["weight=0.5"]))
    assert "sweep.yml:7:40" in raised.value.where
    with pytest.raises(SmeltError, match="must be one number, not 'word'"):
        variants(recipe(), read_over(["lines.alpha=word"]))


def test_one_number_has_one_sweep() -> None:
    with pytest.raises(RecipeError, match="density is swept twice"):
        read_over(["density=1", "density=0.5"])
    for keys in (("density", "models.mean.density"), ("parameters.lambda", "lambda[0]")):
        with pytest.raises(RecipeError, match="set the same number"):
            variants(recipe(), read_over([f"{key}=0.5" for key in keys]))


def test_names_and_order() -> None:
    found = variants(recipe(), read_over(["density=0.3,0.5", "models.models/legal.weight=1:2:1"]))
    assert [one.name for one in found] == [
        "density=0.3,models.models_legal.weight=1",
        "density=0.3,models.models_legal.weight=2",
        "density=0.5,models.models_legal.weight=1",
        "density=0.5,models.models_legal.weight=2",
    ]
    assert found[1].settings == {"density": 0.3, "models.models/legal.weight": 2}
    long = [f"models[{i}].weight=0.{'1' * 70}" for i in range(3)]
    with pytest.raises(RecipeError, match="name of a candidate is too long"):
        variants(recipe(), read_over(long))


def test_an_alias_is_changed_in_one_place() -> None:
    text = "merge_method: linear\nmodels: [{model: a, parameters: &p {weight: 1}}, {model: b, parameters: *p}]\n"
    (one,) = variants(parse(text), read_over(["models.b.weight=0.5"]))
    weights = [source.parameters["weight"] for source in one.recipe.models or ()]
    assert [weight.value for weight in weights] == [1, 0.5]  # type: ignore[union-attr]


def test_recipes_from_python_and_names_in_mappings() -> None:
    from smelt.recipe.parse import from_dict

    tree = {
        "merge_method": "linear",
        "models": [{"model": {"path": "org/a", "revision": "main"}}, {"model": "org/b"}],
        "parameters": {"weight": 1},
    }
    (one,) = variants(from_dict(tree), over_mapping({"models.a.weight": 0.25}))
    assert canonical(one.recipe)["models"][0]["parameters"] == {"weight": 0.25}
    twins = from_dict({"merge_method": "linear", "models": [{"model": "x/a"}, {"model": "y/a"}]})
    with pytest.raises(RecipeError, match="2 models have this name"):
        variants(twins, read_over(["models.a.weight=1"]))
    assert variants(twins, read_over(["models.y/a.weight=1"]))
