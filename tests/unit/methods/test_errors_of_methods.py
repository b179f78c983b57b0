"""Errors raised in a method's own code: told as a recipe's, with the line, and where the call was made."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from smelt.errors import NumericError, RecipeError, SmeltError
from smelt.methods import api, loading
from smelt.methods.loading import answerable, definition_of, line_of, load_file


def passes(error: BaseException) -> bool:
    """Whether an error has words for people already, or is none."""
    return isinstance(error, (SmeltError, MemoryError, api.Undefined)) or not isinstance(error, Exception)


def caught(error: BaseException, *, at: str = "") -> BaseException:
    with pytest.raises(BaseException) as found, answerable(api.get("ties"), at=at):
        raise error
    return found.value


def test_the_place_of_the_call_is_told_after_the_line() -> None:
    found = caught(ZeroDivisionError("by 0"), at="tensor 'w'")
    assert isinstance(found, RecipeError)
    assert found.message == "method ties failed: ZeroDivisionError: by 0"
    assert found.where[1:] == ("tensor 'w'",)
    assert isinstance(found.__cause__, ZeroDivisionError)
    alone = caught(ZeroDivisionError("by 0"))
    assert isinstance(alone, RecipeError)
    assert len(alone.where) == 1


@pytest.mark.parametrize(
    "error", [NumericError("it is"), RecipeError("it is"), MemoryError(), api.Undefined("it is"), KeyboardInterrupt()]
)
def test_what_has_words_already_passes(error: BaseException) -> None:
    assert caught(error, at="tensor 'w'") is error


def raised_in(path: Path, text: str) -> BaseException:
    """What running a file raises."""
    path.write_text(text, encoding="utf-8")
    try:
        exec(compile(text, str(path), "exec"), {})
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def test_the_innermost_line_of_the_file_is_told(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    text = (
        "import json\n\ndef inner(x):\n    return json.loads(x)\n\ndef outer(x):\n    return inner(x)\n\nouter('{')\n"
    )
    assert line_of(raised_in(path, text), path) == "mine.py:4: return json.loads(x)"


def test_a_line_that_is_no_python_is_told(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    assert line_of(raised_in(path, "a = 1\n  b = 2\n"), path) == "mine.py:2: b = 2"
    other = tmp_path / "other.py"
    assert line_of(raised_in(path, "a = 1\n  b = 2\n"), other) == str(other)


def test_without_a_line_the_file_is_told(tmp_path: Path) -> None:
    assert line_of(ValueError(), tmp_path / "mine.py") == str(tmp_path / "mine.py")
    path = tmp_path / "mine.py"
    error = raised_in(path, "1 / 0\n")
    path.unlink()
    assert line_of(error, path) == "mine.py:1: "


def test_where_a_function_begins(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    text = "def same(f):\n    return f\n\n@same\n@same\ndef tile(x):\n    return x\n\nsmall = lambda x: x\n"
    path.write_text(text, encoding="utf-8")
    space: dict[str, object] = {}
    exec(compile(text, str(path), "exec"), space)
    assert definition_of(space["tile"]) == "mine.py:6: def tile(x):"  # type: ignore[arg-type]
    assert definition_of(space["same"]) == "mine.py:1: def same(f):"  # type: ignore[arg-type]
    assert definition_of(space["small"]).startswith("mine.py:"), "it comes to an end"  # type: ignore[arg-type]


def test_a_package_that_is_not_known_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("mine", "no_such_module_of_mine", "smelt.methods")
    monkeypatch.setattr(loading, "entry_points", lambda group: [point])
    with pytest.raises(RecipeError, match="package unknown cannot be loaded: ModuleNotFoundError") as found:
        loading.load_entry_points()
    assert found.value.where == ("entry point mine = no_such_module_of_mine",)


def test_nothing_of_a_file_that_fails_stays(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("1 / 0\n", encoding="utf-8")
    known = api.names()
    with pytest.raises(RecipeError, match="cannot be loaded: ZeroDivisionError") as found:
        load_file(path)
    assert found.value.where == ("mine.py:1: 1 / 0",)
    assert api.names() == known
