"""`planning.sections`: who contributes which layers, and who is the base."""

from __future__ import annotations

from typing import Any

import pytest

import factory
from smelt.errors import SmeltError
from smelt.methods import api
from smelt.planning.align import Section
from smelt.planning.sections import sections
from smelt.recipe.parse import from_dict

MODELS = factory.opened(**{f"m{i}": (factory.llama(layers=3, seed=i), factory.config(layers=3)) for i in range(3)})


def found(tree: dict[str, Any]) -> tuple[list[Section], list[SmeltError]]:
    recipe = from_dict(tree)
    names = [name.text for name in recipe.model_names()]
    models = [MODELS[name] for name in names]
    return sections(recipe, api.get(recipe.merge_method), models, {name: i for i, name in enumerate(names)})


def spans(section: Section) -> list[tuple[str, tuple[int, int], bool]]:
    return [(one.text, one.layers, one.is_base) for one in section.contributors]


def one_of(base: str | None, method: str, *models: str) -> dict[str, Any]:
    tree: dict[str, Any] = {"merge_method": method, "models": [{"model": name} for name in models]}
    return tree | ({"base_model": base} if base else {})


def sliced(method: str, *parts: list[tuple[str, list[int] | None]], **keys: Any) -> dict[str, Any]:
    slices = [{"sources": [{"model": name, "layer_range": span} for name, span in part]} for part in parts]
    return {"merge_method": method, "slices": slices} | keys


def test_models_are_one_section_of_all_layers() -> None:
    (section,), problems = found(one_of(None, "linear", "m0", "m1"))
    assert not problems
    assert spans(section) == [("m0", (0, 3), False), ("m1", (0, 3), False)]
    assert (section.length, section.is_slice, section.label) == (3, False, "recipe")


def test_an_unlisted_base_comes_last() -> None:
    (section,), problems = found(one_of("m0", "ties", "m1", "m2"))
    assert not problems
    assert spans(section) == [("m1", (0, 3), False), ("m2", (0, 3), False), ("m0", (0, 3), True)]


def test_a_listed_base_keeps_its_place_and_is_not_counted() -> None:
    (section,), problems = found(one_of("m0", "slerp", "m0", "m1"))
    assert not problems
    assert spans(section) == [("m0", (0, 3), True), ("m1", (0, 3), False)]


@pytest.mark.parametrize("method", ["linear", "passthrough", "karcher"])
def test_for_a_method_without_base_the_base_is_a_model_only_if_listed(method: str) -> None:
    (section,), problems = found(one_of("m0", method, "m1"))
    assert (spans(section), problems) == ([("m1", (0, 3), False)], [])
    if method != "passthrough":
        (section,), problems = found(one_of("m0", method, "m0", "m1"))
        assert (spans(section), problems) == ([("m0", (0, 3), False), ("m1", (0, 3), False)], [])


def test_slices() -> None:
    parts, problems = found(sliced("linear", [("m0", [0, 2]), ("m1", [1, 3])], [("m2", [2, 3])]))
    assert not problems
    assert [spans(part) for part in parts] == [
        [("m0", (0, 2), False), ("m1", (1, 3), False)],
        [("m2", (2, 3), False)],
    ]
    assert [(part.label, part.length, part.is_slice) for part in parts] == [("slice 1", 2, True), ("slice 2", 1, True)]


def test_a_slice_without_range_takes_all_layers() -> None:
    (section,), problems = found(sliced("linear", [("m0", None), ("m1", [0, 3])]))
    assert (spans(section), problems) == ([("m0", (0, 3), False), ("m1", (0, 3), False)], [])


def test_a_slice_may_have_its_own_base() -> None:
    tree = sliced("slerp", [("m0", [0, 1]), ("m1", [0, 1])], [("m0", [1, 2]), ("m1", [1, 2])], base_model="m0")
    tree["slices"][1]["base_model"] = "m1"
    parts, problems = found(tree)
    assert not problems
    assert [[one.is_base for one in part.contributors] for part in parts] == [[True, False], [False, True]]


def test_settings_go_from_the_nearest_outwards() -> None:
    tree = sliced("linear", [("m0", [0, 1])], parameters={"weight": 1})
    tree["slices"][0]["parameters"] = {"weight": 2}
    tree["slices"][0]["sources"][0]["parameters"] = {"weight": 3}
    (section,), _ = found(tree)
    assert [scope.label for scope in section.scopes] == ["slice 1", "recipe"]
    assert section.contributors[0].scope.label == "model m0"


def test_the_same_model_twice_in_a_slice() -> None:
    (section,), problems = found(sliced("linear", [("m0", [0, 1]), ("m0", [2, 3])]))
    assert (spans(section), problems) == ([("m0", (0, 1), False), ("m0", (2, 3), False)], [])


@pytest.mark.parametrize(
    ("tree", "says"),
    [
        (sliced("linear", [("m0", [0, 4])]), ["layer_range [0, 4] goes beyond m0, which has 3 layers"]),
        (sliced("linear", [("m0", [0, 2]), ("m1", None)]), ["slice 1 takes layer ranges of different lengths"]),
        (sliced("ties", [("m0", [0, 2])], base_model="m1"), ["a slice does not list the base model m1"]),
        (one_of("m0", "slerp", "m0", "m1", "m2"), ["slerp takes exactly 1 model besides the base"]),
        (
            sliced("linear", [("m0", [0, 4])], [("m1", [2, 9])], [("m0", [0, 1]), ("m1", None)]),
            ["goes beyond m0", "goes beyond m1", "different lengths"],
        ),
    ],
)
def test_problems(tree: dict[str, Any], says: list[str]) -> None:
    _, problems = found(tree)
    assert len(problems) == len(says)
    for problem, said in zip(problems, says, strict=True):
        assert said in problem.message
        assert problem.exit_code == 2
        assert problem.fix
