"""Tokenizers and chat templates of merged models: whose files they are, and when vocabularies do not go together."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import factory
import smelt
from smelt.errors import SmeltError

GOLDEN = factory.GOLDEN / "models"
Tree = dict[str, Any]
Edit = Callable[[Tree], None]


def edited(folder: Path, origin: str, **edits: Edit) -> Path:
    """A copy of a golden model with its JSON files edited: `tokenizer` edits tokenizer.json."""
    copy = factory.copy(GOLDEN / origin, folder)
    for name, edit in edits.items():
        path = copy / f"{name}.json"
        tree = json.loads(path.read_text())
        edit(tree)
        path.write_text(json.dumps(tree, indent=1))
    return copy


def swap(tree: Tree) -> None:
    """Two tokens change places: a tokenizer trained anew, or sorted otherwise."""
    vocab = tree["model"]["vocab"]
    one, two = list(vocab)[100:102]
    vocab[one], vocab[two] = vocab[two], vocab[one]


def rename(tree: Tree) -> None:
    """A token gets another text and keeps its row: what fine-tunes do with reserved tokens."""
    vocab = tree["model"]["vocab"]
    last = max(vocab, key=lambda token: vocab[token])
    vocab["<|im_start|>"] = vocab.pop(last)


def template(text: Any) -> Edit:
    return lambda tree: tree.__setitem__("chat_template", text)


def merge(out: Path, *models: Path | str, **keys: Any) -> smelt.MergeReport:
    return smelt.merge(factory.linear(*models, **keys), out)


def refused(*models: Path | str, **keys: Any) -> SmeltError:
    with pytest.raises(SmeltError) as caught:
        smelt.plan(factory.linear(*models, **keys))
    return caught.value


BASE, ONE, TWO = (GOLDEN / name for name in ("llama-base", "llama-ft1", "llama-ft2"))


# --- whose tokenizer ------------------------------------------------------------------------------------------------


def tokenizer_of(folder: Path) -> dict[str, bytes]:
    names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
    return {name: (folder / name).read_bytes() for name in names if (folder / name).exists()}


@pytest.fixture
def marked(tmp_path: Path) -> dict[str, Path]:
    """Models of one vocabulary, told apart by the length that their tokenizers allow."""
    found = {}
    for number, name in enumerate(("llama-base", "llama-ft1", "llama-ft2"), 1):
        mark: Edit = lambda tree, number=number: tree.__setitem__("model_max_length", number)  # noqa: E731
        found[name] = edited(tmp_path / name, name, tokenizer_config=mark)
        (found[name] / "special_tokens_map.json").write_text(json.dumps({"mark": number}))
    return found


@pytest.mark.parametrize(
    ("keys", "giver"),
    [
        ({}, "llama-ft1"),
        ({"base_model": "llama-base"}, "llama-base"),
        ({"tokenizer_source": "llama-ft2"}, "llama-ft2"),
        ({"tokenizer_source": "model:llama-ft2"}, "llama-ft2"),
        ({"tokenizer_source": {"path": "llama-ft2"}}, "llama-ft2"),
        ({"tokenizer": {"source": "llama-ft2"}}, "llama-ft2"),
        ({"tokenizer": {"source": {"model": {"path": "llama-ft2"}}}}, "llama-ft2"),
        ({"tokenizer_source": "base", "base_model": "llama-base"}, "llama-base"),
        ({"tokenizer_source": "llama-ft2", "base_model": "llama-base"}, "llama-ft2"),
        ({"tokenizer_source": "union"}, "llama-ft1"),
        ({"tokenizer_source": "union", "base_model": "llama-base"}, "llama-base"),
        ({"tokenizer": {"source": "union", "tokens": {}, "pad_to_multiple_of": 4}}, "llama-ft1"),
        ({"tokenizer": {}}, "llama-ft1"),
    ],
    ids=str,
)
def test_equal_vocabularies(
    keys: Tree, giver: str, marked: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every way to name the tokenizer is taken, and its files are copied as they are."""
    monkeypatch.chdir(tmp_path)
    merge(tmp_path / "out", "llama-ft1", "llama-ft2", **keys)
    assert tokenizer_of(tmp_path / "out") == tokenizer_of(marked[giver])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["vocab_size"] == 300


