"""A recipe against its method's declaration."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from smelt.errors import SmeltError
from smelt.methods import api
from smelt.recipe.check import check_parameters, notes
from smelt.recipe.parse import load, parse

GOLDEN = sorted((Path(__file__).parents[2] / "golden" / "data" / "cases").glob("*/recipe.yml"))


def found(text: str) -> list[SmeltError]:
    return check_parameters(parse(textwrap.dedent(text), source="recipe.yml"))


def only(text: str) -> tuple[str, str, str | None]:
    (problem,) = found(text)
    assert problem.exit_code == 2
    return problem.message, problem.where[0].removeprefix("recipe.yml:"), problem.fix


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.parent.name)
def test_golden_recipes_pass(path: Path) -> None:
    recipe = load(path)
    problems = check_parameters(recipe)
    if recipe.merge_method in api.names():
        assert problems == []
    else:
        assert [problem.message for problem in problems] == [f"unknown merge_method '{recipe.merge_method}'"]


def test_unknown_method() -> None:
    assert only("merge_method: tie\nmodels: [{model: a}]\n") == (
        "unknown merge_method 'tie'",
        "1:15",
        "did you mean `ties`?",
    )
    assert "known methods: " in str(only("merge_method: qqqqq\nmodels: [{model: a}]\n")[2])


TIES = """\
merge_method: ties
base_model: base
models:
  - model: a
    parameters:
      weight: 0.5
{model}
  - model: b
