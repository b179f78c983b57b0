"""Single files of any kind: diffusion checkpoints, encoders, LoRA files; merged, checked, verified, and refused."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import factory
import smelt as library
import state_dicts
from factory import INPUT, STORAGE, USAGE, Array, accepted, linear, recipe, refused, smelt, stored
from reference.registry import REFERENCE
from state_dicts import CLIP, UNET, bert, clip_text, lora, stable_diffusion, write

KINDS: dict[str, Callable[..., dict[str, Array]]] = {
    "diffusion": partial(stable_diffusion, dtype=np.float32),  # in float16 deltas are equal too often for a cut of ties
    "bert": bert,
    "clip": clip_text,
}
NOT_AVERAGED = ("position_ids", "num_batches_tracked", "num_updates")


@pytest.fixture(params=KINDS)
def three(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder with three files of one kind: base, a, b."""
    for seed, name in enumerate(("base", "a", "b")):
        write(tmp_path / f"{name}.safetensors", KINDS[request.param](seed=seed), metadata={"format": "pt"})
    return tmp_path


def tree(method: str, *models: str, **keys: Any) -> dict[str, Any]:
    return {"merge_method": method, "models": [{"model": f"{name}.safetensors"} for name in models]} | keys


def with_base(method: str, **parameters: Any) -> dict[str, Any]:
    return tree(method, "a", "b", base_model="base.safetensors", parameters=parameters)


RECIPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "linear": (tree("linear", "a", "b", parameters={"weight": 1}), {"weight": [1, 1]}),
    "slerp": (tree("slerp", "b", base_model="base.safetensors", parameters={"t": 0.3}), {"t": 0.3}),
    "task_arithmetic": (with_base("task_arithmetic", weight=0.4), {"weight": [0.4, 0.4]}),
    "ties": (with_base("ties", weight=0.6, density=0.5), {"weight": [0.6, 0.6], "density": [0.5, 0.5]}),
    "dare_ties": (with_base("dare_ties", weight=0.5, density=1.0), {"weight": [0.5, 0.5], "density": [1.0, 1.0]}),
}


@pytest.mark.parametrize("name", RECIPES)
def test_every_method_merges_a_state_dict(three: Path, name: str) -> None:
    asked, parameters = RECIPES[name]
    accepted(three, asked)
    made, inputs = stored(three / "out"), {n: stored_file(three / f"{n}.safetensors") for n in ("base", "a", "b")}
    donor = inputs["base" if "base_model" in asked else "a"]
    assert list(made)
    assert made.keys() == donor.keys()
    listed = [row["model"].removesuffix(".safetensors") for row in asked["models"]]
    for tensor, value in made.items():
        assert (value.dtype, value.shape) == (donor[tensor].dtype, donor[tensor].shape)
        if tensor.endswith(NOT_AVERAGED):
            assert np.array_equal(value, donor[tensor]), tensor
            continue
        models = [inputs[model][tensor].astype(np.float32) for model in listed]
        base = inputs["base"][tensor].astype(np.float32) if "base_model" in asked else None
        expected = REFERENCE[name](models, base, **parameters)
        np.testing.assert_allclose(value, expected, rtol=1e-6, atol=1e-6, err_msg=tensor)


DROPPED = {"weight": 1, "density": 0.5, "rescale": "density"}


def test_random_drops_keep_or_drop_every_entry(three: Path) -> None:
    asked = tree("dare_linear", "a", base_model="base.safetensors", parameters=DROPPED)
    accepted(three, asked)
    made, base, tuned = stored(three / "out"), *(stored_file(three / f"{n}.safetensors") for n in ("base", "a"))
    kept = total = 0
    for name, value in made.items():
        if not name.endswith(NOT_AVERAGED) and value.size > 8:
            moved = np.isclose(value, base[name] + 2 * (tuned[name] - base[name]), atol=1e-5)
            assert np.all(moved | (value == base[name])), name
            kept, total = kept + int(moved.sum()), total + value.size
    assert 0.4 < kept / total < 0.6


