"""Granularity `model` from the recipe to the record: the plan, errors, resuming, verifying, merges within merges."""

from __future__ import annotations

import json
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import factory
import faulty
import smelt as library
from e2e.test_nested import step_by_step, weights
from factory import INPUT, USAGE, accepted, config, llama, model, recipe, refused, smelt, snapshot, stored
from smelt.lineage.record import checksum
from smelt.storage import journal

TIES: dict[str, Any] = {
    "merge_method": "ties",
    "base_model": "m0",
    "models": [{"model": "m1"}, {"model": "m2"}],
    "parameters": {"weight": 0.5, "density": 0.4, "granularity": "model"},
}
PASSES = {"ties": 3, "slerp": 2}


def ties(**parameters: Any) -> dict[str, Any]:
    return TIES | {"parameters": TIES["parameters"] | parameters}


def slerp(**parameters: Any) -> dict[str, Any]:
    tree = {"merge_method": "slerp", "base_model": "m0", "models": [{"model": "m1"}]}
    return tree | {"parameters": {"t": 0.4, "granularity": "model", **parameters}}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base and two models of two types, whose later layers have moved further."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    base = llama(seed=0)
    model(tmp_path / "m0", base, config())
    for i in (1, 2):
        moved = {
            name: (tensor + np.float32(0.01 * (1 + place)) * llama(seed=i)[name])
            for place, (name, tensor) in enumerate(base.items())
        }
        kept = {name: tensor.astype(ml_dtypes.bfloat16 if i == 2 else np.float32) for name, tensor in moved.items()}
        model(tmp_path / f"m{i}", kept, config())
    return tmp_path


def input_bytes(folder: Path, *names: str) -> int:
    return sum(tensor.nbytes for name in names for tensor in stored(folder / name).values())


# --- the plan -------------------------------------------------------------------------------------------------------


def test_the_plan_shows_the_passes_before(folder: Path) -> None:
    path = recipe(folder / "recipe.yml", TIES)
    text = smelt("plan", path).out
    once = input_bytes(folder, "m0", "m1", "m2")
    assert "3 passes" in text
    assert "granularity=model" in text
    assert re.search(
        r"^granularity model: 9 tensors, 600 parameters as one, 2 passes over them first, which read ", text, re.M
    )
    tree = smelt("plan", path, "--json").json
    assert tree["forecast"]["bytes_read"] == 3 * once
    (whole,) = tree["whole"]
    assert (whole["counted"], whole["parameters"], whole["passes"], whole["bytes_read"]) == (9, 600, 2, 2 * once)
    assert whole["tensors"] == [row["name"] for row in tree["tensors"]]
    assert {row["passes"] for row in tree["tensors"]} == {3}
    report = library.merge(path, folder / "out")
    assert report.bytes_read == 3 * once
    one = smelt("plan", recipe(folder / "one.yml", slerp())).out
    assert "granularity model: 9 tensors, 600 parameters as one, 1 pass over them first, which reads " in one


def test_explain_says_what_is_looked_at(folder: Path) -> None:
    text = smelt("plan", recipe(folder / "recipe.yml", TIES), "--explain", "model.norm.weight").out
    assert "  granularity = model  recipe" in text
    assert "  merged with what ties finds over the whole model: 9 tensors, 600 parameters" in text
    plain = smelt("plan", recipe(folder / "recipe.yml", ties(granularity="tensor")), "--explain", "norm.weight").out
    assert "whole model" not in plain
    assert "granularity = tensor" in plain


def test_by_default_nothing_is_said(folder: Path) -> None:
    path = recipe(folder / "recipe.yml", TIES | {"parameters": {"weight": 0.5, "density": 0.4}})
    assert "granularity model" not in smelt("plan", path).out
    assert "whole" not in smelt("plan", path, "--json").json


def test_filters_choose_what_is_taken_together(folder: Path) -> None:
    """Norms stay alone; they may have settings of their own."""
    some = [{"filter": "norm", "value": "tensor"}, {"value": "model"}]
    density = [{"filter": "norm", "value": 1}, {"value": 0.4}]
    tree = smelt("plan", recipe(folder / "recipe.yml", ties(granularity=some, density=density)), "--json").json
    (whole,) = tree["whole"]
    assert not any("norm" in name for name in whole["tensors"])
    assert len(whole["tensors"]) == 6
    accepted(folder, ties(granularity=some, density=density), out="some")
    accepted(folder, ties(granularity="tensor", density=1.0), out="each")
    some_of, each = stored(folder / "some"), stored(folder / "each")
    same = {name for name in each if np.array_equal(some_of[name], each[name])}
    assert same == {name for name in each if "norm" in name}


