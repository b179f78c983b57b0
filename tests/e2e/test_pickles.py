"""Models stored as pickles: refused by name, read in a process apart when trusted, and never run."""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import factory
from factory import INPUT, STORAGE, Done, config, linear, llama, recipe, smelt, snapshot, stored
from smelt.storage.sources import pickles

TRUST = "--trust-pickles"


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """TMPDIR for this test; nothing may be left in it."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    yield folder
    assert list(folder.iterdir()) == []


def tensors(seed: int = 0) -> dict[str, Any]:
    return {name: torch.from_numpy(value) for name, value in llama(seed=seed).items()}


def pickled(folder: Path, files: dict[str, Any], *, index: dict[str, str] | None = None, **save: Any) -> Path:
    """A model whose weights are what `torch.save` makes of `files`."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config()))
    for name, value in files.items():
        torch.save(value, folder / name, **save)
    if index is not None:
        (folder / pickles.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


def merged(folder: Path, tree: Any, *words: str) -> Done:
    return smelt("merge", recipe(folder / "recipe.yml", tree), folder / "out", *words)


class Canary:
    """A pickle of this runs a command when it is loaded by Python's own reader."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.path}",)


# --- refused --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt"])
def test_without_the_flag_they_are_refused_by_name(tmp_path: Path, name: str) -> None:
    factory.llamas(tmp_path, 1)
    pickled(tmp_path / "p", {name: tensors()})
    says = ["no safetensors files, but pickles, which are programs", f"found {name}", "fix: convert", "--trust-pickles"]
    factory.refused(tmp_path, linear("m0", "p"), code=INPUT, says=says)
    for command in ("plan", "check"):
        assert smelt(command, tmp_path / "recipe.yml").code == INPUT
    tree = linear("m0", f"./p/{name}")
    factory.refused(tmp_path, tree, code=INPUT, says=["but a pickle, which is a program", "--trust-pickles"])


def test_a_malicious_pickle_runs_nothing_even_if_trusted(tmp_path: Path, temporary: Path) -> None:
    factory.llamas(tmp_path, 1)
    canary = tmp_path / "canary"
    pickled(tmp_path / "zipped", {"pytorch_model.bin": {"a": Canary(canary)}})
    pickled(tmp_path / "legacy", {"pytorch_model.bin": {"a": Canary(canary)}}, _use_new_zipfile_serialization=False)
    bare = pickled(tmp_path / "bare", {})
    (bare / "pytorch_model.bin").write_bytes(pickle.dumps(Canary(canary)))
    tree = linear("m0", "zipped", "legacy", "bare")
    before = snapshot(tmp_path)
    assert merged(tmp_path, tree).code == INPUT
    done = merged(tmp_path, tree, TRUST)
    assert done.code == INPUT, done.text
    assert "defect" not in done.err
    assert done.err.count("error: ") == 3
    assert "asks for `posix.system`, which is no part of weights: it was not run" in done.err
    assert "fix: do not trust this file" in done.err
    assert not canary.exists()
    assert snapshot(tmp_path).keys() - before.keys() == {"recipe.yml"}
    os.system(f"touch {canary}")  # the canary sings when it is run
    assert canary.exists()


DAMAGED: dict[str, Callable[[Path], Any]] = {
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("hello"),
    "no dict": lambda path: torch.save([torch.ones(2)], path),
    "no tensors": lambda path: torch.save({"epoch": 3, "w": torch.ones(2)}, path),
    "nothing": lambda path: torch.save({}, path),
    "sparse": lambda path: torch.save({"w": torch.ones(2, 2).to_sparse()}, path),
    "vast": lambda path: torch.save({"w": torch.zeros(1).expand(1 << 34)}, path),
}


def test_what_is_no_state_dict(tmp_path: Path, temporary: Path) -> None:
    factory.llamas(tmp_path, 1)
    for name, spoil in DAMAGED.items():
        spoil(pickled(tmp_path / name, {"pytorch_model.bin": tensors()}) / "pytorch_model.bin")
    done = merged(tmp_path, linear("m0", *DAMAGED), TRUST)
    assert done.code == INPUT, done.text
    assert "defect" not in done.err
    for name in DAMAGED:
        assert f"  {name}: pytorch_model.bin\n" in done.err
    for said in (
        "torch cannot read the pickle",
        "it holds list, not a dict of tensors",
        "'epoch' is int, not a tensor",
        "torch.sparse_coo",
        "the pickle describes more than it holds",
    ):
        assert said in done.err
    assert done.err.count("error: ") == len(DAMAGED)
    assert not (tmp_path / "out").exists()


def test_sets_of_files(tmp_path: Path, temporary: Path) -> None:
    one, two = "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"
    weights = tensors()
    names = list(weights)
    halves = {one: {name: weights[name] for name in names[:4]}, two: {name: weights[name] for name in names[4:]}}
    sound = {name: file for file, half in halves.items() for name in half}
    (pickled(tmp_path / "lacks", halves) / two).unlink()
    pickled(tmp_path / "several", {"a.bin": weights, "b.bin": weights})
    pickled(tmp_path / "outside", halves, index=sound | {names[0]: "../x.bin"})
    pickled(tmp_path / "swapped", halves, index=sound | {names[0]: two})
    (pickled(tmp_path / "missing", halves, index=sound) / two).unlink()
    done = merged(tmp_path, linear("lacks", "several", "outside", "swapped", "missing"), TRUST)
    assert done.code == INPUT, done.text
    for said in (
        f"several pickles, and no index that says which of them are the model\n  {tmp_path / 'recipe.yml'}:5",
        "which is not the name of a weight file",
        f"1 tensors that the index lists for {two} are not in it",
        f"missing: {two}",
    ):
        assert said in done.err, done.err


def test_no_torch(tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pickled(tmp_path / "p", {"pytorch_model.bin": tensors()})
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "torch" else found(name, *more)
    )
    done = merged(tmp_path, linear("p", "p"), TRUST)
    assert done.code == INPUT
    assert "reading a pickle needs torch, which is not installed" in done.err
    assert "fix: pip install 'smelt[torch]'" in done.err


def test_no_temporary_space(tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pickled(tmp_path / "p", {"pytorch_model.bin": tensors()})
    monkeypatch.setattr(pickles.files, "free_bytes", lambda path: 1000)
    done = merged(tmp_path, linear("p", "p"), TRUST)
    assert done.code == STORAGE
    assert "not enough temporary space to read pickles" in done.err
    assert "fix: set TMPDIR" in done.err


def test_a_child_that_dies(tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pickled(tmp_path / "p", {"pytorch_model.bin": tensors()})
    (tmp_path / "child.py").write_text("import sys; print('{\"tensors\": [1'); sys.exit(9)")
    monkeypatch.setattr(pickles.unpickle, "__file__", str(tmp_path / "child.py"))
    done = merged(tmp_path, linear("p", "p"), TRUST)
    assert done.code == INPUT
    assert "the process that reads the pickle failed (exit code 9)" in done.err


def test_a_child_that_lies_is_not_believed(tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pickled(tmp_path / "p", {"pytorch_model.bin": tensors()})
    code = "import sys, json\nfor line in sys.stdin:\n    open(json.loads(line)[1], 'wb').write(b'x' * 99)\n"
    code += "    print('{}')\n"
    (tmp_path / "child.py").write_text(code)
    monkeypatch.setattr(pickles.unpickle, "__file__", str(tmp_path / "child.py"))
    done = merged(tmp_path, linear("p", "p"), TRUST)
    assert done.code == INPUT
    assert "not a safetensors file" in done.err


# --- read -----------------------------------------------------------------------------------------------------------


def test_trusted_they_give_what_safetensors_give(tmp_path: Path, temporary: Path) -> None:
    factory.llamas(tmp_path, 4)
    names = list(tensors())
    files = [f"pytorch_model-0000{n}-of-00002.bin" for n in (1, 2)]
    where = {name: files[place % 2] for place, name in enumerate(names)}
    parts = {file: {name: value for name, value in tensors(1).items() if where[name] == file} for file in files}
    pickled(tmp_path / "p0", {"pytorch_model.bin": tensors(0), "training_args.bin": {"x": 1}})
    pickled(tmp_path / "p1", parts, index=where)
    pickled(
        tmp_path / "p2", {"last.ckpt": {"state_dict": tensors(2), "epoch": 3}}, _use_new_zipfile_serialization=False
    )
    pickled(tmp_path / "p3", parts | {"optimizer.pt": {"x": 1}})
    (tmp_path / "m3" / "model.safetensors").write_bytes((tmp_path / "m1" / "model.safetensors").read_bytes())
    before = snapshot(tmp_path)
    done = merged(tmp_path, linear("p0", "p1", "./p2/last.ckpt", "p3"), TRUST)
    assert done.code == 0, done.text
    factory.accepted(tmp_path, linear("m0", "m1", "m2", "m3"), out="plain")
    one, two = stored(tmp_path / "out"), stored(tmp_path / "plain")
    assert one.keys() == two.keys()
    assert all(np.array_equal(one[name], two[name]) for name in one)
    after = snapshot(tmp_path)
    assert all(after[name] == what for name, what in before.items())
    record = json.loads((tmp_path / "out" / "smelt.json").read_text())
    found = record["inputs"][0]["files"][0]
    content = (tmp_path / "p0" / "pytorch_model.bin").read_bytes()
    assert (found["name"], found["size"]) == ("pytorch_model.bin", len(content))
    assert found["sha256"] == __import__("hashlib").sha256(content).hexdigest()
    assert str(temporary) not in (tmp_path / "out" / "smelt.json").read_text()
    words = [word for i in (0, 1, 3) for word in ("--model", f"p{i}={tmp_path / f'p{i}'}")]
    words += ["--model", f"last.ckpt={tmp_path / 'p2' / 'last.ckpt'}"]
    verified = smelt("verify", tmp_path / "out", *words, TRUST, "--sample", "all")
    assert verified.code == 0, verified.text


def test_types_shapes_and_views(tmp_path: Path, temporary: Path) -> None:
    base = torch.arange(24, dtype=torch.float32)
    odd = {
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 3),
        "transposed": base.reshape(4, 6).t(),
        "view": base[5:9],
        "bf16": base.to(torch.bfloat16),
        "f16": base.to(torch.float16),
        "ids": torch.arange(3),
        "flags": torch.tensor([True, False]),
    }
    odd["tied"] = odd["view"]
    pickled(tmp_path / "p", {"pytorch_model.bin": odd})
    (tmp_path / "p" / "config.json").unlink()
    done = merged(tmp_path, {"merge_method": "passthrough", "models": [{"model": "p"}]}, TRUST)
    assert done.code == 0, done.text
    out = stored(tmp_path / "out")
    assert out.keys() == odd.keys()
    for name, value in odd.items():
        assert out[name].shape == tuple(value.shape)
        assert np.array_equal(out[name].astype(np.float64), value.to(torch.float64).numpy())


def test_the_library_and_the_other_commands(tmp_path: Path, temporary: Path) -> None:
    import smelt as library

    pickled(tmp_path / "p", {"pytorch_model.bin": tensors()})
    path = recipe(tmp_path / "recipe.yml", linear("p", "p"))
    assert smelt("check", path, TRUST).code == 0
    assert len(library.plan(path, trust_pickles=True).entries) == len(tensors())
    with pytest.raises(library.InputError, match="pickles"):
        library.merge(path, tmp_path / "out")
    assert library.merge(path, tmp_path / "out", trust_pickles=True).bytes_written > 0


def test_the_parent_never_imports_torch(tmp_path: Path) -> None:
    pickled(tmp_path / "p", {"pytorch_model.bin": tensors()})
    path = recipe(tmp_path / "recipe.yml", linear("p", "p"))
    code = f"import smelt, sys; smelt.plan({str(path)!r}, trust_pickles=True); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