def test_plan_check_and_verify(three: Path) -> None:
    path = recipe(three / "recipe.yml", with_base("ties", weight=0.5, density=0.5))
    checked = smelt("check", path)
    assert checked.code == 0, checked.text
    assert "sound. ties of 3 models" in checked.out
    assert "warning" not in checked.out
    plan = smelt("plan", path, "--json").json
    assert len(plan["tensors"]) == len(stored_file(three / "base.safetensors"))
    assert smelt("merge", path, three / "out").code == 0
    where = [w for n in ("base", "a", "b") for w in ("--model", f"{n}.safetensors={three / n}.safetensors")]
    verified = smelt("verify", three / "out", *where, "--sample", "all", "--json")
    assert verified.code == 0, verified.text
    assert len(verified.json["recomputed"]) == len(plan["tensors"])
    swapped = smelt("verify", three / "out", *where[:3], f"a.safetensors={three / 'b'}.safetensors", *where[4:])
    assert swapped.code == INPUT, swapped.text


def stored_file(path: Path) -> dict[str, Array]:
    """The tensors of one file, whatever else is in its folder."""
    folder = path.parent / f".{path.stem}"
    folder.mkdir(exist_ok=True)
    (folder / path.name).write_bytes(path.read_bytes())
    return stored(folder)


def header(path: Path) -> dict[str, Any]:
    raw = path.read_bytes()
    return json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])


# --- names, layers and filters ---------------------------------------------------------------------------------------


@pytest.fixture
def diffusion(tmp_path: Path) -> Path:
    for seed, name in enumerate("ab"):
        write(tmp_path / f"{name}.safetensors", stable_diffusion(seed=seed), metadata={"format": "pt"})
    return tmp_path


def values(folder: Path, asked: Any, name: str) -> dict[str, Any]:
    plan = smelt("plan", recipe(folder / "recipe.yml", asked), "--json").json
    return {row["name"]: row["values"].get(name) for row in plan["tensors"]}


def test_filters_choose_parts_of_the_file(diffusion: Path) -> None:
    weight = [
        {"match": "first_stage_model.*", "value": 0},
        {"filter": "cond_stage_model", "value": 0.25},
        {"match": f"{UNET}.input_blocks.[01].*", "value": 0.5},
        {"value": 1},
    ]
    asked = tree("linear", "a", "b", parameters={"normalize": False})
    asked["models"][0]["parameters"] = {"weight": 1}
    asked["models"][1]["parameters"] = {"weight": weight}
    accepted(diffusion, asked)
    made, a, b = stored(diffusion / "out"), *(stored_file(diffusion / f"{n}.safetensors") for n in "ab")
    for name, share in {
        "first_stage_model.quant_conv.weight": 0.0,
        f"{CLIP}.final_layer_norm.weight": 0.25,
        f"{UNET}.input_blocks.1.0.in_layers.2.weight": 0.5,
        f"{UNET}.input_blocks.2.0.in_layers.2.weight": 1.0,
    }.items():
        expected = a[name].astype(np.float32) + share * b[name].astype(np.float32)
        np.testing.assert_allclose(made[name], expected, rtol=2e-3, atol=2e-3)


def test_a_gradient_runs_over_each_numbered_stack(diffusion: Path) -> None:
    found = values(diffusion, tree("slerp", "b", base_model="a.safetensors", parameters={"t": [0, 1]}), "t")
    t = [found[f"{UNET}.output_blocks.{block}.0.skip_connection.weight"] for block in range(3)]
    assert t == [0, 0.5, 1]
    assert [found[f"{CLIP}.encoder.layers.{layer}.mlp.fc1.weight"] for layer in range(2)] == [0, 1]
    assert found[f"{UNET}.time_embed.0.weight"] == 0


