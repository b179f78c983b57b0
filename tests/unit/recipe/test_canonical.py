"""The canonical form, its YAML and its digest."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from smelt.recipe.canonical import canonical, digest, to_yaml
from smelt.recipe.parse import from_dict, load, parse
from smelt.recipe.yaml import read

GOLDEN = sorted((Path(__file__).parents[2] / "golden" / "data" / "cases").glob("*/recipe.yml"))


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.parent.name)
def test_golden_recipes_come_back(path: Path) -> None:
    recipe = load(path)
    again = parse(to_yaml(canonical(recipe)))
    assert again == recipe
    assert digest(again) == digest(recipe)
    assert read(to_yaml(canonical(recipe))).value == read(path.read_bytes()).value


def test_form() -> None:
    recipe = parse("""\
dtype: bf16
models:
  - parameters: {weight: "5e-1", density: [1.0, 1e-5]}
    model: {path: org/a, revision: main}
  - model: ./b
    parameters:
      weight: [{value: 1, filter: mlp}, {value: 0.5}]
base_model: 'yes'
merge_method: ties
parameters: {}
tokenizer: {tokens: {"<s>": {force: false, source: org/a}}}
allow: [nonfinite, extra_tensor]
""")
    assert (
        to_yaml(canonical(recipe))
        == """\
merge_method: ties
base_model: "yes"
models:
  - model: org/a@main
    parameters:
      density: [1, 1.0e-05]
      weight: 0.5
  - model: ./b
    parameters:
      weight:
        - filter: mlp
          value: 1
        - value: 0.5
dtype: bfloat16
tokenizer:
  source: union
  tokens:
    "<s>":
      source: org/a