def test_a_tied_head_that_is_stored_counts_once(folder: Path) -> None:
    for name in ("m0", "m1", "m2"):
        tied = config(tied=True)
        (folder / name / "config.json").write_text(json.dumps(tied))
    tree = smelt("plan", recipe(folder / "recipe.yml", TIES), "--json").json
    (whole,) = tree["whole"]
    assert whole["counted"] == 8
    assert "lm_head.weight" in whole["tensors"]
    passes = {row["name"]: row["passes"] for row in tree["tensors"]}
    assert passes.pop("lm_head.weight") == 1
    assert set(passes.values()) == {3}
    report = library.merge(folder / "recipe.yml", folder / "out")
    assert report.bytes_read == tree["forecast"]["bytes_read"]


def test_tensors_of_fewer_models_are_a_whole_of_their_own(folder: Path) -> None:
    lacking = stored(folder / "m2")
    lacking.pop("model.norm.weight")
    shutil.rmtree(folder / "m2")
    model(folder / "m2", lacking, None)
    for name in ("m0", "m1"):
        (folder / name / "config.json").unlink()
    path = recipe(folder / "recipe.yml", TIES)
    text = smelt("plan", path, "--allow", "missing_tensor").out
    assert "granularity model: 8 and 1 tensors are of different models" in text


# --- what is refused ------------------------------------------------------------------------------------------------


def test_settings_that_must_be_the_same(folder: Path) -> None:
    tree = ties(density=[0.2, 0.6])
    says = [
        "ties with granularity model needs one `density` for all tensors, and it differs",
        "tensor 'model.embed_tokens.weight': density [0.2, 0.2]",
        "tensor 'model.layers.1.input_layernorm.weight': density [0.6, 0.6] (recipe, gradient [0.2, 0.6] at 1 -> 0.6)",
        "recipe.yml:14:3",
        "set `granularity` by `filter`",
    ]
    refused(folder, tree, code=USAGE, says=says)
    accepted(folder, ties(weight=[0.2, 0.6], **{"lambda": [0.5, 1.0]}))


def test_all_that_differs_is_told(folder: Path) -> None:
    tree = ties(density=[0.2, 0.6], rescale=[{"filter": "mlp", "value": True}, {"value": False}])
    refused(folder, tree, code=USAGE, says=["one `density`", "one `rescale`"], problems=2)


@pytest.mark.parametrize(
    ("tree", "says"),
    [
        (ties(granularity="planet"), "`granularity` must be 'tensor' or 'model', not 'planet'"),
        (ties(granularity=1), "`granularity` must be 'tensor' or 'model', not 1"),
        (ties(granularity=True), "`granularity` must be 'tensor' or 'model', not true"),
        (
            TIES | {"merge_method": "model_stock", "parameters": {"filter_wise": True, "granularity": "model"}},
            "model_stock: filter_wise asks for each row by itself, granularity for the whole model",
        ),
        (
            {
                **TIES,
                "merge_method": "nuslerp",
                "parameters": {"weight": 1, "nuslerp_flatten": False, "granularity": "model"},
            },
            "nuslerp: nuslerp_flatten: false asks for an angle per vector",
        ),
        (
            TIES | {"merge_method": "dare_ties", "parameters": {"weight": 1, "granularity": "model"}},
            "dare_ties has no parameter `granularity`",
        ),
    ],
)
def test_what_makes_no_sense(folder: Path, tree: Any, says: str) -> None:
    refused(folder, tree, code=USAGE, says=[says])


# --- going on, and making again -------------------------------------------------------------------------------------


