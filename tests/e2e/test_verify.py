"""`smelt verify` with the inputs: tensors are made again, and one bit more or less anywhere is found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import factory
import smelt as library
from factory import INPUT, USAGE, Done, config, linear, llama, model, smelt
from smelt.lineage.record import checksum

DARE = {
    "merge_method": "dare_ties",
    "base_model": "m0",
    "models": [{"model": f"m{i}", "parameters": {"weight": 0.5, "density": 0.5}} for i in (1, 2)],
}
STACK = {
    "merge_method": "passthrough",
    "slices": [{"sources": [{"model": name, "layer_range": [0, 2]}]} for name in ("m0", "m1")],
    "out_dtype": "bfloat16",
}
RECIPES: dict[str, Any] = {
    "linear": linear("m0", "m1"),
    "dare": DARE,
    "slerp": linear("m1", merge_method="slerp", base_model="m0", parameters={"t": [0, 1]}),
    "stack": STACK,
    "float16": linear("m0", "m1", "m2", out_dtype="float16"),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    for i in range(3):
        tensors = llama(seed=i, dtype=ml_dtypes.bfloat16 if i == 2 else np.float32)
        model(folder / f"m{i}", tensors | {"model.ids": np.arange(4)}, config())
    for name, tree in RECIPES.items():
        factory.accepted(folder, tree, "--seed", "7", "--shard-size", "1kB", out=name)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return factory.copy(made, tmp_path / "copy")


def places(folder: Path, count: int = 3) -> list[str]:
    return [word for i in range(count) for word in ("--model", f"m{i}={folder / f'm{i}'}")]


def verified(folder: Path, name: str, *words: str) -> Done:
    given = [w for w in range(3) if f"m{w}" in json.dumps(RECIPES[name])]
    named = [word for i in given for word in ("--model", f"m{i}={folder / f'm{i}'}")]
    return smelt("verify", folder / name, *named, *words)


def flip(path: Path, place: int, bit: int = 0) -> None:
    raw = bytearray(path.read_bytes())
    raw[place] ^= 1 << bit
    path.write_bytes(raw)


@pytest.mark.parametrize("name", RECIPES)
def test_every_tensor_can_be_made_again(made: Path, name: str) -> None:
    done = verified(made, name, "--sample", "all", "--json")
    assert done.code == 0, done.text
    assert set(done.json["recomputed"]) == set(factory.stored(made / name))


def test_a_sample_is_chosen_by_its_seed(made: Path) -> None:
    one, same, other = (verified(made, "linear", "--json", "--seed", seed).json for seed in ("1", "1", "3"))
    assert one == same
    assert len(one["recomputed"]) == 4
    assert one["recomputed"] != other["recomputed"]
    drawn = verified(made, "linear", "--sample", "2", "--json").json
    again = verified(made, "linear", "--sample", "2", "--json", "--seed", str(drawn["seed"])).json
    assert drawn == again
    text = verified(made, "linear", "--seed", "1").out
    assert "4 tensors recomputed from the inputs, the same bits (chosen by --seed 1): " in text


def test_without_inputs_it_says_so(made: Path) -> None:
    done = smelt("verify", made / "linear")
    assert done.code == 0
    assert "note: no tensor was recomputed: it is not known where these inputs are: m0, m1" in done.out
    assert smelt("verify", made / "linear", "--json").json["recomputed"] == []
    assert smelt("verify", made / "linear", "--sample", "0").out.count("\n") == 1
    for words in (["--sample", "1"], ["--model", f"m0={made / 'm0'}"]):
        done = smelt("verify", made / "linear", *words)
        assert done.code == INPUT
        assert "cannot be recomputed" in done.err
        assert "m1" in done.err


@pytest.mark.parametrize("bit", [0, 7])
def test_a_bit_of_the_output(folder: Path, bit: int) -> None:
    shard = sorted((folder / "float16").glob("*.safetensors"))[-1]
    flip(shard, -1, bit)
    done = verified(folder, "float16", "--sample", "all")
    assert done.code == INPUT
    assert "is not what was written" in done.err
    assert "is not what its inputs give" in done.err
    assert "the output has changed" in done.err
    assert "first at index [15, 7]: stored " in done.err
    assert done.err.count("error: ") == 2


def test_a_bit_of_an_input(folder: Path) -> None:
    before = verified(folder, "linear", "--sample", "all")
    flip(folder / "m1" / "model.safetensors", -40, 6)
    done = verified(folder, "linear", "--sample", "all")
    assert (before.code, done.code) == (0, INPUT)
    assert "is not what its inputs give" in done.err
    assert "made of m0, m1" in done.err
    assert "the output is as it was written: an input has changed" in done.err
    assert smelt("verify", folder / "linear").code == 0


def test_a_bit_of_an_integer_tensor(folder: Path) -> None:
    raw = (folder / "m1" / "model.safetensors").read_bytes()
    begin = 8 + int.from_bytes(raw[:8], "little")
    place = json.loads(raw[8:begin])["model.ids"]["data_offsets"][0]
    flip(folder / "m1" / "model.safetensors", begin + place)
    done = verified(folder, "linear", "--sample", "all")
    assert done.code == INPUT
    assert "tensor 'model.ids' holds int64 numbers that differ" in done.err


def test_a_bit_of_the_record(folder: Path) -> None:
    raw = (folder / "linear" / "smelt.json").read_bytes()
    for place in range(3, len(raw), len(raw) // 60):
        (folder / "linear" / "smelt.json").write_bytes(raw)
        flip(folder / "linear" / "smelt.json", place, place % 8)
        done = verified(folder, "linear")
        assert done.code == INPUT, done.text
        assert "smelt.json" in done.err


def test_a_record_that_lies_with_a_fitting_checksum(folder: Path) -> None:
    path = folder / "dare" / "smelt.json"
    tree = json.loads(path.read_text())
    tree["tensors"]["model.norm.weight"]["values"]["density"] = [0.5, 0.9]
    path.write_text(json.dumps(tree | {"checksum": checksum(tree)}))
    done = verified(folder, "dare")
    assert done.code == INPUT
    assert "the record does not say what the recipe gives over these inputs" in done.err
    assert "model.norm.weight  values: recorded " in done.err
    tree = json.loads((folder / "linear" / "smelt.json").read_text())
    sources = [{"model": name, "layer_range": [0, 9]} for name in ("m0", "m1")]
    tree["recipe"]["text"] = {"merge_method": "linear", "slices": [{"sources": sources}], "parameters": {"weight": 1}}
    (folder / "linear" / "smelt.json").write_text(json.dumps(tree | {"checksum": checksum(tree)}))
    done = verified(folder, "linear")
    assert done.code == INPUT
    assert "the recorded recipe cannot be carried out over these inputs" in done.err


@pytest.mark.parametrize(
    "changes",
    [
        {"inputs": None},
        {"inputs": [{}]},
        {"inputs": [{"model": 3, "commit": None, "files": []}]},
        {"inputs": [{"model": "m0", "commit": 3, "files": []}]},
        {"inputs": [{"model": "m0", "commit": None, "files": [{}]}]},
        {"inputs": [{"model": "m0", "commit": None, "files": 7}]},
        {"recipe": None},
        {"recipe": {"text": 3, "seed": 0}},
        {"recipe": {"text": {"merge_method": "linaer", "models": [{"model": "m0"}]}, "seed": 0}},
        {"recipe": {"text": {"merge_method": "linear", "models": [{"model": "m0"}]}, "seed": "x"}},
    ],
)
def test_records_of_another_form(folder: Path, changes: dict[str, Any]) -> None:
    path = folder / "linear" / "smelt.json"
    tree = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(tree | {"checksum": checksum(tree)}))
    done = verified(folder, "linear")
    assert done.code == INPUT, done.text
    assert "the record's recipe or inputs cannot be read" in done.err


def test_another_seed_gives_other_bits(folder: Path) -> None:
    path = folder / "dare" / "smelt.json"
    tree = json.loads(path.read_text())
    tree["recipe"]["seed"] = 8
    path.write_text(json.dumps(tree | {"checksum": checksum(tree)}))
    done = verified(folder, "dare", "--sample", "all")
    assert done.code == INPUT
    assert "is not what its inputs give" in done.err


def test_inputs_that_are_others(folder: Path) -> None:
    words = ["--model", f"m0={folder / 'm0'}", "--model", f"m1={folder / 'm2'}"]
    done = smelt("verify", folder / "linear", *words)
    assert done.code == INPUT
    assert "the input m1 is not the one that was merged" in done.err
    assert "model.safetensors has another size or header" in done.err
    done = smelt("verify", folder / "linear", "--model", f"m7={folder / 'm0'}")
    assert done.code == USAGE
    assert "the output was not made of 'm7'" in done.err
    done = smelt("verify", folder / "linear", "--model", f"m0={folder / 'none'}", "--model", f"m1={folder / 'm1'}")
    assert done.code == INPUT
    assert "the model does not exist" in done.err


@pytest.mark.parametrize("words", [["--sample", "some"], ["--sample=-1"], ["--model", "m0"], ["--model", "=x"]])
def test_arguments_that_make_no_sense(made: Path, words: list[str]) -> None:
    done = smelt("verify", made / "linear", *words)
    assert done.code == USAGE
    assert "fix: " in done.err or "the sample must be a number" in done.err


def test_allowances_of_the_command_line_are_no_obstacle(tmp_path: Path) -> None:
    factory.llamas(tmp_path, 1)
    lacking = llama(seed=4)
    lacking["model.extra"] = lacking.pop("model.norm.weight")
    model(tmp_path / "m1", lacking, config())
    factory.accepted(tmp_path, linear("m0", "m1"), "--allow", "missing_tensor", "--allow", "extra_tensor")
    done = smelt("verify", tmp_path / "out", *places(tmp_path, 2), "--sample", "all")
    assert done.code == 0, done.text


def test_inputs_of_the_hub_are_found_in_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    factory.llamas(tmp_path / "made", 2)
    for i in range(2):
        factory.hub_model(tmp_path / "home", f"org/m{i}", tmp_path / "made" / f"m{i}", commit=str(i) * 40)
    factory.accepted(tmp_path, linear("org/m0", "org/m1"))
    done = smelt("verify", tmp_path / "out", "--json")
    assert len(done.json["recomputed"]) == 4
    found = library.verify(tmp_path / "out", sample="all", seed=1)
    assert (len(found.recomputed), found.problems, found.seed) == (found.tensors, (), 1)


def test_methods_of_ones_own_are_hashed_only(tmp_path: Path) -> None:
    factory.llamas(tmp_path, 2)
    (tmp_path / "mine.py").write_text(
        "from smelt.methods.api import Method, register\n\n\n"
        '@register("mine", source="a test")\nclass Mine(Method):\n    """The first model.\n\n'
        '    Equation:\n        out = x_1\n\n    Use it never.\n\n    Example:\n        merge_method: mine\n    """\n\n'
        "    def tile(self, x):\n        return x[0] + 0\n"
    )
    tree = linear("m0", "m1", merge_method="mine", methods=["./mine.py"], parameters={})
    factory.accepted(tmp_path, tree, "--trust-methods")
    done = smelt("verify", tmp_path / "out")
    assert done.code == 0
    assert "no tensor was recomputed: the recipe has methods of its own (mine.py)" in done.out