def test_a_gradient_over_names_without_layers_is_a_warning(tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        write(
            tmp_path / f"{name}.safetensors",
            {"weight": np.full(4, seed + 1.0, np.float32), "a.b": np.ones(2, np.float32)},
        )
    asked = tree("slerp", "b", base_model="a.safetensors", parameters={"t": [0.25, 1]})
    done = accepted(tmp_path, asked)
    assert "recipe.yml" in done.err
    assert "the gradient of `t` has no effect but its first value: the tensors of a.safetensors" in done.err
    np.testing.assert_allclose(stored(tmp_path / "out")["weight"], 1.25)
    refused(tmp_path, asked, "--strict", code=USAGE, says=["the gradient of `t`"], out="o2")
    accepted(tmp_path, tree("slerp", "b", base_model="a.safetensors", parameters={"t": 0.25}), "--strict", out="o3")


def test_slices_without_layers_are_refused(tmp_path: Path) -> None:
    for name in "ab":
        write(tmp_path / f"{name}.safetensors", lora(names="kohya"))
    sources = [{"model": f"{name}.safetensors", "layer_range": [0, 1]} for name in "ab"]
    asked = {"merge_method": "linear", "parameters": {"weight": 1}, "slices": [{"sources": sources}]}
    refused(tmp_path, asked, code=USAGE, says=["layer ranges need one stack of layers"])


# --- the output -------------------------------------------------------------------------------------------------------


def test_the_output_is_one_file_with_its_papers(diffusion: Path) -> None:
    (diffusion / "config.json").write_text('{"num_hidden_layers": 77, "vocab_size": 3}')
    (diffusion / "tokenizer.json").write_text("not JSON")
    (diffusion / "LICENSE").write_text("of somebody else")
    accepted(diffusion, linear("a.safetensors", "b.safetensors"))
    names = {path.name for path in (diffusion / "out").iterdir()}
    assert names == {"model.safetensors", "smelt.json", "README.md", "mergekit_config.yml"}
    assert "library_name" not in (diffusion / "out" / "README.md").read_text()
    assert smelt("verify", diffusion / "out").code == 0


def test_one_file_stays_one_unless_asked_otherwise(diffusion: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smelt.writing.SHARD_BYTES", 2000)
    accepted(diffusion, linear("a.safetensors", "b.safetensors"))
    assert len(list((diffusion / "out").glob("*.safetensors"))) == 1
    accepted(diffusion, linear("a.safetensors", "b.safetensors"), "--shard-size", "2kB", out="cut")
    assert len(list((diffusion / "cut").glob("*.safetensors"))) > 3
    factory.llamas(diffusion)
    accepted(diffusion, linear("m0", "m1"), out="llama")
    assert len(list((diffusion / "llama").glob("*.safetensors"))) > 1


def test_a_single_file_may_be_merged_again(diffusion: Path) -> None:
    accepted(diffusion, linear("a.safetensors", "b.safetensors"))
    accepted(diffusion, linear("out/model.safetensors", "a.safetensors"), out="again")
    accepted(diffusion, linear("out", "a.safetensors"), out="folder")
    one, two = ((diffusion / name / "model.safetensors").read_bytes() for name in ("again", "folder"))
    assert one == two


def test_an_output_named_as_a_file_is_refused(diffusion: Path) -> None:
    asked = linear("a.safetensors", "b.safetensors")
    says = ["the output is a folder, and this is the name of a file", "write to merged", "model.safetensors"]
    refused(diffusion, asked, code=STORAGE, says=says, out="merged.safetensors")
    (diffusion / "there.safetensors").write_bytes(b"kept")
    refused(diffusion, asked, "--overwrite", code=STORAGE, says=says[:1], out="there.safetensors")
    refused(diffusion, asked, "--overwrite", code=STORAGE, says=["is an input"], out="a.safetensors")


def test_metadata_of_the_donor(diffusion: Path) -> None:
    kept = {"modelspec.title": "Two\nlines", "modelspec.architecture": "stable-diffusion-v1", "ss_v2": "False"}
    lost = {
        "modelspec.hash_sha256": "0x00",
        "sshs_model_hash": "abc",
        "modelspec.thumbnail": "data:image/jpeg;base64,AAAA",
        "control": "a\x00b",
        "format": "np",
    }
    write(diffusion / "a.safetensors", stable_diffusion(), metadata=kept | lost)
    write(diffusion / "b.safetensors", stable_diffusion(seed=1), metadata={"modelspec.author": "b"})
    accepted(diffusion, linear("a.safetensors", "b.safetensors"))
    assert header(diffusion / "out" / "model.safetensors")["__metadata__"] == kept | {"format": "pt"}
    accepted(diffusion, linear("b.safetensors", "a.safetensors"), out="other")
    assert header(diffusion / "other" / "model.safetensors")["__metadata__"] == {
        "modelspec.author": "b",
        "format": "pt",
    }


# --- missing ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def uneven(tmp_path: Path) -> Path:
    """a has `only.a`, b has `only.b`, c lacks `both`; all have `every`."""
    for seed, name in enumerate("abc"):
        tensors = {
            "every.weight": np.full(3, seed + 1.0, np.float32),
            f"only.{name}": np.full(2, seed + 10.0, np.float32),
        }
        if name == "c":
            del tensors["only.c"]
        else:
            tensors["both.weight"] = np.full(2, seed + 5.0, np.float32)
        write(tmp_path / f"{name}.safetensors", tensors)
    return tmp_path


def test_missing_tensors_are_an_error_by_default(uneven: Path) -> None:
    for keys in ({}, {"missing": "error"}):
        asked = tree("linear", *"abc", parameters={"weight": 1}, **keys)
        says = [
            "tensor 'only.a' is missing in b.safetensors, c.safetensors",
            "only.b",
            "missing: copy",
            "missing: skip",
        ]
        refused(uneven, asked, code=INPUT, says=says, problems=3)


def test_missing_skip_leaves_them_out_and_lists_them(uneven: Path) -> None:
    asked = tree("linear", *"abc", parameters={"weight": 1}, missing="skip")
    done = accepted(uneven, asked)
    made = stored(uneven / "out")
    assert list(made) == ["every.weight"]
    np.testing.assert_allclose(made["every.weight"], 2)
    assert "`missing: skip` leaves out 1 tensor that c.safetensors lacks: both.weight" in done.err
    assert "1 tensor that b.safetensors, c.safetensors lack: only.a" in done.err
    assert "1 tensor that a.safetensors, c.safetensors lack: only.b" in done.err
    record = json.loads((uneven / "out" / "smelt.json").read_text())
    lost = {
        "a.safetensors: both.weight",
        "b.safetensors: both.weight",
        "a.safetensors: only.a",
        "b.safetensors: only.b",
    }
    assert record["ignored"].keys() == lost
    assert record["recipe"]["text"]["missing"] == "skip"
    assert verified(uneven) == 0
    refused(uneven, asked, "--strict", code=USAGE, says=["missing: skip"], out="o2")


def verified(folder: Path, *names: str) -> int:
    where = [w for n in names or "abc" for w in ("--model", f"{n}.safetensors={folder / n}.safetensors")]
    return smelt("verify", folder / "out", *where, "--sample", "all").code


def test_missing_copy_takes_them_from_the_first_that_has_them(uneven: Path) -> None:
    done = accepted(uneven, tree("linear", *"cba", parameters={"weight": 1}, missing="copy"))
    made = stored(uneven / "out")
    assert list(made) == ["every.weight", "only.b", "both.weight", "only.a"]
    assert made["both.weight"].tolist() == [6, 6]
    assert made["only.a"].tolist() == [10, 10]
    assert made["only.b"].tolist() == [11, 11]
    assert "`missing: copy` copies 1 tensor that c.safetensors lacks from b.safetensors: both.weight" in done.err
    assert verified(uneven) == 0
    plan = smelt("plan", uneven / "recipe.yml").out
    assert "copy of a.safetensors: not every model has it (missing: copy)" in plan


@pytest.mark.parametrize("listed", [True, False])
def test_missing_copy_prefers_the_base(uneven: Path, listed: bool) -> None:
    models = "acb" if listed else "ac"
    asked = tree("task_arithmetic", *models, base_model="b.safetensors", parameters={"weight": 1}, missing="copy")
    accepted(uneven, asked)
    made = stored(uneven / "out")
    assert made["both.weight"].tolist() == [6, 6]
    assert made["only.a"].tolist() == [10, 10]
    np.testing.assert_allclose(made["every.weight"], 2 + (1 - 2) + (3 - 2))
    assert verified(uneven) == 0


def test_a_base_that_only_gives_the_names(uneven: Path) -> None:
    """linear does not merge an unlisted base: what it alone has is a tensor that not all models have."""
    keys: dict[str, Any] = {"base_model": "b.safetensors", "parameters": {"weight": 1}}
    accepted(uneven, tree("linear", *"ac", **keys, missing="copy"))
    made = stored(uneven / "out")
    assert made["only.b"].tolist() == [11, 11]
    assert made["only.a"].tolist() == [10, 10]
    assert made["both.weight"].tolist() == [6, 6]
    accepted(uneven, tree("linear", *"ac", **keys, missing="skip"), out="skip")
    assert list(stored(uneven / "skip")) == ["every.weight"]


def test_missing_and_allow_are_one_answer(uneven: Path) -> None:
    for word in ("missing_tensor", "extra_tensor"):
        asked = tree("linear", *"abc", parameters={"weight": 1}, missing="skip", allow=[word])
        refused(
            uneven, asked, code=USAGE, says=[f"`missing: skip` and `{word}` under `allow` contradict", f"drop `{word}`"]
        )
    allowed = tree("linear", *"abc", parameters={"weight": 1}, allow=["missing_tensor", "extra_tensor"])
    accepted(uneven, allowed)
    made = stored(uneven / "out")
    assert made["both.weight"].tolist() == [5.5, 5.5]
    assert "only.b" not in made
    accepted(
        uneven, tree("linear", *"abc", parameters={"weight": 1}, missing="skip"), "--allow", "extra_tensor", out="o2"
    )
    assert list(stored(uneven / "o2")) == ["every.weight"]


def test_a_word_that_missing_does_not_know(uneven: Path) -> None:
    asked = tree("linear", *"abc", parameters={"weight": 1}, missing="skipp")
    refused(uneven, asked, code=USAGE, says=["`missing` cannot be 'skipp'", "did you mean `skip`?"])


def test_missing_in_slices(tmp_path: Path) -> None:
    for i, folder in enumerate(factory.llamas(tmp_path)):
        tensors = stored(folder)
        if i == 1:
            tensors["model.layers.1.extra.weight"] = np.full(3, 7, np.float32)
            del tensors["model.layers.0.mlp.up_proj.weight"]
        factory.model(folder, tensors, factory.config())
    ranges = [{"sources": [{"model": m, "layer_range": [i, i + 1]} for m in ("m0", "m1")]} for i in (1, 0)]
    asked = {"merge_method": "linear", "parameters": {"weight": 1}, "slices": ranges}
    accepted(tmp_path, asked | {"missing": "copy"}, out="copied")
    made, m0 = stored(tmp_path / "copied"), stored(tmp_path / "m0")
    assert made["model.layers.0.extra.weight"].tolist() == [7, 7, 7]
    assert np.array_equal(made["model.layers.1.mlp.up_proj.weight"], m0["model.layers.0.mlp.up_proj.weight"])
    accepted(tmp_path, asked | {"missing": "skip"}, out="skipped")
    made = stored(tmp_path / "skipped")
    assert "model.layers.0.extra.weight" not in made
    assert "model.layers.1.mlp.up_proj.weight" not in made
    assert "model.layers.0.mlp.up_proj.weight" in made


@pytest.mark.parametrize("word", ["skip", "copy"])
def test_missing_does_not_make_a_config_lie(tmp_path: Path, word: str) -> None:
    factory.model(tmp_path / "short", factory.llama(layers=2), factory.config(layers=2))
    factory.model(tmp_path / "long", factory.llama(layers=3), factory.config(layers=3))
    names = ("short", "long") if word == "copy" else ("long", "short")
    says = [f"with `missing: {word}` the merged model has other layers than its config.json counts"]
    refused(tmp_path, linear(*names, missing=word), code=INPUT, says=says)


@pytest.mark.parametrize("word", ["skip", "copy"])
def test_missing_in_modules(tmp_path: Path, word: str) -> None:
    names = [f"{stack}.{n}.mlp.weight" for stack in ("model.layers", "visual.blocks") for n in range(2)]
    for seed in range(3):
        tensors = {name: np.full(4, seed, np.float32) for name in [*names, "model.norm.weight"]}
        if seed == 2:
            del tensors["model.norm.weight"]
            tensors["visual.extra.weight"] = np.full(2, 9, np.float32)
        write(tmp_path / f"m{seed}.safetensors", tensors)
    models = [{"model": f"m{seed}.safetensors", "parameters": {"weight": 1}} for seed in (1, 2)]
    asked = {"merge_method": "linear", "base_model": "m0.safetensors", "modules": {"model": {"models": models}}}
    accepted(tmp_path, asked | {"missing": word})
    made = stored(tmp_path / "out")
    assert made["model.layers.1.mlp.weight"].tolist() == [1.5] * 4
    assert made["visual.blocks.1.mlp.weight"].tolist() == [0] * 4
    assert ("visual.extra.weight" in made) == ("model.norm.weight" in made) == (word == "copy")
    assert word == "skip" or made["model.norm.weight"].tolist() == [0] * 4


# --- LoRA files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "kinds"),
    [("kohya", "lora_down/lora_up"), ("peft", "lora_A/lora_B"), ("diffusers", "lora.down/lora.up")],
)
def test_pairs_of_factors_are_a_warning(tmp_path: Path, names: str, kinds: str) -> None:
    for seed, name in enumerate("ab"):
        write(tmp_path / f"{name}.safetensors", lora(seed=seed, names=names))
    asked = linear("a.safetensors", "b.safetensors")
    done = accepted(tmp_path, asked)
    assert f"warning: 2 pairs of low-rank factors are merged factor by factor ({kinds})" in done.err
    refused(tmp_path, asked, "--strict", code=USAGE, says=["factor by factor"], out="o2")
    made, a, b = stored(tmp_path / "out"), *(stored_file(tmp_path / f"{n}.safetensors") for n in "ab")
    for name, value in made.items():
        np.testing.assert_allclose(value, (a[name] + b[name]) / 2, rtol=1e-6)
    accepted(tmp_path, tree("passthrough", "a"), "--strict", out="copied")


def test_alpha_is_never_averaged(tmp_path: Path) -> None:
    for seed, name in enumerate("abc"):
        write(tmp_path / f"{name}.safetensors", lora(seed=seed, alpha=4.0 if name == "c" else 2.0))
    asked = tree("linear", "a", "b", parameters={"weight": 0.8, "normalize": False})
    accepted(tmp_path, asked)
    alphas = [value for name, value in stored(tmp_path / "out").items() if name.endswith(".alpha")]
    assert len(alphas) == 2
    assert all(value.shape == () and value == 2 for value in alphas)
    other = linear("a.safetensors", "c.safetensors")
    says = ["holds float32 numbers that differ", ".alpha", "bring all models to one alpha"]
    refused(tmp_path, other, code=INPUT, says=says, problems=2, out="o2")
    checked = smelt("check", recipe(tmp_path / "recipe.yml", other))
    assert checked.code == 0
    assert "must be the same in every model" in checked.out


def test_an_alpha_that_scales_no_pair_is_a_number_like_others(tmp_path: Path) -> None:
    for value, name in enumerate("ab"):
        write(tmp_path / f"{name}.safetensors", {"mix.alpha": np.asarray(value, np.float32)})
    accepted(tmp_path, linear("a.safetensors", "b.safetensors"))
    assert stored(tmp_path / "out")["mix.alpha"] == 0.5


def test_other_ranks_are_refused(tmp_path: Path) -> None:
    for rank, name in ((2, "a"), (3, "b")):
        write(tmp_path / f"{name}.safetensors", lora(rank=rank))
    says = ["4 tensors have different shapes", "[2, 8]", "[3, 8]", "b.safetensors"]
    refused(tmp_path, linear("a.safetensors", "b.safetensors"), code=INPUT, says=says)


# --- numbers that are not averaged ------------------------------------------------------------------------------------


def test_integers_must_be_equal_but_counters_need_not(diffusion: Path) -> None:
    for seed, name in enumerate("ab"):
        tensors = stable_diffusion(seed=seed) | {"buckets": np.arange(seed, seed + 4)}
        write(diffusion / f"{name}.safetensors", tensors)
    says = ["tensor 'buckets' holds int64 numbers that differ between the models"]
    refused(diffusion, linear("a.safetensors", "b.safetensors"), code=INPUT, says=says)


def test_shapes_that_differ_are_refused(diffusion: Path) -> None:
    write(diffusion / "wide.safetensors", stable_diffusion(channels=16))
    says = ["tensors have different shapes", "a.safetensors", "wide.safetensors"]
    refused(diffusion, linear("a.safetensors", "wide.safetensors"), code=INPUT, says=says)


# --- where files are --------------------------------------------------------------------------------------------------


def test_a_file_that_is_not_there(diffusion: Path) -> None:
    write(diffusion / "sd" / "real.safetensors", stable_diffusion())
    says = ["there is no model at 'sd/rael.safetensors'", "no such file", "did you mean", "real.safetensors"]
    refused(diffusion, linear("a.safetensors", "sd/rael.safetensors"), code=INPUT, says=says)


def test_a_link_to_a_file_of_another_name(diffusion: Path) -> None:
    (diffusion / "blobs").mkdir()
    (diffusion / "a.safetensors").rename(diffusion / "blobs" / "0123abcd")
    (diffusion / "a.safetensors").symlink_to("blobs/0123abcd")
    accepted(diffusion, linear("a.safetensors", "b.safetensors"))


def test_a_pickled_file_stands_alone_too(diffusion: Path) -> None:
    torch = pytest.importorskip("torch")
    (diffusion / "config.json").write_text('{"num_hidden_layers": 77}')
    state = {name: torch.from_numpy(np.array(value)) for name, value in stable_diffusion(seed=1).items()}
    torch.save(state, diffusion / "b.ckpt")
    asked = linear("b.ckpt", "a.safetensors")
    refused(diffusion, asked, code=INPUT, says=["--trust-pickles"])
    accepted(diffusion, asked, "--trust-pickles")
    assert not (diffusion / "out" / "config.json").exists()
    accepted(diffusion, linear("b.safetensors", "a.safetensors"), out="plain")
    one, two = stored(diffusion / "out"), stored(diffusion / "plain")
    assert one.keys() == two.keys()
    assert all(np.array_equal(one[name], two[name]) for name in one)


UNET_CONFIG = {"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.30.0", "sample_size": 64}
PART = "diffusion_pytorch_model.safetensors"


def pipeline(folder: Path, seed: int) -> Path:
    """A folder as diffusers saves a pipeline."""
    part = {"conv_in.weight": stable_diffusion(seed=seed)[f"{UNET}.input_blocks.0.0.weight"]}
    write(folder / "unet" / PART, part, metadata={"format": "pt"})
    (folder / "unet" / "config.json").write_text(json.dumps(UNET_CONFIG | {"_name_or_path": "/home/x"}))
    write(folder / "text_encoder" / "model.safetensors", clip_text(seed=seed))
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    return folder


def test_a_pipeline_is_refused_with_the_way_out(tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        pipeline(tmp_path / name, seed)
    says = ["a pipeline of several models", f"found unet/{PART}", "merge each part by itself", str(tmp_path / "a")]
    refused(tmp_path, linear("a", "b"), code=INPUT, says=says, problems=2)


def test_a_part_of_a_pipeline_is_merged_into_what_diffusers_reads(tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        pipeline(tmp_path / name, seed)
    accepted(tmp_path, linear("a/unet", "b/unet"))
    out = tmp_path / "out"
    assert list(stored(out)) == ["conv_in.weight"]
    assert (out / PART).exists()
    assert json.loads((out / "config.json").read_text()) == UNET_CONFIG
    assert "library_name: diffusers" in (out / "README.md").read_text()
    assert (
        smelt("verify", out, "--model", f"unet={tmp_path / 'a/unet'}", "--model", f"unet-2={tmp_path / 'b/unet'}").code
        == 0
    )
    accepted(tmp_path, linear(f"a/unet/{PART}", f"b/unet/{PART}"), out="by-file")
    assert (tmp_path / "by-file" / PART).read_bytes() == (out / PART).read_bytes()


def test_shards_of_a_part_have_its_index(tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        folder = tmp_path / name
        write(folder / PART, bert(seed=seed), metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(UNET_CONFIG))
    accepted(tmp_path, linear("a", "b"), "--shard-size", "1kB")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    index = "diffusion_pytorch_model.safetensors.index.json"
    assert index in names
    assert "model.safetensors.index.json" not in names
    files = set(json.loads((tmp_path / "out" / index).read_text())["weight_map"].values())
    assert files == {name for name in names if name.endswith(".safetensors")}
    assert smelt("verify", tmp_path / "out").code == 0


# --- from Python ------------------------------------------------------------------------------------------------------


def test_from_python(uneven: Path) -> None:
    files = [str(uneven / f"{name}.safetensors") for name in "abc"]
    asked = linear(*files, missing="copy")
    plan = library.plan(asked)
    assert [entry.name for entry in plan.entries] == ["every.weight", "only.a", "both.weight", "only.b"]
    report = library.merge(asked, uneven / "out")
    assert sum("missing: copy" in warning for warning in report.warnings) == 3
    states = [stored_file(Path(path)) for path in files]
    for word in ("copy", "skip"):
        library.merge(linear(*files, missing=word), uneven / word)
        made = library.merge_state_dicts(states, method="linear", weight=1, missing=word)
        on_disk = stored(uneven / word)
        assert made.keys() == on_disk.keys()
        assert all(np.array_equal(made[name], on_disk[name]) for name in made)
    with pytest.raises(library.SmeltError, match="missing in"):
        library.merge_state_dicts(states, method="linear", weight=1)
    with pytest.raises(library.SmeltError, match="`missing` cannot be 'drop'"):
        library.merge_state_dicts(states, method="linear", weight=1, missing="drop")


def test_the_schema_knows_the_words() -> None:
    schema = json.loads(smelt("schema").out)
    assert schema["properties"]["missing"]["enum"] == ["error", "skip", "copy"]


def test_tiles_and_threads_do_not_show(diffusion: Path) -> None:
    asked = tree("dare_ties", "b", base_model="a.safetensors", parameters={"weight": 1, "density": 0.5})
    recipe_path = recipe(diffusion / "recipe.yml", asked)
    library.merge(recipe_path, diffusion / "one", workers=1, tile=65536)
    library.merge(recipe_path, diffusion / "two", workers=3)
    one, two = ((diffusion / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two
    assert state_dicts.UNET in json.dumps(header(diffusion / "one" / "model.safetensors"))
