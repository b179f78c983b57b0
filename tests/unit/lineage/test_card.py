"""`lineage.card`: front matter that every YAML parser reads, and the recipe in words."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

import factory
from smelt.lineage.card import card
from smelt.planning.build import build
from smelt.planning.entries import Plan
from smelt.recipe.canonical import canonical
from smelt.recipe.parse import from_dict

RECIPE = from_dict(
    {
        "merge_method": "ties",
        "base_model": "m0",
        "models": [{"model": name} for name in ("m1", "m2")],
        "parameters": {"weight": 0.5},
    }
)
MODELS = factory.opened(**{f"m{i}": (factory.llama(seed=i), factory.config()) for i in range(3)})
PLAN = build(RECIPE, MODELS)


def renamed(*names: str, tokenizer: str | None = None) -> Plan:
    models = tuple(replace(model, published=name) for model, name in zip(PLAN.models, names, strict=True))
    return replace(PLAN, models=models, tokenizer=tokenizer or names[PLAN.donor])


def text_of(plan: Plan = PLAN, *, donor: bytes | None = None, name: str = "out", has_config: bool = True) -> str:
    made = card(
        plan, name=name, recipe=canonical(RECIPE), donor_card=donor, library="transformers" if has_config else None
    )
    return made.decode("utf-8")


def front(text: str) -> dict[str, Any]:
    _, matter, _ = text.split("---\n", 2)
    return YAML(typ="safe", pure=True).load(matter)


def test_front_matter() -> None:
    found = front(text_of())
    assert found == {
        "base_model": ["m1", "m2", "m0"],
        "base_model_relation": "merge",
        "library_name": "transformers",
        "tags": ["merge", "smelt"],
    }
    assert "library_name" not in front(text_of(has_config=False))


def test_roles() -> None:
    text = text_of()
    assert "| m1 | model |" in text
    assert "| m0 | base, config and tokenizer |" in text
    elsewhere = text_of(renamed("m1", "m2", "m0", tokenizer="m1"))
    assert "| m1 | tokenizer |" in elsewhere
    assert "| m0 | base, config |" in elsewhere
    outside = text_of(renamed("m1", "m2", "m0", tokenizer="words"))
    assert "| m0 | base, config |\n| words | tokenizer |" in outside


def test_the_recipe_is_there_in_full() -> None:
    (written,) = re.findall(r"```yaml\n(.*?)```", text_of(), re.DOTALL)
    assert from_dict(YAML(typ="safe", pure=True).load(written)) == RECIPE
    assert PLAN.recipe_digest in text_of()
    assert "method `ties`" in text_of()


def test_hub_models_are_named_by_their_repositories_once() -> None:
    models = tuple(
        replace(model, published=f"org/x@{i}", repository="org/x", commit="c" * 40)
        for i, model in enumerate(PLAN.models)
    )
    found = front(text_of(replace(PLAN, models=models)))
    assert found["base_model"] == ["org/x"]


ODD = [
    "true",
    "No",
    "null",
    "~",
    "12",
    "1e3",
    "0x1f",
    "1_000",
    "2024-01-01",
    ".5",
    "a: b",
    "- a",
    "#a",
    "&a",
    "*a",
    "!a",
]
ODD += [
    "'a'",
    '"a"',
    "a # b",
    "a\tb",
    "a\nb",
    "ünï/cødé",
    "模型",
    "a|b",
    " a",
    "a ",
    "@a",
    "%a",
    "`a`",
    "?",
    "{a}",
    "[a]",
]


@pytest.mark.parametrize("name", ODD)
def test_odd_names(name: str) -> None:
    text = text_of(renamed(name, "m2", "m0"))
    assert front(text)["base_model"] == [name, "m2", "m0"]
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 3
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 3 for row in rows)


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20))
def test_any_name_survives(name: str) -> None:
    assert front(text_of(renamed(name, "m2", "m0")))["base_model"][0] == name


@pytest.mark.parametrize(
    ("donor", "wanted"),
    [
        (None, {}),
        (b"", {}),
        (b"# a card without front matter\nlicense: mit\n", {}),
        (b"---\nlicense: mit\n---\n", {"license": "mit"}),
        (b"---\nlicense: 'apache-2.0'\n---\n", {"license": "apache-2.0"}),
        (b'---\r\nlicense: "mit"\r\n---\r\n', {"license": "mit"}),
        (b"\xef\xbb\xbf---\nlicense: mit\n---\n", {"license": "mit"}),
        (b"---\nlicense: mit   # yes\n---\n", {"license": "mit"}),
        (b"---\nauthor: Jos\xe9\nlicense: mit\n---\n", {"license": "mit"}),
        (b"---\ntags: []\n---\nlicense: mit\n", {}),
        (b"---\nlicense:\n- mit\n---\n", {}),
        (b"---\nlicense: [mit]\n---\n", {}),
        (b"---\nlicense: 'mit\n---\n", {}),
        (b"---\nlicense: no\n---\n", {"license": "no"}),
        (b"---\nlicense: mit\ninject: {a: b}\n---\n", {"license": "mit"}),
        (
            b"---\nlicense: other\nlicense_name: llama3\nlicense_link: https://example.org/LICENSE\n---\n",
            {"license": "other", "license_name": "llama3", "license_link": "https://example.org/LICENSE"},
        ),
    ],
)
def test_the_licence(donor: bytes | None, wanted: dict[str, str]) -> None:
    found = front(text_of(donor=donor))
    assert {key: value for key, value in found.items() if key.startswith("license")} == wanted
    assert found.keys() <= {"base_model", "base_model_relation", "library_name", "tags", *wanted}
