"""`planning.locate`: what a model's name leads to."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import factory
from smelt.errors import SmeltError
from smelt.planning.locate import Model, open_models
from smelt.recipe.parse import from_dict


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as opened:
        yield opened


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No network, an empty hub cache, and a working folder of its own."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


def located(stack: ExitStack, *names: Any, beside: Path | None) -> dict[str, Model]:
    tree = {"merge_method": "linear", "models": [{"model": name} for name in names], "parameters": {"weight": 1}}
    return open_models(from_dict(tree).mentions(), beside=beside, stack=stack)


def one(folder: Path, seed: int = 0) -> Path:
    return factory.model(folder, factory.llama(seed=seed), factory.config())


def test_beside_the_recipe_goes_before_the_working_folder(tmp_path: Path, stack: ExitStack) -> None:
    beside, here = one(tmp_path / "recipes" / "m"), one(tmp_path / "work" / "m")
    (found,) = located(stack, "m", beside=tmp_path / "recipes").values()
    assert (found.planned.place, found.name, found.planned.commit) == (str(beside), "m", None)
    (found,) = located(stack, "m", beside=tmp_path / "elsewhere").values()
    assert found.planned.place == str(here)
    (found,) = located(stack, "m", beside=None).values()
    assert found.planned.place == str(here)


@pytest.mark.parametrize("name", ["m", "./m", "m/", "../recipes/m", "absolute", "~/m", "link", "m/model.safetensors"])
def test_spellings(tmp_path: Path, stack: ExitStack, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "recipes"))
    place = one(tmp_path / "recipes" / "m")
    os.symlink("m", tmp_path / "recipes" / "link")
    given = str(place) if name == "absolute" else name
    (found,) = located(stack, given, beside=tmp_path / "recipes").values()
    weights = name.endswith(".safetensors")
    assert found.planned.place == str(place / "model.safetensors" if weights else place)
    assert found.name == ("model.safetensors" if weights else "m")
    assert found.config == factory.config()


def test_spellings_of_one_folder_are_one_model(tmp_path: Path, stack: ExitStack) -> None:
    place = one(tmp_path / "m")
    found = located(stack, "m", "./m", "m/", str(place), {"path": "m"}, beside=tmp_path)
    assert len({id(model) for model in found.values()}) == 1


def test_folders_of_one_name_are_told_apart(tmp_path: Path, stack: ExitStack) -> None:
    for i, parent in enumerate("abc"):
        one(tmp_path / parent / "m", seed=i)
    found = located(stack, "a/m", "b/m", "c/m", beside=tmp_path)
    assert [model.name for model in found.values()] == ["m", "m-2", "m-3"]
    assert [model.planned.ref.text for model in found.values()] == ["a/m", "b/m", "c/m"]


def test_a_number_that_is_taken_is_left_out(tmp_path: Path, stack: ExitStack) -> None:
    for place in ("m-2", "a/m", "b/m"):
        one(tmp_path / place)
    found = located(stack, "m-2", "a/m", "b/m", beside=tmp_path)
    assert [model.name for model in found.values()] == ["m-2", "m", "m-3"]


def test_names_with_an_at_sign_may_be_folders(tmp_path: Path, stack: ExitStack) -> None:
    place = one(tmp_path / "org" / "m@v2")
    (found,) = located(stack, "org/m@v2", beside=tmp_path).values()
    assert (found.planned.place, found.name) == (str(place), "m@v2")


COMMITS = ("a" * 40, "b" * 40)


@pytest.fixture
def cached(tmp_path: Path) -> list[Path]:
    """org/chat in the hub cache, in two revisions."""
    home = tmp_path / "hf"
    return [
        factory.hub_model(home, "org/chat", one(tmp_path / "made" / str(i), seed=i), commit=commit, refs=(reference,))
        for i, (commit, reference) in enumerate(zip(COMMITS, ("main", "v2"), strict=True))
    ]


def test_the_hub_cache(tmp_path: Path, stack: ExitStack, cached: list[Path]) -> None:
    names = ["org/chat", "org/chat@v2", {"model": {"path": "org/chat", "revision": COMMITS[1]}}]
    found = located(stack, *names, beside=tmp_path)
    models = list(found.values())
    assert [model.planned.commit for model in models] == [COMMITS[0], COMMITS[1], COMMITS[1]]
    assert models[1] is models[2]
    assert [model.name for model in models[:2]] == ["org/chat", "org/chat@v2"]
    assert {model.planned.repository for model in models} == {"org/chat"}
    assert Path(models[0].planned.place) == cached[0]


def test_a_folder_goes_before_the_hub_and_a_path_never_means_it(
    tmp_path: Path, stack: ExitStack, cached: list[Path]
) -> None:
    with pytest.raises(SmeltError, match=r"there is no model at '\./org/chat'"):
        located(stack, "./org/chat", beside=tmp_path)
    one(tmp_path / "org" / "chat")
    (found,) = located(stack, "org/chat", beside=tmp_path).values()
    assert found.planned.commit is None


@pytest.mark.parametrize(
    ("name", "fix"),
    [
        ("./lama", "did you mean {folder}/llama?"),
        ("./Llama", "did you mean {folder}/llama?"),
        ("./llama-", "did you mean {folder}/llama?"),
        ("sub/tuned-v1", "did you mean {folder}/sub/tuned-v2?"),
        ("./something-else", "paths are relative to the recipe's folder"),
        ("./no/such/parent", "paths are relative"),
        ("C:\\models\\llama", "paths are relative"),
    ],
)
def test_typos(tmp_path: Path, stack: ExitStack, name: str, fix: str) -> None:
    folder = tmp_path / "recipes"
    one(folder / "llama")
    one(folder / "sub" / "tuned-v2")
    with pytest.raises(SmeltError) as caught:
        located(stack, name, beside=folder)
    (problem,) = caught.value.problems
    assert problem.exit_code == 3
    assert problem.fix is not None
    assert fix.format(folder=folder) in problem.fix


def test_everything_that_cannot_be_opened_is_told(tmp_path: Path, stack: ExitStack) -> None:
    one(tmp_path / "good")
    (tmp_path / "empty").mkdir()
    os.truncate(one(tmp_path / "cut") / "model.safetensors", 300)
    factory.model(tmp_path / "odd", factory.llama(), factory.config(layers=9))
    with pytest.raises(SmeltError) as caught:
        located(stack, "good", "empty", "cut", "./none", "odd", beside=tmp_path)
    told = [problem.render() for problem in caught.value.problems]
    assert len(told) == 4
    for text, said in zip(told, ("no weight files", "cut", "./none", "config.json says 9 layers"), strict=True):
        assert said in text
        assert "models[" in text or "recipe" in text, "the place in the recipe is told"


def test_the_models_are_closed_with_the_stack(tmp_path: Path) -> None:
    one(tmp_path / "m")
    with ExitStack() as stack:
        (found,) = located(stack, "m", beside=tmp_path).values()
        spec = found.source.tensors["model.norm.weight"]
        found.source.read_into(spec, 0, 4, bytearray(4))
    with pytest.raises(ValueError, match="closed"):
        found.source.read_into(spec, 0, 4, bytearray(4))
