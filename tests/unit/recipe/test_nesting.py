"""Merges within a recipe: what is needed in which order, several documents, and what neither may be."""

from __future__ import annotations

import json
from typing import Any

import pytest

from smelt.errors import SmeltError
from smelt.recipe.canonical import canonical, digest, to_yaml
from smelt.recipe.check import check_parameters
from smelt.recipe.editor import editor_schema
from smelt.recipe.nesting import mentions, needed, unused
from smelt.recipe.parse import from_dict, parse


def linear(*models: str, **keys: Any) -> dict[str, Any]:
    tree = {"merge_method": "linear", "models": [{"model": name} for name in models], "parameters": {"weight": 1}}
    return tree | keys


FAMILY = {
    "merges": {
        "top": linear("left", "right", "org/x"),
        "left": linear("deep", "b"),
        "right": linear("a", "deep", base_model="left"),
        "deep": linear("a", {"path": "b", "revision": "main"}),  # type: ignore[arg-type]
        "idle": linear("nowhere", "deep"),
    },
    **linear("top", "a"),
}


def problems(text: str) -> list[tuple[str, str]]:
    with pytest.raises(SmeltError) as caught:
        parse(text, source="r.yml")
    return [(problem.message, problem.where[0]) for problem in caught.value.problems]


def test_order_mentions_and_what_is_not_used() -> None:
    recipe = from_dict(FAMILY)
    order = needed(recipe)
    assert order == ["deep", "left", "right", "top"]
    assert [name.text for name in mentions(recipe)] == ["a", "b@main", "b", "org/x"]
    assert [warning.partition(": ")[2] for warning in unused(recipe)] == ["the merge `idle` is not used"]


def test_a_recipe_without_merges_needs_none() -> None:
    recipe = from_dict(linear("a", "b"))
    assert (needed(recipe), unused(recipe), recipe.steps()) == ([], [], {})
    assert mentions(recipe) == recipe.mentions()


def test_steps_are_float32_unless_they_say_otherwise() -> None:
    said = {"a": linear("x"), "b": linear("x", dtype="bfloat16"), "c": linear("x", out_dtype="float16")}
    steps = from_dict({"merges": said, **linear(*said)}).steps()
    assert {name: (step.dtype, step.out_dtype) for name, step in steps.items()} == {
        "a": (None, "float32"),
        "b": ("bfloat16", None),
        "c": (None, "float16"),
    }


def test_the_canonical_form_is_read_back_and_tells_merges_apart() -> None:
    recipe = from_dict(FAMILY)
    assert canonical(parse(to_yaml(canonical(recipe)))) == canonical(recipe)
    other = json.loads(json.dumps(FAMILY))
    other["merges"]["deep"]["parameters"]["weight"] = 2
    assert digest(from_dict(other)) != digest(recipe)
    renamed = canonical(recipe, rename={"a": "A"})
    assert renamed["merges"]["deep"]["models"][0] == {"model": "A"}


def test_positions_of_documents_and_of_merges() -> None:
    one = "merges:\n  s:\n    merge_method: linear\n    models: [{model: a}]\n    parameters: {wait: 1}\n"
    recipe = parse(one + "merge_method: linear\nmodels: [{model: s}]\nparameters: {weight: 1}\n", source="r.yml")
    assert next(problem.where[0] for problem in check_parameters(recipe)) == "r.yml:5:18"
    two = "name: s\nmerge_method: linear\nmodels: [{model: a}]\nparameters: {wait: 1}\n---\n"
    recipe = parse(two + "merge_method: linear\nmodels: [{model: s}]\nparameters: {weight: 1}\n", source="r.yml")
    assert next(problem.where[0] for problem in check_parameters(recipe)) == "r.yml:4:14"
    assert recipe.where("merges", "s") == ["r.yml:1:7", "| name: s"]


STEP = "name: s\nmerge_method: linear\nmodels: [{model: a}]\n"
OUTPUT = "merge_method: linear\nmodels: [{model: s}]\n"


@pytest.mark.parametrize(
    ("text", "said", "place"),
    [
        (OUTPUT + "---\n" + OUTPUT, "two documents have no `name:`", "r.yml:4:1"),
        (STEP + "---\n" + STEP + "---\n" + OUTPUT, "two documents are called `s`", "r.yml:5:7"),
        (STEP.replace("name: s", "name: 3") + "---\n" + OUTPUT, "the name of a document must be text", "r.yml:1:7"),
        (STEP.replace("name: s", "name: [s]") + "---\n" + OUTPUT, "the name of a document must be text", "r.yml:1:7"),
        (STEP + "---\n" + OUTPUT + "merges: {t: {}}\n", "`merges:` stands beside further documents", "r.yml:7:9"),
        (OUTPUT + "---\n- 1\n", "a second document begins here", "r.yml:4:1"),
        (OUTPUT + "---\nmore text\n", "a second document begins here", "r.yml:4:1"),
        ("a: &x 1\nmerge_method: linear\n---\nname: *x\n", "the alias *x names no earlier anchor", "r.yml:4:7"),
        (STEP.replace("name: s", "name: a/b") + "---\n" + OUTPUT, "a merge cannot be called 'a/b'", "r.yml:1:7"),
        (STEP + "methods: [./m.py]\n---\n" + OUTPUT, "unknown key `methods`", "r.yml:4:1"),
    ],
)
def test_documents_that_are_refused(text: str, said: str, place: str) -> None:
    (message, where), *_ = problems(text)
    assert message.startswith(said)
    assert where == place


def test_every_circle_is_told_with_all_its_places() -> None:
    tree = {"a": linear("b"), "b": linear("a"), "c": linear("c"), "d": linear("a", "c")}
    with pytest.raises(SmeltError) as caught:
        from_dict({"merges": tree, **linear("d")})
    assert [problem.message for problem in caught.value.problems] == [
        "merges are made of each other in a circle: a → b → a",
        "a merge is made of itself: c → c",
    ]


def test_long_chains_are_refused_in_short_time() -> None:
    chain = {f"s{i}": linear(f"s{i + 1}" if i < 4999 else "m") for i in range(5000)}
    with pytest.raises(SmeltError, match="over more than 32 levels"):
        from_dict({"merges": chain, **linear("s0")})


def test_the_editor_schema_has_merges() -> None:
    schema = editor_schema()
    assert schema["properties"]["merges"]["anyOf"][0]["additionalProperties"] == {"$ref": "#/$defs/Step"}
    step = schema["$defs"]["Step"]
    assert step["additionalProperties"] is False
    assert step["required"] == ["merge_method"]
    own = set(step["properties"])
    assert own - set(schema["properties"]) == {"keep"}
    assert set(schema["properties"]) - own == {"name", "methods", "merges"}
    for key in ("merge_method", "dtype", "out_dtype", "parameters"):
        assert step["properties"][key] == schema["properties"][key]
