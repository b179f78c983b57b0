"""What docs/trust.md promises and no other test shows: the order of refusals, no network, inputs that change."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

import numpy as np
import pytest

import factory
import smelt as library
from factory import INPUT, STORAGE, accepted, config, linear, llama, model, recipe, refused, smelt, snapshot
from smelt.storage import files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    factory.llamas(tmp_path, 2)
    return tmp_path


# --- an output that cannot be ---------------------------------------------------------------------------------------


def spoilt(folder: Path) -> None:
    """Cut the models off: whoever opens them says so."""
    for i in range(2):
        os.truncate(folder / f"m{i}" / "model.safetensors", 500)


def test_an_unusable_output_is_told_before_any_model_is_opened(folder: Path) -> None:
    spoilt(folder)
    (folder / "file").write_text("x")
    (folder / "full").mkdir()
    (folder / "full" / "x").write_text("x")
    os.symlink("nowhere", folder / "dangling")
    for out, says in (
        ("file", "the output exists and is not a folder"),
        ("full", "the output folder is not empty"),
        ("dangling", "the output is a link that leads nowhere"),
        ("file/below", "the output's parent is not a folder"),
    ):
        refused(folder, linear("m0", "m1"), code=STORAGE, says=[says], out=out)
    refused(folder, linear("m0", "m1"), code=INPUT, says=["cut off"], out="out", problems=2)


def test_a_folder_that_cannot_be_written_to(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoilt(folder)
    monkeypatch.setattr(files, "refuses_writes", lambda path: "Permission denied")
    refused(folder, linear("m0", "m1"), code=STORAGE, says=["the output's folder cannot be written to"])


def test_an_output_that_is_an_input_is_told_as_that(folder: Path) -> None:
    spoilt(folder)
    says = ["the output folder is an input", "inputs are never touched"]
    refused(folder, linear("m0", "m1"), code=STORAGE, says=says, out="m0")
    refused(folder, linear("m0", "m1"), code=STORAGE, says=["lies in an input"], out="m0/model.safetensors")


def test_missing_models_are_told_with_an_unusable_output(folder: Path) -> None:
    (folder / "file").write_text("x")
    says = ["the output exists and is not a folder", "there is no model at './zzz'"]
    refused(folder, linear("m0", "./zzz"), code=STORAGE, says=says, out="file", problems=2)


def test_mistakes_of_the_recipe_come_first(folder: Path) -> None:
    (folder / "file").write_text("x")
    tree = linear("m0", "m1", parameters={"weihgt": 1})
    refused(folder, tree, code=2, says=["weihgt"], out="file")


# --- inputs ---------------------------------------------------------------------------------------------------------


def test_an_input_that_changes_during_the_run_is_noticed(folder: Path) -> None:
    path = recipe(folder / "recipe.yml", linear("m0", "m1"))
    weights = folder / "m1" / "model.safetensors"
    before = snapshot(folder).keys()

    def late(done: int, total: int) -> None:
        os.utime(weights, ns=(1, 1))

    for changes in ({"progress": late}, {"on_plan": lambda prepared: os.utime(weights, ns=(2, 2))}):
        with pytest.raises(library.InputError, match="changed"):
            library.merge(path, folder / "out", **changes)  # type: ignore[arg-type]
        assert snapshot(folder).keys() == before


def test_an_output_that_shares_its_files_with_an_input(folder: Path) -> None:
    """A hard link in a replaced folder is removed as a name; the input's bytes stay."""
    (folder / "out").mkdir()
    os.link(folder / "m0" / "model.safetensors", folder / "out" / "model.safetensors")
    before = (folder / "m0" / "model.safetensors").read_bytes()
    accepted(folder, linear("m0", "m1"), "--overwrite")
    assert (folder / "m0" / "model.safetensors").read_bytes() == before
    assert (folder / "m0" / "model.safetensors").stat().st_nlink == 1


def test_what_check_cannot_tell_is_named(folder: Path) -> None:
    for i in range(2):
        odd = {f"model.ids.{n}": np.arange(3) + i for n in range(7)} | {"model.on": np.array([True])}
        model(folder / f"m{i}", llama(seed=i) | odd, config())
    path = recipe(folder / "recipe.yml", linear("m0", "m1"))
    done = smelt("check", path)
    assert done.code == 0
    assert (
        "note: 8 tensors (bool and int64) must be the same in every model, which is compared when merging" in done.out
    )
    assert "model.ids.0, " in done.out
    assert "and 3 more" in done.out
    assert len(smelt("check", path, "--json").json["compared_at_merge"]) == 8
    refused(folder, linear("m0", "m1"), code=INPUT, says=["'model.ids.6' holds int64 numbers that differ"], problems=7)
    factory.llamas(folder, 2)
    assert smelt("check", path, "--json").json["compared_at_merge"] == []
    assert "note: " not in smelt("check", path).out


# --- no network, another file system --------------------------------------------------------------------------------


def test_local_work_opens_no_socket(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    path = recipe(folder / "recipe.yml", linear("m0", "./m1"))
    monkeypatch.chdir(folder)
    for words in (("plan", path), ("check", path), ("merge", path, "out"), ("verify", "out", "--model", "m0=m0")):
        assert smelt(*words, HF_HUB_OFFLINE="0").code == (0 if words[0] != "verify" else INPUT)
    assert smelt("verify", "out", "--model", "m0=m0", "--model", "m1=m1", HF_HUB_OFFLINE="0").code == 0


def test_a_rename_that_the_file_system_refuses(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def rename(*_: object) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "rename", rename)
    refused(folder, linear("m0", "m1"), code=STORAGE, says=["cannot rename to out"])