parameters:
  weight: 1
{recipe}
"""


@pytest.mark.parametrize(
    ("model", "recipe", "expected"),
    [
        ("      wieght: 1", "", ("ties has no parameter `wieght`", "7:7", "did you mean `weight`?")),
        (
            "",
            "  t: 1",
            (
                "ties has no parameter `t`",
                "11:3",
                "it belongs to nearswap, slerp; ties takes weight, density, normalize, rescale, lambda, granularity",
            ),
        ),
        (
            "",
            "  zzz: 1",
            (
                "ties has no parameter `zzz`",
                "11:3",
                "ties takes weight, density, normalize, rescale, lambda, granularity",
            ),
        ),
        ("      density: 53%", "", ("`density` must be a number, not '53%'", "7:16", "write 0.53")),
        ("      density: 0,5", "", ("`density` must be a number, not '0,5'", "7:16", "write 0.5")),
        (
            "      lambda: 1",
            "",
            ("`lambda` is method-wide and is not read at model level", "7:7", "move it to the recipe's `parameters:`"),
        ),
        ("      density: x", "", ("`density` must be a number, not 'x'", "7:16", None)),
        ("      density: [1, true]", "", ("`density` must be a number, not true", "7:20", None)),
        (
            "      density: [{filter: m, value: [1, no]}, {value: 1}]",
            "",
            ("`density` must be a number, not false", "7:40", None),
        ),
        ("", "  normalize: 3", ("`normalize` must be true or false, not 3", "11:14", None)),
        ("", "  rescale: often", ("`rescale` must be true or false or 'density', not 'often'", "11:12", None)),
        ("", "  lambda: nan", ("`lambda` must be a finite number, not 'nan'", "11:11", None)),
        ("", "  rescale: density", None),
        ("", "  normalize: off", None),
        ("", "  int8_mask: true", None),
    ],
)
def test_parameters(model: str, recipe: str, expected: tuple[str, str, str | None] | None) -> None:
    text = TIES.format(model=model or "      # nothing", recipe=recipe)
    assert found(text) == [] if expected is None else only(text) == expected


def test_ranges_are_the_fields_own() -> None:
    ranged = [(info, field) for info in map(api.get, api.names()) for field in info.fields.values() if field.within]
    for info, field in ranged:
        assert field.within is not None
        outside = next(v for v in (-1e9, 1e9, field.within.low, field.within.high) if not field.within.holds(v))
        if outside in (float("inf"), float("-inf")):
            continue
        problems = found(
            f"merge_method: {info.name}\nbase_model: b\nmodels: [{{model: a}}]\n"
            f"parameters:\n  {field.name}: {outside}\n"
        )
        assert any(f"`{field.name}` must lie in {field.within.text}" in problem.message for problem in problems)


def test_everything_at_once() -> None:
    problems = found("""\
        merge_method: ties
        models:
          - model: a
            parameters: {wieght: 1, lambda: 2, density: [x, 1]}
          - model: b
        """)
    assert [problem.message for problem in problems] == [
        "ties has no parameter `wieght`",
        "`lambda` is method-wide and is not read at model level",
        "`density` must be a number, not 'x'",
        "ties needs a base model",
    ]


def test_required_for_one_model() -> None:
    assert only("merge_method: linear\nmodels:\n- {model: a, parameters: {weight: 1}}\n- model: b\n") == (
        "linear needs `weight` for b",
        "4:3",
        "add `parameters: {weight: ...}` beside its `model:`, or to the recipe for all models",
    )


@pytest.mark.parametrize(
    "text",
    [
        "merge_method: linear\nmodels: [{model: a}]\nparameters: {weight: 1}\n",
        "merge_method: linear\nmodels: [{model: a}]\nparameters: {weight: [{filter: x, value: 1}]}\n",
        "merge_method: linear\nslices: [{sources: [{model: a}], parameters: {weight: 1}}]\n",
        "merge_method: linear\nmodules: {x: {models: [{model: a}], parameters: {weight: 1}}}\n",
        "merge_method: ties\nbase_model: b\nmodels: [{model: b}, {model: a, parameters: {weight: 1}}]\n",
        "merge_method: slerp\nbase_model: a\nmodels: [{model: a}, {model: b}]\nparameters: {t: 0.5}\n",
        "merge_method: slerp\nbase_model: a\nmodels: [{model: b}]\nparameters: {t: 0.5}\n",
        "merge_method: passthrough\nbase_model: b\nmodels: [{model: a}]\n",
    ],
)
def test_fine(text: str) -> None:
    assert found(text) == []


def test_required_for_the_method() -> None:
    assert only("merge_method: slerp\nbase_model: a\nmodels: [{model: a}, {model: b}]\n") == (
        "slerp needs `t`",
        "1:1",
        "add `parameters: {t: ...}` to the recipe",
    )
    message, place, fix = only("""\
        merge_method: slerp
        base_model: a
        slices:
          - sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [0, 2]}]
            parameters: {t: 0.5}
          - sources: [{model: a, layer_range: [2, 4]}, {model: b, layer_range: [2, 4]}]
        """)
    assert (message, place) == ("slerp needs `t`", "6:5")
    assert fix == "add `parameters: {t: ...}` to slice 2, or to the recipe"


@pytest.mark.parametrize(
    ("text", "message", "place"),
    [
        ("merge_method: ties\nmodels: [{model: a}]\nparameters: {weight: 1}\n", "ties needs a base model", "1:1"),
        (
            "merge_method: slerp\nbase_model: a\nmodels: [{model: a}]\nparameters: {t: 1}\n",
            "slerp takes exactly 1 model besides the base, not 0",
            "3:1",
        ),
        (
            "merge_method: slerp\nbase_model: a\nmodels: [{model: b}, {model: c}, {model: d}]\nparameters: {t: 1}\n",
            "slerp takes exactly 1 model besides the base, not 3",
            "3:1",
        ),
        (
            "merge_method: passthrough\nbase_model: a\nmodels: [{model: a}, {model: b}]\n",
            "passthrough takes exactly 1 model, not 2",
            "3:1",
        ),
        (
            "merge_method: ties\nbase_model: a\nparameters: {weight: 1}\n"
            "models: [{model: a}, {model: b}, {model: a}]\n",
            "the base model a is listed twice",
            "4:34",
        ),
    ],
)
def test_models_and_base(text: str, message: str, place: str) -> None:
    assert only(text)[:2] == (message, place)


def test_a_slices_own_base_counts() -> None:
    assert (
        found(
            "merge_method: slerp\nparameters: {t: 1}\nslices:\n- {base_model: a, sources: [{model: a}, {model: b}]}\n"
        )
        == []
    )
    assert only("merge_method: slerp\nparameters: {t: 1}\nslices:\n- sources: [{model: a}, {model: b}]\n")[0] == (
        "slerp needs a base model"
    )


def test_notes() -> None:
    recipe = parse(
        textwrap.dedent("""\
        merge_method: task_arithmetic
        base_model: a
        models:
          - {model: a, parameters: {weight: 1}}
          - {model: b, parameters: {weight: 1, density: 0.5}}
        parameters: {int8_mask: true}
        """),
        source="recipe.yml",
    )
    assert check_parameters(recipe) == []
    one, two, three = notes(recipe)
    assert one.startswith("recipe.yml:5:40: `density` has no effect in task_arithmetic: ")
    assert two.startswith("recipe.yml:6:14: `int8_mask` has no effect in task_arithmetic: ")
    assert three == "recipe.yml:4:16: `weight` of a has no effect: it is the base model"
