"""Kernels that read the models' files by themselves, in whole merges: a file that changes meanwhile is told as ever."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import factory
from factory import INPUT, config, linear, model, recipe, smelt
from smelt.engine import run as engine
from smelt.engine.tiles import STREAMED_TASK
from smelt.storage import files
from smelt.storage.checkpoint import Checkpoint

pytestmark = pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="numba, hence any kernel, is missing")

WIDTH = 4096
ROWS = 5 * STREAMED_TASK // (2 * WIDTH)
"""Of the large tensor: three tasks."""
TIES = {"merge_method": "ties", "base_model": "m0", "parameters": {"weight": 0.5, "density": 0.5}}
RECIPES: dict[str, dict[str, Any]] = {
    "linear": linear("m1", "m2"),
    "slerp": linear("m1", merge_method="slerp", base_model="m0", parameters={"t": 0.3}),
    "ties": linear("m1", "m2", **TIES),
    "dare_ties": linear("m1", "m2", **TIES | {"merge_method": "dare_ties"}),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three models of 21 MB in two large tensors."""
    assert 2 * STREAMED_TASK < ROWS * WIDTH <= 3 * STREAMED_TASK
    folder = tmp_path_factory.mktemp("large")
    for i in range(3):
        noise = np.random.default_rng(i)
        tensors = {
            f"model.layers.{layer}.mlp.up_proj.weight": noise.standard_normal((ROWS, WIDTH), dtype=np.float32).astype(
                ml_dtypes.bfloat16
            )
            for layer in range(2)
        }
        model(folder / f"m{i}", tensors, config())
    return folder


@pytest.fixture
def folder(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The models with an m1 that may be harmed, and merges that are worth kernels."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(engine, "WORTH_KERNELS", 1 << 20)
    for name in ("m0", "m2"):
        (tmp_path / name).symlink_to(models / name)
    factory.copy(models / "m1", tmp_path / "m1")
    return tmp_path


def cut(path: Path) -> None:
    """In the middle of the second tensor, and of a piece."""
    os.truncate(path, path.stat().st_size * 3 // 4 + 4321)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def grow(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b"more")


def edit(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x01")


def swap(path: Path) -> None:
    """Another file of the same size and times, with other numbers, takes the name."""
    stat, other = path.stat(), path.with_name("other")
    data = bytearray(path.read_bytes())
    data[-(1 << 20) :] = bytes(1 << 20)
    other.write_bytes(data)
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    os.replace(other, path)


class Meanwhile:
    """Makes a change to m1 when a kernel is about to read it for the k-th time; counts all these reads."""

    def __init__(self, patch: pytest.MonkeyPatch, path: Path, change: Callable[[Path], None] | None, at: int) -> None:
        self.reads = 0
        real = Checkpoint.place_of

        def place_of(source: Checkpoint, *range_of: Any) -> tuple[int, int]:
            place = real(source, *range_of)
            if source.name == "m1":
                self.reads += 1
                if self.reads == at and change is not None:
                    change(path)
            return place

        patch.setattr(Checkpoint, "place_of", place_of)


def reads(folder: Path, tree: dict[str, Any]) -> int:
    """How often kernels read m1 in a whole merge; the merge must succeed."""
    with pytest.MonkeyPatch.context() as patch:
        seen = Meanwhile(patch, folder, None, 0)
        done = smelt("merge", recipe(folder / "recipe.yml", tree), folder / "sound", "--threads", 1)
    assert done.code == 0, done.text
    return seen.reads


@pytest.mark.parametrize("change", [cut, empty, grow, edit, swap, os.unlink], ids=lambda change: change.__name__)
@pytest.mark.parametrize("name", RECIPES)
def test_a_model_that_changes_while_kernels_read_it(
    folder: Path, name: str, change: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At their first read, and at one of the last: an error with the file's name, and nothing is left."""
    count = reads(folder, RECIPES[name])
    assert count >= 6  # each of three tasks of two tensors, in every pass
    path = folder / "m1" / "model.safetensors"
    sound = path.read_bytes()
    for at in (1, count - 1):
        path.unlink(missing_ok=True)
        path.write_bytes(sound)
        before = set(os.listdir(folder))
        with pytest.MonkeyPatch.context() as patch:
            seen = Meanwhile(patch, path, change, at)
            words = ("--threads", 1 if at == 1 else 2, *(["--resume"] if at == 1 else []))
            done = smelt("merge", folder / "recipe.yml", folder / "out", *words)
        assert seen.reads >= at
        assert done.code == INPUT, done.text
        said = (
            "the file ends early" if change in (cut, empty) else "input files were changed while they were being read"
        )
        assert said in done.err
        assert "m1" in done.err
        assert "model.safetensors" in done.err
        assert "Traceback" not in done.err
        assert set(os.listdir(folder)) == before


@pytest.mark.parametrize("name", RECIPES)
def test_a_cut_file_is_the_same_error_with_and_without_kernels(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels know only that a read failed; what is told is found out by the ordinary one."""
    count = reads(folder, RECIPES[name])
    path = folder / "m1" / "model.safetensors"
    sound = path.read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        seen = Meanwhile(patch, path, cut, count // 2)
        by_kernels = smelt("merge", folder / "recipe.yml", folder / "out", "--threads", 1)
    assert seen.reads >= count // 2
    path.write_bytes(sound)
    monkeypatch.setattr(engine, "WORTH_KERNELS", 1 << 40)
    real = files.WriteFile.write_at
    begun: list[int] = []

    def write_at(file: Any, offset: int, data: Any) -> None:
        if file.path.suffix == ".safetensors" and offset > 8 and not begun:
            begun.append(offset)
            cut(path)
        real(file, offset, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files.WriteFile, "write_at", write_at)
        ordinary = smelt("merge", folder / "recipe.yml", folder / "out", "--threads", 1)
    assert begun
    assert by_kernels.code == ordinary.code == INPUT
    assert error_of(by_kernels) == error_of(ordinary)


def error_of(done: factory.Done) -> str:
    """What is said from the error on."""
    assert done.err.count("error: ") == 1, done.err
    return done.err[done.err.index("error: ") :]


def test_a_read_that_fails_once_is_made_again(folder: Path) -> None:
    """Kernels that are given a descriptor on which nothing can be read: the ordinary reads give the same bytes."""
    assert reads(folder, RECIPES["ties"])
    real = Checkpoint.place_of
    refused: list[int] = []
    closed = os.open(os.devnull, os.O_WRONLY)

    def place_of(source: Checkpoint, *range_of: Any) -> tuple[int, int]:
        place = real(source, *range_of)
        if source.name == "m2":
            refused.append(place[0])
            return closed, place[1]
        return place

    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Checkpoint, "place_of", place_of)
            done = smelt("merge", folder / "recipe.yml", folder / "out", "--threads", 2)
    finally:
        os.close(closed)
    assert done.code == 0, done.text
    assert refused
    made, sound = (folder / name / "model.safetensors" for name in ("out", "sound"))
    assert made.read_bytes() == sound.read_bytes()