def test_a_tokenizer_of_a_model_that_is_not_merged(
    marked: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for a base model with the tokenizer of its chat version; nothing else is taken from it."""
    monkeypatch.chdir(tmp_path)
    report = merge(tmp_path / "out", "llama-ft1", "llama-ft2", tokenizer_source="llama-base")
    assert tokenizer_of(tmp_path / "out") == tokenizer_of(marked["llama-base"])
    assert [model.published for model in report.plan.models] == ["llama-ft1", "llama-ft2"]
    assert factory.smelt("verify", tmp_path / "out").code == 0


def test_no_base_to_take_it_from() -> None:
    error = refused(ONE, TWO, tokenizer_source="base")
    assert "`tokenizer_source` asks for the base, and there is none" in str(error)
    assert "set base_model" in str(error)


def test_a_model_without_a_tokenizer(tmp_path: Path) -> None:
    bare = factory.copy(ONE, tmp_path / "bare")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bare / name).unlink()
    error = refused(bare, TWO, tokenizer_source=str(bare))
    assert "model bare has no tokenizer to take" in str(error)
    report = merge(tmp_path / "out", bare, TWO)
    assert not (tmp_path / "out" / "tokenizer.json").exists()
    report = merge(tmp_path / "other", TWO, bare)
    assert tokenizer_of(tmp_path / "other") == tokenizer_of(TWO)
    assert any("bare" in note and "tokenizer" in note for note in report.plan.notes)


def test_what_would_build_a_vocabulary_is_refused_by_name() -> None:
    tokens = {"<s>": {"source": str(ONE)}}
    assert "`tokenizer.tokens`: building a vocabulary" in str(refused(ONE, TWO, tokenizer={"tokens": tokens}))
    error = str(refused(ONE, TWO, tokenizer={"pad_to_multiple_of": 64}))
    assert "`pad_to_multiple_of: 64` would add rows" in error
    assert "the embedding has 300 rows" in error
    error = str(refused(ONE, GOLDEN / "plus-ft1", tokenizer_source="union"))
    assert "the vocabularies of llama-ft1 and plus-ft1 differ, and building a vocabulary" in error
    assert "0 tokens moved, 0 only in llama-ft1, 1 only in plus-ft1: '<|user|>'" in error


# --- vocabularies that differ ---------------------------------------------------------------------------------------


def test_moved_tokens_are_refused(tmp_path: Path) -> None:
    """Rows are averaged by their place: the mean of two different tokens is a wrong model that looks right."""
    moved = edited(tmp_path / "moved", "llama-ft2", tokenizer=swap)
    recipe = factory.recipe(tmp_path / "recipe.yml", factory.linear(ONE, moved))
    done = factory.smelt("merge", recipe, tmp_path / "out")
    assert done.code == 3
    assert "2 of 300 tokens have other ids in moved than in llama-ft1" in done.err
    vocab = json.loads((ONE / "tokenizer.json").read_text())["model"]["vocab"]
    one, two = list(vocab)[100:102]
    assert f"{one!r}: llama-ft1 100, moved 101" in done.err
    assert f"{two!r}: llama-ft1 101, moved 100" in done.err
    assert "--allow vocabulary" in done.err
    assert not (tmp_path / "out").exists()
    for command in ("plan", "check"):
        assert factory.smelt(command, recipe).code == 3


def test_moved_tokens_can_be_allowed(tmp_path: Path) -> None:
    moved = edited(tmp_path / "moved", "llama-ft2", tokenizer=swap)
    recipe = factory.recipe(tmp_path / "recipe.yml", factory.linear(ONE, moved))
    done = factory.smelt("merge", recipe, tmp_path / "one", "--allow", "vocabulary", "--json")
    assert done.code == 0
    told = "the vocabulary of moved differs from that of llama-ft1, which the output gets: 2 tokens moved, "
    assert f"{told}0 lacking, 0 more" in done.json["notes"]
    report = merge(tmp_path / "two", ONE, moved, allow=["vocabulary"])
    assert f"{told}0 lacking, 0 more" in report.plan.notes
    assert tokenizer_of(tmp_path / "two") == tokenizer_of(ONE)
    assert factory.stored(tmp_path / "one").keys() == factory.stored(tmp_path / "two").keys()


def test_moved_against_whom_the_output_gets(tmp_path: Path) -> None:
    """With two of three the same, the error names the one that differs from the tokenizer's giver."""
    moved = edited(tmp_path / "moved", "llama-ft2", tokenizer=swap)
    error = str(refused(moved, ONE, BASE))
    assert "in llama-ft1 than in moved" in error
    assert "in llama-base than in moved" in error
    error = str(refused(moved, ONE, base_model=str(BASE)))
    assert "in moved than in llama-base" in error
    assert "llama-ft1" not in error


def test_renamed_tokens_are_noted(tmp_path: Path) -> None:
    renamed = edited(tmp_path / "renamed", "llama-ft2", tokenizer=rename)
    report = merge(tmp_path / "out", ONE, renamed)
    assert (
        "the vocabulary of renamed differs from that of llama-ft1, which the output gets: "
        "0 tokens moved, 1 lacking, 1 more" in report.plan.notes
    )
    assert tokenizer_of(tmp_path / "out") == tokenizer_of(ONE)


def test_renamed_tokens_where_equal_ones_are_asked_for(tmp_path: Path) -> None:
    renamed = edited(tmp_path / "renamed", "llama-ft2", tokenizer=rename)
    error = str(refused(ONE, renamed, tokenizer_source="union"))
    assert "the vocabularies of llama-ft1 and renamed differ, and building a vocabulary" in error
    assert "0 tokens moved, 1 only in llama-ft1, 1 only in renamed" in error
    assert "'<|im_start|>'" in error


def test_the_same_ids_in_another_order_are_equal(tmp_path: Path) -> None:
    def turned(tree: Tree) -> None:
        tree["model"]["vocab"] = dict(reversed(tree["model"]["vocab"].items()))

    other = edited(tmp_path / "other", "llama-ft2", tokenizer=turned)
    report = merge(tmp_path / "out", ONE, other, tokenizer_source="union")
    assert not [note for note in report.plan.notes if "vocabular" in note]


def test_a_damaged_tokenizer_is_named(tmp_path: Path) -> None:
    damaged = edited(tmp_path / "damaged", "llama-ft2", tokenizer=lambda tree: tree["model"].pop("vocab"))
    error = refused(ONE, damaged)
    assert error.exit_code == 3
    assert "model damaged: tokenizer.json holds no vocabulary" in str(error)


def test_a_tokenizer_that_is_no_json(tmp_path: Path) -> None:
    damaged = factory.copy(TWO, tmp_path / "damaged")
    (damaged / "tokenizer.json").write_text('{"model": ')
    error = refused(ONE, damaged)
    assert error.exit_code == 3
    assert "tokenizer.json" in str(error)
    assert "damaged" in str(error)


# --- chat templates -------------------------------------------------------------------------------------------------

CONVERSATION = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
OTHER = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"


def chat(folder: Path, *, generate: bool = False) -> str:
    """What transformers renders for a merged model."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return tokenizer.apply_chat_template(CONVERSATION, tokenize=False, add_generation_prompt=generate)


def test_chatml_as_transformers_renders_it(tmp_path: Path) -> None:
    merge(tmp_path / "out", ONE, TWO, chat_template="chatml")
    turns = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHo<|im_end|>\n"
    assert chat(tmp_path / "out") == turns
    assert chat(tmp_path / "out", generate=True) == turns + "<|im_start|>assistant\n"


def test_the_golden_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What MergeKit wrote for the same recipe renders the same."""
    monkeypatch.chdir(factory.GOLDEN)
    smelt.merge(Path("cases") / "chat-template" / "recipe.yml", tmp_path / "out")
    ours = {generate: chat(tmp_path / "out", generate=generate) for generate in (False, True)}
    golden = factory.GOLDEN / "cases" / "chat-template" / "expected_chat_template.jinja"
    (tmp_path / "out" / "chat_template.jinja").write_bytes(golden.read_bytes())
    assert ours == {generate: chat(tmp_path / "out", generate=generate) for generate in (False, True)}


def test_a_template_replaces_the_models_own(tmp_path: Path) -> None:
    """One template is left, in its file; the rest of tokenizer_config.json stays."""
    model = edited(tmp_path / "model", "llama-ft1", tokenizer_config=template("{{ 'old' }}"))
    (model / "chat_template.json").write_text('{"chat_template": "old"}')
    merge(tmp_path / "out", model, TWO, chat_template="chatml")
    before = json.loads((model / "tokenizer_config.json").read_text())
    after = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert before.pop("chat_template") == "{{ 'old' }}"
    assert after == before
    assert not (tmp_path / "out" / "chat_template.json").exists()
    assert chat(tmp_path / "out").startswith("<|im_start|>user\nHi")


def test_a_template_file_is_replaced(tmp_path: Path) -> None:
    model = factory.copy(ONE, tmp_path / "model")
    (model / "chat_template.jinja").write_text("{{ 'old' }}")
    merge(tmp_path / "out", model, TWO, chat_template=OTHER)
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == OTHER
    assert chat(tmp_path / "out") == "<user>Hi<assistant>Ho"


def test_without_the_key_templates_stay_as_they_are(tmp_path: Path) -> None:
    model = edited(tmp_path / "model", "llama-ft1", tokenizer_config=template("{{ 'own' }}"))
    (model / "chat_template.jinja").write_text("{{ 'file' }}")
    merge(tmp_path / "out", model, TWO)
    assert tokenizer_of(tmp_path / "out") == tokenizer_of(model)


@pytest.mark.parametrize(
    ("carried", "chosen"),
    [
        ([None, OTHER, OTHER], OTHER),
        (["{{ 'a' }}", "{{ 'b' }}", None], "{{ 'a' }}"),
        (["{{ 'a' }}", OTHER, OTHER], OTHER),
        ([None, None, OTHER], OTHER),
    ],
    ids=str,
)
def test_auto(carried: list[str | None], chosen: str, tmp_path: Path) -> None:
    """The most common one of all models, the base included; of equally common ones the first."""
    folders = []
    for index, (text, origin) in enumerate(zip(carried, ("llama-ft1", "llama-ft2", "llama-base"), strict=True)):
        edits = {} if text is None else {"tokenizer_config": template(text)}
        folders.append(edited(tmp_path / f"m{index}", origin, **edits))
    *models, base = folders
    tree = factory.linear(*models, base_model=str(base), chat_template="auto", merge_method="task_arithmetic")
    smelt.merge(tree, tmp_path / "out")
    assert (tmp_path / "out" / "chat_template.jinja").read_text().strip() == chosen
    assert "chat_template" not in json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())


