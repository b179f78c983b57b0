"""Which id each token has, from the files that say so, and how two models differ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import factory
from smelt.errors import InputError
from smelt.storage.sources.local import open_folder
from smelt.tokens.vocabulary import Vocabulary, compare, read


def vocabulary(folder: Path, **files: Any) -> Vocabulary | None:
    """What is read from a model with these files: tokenizer="..." is tokenizer.json."""
    made = factory.model(
        folder,
        factory.llama(),
        factory.config(),
        files={f"{name}.json": text if isinstance(text, str) else json.dumps(text) for name, text in files.items()},
    )
    with open_folder(made, name="m") as source:
        return read(source)


def added(content: str, number: Any) -> dict[str, Any]:
    return {"content": content, "id": number, "special": True}


# --- reading --------------------------------------------------------------------------------------------------------


def test_the_golden_tokenizers_are_as_the_tokenizers_library_has_them() -> None:
    from tokenizers import Tokenizer

    for name in ("llama-base", "plus-base", "code-base"):
        folder = factory.GOLDEN / "models" / name
        with open_folder(folder, name=name) as source:
            found = read(source)
        assert found is not None
        assert found.ids == Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab(with_added_tokens=True)
        assert found.rows == len(found.ids)


@pytest.mark.parametrize(
    ("files", "ids"),
    [
        ({}, None),
        ({"tokenizer": {"model": {"vocab": {"a": 0, "b": 1}}}}, {"a": 0, "b": 1}),
        ({"tokenizer": {"model": {"vocab": {"a": 0}}, "added_tokens": [added("<x>", 1)]}}, {"a": 0, "<x>": 1}),
        ({"tokenizer": {"model": {"vocab": {"a": 0}}, "added_tokens": None}}, {"a": 0}),
        ({"tokenizer": {"model": {"vocab": [["a", 0.0], ["b", -1.5], ["a", -2.0]]}}}, {"a": 0, "b": 1}),
        ({"tokenizer": {"model": {"vocab": {}}}}, {}),
        ({"vocab": {"a": 0, "b": 1}}, {"a": 0, "b": 1}),
        ({"vocab": {"a": 0}, "added_tokens": {"<x>": 5}}, {"a": 0, "<x>": 5}),
        ({"tokenizer": {"model": {"vocab": {"a": 0}}}, "vocab": {"z": 9}}, {"a": 0}),
        ({"added_tokens": {"<x>": 5}}, None),
    ],
    ids=str,
)
def test_read(files: dict[str, Any], ids: dict[str, int] | None, tmp_path: Path) -> None:
    found = vocabulary(tmp_path / "m", **files)
    assert (None if found is None else dict(found.ids)) == ids
    if found is not None and ids is not None:
        assert found.rows == 1 + max(ids.values(), default=-1)


@pytest.mark.parametrize(
    "tokenizer",
    [
        {},
        {"model": None},
        {"model": {"vocab": "abc"}},
        {"model": {"vocab": [3]}},
        {"model": {"vocab": [[]]}},
        {"model": {"vocab": [[3, 0.5]]}},
        {"model": {"vocab": {"a": -1}}},
        {"model": {"vocab": {"a": 1.5}}},
        {"model": {"vocab": {"a": True}}},
        {"model": {"vocab": {"a": None}}},
        {"model": {"vocab": {"a": 1 << 40}}},
        {"model": {"vocab": {"a": 0}}, "added_tokens": 3},
        {"model": {"vocab": {"a": 0}}, "added_tokens": ["<x>"]},
        {"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 3}]},
        {"model": {"vocab": {"a": 0}}, "added_tokens": [added("<x>", None)]},
        "no json",
        "[1, 2]",
        "",
    ],
    ids=str,
)
def test_what_contradicts_itself_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"\bm\b.*tokenizer\.json|tokenizer\.json.*\bm\b"):
        vocabulary(tmp_path / "m", tokenizer=tokenizer)


# --- comparing ------------------------------------------------------------------------------------------------------


def of(**ids: int) -> Vocabulary:
    return Vocabulary(ids, "tokenizer.json")


def test_equal() -> None:
    assert not compare(of(a=0, b=1), of(b=1, a=0))


def test_moved() -> None:
    found = compare(of(a=0, b=1, c=2), of(a=0, b=2, c=1))
    assert found.moved == (("b", 1, 2), ("c", 2, 1))
    assert (found.lacking, found.extra) == ((), ())
    assert found


def test_renamed() -> None:
    found = compare(of(a=0, unused=1), of(a=0, im_start=1))
    assert (found.moved, found.lacking, found.extra) == ((), ("unused",), ("im_start",))
    assert found


def test_more_and_fewer() -> None:
    assert compare(of(a=0), of(a=0, b=1)).extra == ("b",)
    assert compare(of(a=0, b=1), of(a=0)).lacking == ("b",)
