"""Merges larger than memory: the same bytes, and what is done with is let go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import factory
from factory import smelt
from smelt.engine.streaming import exceed_memory
from smelt.storage import caching
from smelt.storage.files import ReadFile, WriteFile
from smelt.storage.sources.local import open_folder

LARGE = ("a", "b", "c")
"""Tensors of 3 MiB."""
SIZE = 3 << 20


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three models of a few large tensors and a small one."""
    random = np.random.default_rng(0)
    for number in range(3):
        tensors = {name: random.standard_normal((768, 1024)).astype(np.float32) for name in LARGE}
        factory.model(tmp_path / f"m{number}", {**tensors, "small": np.ones(8, np.float32)})
    return tmp_path


def weighed(*names: str) -> list[dict[str, Any]]:
    return [{"model": name, "parameters": {"weight": 0.5}} for name in names]


RECIPES: dict[str, dict[str, Any]] = {
    "ties": {
        "merge_method": "ties",
        "base_model": "m0",
        "models": weighed("m1", "m2"),
        "parameters": {"density": 0.5},
    },
    "copies": {"merge_method": "passthrough", "models": [{"model": "m1"}]},
    "nested": {
        "merges": {"mean": {"merge_method": "linear", "models": weighed("m1", "m2")}},
        "merge_method": "slerp",
        "base_model": "m0",
        "models": [{"model": "m0"}, {"model": "mean"}],
        "parameters": {"t": 0.5},
    },
}


def streaming(patch: pytest.MonkeyPatch) -> dict[str, set[tuple[int, int]]]:
    """Let every merge be larger than memory; gives what is let go, by model, as it happens."""
    gone: dict[str, set[tuple[int, int]]] = {}
    whole = ReadFile.let_go

    def let_go(self: ReadFile, start: int, stop: int) -> None:
        gone.setdefault(self.path.parent.name, set()).add((start, stop))
        whole(self, start, stop)

    patch.setattr(caching, "available_bytes", lambda: 1000)
    patch.setattr(ReadFile, "let_go", let_go)
    return gone


def all_large(folder: Path, *names: str) -> dict[str, set[tuple[int, int]]]:
    """Where the large tensors of these models lie."""
    places = {}
    for name in names:
        with open_folder(folder / name, name=name) as source:
            places[name] = {(spec.offset, spec.offset + SIZE) for spec in map(source.tensors.__getitem__, LARGE)}
    return places


@pytest.mark.parametrize(("kind", "models"), [("ties", "m0 m1 m2"), ("copies", "m1"), ("nested", "m0 m1 m2")])
def test_a_merge_that_streams_writes_the_same_and_lets_all_go(
    folder: Path, kind: str, models: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    factory.accepted(folder, RECIPES[kind], out="plain")
    gone = streaming(monkeypatch)
    factory.accepted(folder, RECIPES[kind], out="streamed")
    assert gone == all_large(folder, *models.split())
    for path in sorted((folder / "plain").iterdir()):
        if path.suffix == ".safetensors":
            assert (folder / "streamed" / path.name).read_bytes() == path.read_bytes()


def test_a_merge_that_fits_keeps_all(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = streaming(monkeypatch)
    written = []
    monkeypatch.setattr(WriteFile, "let_go", lambda self: written.append(self.path.name))
    monkeypatch.setattr(caching, "available_bytes", lambda: 1 << 40)
    factory.accepted(folder, RECIPES["ties"], out="out")
    assert (gone, written) == ({}, [])
    monkeypatch.setattr(caching, "available_bytes", lambda: 1000)
    factory.accepted(folder, RECIPES["ties"], out="again")
    assert set(written) == {path.name for path in (folder / "again").glob("*.safetensors")}


def test_a_tensor_is_let_go_when_all_candidates_have_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = streaming(monkeypatch)
    factory.recipe(folder / "recipe.yml", RECIPES["ties"])
    words = ("--over", "density=0.2,0.5,0.8")
    done = smelt("sweep", folder / "recipe.yml", "--out", folder / "out", *words)
    assert done.code == 0, done.err
    assert gone == all_large(folder, "m0", "m1", "m2")
    gone.clear()
    monkeypatch.setattr(caching, "available_bytes", lambda: 1 << 40)
    assert smelt("sweep", folder / "recipe.yml", "--out", folder / "plain", *words).code == 0
    assert gone == {}
    for path in sorted((folder / "plain").rglob("*.safetensors")):
        assert (folder / "out" / path.relative_to(folder / "plain")).read_bytes() == path.read_bytes()


def test_what_exceeds_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_folder(folder / "m0", name="m0") as source:
        size = source.files[0].size
        for room, written, exceeds in ((size, 0, False), (size, 1, True), (size + 1, 1, False), (None, 1 << 60, False)):
            monkeypatch.setattr(caching, "available_bytes", lambda room=room: room)
            assert exceed_memory([source], written) is exceeds