def test_auto_without_any(tmp_path: Path) -> None:
    report = merge(tmp_path / "out", ONE, TWO, chat_template="auto")
    assert [warning.partition(": ")[2] for warning in report.warnings] == [
        "chat_template is auto, and no model has one"
    ]
    assert not (tmp_path / "out" / "chat_template.jinja").exists()


@pytest.mark.parametrize(
    ("asked", "fix"),
    [
        ("chat_ml", "did you mean `chatml`?"),
        ("ChatML", "did you mean `chatml`?"),
        ("automatic", "did you mean `auto`?"),
        ("vicuna-v1.5", "write auto, chatml, "),
        ("../../secret", "write auto, chatml, "),
        ("templates/mine.jinja", "write auto, chatml, "),
    ],
)
def test_no_such_template(asked: str, fix: str) -> None:
    error = refused(ONE, TWO, chat_template=asked)
    assert f"there is no chat template '{asked}'" in str(error)
    assert fix in str(error)


def test_a_template_is_never_rendered(tmp_path: Path) -> None:
    """Not even one that would do harm: it is text."""
    text = "{{ ''.__class__.__mro__[1].__subclasses__() }}{% for x in range(10**12) %}{{ x }}{% endfor %}{{"
    merge(tmp_path / "out", ONE, TWO, chat_template=text)
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == text