@pytest.mark.parametrize("tree", [TIES, ties(rescale=True), slerp()], ids=["ties", "rescaled", "slerp"])
def test_a_killed_merge_goes_on_with_the_same_bytes(folder: Path, tree: Any) -> None:
    """What was found over the whole model is worked out again, and the tensors that were written are left."""
    path = recipe(folder / "recipe.yml", tree)
    shards = ("--shard-size", "1kB")
    assert smelt("merge", path, folder / "whole" / "out", *shards).code == 0
    (folder / "place").mkdir()
    words = ["merge", path, folder / "place" / "out", *shards]
    for at in range(40, 400, 4):
        ended = faulty.forked([*words, "--threads", 2], folder, at=at)
        assert ended.code == -signal.SIGKILL, ended.err
        found = journal.read(folder / "place" / ".out.smelt-build.journal")
        if found is not None and len(found.finished) >= 4:
            break
    else:
        pytest.fail("it was never cut off late enough")
    done = smelt(*words, "--resume", "--threads", 1, "--json")
    assert done.code == 0, done.text
    assert done.json["resumed"] == len(found.finished)
    assert snapshot(folder / "place" / "out") == snapshot(folder / "whole" / "out")


def test_a_merge_that_is_killed_in_a_pass_before_begins_anew(folder: Path) -> None:
    path = recipe(folder / "recipe.yml", TIES)
    accepted(folder, TIES, out="whole/out")
    for at in (20, 30):
        ended = faulty.forked(["merge", path, folder / "out"], folder, at=at)
        assert ended.code == -signal.SIGKILL
        assert not (folder / "out").exists()
    assert smelt("merge", path, folder / "out", "--resume").code == 0
    assert snapshot(folder / "out") == snapshot(folder / "whole" / "out")


def places(folder: Path) -> list[str]:
    return [word for i in range(3) for word in ("--model", f"m{i}={folder / f'm{i}'}")]


@pytest.mark.parametrize("sample", ["all", "2"])
def test_verify_works_the_whole_model_out_again(folder: Path, sample: str) -> None:
    accepted(folder, ties(rescale=True), "--seed", "3")
    done = smelt("verify", folder / "out", *places(folder), "--sample", sample, "--json")
    assert done.code == 0, done.text
    assert len(done.json["recomputed"]) == (9 if sample == "all" else 2)


def test_verify_finds_a_change_in_an_input_though_another_tensor_is_made_again(folder: Path) -> None:
    """One tensor of one model is changed; the cut is another, and with it tensors that were not touched."""
    accepted(folder, ties(density=0.1))
    tensors = stored(folder / "m1")
    tensors["lm_head.weight"] = tensors["lm_head.weight"] * np.float32(3)
    shutil.rmtree(folder / "m1")
    model(folder / "m1", tensors, config())
    done = smelt("verify", folder / "out", *places(folder), "--sample", "all")
    assert done.code == INPUT
    told = re.findall(r"tensor '([\w.]+)' is not what its inputs give", done.err)
    assert "lm_head.weight" in told
    assert len(told) > 1


def test_records_from_before_the_parameter_are_verified(folder: Path) -> None:
    accepted(folder, ties(granularity="tensor"))
    path = folder / "out" / "smelt.json"
    tree = json.loads(path.read_text())
    del tree["recipe"]["text"]["parameters"]["granularity"]
    for row in tree["tensors"].values():
        assert row["values"].pop("granularity") == "tensor"
    tree["checksum"] = checksum(tree)
    path.write_text(json.dumps(tree))
    done = smelt("verify", folder / "out", *places(folder), "--sample", "all", "--json")
    assert done.code == 0, done.text
    for row in tree["tensors"].values():
        row["values"]["density"] = [0.9, 0.9]
    tree["checksum"] = checksum(tree)
    path.write_text(json.dumps(tree))
    assert smelt("verify", folder / "out", *places(folder), "--sample", "all").code == INPUT


# --- the same from everywhere ---------------------------------------------------------------------------------------


def test_state_dicts_threads_and_tiles_give_the_same(folder: Path) -> None:
    accepted(folder, ties(rescale=True), "--seed", "5", "--threads", "3")
    want = {name: tensor.tobytes() for name, tensor in stored(folder / "out").items()}
    library.merge(folder / "recipe.yml", folder / "other", seed=5, workers=1, tile=65536)
    assert {name: tensor.tobytes() for name, tensor in stored(folder / "other").items()} == want
    base, one, two = (stored(folder / name) for name in ("m0", "m1", "m2"))
    found = library.merge_state_dicts(
        [one, two], method="ties", base=base, weight=0.5, density=0.4, rescale=True, granularity="model", seed=5
    )
    assert {name: tensor.tobytes() for name, tensor in found.items()} == want


