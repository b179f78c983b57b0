"""The corpus: each folder of `reject` is refused as its `case.toml` says, each one of `accept` merges to the same bits.

A case folder is copied to `model` in an empty folder, beside `sound` (a sound model of tensors w [2, 2] and b [2]),
`sound.safetensors` and `secret.txt`. Its `recipe.yml`, if it has one, is moved beside the models; else the model is
taken by passthrough. `case.toml` has `code` (exit code) and `says` (parts of the message), and may ask for what a
repository cannot hold: `links` (name to target), `pipes`, `folders`, `sizes` (name to bytes: a hole), `repeat` (name to
how often its content is repeated); `words` are further words of the command. To add a case, add a folder.
"""

from __future__ import annotations

import os
import shutil
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors

import factory
from factory import Done, smelt, snapshot

HERE = Path(__file__).parent
REJECT, ACCEPT = (sorted(path for path in (HERE / name).iterdir() if path.is_dir()) for name in ("reject", "accept"))
PASSTHROUGH = "merge_method: passthrough\nmodels: [{model: model}]\n"


def prepared(case: Path, folder: Path) -> dict[str, Any]:
    """Set the case up in `folder`; gives its `case.toml`."""
    asked = tomllib.loads((case / "case.toml").read_text(encoding="utf-8"))
    model = folder / "model"
    shutil.copytree(case, model, ignore=shutil.ignore_patterns("case.toml"))
    sound = {"w": np.float32([[1, 2], [3, 4]]), "b": np.float32([5, 6])}
    factory.model(folder / "sound", sound)
    (folder / "sound.safetensors").write_bytes(factory.file(sound))
    (folder / "secret.txt").write_text("the secret")
    for name, times in asked.get("repeat", {}).items():
        (model / name).write_bytes((model / name).read_bytes() * times)
    for name, target in asked.get("links", {}).items():
        os.symlink(target, model / name)
    for name in asked.get("pipes", []):
        os.mkfifo(model / name)
    for name in asked.get("folders", []):
        (model / name).mkdir()
    for name, size in asked.get("sizes", {}).items():
        with open(model / name, "wb") as file:
            file.truncate(size)
    if (model / "recipe.yml").exists():
        (model / "recipe.yml").rename(folder / "recipe.yml")
    else:
        (folder / "recipe.yml").write_text(PASSTHROUGH)
    return asked


def seen(folder: Path) -> dict[str, str]:
    """What is on the disk; of files that are holes the size alone."""
    small = [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size < 1 << 20]
    assert len(small) < 50
    return snapshot(folder)


def merged(folder: Path, words: list[str]) -> Done:
    return smelt("merge", folder / "recipe.yml", folder / "out", *words)


def name_of(case: Path) -> str:
    return case.name


@pytest.mark.parametrize("case", REJECT, ids=name_of)
def test_reject(case: Path, tmp_path: Path) -> None:
    asked = prepared(case, tmp_path)
    before = seen(tmp_path)
    done = merged(tmp_path, asked.get("words", []))
    assert done.code == asked["code"], done.text
    assert asked["says"]
    for said in asked["says"]:
        assert said in done.err, done.err
    assert "Traceback" not in done.text
    assert "defect" not in done.err
    assert "the secret" not in done.text
    assert len(done.err) < 8000
    assert done.out == ""
    assert seen(tmp_path) == before
    told = smelt("merge", tmp_path / "recipe.yml", tmp_path / "out", *asked.get("words", []), "--json")
    assert (told.code, told.json["exit_code"], told.json["ok"]) == (asked["code"], asked["code"], False)


@pytest.mark.parametrize("case", ACCEPT, ids=name_of)
def test_accept(case: Path, tmp_path: Path) -> None:
    asked = prepared(case, tmp_path)
    done = merged(tmp_path, asked.get("words", []))
    assert done.code == 0, done.text
    files = [path for path in (tmp_path / "model").glob("*.safetensors") if path.name != "consolidated.safetensors"]
    if (tmp_path / "model" / "model.safetensors").exists():
        files = [tmp_path / "model" / "model.safetensors"]
    given = [tensor for path in files for tensor in safetensors.deserialize(path.read_bytes())]
    kept = [t for path in (tmp_path / "out").glob("*.safetensors") for t in safetensors.deserialize(path.read_bytes())]
    assert comparable(kept) == comparable(given)
    assert smelt("verify", tmp_path / "out").code == 0


def comparable(tensors: list[Any]) -> dict[str, tuple[str, list[int], bytes]]:
    return {name: (entry["dtype"], entry["shape"], bytes(entry["data"])) for name, entry in tensors}


def test_every_row_that_the_corpus_is_for_has_cases() -> None:
    rows = {int(case.name[:2]) for case in REJECT}
    assert rows >= {1, 2, 3, 4, 5, 6, 13, 14, 17, 26}
    assert len(REJECT) > 60
    assert len(ACCEPT) > 15
