"""Model names and what they refer to."""

from __future__ import annotations

from pathlib import Path

import pytest

from smelt.errors import RecipeError
from smelt.recipe.references import ModelName, parse_reference, read_model_name, resolve_name
from smelt.specs import ModelRef


@pytest.mark.parametrize(
    ("text", "path", "revision"),
    [
        ("org/name", "org/name", None),
        ("org/name@main", "org/name", "main"),
        ("org/name@refs/pr/1", "org/name", "refs/pr/1"),
        ("gpt2@0a1b2c", "gpt2", "0a1b2c"),
        ("models/llama/base@v1", "models/llama/base@v1", None),
        ("./x@y", "./x@y", None),
        ("../x@y", "../x@y", None),
        ("/data/x@y", "/data/x@y", None),
        ("~/x@y", "~/x@y", None),
        ("C:\\models\\x@y", "C:\\models\\x@y", None),
        ("C:/models/x@y", "C:/models/x@y", None),
        (".", ".", None),
        ("models/x/", "models/x/", None),
    ],
)
def test_references(text: str, path: str, revision: str | None) -> None:
    assert parse_reference(text) == ModelRef(text, path, revision)


def test_an_existing_path_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "org" / "name@main").mkdir(parents=True)
    (tmp_path / "a+b").mkdir()
    assert parse_reference("org/name@main", folders=[tmp_path]).revision is None
    assert parse_reference("a+b", folders=[tmp_path]).path == "a+b"
    assert parse_reference(f"{tmp_path}/a+b").path == f"{tmp_path}/a+b"


@pytest.mark.parametrize("text", ["org/a+org/lora", "./base+./lora", "org/a@main+org/lora@main"])
def test_adapters_are_refused(text: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_reference(text)
    assert "adapters are not supported yet" in caught.value.message
    assert "merge_and_unload" in str(caught.value.fix)


@pytest.mark.parametrize("text", ["", "  ", "org/a@", "org/a@b@c"])
def test_malformed(text: str) -> None:
    with pytest.raises(RecipeError):
        parse_reference(text)


@pytest.mark.parametrize("text", ["a\0b", "x" * 100_000, "org/" + "y" * 5000 + "@main"])
def test_names_that_no_file_can_have(text: str) -> None:
    assert parse_reference(text).text == text


def test_names_in_every_form() -> None:
    assert read_model_name("org/a@r") == ModelName("org/a@r")
    assert read_model_name({"path": "org/a", "revision": "r"}) == ModelName("org/a@r", "org/a", "r")
    assert read_model_name({"model": {"path": "org/a", "revision": "r"}}) == ModelName("org/a@r", "org/a", "r")
    assert read_model_name({"model": "org/a@r", "lora": "l"}) == ModelName("org/a@r+l", lora="l")
    assert read_model_name({"model": "org/a", "lora": {"path": "l", "revision": "2"}}).lora == "l@2"


def test_resolving_names() -> None:
    assert resolve_name(ModelName("org/a@r")) == ModelRef("org/a@r", "org/a", "r")
    assert resolve_name(read_model_name({"path": "./a@b"})) == ModelRef("./a@b", "./a@b")
    assert resolve_name(read_model_name({"path": "a@b", "revision": "r"})) == ModelRef("a@b@r", "a@b", "r")
    with pytest.raises(RecipeError, match="adapters"):
        resolve_name(read_model_name({"model": "org/a", "lora": "l"}))


@pytest.mark.parametrize(
    ("path", "revision", "one_line"),
    [("org/a", "r", True), ("org/a", None, True), ("a@b", None, False), ("a+b", None, False), ("./a", "r", False)],
)
def test_names_that_a_line_can_hold(path: str, revision: str | None, one_line: bool) -> None:
    assert read_model_name({"path": path, "revision": revision}).is_one_line is one_line