allow: [extra_tensor, nonfinite]
"""
    )


def same(one: str, other: str) -> bool:
    return digest(parse(one)) == digest(parse(other))


ONE = "merge_method: linear\nmodels: [{model: a, parameters: {weight: 0.5}}, {model: b, parameters: {weight: 1}}]\n"


@pytest.mark.parametrize(
    "other",
    [
        "# c\nmodels:\n- parameters:\n    weight: 5e-1\n  model: a\n- model: 'b'\n  parameters: {weight: 1.0}\n"
        "merge_method: linear",
        ONE.replace("0.5", '"5e-1"'),
        ONE.replace("0.5", "0.50"),
        ONE + "parameters: {}\nbase_model:\n",
    ],
)
def test_formatting_does_not_change_the_digest(other: str) -> None:
    assert same(ONE, other)


@pytest.mark.parametrize(
    "other",
    [
        ONE.replace("0.5", "0.25"),
        ONE.replace("model: b", "model: c"),
        "merge_method: linear\nmodels: [{model: b, parameters: {weight: 1}}, {model: a, parameters: {weight: 0.5}}]\n",
        ONE + "dtype: float32\n",
    ],
)
def test_meaning_changes_the_digest(other: str) -> None:
    assert not same(ONE, other)


def test_the_digest_is_a_sha256_of_json() -> None:
    assert re.fullmatch("[0-9a-f]{64}", digest(parse(ONE)))


def test_dtype_words_of_one_type_are_the_same() -> None:
    assert same(ONE + "dtype: bf16\n", ONE + "dtype: bfloat16\n")


def test_rename() -> None:
    recipe = parse(
        "merge_method: slerp\nbase_model: /data/a\ntokenizer_source: /data/a\n"
        "slices: [{sources: [{model: /data/a}, {model: {path: /data/b@2}}]}]\n"
    )
    assert canonical(recipe, rename={"/data/a": "a", "/data/b@2": "b"}) == {
        "merge_method": "slerp",
        "base_model": "a",
        "slices": [{"sources": [{"model": "a"}, {"model": "b"}]}],
        "tokenizer_source": "a",
    }
    assert digest(recipe, rename={"/data/a": "a"}) != digest(recipe)


def test_a_model_called_union_stays_a_model() -> None:
    recipe = parse("merge_method: linear\nmodels: [{model: x}]\ntokenizer_source: {path: union}\n")
    assert parse(to_yaml(canonical(recipe))) == parse(to_yaml(canonical(parse(to_yaml(canonical(recipe))))))
    renamed = canonical(
        parse("merge_method: linear\nmodels: [{model: x}]\ntokenizer_source: x\n"), rename={"x": "base"}
    )
    assert renamed["tokenizer_source"] == {"model": "base"}
    assert str(parse(to_yaml(renamed)).tokenizer_source) == "base"


# --- round trips ----------------------------------------------------------------------------------------------------

text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
name = st.one_of(
    st.sampled_from(
        ["org/a", "org/a@main", "./x", "C:\\m\\a", "no", "1e-5", "null", "~", ".5", "a: b", "# x", "-", "2024-01-01"]
    ),
    text.filter(lambda t: bool(t.strip())),
)
model = st.one_of(
    name,
    st.fixed_dictionaries({"path": name}, optional={"revision": name}),
    st.fixed_dictionaries({"model": name}, optional={"lora": name, "override_architecture": name}),
    st.fixed_dictionaries(
        {"model": st.fixed_dictionaries({"path": name}, optional={"revision": name})}, optional={"lora": name}
    ),
)
number = st.one_of(st.integers(-(2**53), 2**53), st.floats(allow_nan=False, allow_infinity=False))
scalar = st.one_of(number, st.booleans(), name)
flat = st.one_of(scalar, st.lists(scalar, min_size=1, max_size=4))
condition = st.one_of(st.fixed_dictionaries({"filter": name}), st.fixed_dictionaries({"match": name}))
case = st.builds(lambda when, value: {**when, "value": value}, condition.filter(lambda c: c != {"filter": "*"}), flat)
setting = st.one_of(flat, st.lists(case, min_size=1, max_size=3), case)
parameters = st.dictionaries(
    st.sampled_from(["weight", "density", "t", "lambda", "x y", "1", "on"]), setting, max_size=3
)
vocabulary = st.one_of(st.sampled_from(["union", "base"]), model)
rule = st.fixed_dictionaries(
    {},
    optional={
        "source": st.one_of(
            model,
            st.just({"kind": "zero"}),
            st.fixed_dictionaries({"kind": st.just("model_token"), "model": model, "token": text}),
        ),
        "force": st.booleans(),
    },
)
shared = {
    "name": text,
    "base_model": model,
    "parameters": parameters,
    "dtype": st.sampled_from(["float32", "bf16"]),
    "chat_template": text,
    "allow": st.lists(st.sampled_from(["extra_tensor", "nonfinite"]), max_size=2),
    "missing": st.sampled_from(["error", "skip", "copy"]),
}
vocabularies = st.one_of(
    st.just({}),
    st.fixed_dictionaries({"tokenizer_source": vocabulary}),
    st.fixed_dictionaries(
        {
            "tokenizer": st.fixed_dictionaries(
                {"source": vocabulary}, optional={"tokens": st.dictionaries(text, rule, max_size=2)}
            )
        }
    ),
)
source = st.fixed_dictionaries({"model": model}, optional={"parameters": parameters})
ranged = st.fixed_dictionaries({"model": model, "layer_range": st.just([1, 3])}, optional={"parameters": parameters})
piece = st.fixed_dictionaries({"sources": st.lists(ranged, min_size=1, max_size=2)}, optional={"base_model": model})
body = st.one_of(
    st.fixed_dictionaries({"models": st.lists(source, min_size=1, max_size=3)}),
    st.fixed_dictionaries({"slices": st.lists(piece, min_size=1, max_size=2)}),
    st.fixed_dictionaries(
        {
            "modules": st.dictionaries(
                text, st.fixed_dictionaries({"slices": st.lists(piece, min_size=1, max_size=1)}), min_size=1, max_size=2
            )
        }
    ),
)
trees = st.builds(
    lambda body, vocabulary, rest: {"merge_method": "ties", **body, **vocabulary, **rest},
    body,
    vocabularies,
    st.fixed_dictionaries({}, optional=shared),
)


@settings(max_examples=200, deadline=None)
@given(trees)
def test_any_recipe_comes_back_from_its_yaml(tree: dict[str, Any]) -> None:
    recipe = from_dict(tree)
    plain = canonical(recipe)
    again = parse(to_yaml(plain))
    assert canonical(again) == plain
    assert digest(again) == digest(recipe)


@settings(max_examples=300, deadline=None)
@given(
    st.recursive(
        st.one_of(number, st.booleans(), st.none(), text),
        lambda c: st.lists(c, max_size=3) | st.dictionaries(text, c, max_size=3),
    )
)
def test_any_tree_comes_back_from_its_yaml(tree: Any) -> None:
    assert read(to_yaml({"key": tree})).value == {"key": tree}


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.one_of(text, name), st.lists(st.one_of(number, st.booleans(), name, text), max_size=4)))
def test_yaml_1_1_and_1_2_read_it_alike(tree: dict[str, Any]) -> None:
    for version in ((1, 1), (1, 2)):
        reader = YAML(typ="safe", pure=True)
        reader.version = version
        assert reader.load(to_yaml(tree)) == tree