def test_on_a_device(folder: Path) -> None:
    pytest.importorskip("torch")
    accepted(folder, ties(rescale=True), out="here")
    accepted(folder, ties(rescale=True), "--device", "torch:cpu", out="there")
    here, there = stored(folder / "here"), stored(folder / "there")
    for name, tensor in here.items():
        np.testing.assert_allclose(there[name], tensor, rtol=2e-7)


NESTED: dict[str, dict[str, Any]] = {
    "inside": {"merges": {"a": TIES}, **factory.linear("a", "m1")},
    "outside": {"merges": {"a": factory.linear("m1", "m2")}, **ties(), "models": [{"model": "a"}, {"model": "m2"}]},
    "both": {
        "merges": {"a": ties(rescale=True), "b": slerp() | {"models": [{"model": "a"}]}},
        **ties(),
        "models": [{"model": "a"}, {"model": "b"}],
    },
}


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("name", NESTED)
def test_merges_within_merges(folder: Path, name: str, threads: int) -> None:
    tree = NESTED[name]
    apart = step_by_step(folder, tree, "--seed", "9")
    accepted(folder, tree, "--seed", "9", "--threads", str(threads))
    assert weights(folder / "out") == (apart / "model.safetensors").read_bytes()
    named = [word for i in range(3) for word in ("--model", f"m{i}={folder / f'm{i}'}")]
    used = [word for place, word in enumerate(named) if f"m{place // 2}" in json.dumps(tree)]
    verified = smelt("verify", folder / "out", *used, "--sample", "all")
    assert verified.code == 0, verified.text


@pytest.mark.parametrize("name", NESTED)
def test_what_merges_within_merges_read(folder: Path, name: str) -> None:
    path = recipe(folder / "recipe.yml", NESTED[name])
    planned = smelt("plan", path, "--json").json["forecast"]["bytes_read"]
    assert library.merge(path, folder / "out", workers=1).bytes_read == planned
    assert "granularity" in smelt("plan", path, "--explain", "model.norm.weight").out


def test_a_merge_that_is_kept(folder: Path) -> None:
    tree = {"merges": {"a": TIES | {"keep": True}}, **factory.linear("a", "m1")}
    accepted(folder, NESTED["inside"], out="computed")
    for _ in range(2):
        accepted(folder, tree, "--overwrite", out="out")
        assert weights(folder / "out") == weights(folder / "computed")


# --- methods of one's own -------------------------------------------------------------------------------------------

OWN = """\
from smelt.methods.api import Array, Grain, Method, Sum, reduce, register, scalar


@register("centred", source="nowhere")
class Centred(Method):
    \"\"\"Take the mean of all numbers off.\"\"\"

    granularity: str = scalar("tensor", words=("tensor", "model"), doc="tensor or model")
    wide: bool = scalar(False, doc="by column")

    @property
    def grain(self) -> Grain:
        return Grain.SLAB if self.wide else Grain.ELEMENT

    @reduce(Sum, when=lambda method: not method.wide)
    def total(self, x: Array) -> Array:
        return x

    @reduce(Sum, scope="column", when=lambda method: method.wide)
    def columns(self, x: Array) -> Array:
        return x

    def tile(self, x: Array, total: Array, size: int) -> Array:
        mean = (total / size).astype("float32")[:, None]
        return (x - mean)[0]
"""


def test_a_method_of_ones_own(folder: Path) -> None:
    (folder / "centred.py").write_text(OWN)
    tree = {"merge_method": "centred", "methods": ["centred.py"], "models": [{"model": "m1"}]}
    accepted(folder, tree | {"parameters": {"granularity": "model"}}, "--trust-methods")
    found = np.concatenate([tensor.ravel() for tensor in stored(folder / "out").values()])
    assert abs(float(found.mean(dtype=np.float64))) < 1e-6
    assert any(abs(float(tensor.mean())) > 1e-3 for tensor in stored(folder / "out").values())
    accepted(folder, tree, "--trust-methods", out="each")
    assert all(abs(float(tensor.mean())) < 1e-6 for tensor in stored(folder / "each").values())
    says = ["centred: columns goes over columns, and cannot go over the whole model"]
    refused(
        folder, tree | {"parameters": {"granularity": "model", "wide": True}}, "--trust-methods",
        code=USAGE, says=says, out="none",
    )  # fmt: skip
