"""YAML -> plain values with positions, and every text that is refused."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smelt.errors import ManyProblems, RecipeError, SmeltError
from smelt.recipe.document import MAX_BYTES, MAX_DEPTH, Position
from smelt.recipe.yaml import read

RECIPE = """\
merge_method: ties   # comment
models:
  - model: org/a
    parameters: {weight: [0.5, 1]}
  - model: org/b
"""


def value(text: str) -> object:
    return read(f"key: {text}\n").value["key"]


def refused(text: str | bytes) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        read(text, source="recipe.yml")
    return caught.value


def test_values_and_positions() -> None:
    document = read(RECIPE, source="recipe.yml")
    assert document.value == {
        "merge_method": "ties",
        "models": [{"model": "org/a", "parameters": {"weight": [0.5, 1]}}, {"model": "org/b"}],
    }
    assert document.positions["models",] == Position(2, 1)
    assert document.values["models",] == Position(3, 3)
    assert document.positions["models", 1] == Position(5, 5)
    assert document.positions["models", 0, "parameters", "weight"] == Position(4, 18)
    assert document.values["models", 0, "parameters", "weight", 1] == Position(4, 32)


def test_a_path_without_position_points_at_its_surroundings() -> None:
    document = read(RECIPE, source="recipe.yml")
    assert document.label(("models", 1, "parameters", "weight")) == "recipe.yml:5:5"
    assert document.where(("models", 1)) == ["recipe.yml:5:5", "|   - model: org/b"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1e-5", 1e-5),
        ("1E+3", 1000.0),
        (".5", 0.5),
        ("5.", 5.0),
        ("-3", -3),
        ("+3", 3),
        ("0x10", 16),
        ("0o17", 15),
        ("010", 10),
        ("true", True),
        ("False", False),
        ("yes", "yes"),
        ("on", "on"),
        ("~", None),
        ("", None),
        ("null", None),
        ("'5'", "5"),
        ('"true"', "true"),
        ("!!str 5", "5"),
        ("!!float 3", 3),
        ("! 5", "5"),
        ("1_000", "1_000"),
        ("12:30:00", "12:30:00"),
        ("2024-01-01", "2024-01-01"),
        ("nan", "nan"),
        ("C:\\models\\a", "C:\\models\\a"),
        ("org/name@main", "org/name@main"),
        ("|\n  {% if x %}\n  \ty\n", "{% if x %}\n\ty\n"),
    ],
)
def test_scalars(text: str, expected: object) -> None:
    found = value(text)
    assert found == expected
    assert type(found) is type(expected)


def test_anchors_and_aliases() -> None:
    assert read("a: &x {w: 1}\nb: [*x, *x]\n").value == {"a": {"w": 1}, "b": [{"w": 1}, {"w": 1}]}


def test_merge_keys() -> None:
    """As PyYAML reads them, and so MergeKit: own keys win, then earlier mappings; they do not repeat keys."""
    document = read(
        "a: &x {b: 1, c: 2}\nd:\n  <<: *x\n  b: 3\ne: {<<: [*x, {z: 4, b: 7}]}\nf: &f {<<: *x}\ng: {<<: *f}\n"
    )
    x = {"b": 1, "c": 2}
    assert document.value == {"a": x, "d": {"b": 3, "c": 2}, "e": x | {"z": 4}, "f": x, "g": x}
    assert document.positions["d", "c"] == Position(1, 14)


@pytest.mark.parametrize(
    "text",
    [
        "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 60)),
        "a: &a {"
        + ", ".join(f"k{i}: 1" for i in range(5000))
        + "}\n"
        + "".join(f"b{i}: {{<<: *a}}\n" for i in range(99)),
        "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: *a{i - 1}}}\n" for i in range(1, 500)),
    ],
    ids=["doubling", "wide", "long"],
)
def test_merge_keys_cannot_grow_without_end(text: str) -> None:
    with pytest.raises(RecipeError, match=r"100,000 values once its aliases|more than 64 levels"):
        read(text)


def test_bom_and_line_ends() -> None:
    document = read(b"\xef\xbb\xbfa: 1\r\nb: 2\r\n")
    assert document.value == {"a": 1, "b": 2}
    assert document.positions["b",] == Position(2, 1)


@pytest.mark.parametrize(
    ("text", "message", "place"),
    [
        ("a: 1\nb: 2\na: 3\n", "the key `a` is given twice", "3:1"),
        ("a: {x: 1, 'x': 2}\n", "the key `x` is given twice", "1:11"),
        ("a: .nan\n", ".nan is not a number that a recipe can hold", "1:4"),
        ("a: [1, -.inf]\n", "-.inf is not a number that a recipe can hold", "1:8"),
        ("a: 1e999\n", "the number is too large", "1:4"),
        ("a: " + "9" * 5000, "the number is too large", "1:4"),
        ("a: !!python/object/apply:os.system [id]\n", "the tag !!python/object/apply:os.system is not allowed", "1:4"),
        ("a: !!python/name:os.system x\n", "the tag !!python/name:os.system is not allowed", "1:4"),
        ("a: !local {b: 1}\n", "the tag !local is not allowed", "1:4"),
        ("a: !!binary aGk=\n", "the tag !!binary is not allowed", "1:4"),
        ("a: !!set {b}\n", "the tag !!set is not allowed", "1:4"),
        ("a: !!int x\n", "x is not what its tag !!int says", "1:4"),
        ("a: {<<: 3}\n", "`<<` takes a mapping, or a list of them", "1:9"),
        ("a: 1\n---\nb: 2\n", "a second document begins here", "2:1"),
        ("%YAML 1.1\n---\na: yes\n", "recipes are YAML 1.2", "1:1"),
        ("a:\n\tb: 1\n", "a tab stands where YAML wants spaces", "2:1"),
        ("a:\t1\n", "a tab stands where YAML wants spaces", "1:3"),
        ("\ta: 1\n", "a tab stands where YAML wants spaces", "1:1"),
        ("1: a\n", "the key 1 is not text", "1:1"),
        ("true: a\n", "the key true is not text", "1:1"),
        ("? [a]\n: 1\n", "a key must be text", "1:3"),
        ("a: &x [*x]\n", "the alias *x names no earlier anchor", "1:8"),
        ("a: *x\n", "the alias *x names no earlier anchor", "1:4"),
        ("a: 1\nb: \x00\n", "the character U+0000 cannot stand in a recipe", "2:4"),
        ("a: \x1b[31m\n", "the character U+001B cannot stand in a recipe", "1:4"),
        ('a: "\\0"\n', "text must not hold NUL or half characters", "1:4"),
        ('a: "\\ud800"\n', "text must not hold NUL or half characters", "1:4"),
        (b"a: 1\nb: \xff\n", "the recipe is not UTF-8 text", "2:4"),
        ("a: 1\n".encode("utf-16"), "the recipe is not UTF-8 text", "1:1"),
        ("a: b: c\n", "a `:` stands where no key can be", "1:5"),
        ("a: [1, 2\n", "a bracket is not closed", "2:1"),
        ("a: 'x\n", "a quote is not closed", "2:1"),
        ("  a: 1\nb: 2\n", "this line does not fit the lines above", "2:1"),
        ("a: 1\n b: 2\n", "a `:` stands where no key can be", "2:3"),
        ("a:\n  b: 1\n c: 2\n", "the indentation does not fit the lines above", "3:2"),
        ("a: @x\n", "text cannot begin with @", "1:4"),
        ("[" * 100, f"the recipe is nested more than {MAX_DEPTH} levels deep", f"1:{MAX_DEPTH + 1}"),
        ("{a: " * 200_000, f"the recipe is nested more than {MAX_DEPTH} levels deep", f"1:{4 * MAX_DEPTH + 1}"),
    ],
)
def test_refused(text: str | bytes, message: str, place: str) -> None:
    error = refused(text)
    assert error.message == message
    assert error.where[0] == f"recipe.yml:{place}"


@pytest.mark.parametrize("text", ["", "\n\n", "# a comment\n", "---\n", "~\n", b"\xef\xbb\xbf"])
def test_empty(text: str | bytes) -> None:
    assert refused(text).message == "the recipe is empty"


def test_too_large_is_refused_unread() -> None:
    assert "at most 1,048,576 are read" in refused("a: " + "x" * 10_000_000).message
    assert "at most 1,048,576 are read" in refused(b"x" * (MAX_BYTES + 1)).message


def test_alias_bomb() -> None:
    lines = ["a0: &a0 [" + ", ".join("x" * 10) + "]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 30)]
    assert "once its aliases are expanded" in refused("\n".join(lines)).message


def test_nested_aliases_do_not_get_past_the_depth_cap() -> None:
    lines = ["a0: &a0 [1]"] + [f"a{i}: &a{i} [*a{i - 1}]" for i in range(1, 500)]
    assert refused("\n".join(lines)).message == f"the recipe is nested more than {MAX_DEPTH} levels deep"


def test_all_problems_of_a_tree_are_listed() -> None:
    with pytest.raises(ManyProblems) as caught:
        read("a: .nan\nb: !x 1\na: 2\n", source="recipe.yml")
    assert caught.value.exit_code == 2
    assert [problem.where[0] for problem in caught.value.problems] == [f"recipe.yml:{i}" for i in ("1:4", "2:4", "3:1")]


def test_the_second_key_names_the_first() -> None:
    assert refused("a: 1\nb: 2\na: 3\n").render() == (
        "error: the key `a` is given twice\n"
        "  recipe.yml:3:1\n"
        "  | a: 3\n"
        "  first at recipe.yml:1:1\n"
        "  fix: keep one of the two"
    )


def test_messages_never_carry_control_characters() -> None:
    text = refused('"\\e[31m": 1\n"\\e[31m": 2\n').render()
    assert "\x1b" not in text


def test_a_long_line_is_shown_around_the_problem() -> None:
    error = refused("a: [" + "1, " * 500 + ".nan]\n")
    assert ".nan" in error.where[1]
    assert len(error.where[1]) < 110


def outcome(text: str | bytes) -> list[SmeltError]:
    try:
        read(text)
    except SmeltError as error:
        return list(error.problems)
    return []


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="ab:-[]{}&*!|>'\"\\%@`#?,<~. \n\t0123e\x00é", max_size=60))
def test_any_text_is_read_or_refused(text: str) -> None:
    assert all(isinstance(problem, RecipeError) and problem.where for problem in outcome(text))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    assert all(isinstance(problem, RecipeError) for problem in outcome(data))
