"""Bad input, as careless and as hostile users give it: one clear error each, all at once, nothing written.

Every refusal is a real command, with the exit code of docs/errors.md, and what was on the disk is compared before and
after: no output, no build folder, no lock, no change anywhere.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import factory
from factory import (
    INPUT,
    NUMERIC,
    USAGE,
    Array,
    accepted,
    config,
    linear,
    llama,
    model,
    recipe,
    refused,
    smelt,
    snapshot,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with two sound models, m0 and m1, of two layers."""
    factory.llamas(tmp_path, 2)
    return tmp_path


def changed(folder: Path, name: str, change: Callable[[dict[str, Array]], object], **settings: Any) -> Path:
    """A model as m0, but with its tensors changed by `change`, and its config by `settings`."""
    tensors = llama(seed=9)
    change(tensors)
    return model(folder / name, tensors, config(**settings))


# --- the recipe -----------------------------------------------------------------------------------------------------

RECIPES: dict[str, tuple[str, list[str]]] = {
    "unknown key": (
        "merge_method: linear\ndype: float16\nmodels: [{model: m0, parameters: {weight: 1}}]\n",
        ["unknown key `dype`", "recipe.yml:2:1", "fix: did you mean `dtype`?"],
    ),
    "parameter at the top": (
        "merge_method: slerp\nbase_model: m0\nmodels: [{model: m1}]\nt: 0.5\n",
        ["unknown key `t`", "recipe.yml:4:1", "under `parameters:`"],
    ),
    "wrong type": ("merge_method: linear\nmodels: m0\n", ["`models` must be a list, not 'm0'", "recipe.yml:2"]),
    "text for a number": (
        "merge_method: linear\nmodels: [{model: m0}]\nparameters: {weight: heavy}\n",
        ["`weight`", "not 'heavy'", "recipe.yml:3"],
    ),
    "number for a flag": (
        "merge_method: linear\nmodels: [{model: m0}]\nparameters: {weight: 1, normalize: 3}\n",
        ["`normalize`", "recipe.yml:3"],
    ),
    "out of range": (
        "merge_method: ram\nbase_model: m0\nmodels: [{model: m1}]\nparameters: {epsilon: -1}\n",
        ["`epsilon`", "[0, inf)", "-1", "recipe.yml:4"],
    ),
    "NaN": (
        "merge_method: linear\nmodels: [{model: m0, parameters: {weight: .nan}}]\n",
        [".nan is not a number", "recipe.yml:2:43", "fix: give a finite number"],
    ),
    "NaN in words": (
        "merge_method: linear\nmodels: [{model: m0, parameters: {weight: nan}}]\n",
        ["must be a finite number, not 'nan'", "recipe.yml:2:43"],
    ),
    "infinity": ("merge_method: linear\nmodels: [{model: m0, parameters: {weight: -.inf}}]\n", ["-.inf"]),
    "too large a number": (
        "merge_method: linear\nmodels: [{model: m0, parameters: {weight: 1e999}}]\n",
        ["recipe.yml:2"],
    ),
    "method": (
        "merge_method: linaer\nmodels: [{model: m0}]\n",
        ["linaer", "fix: did you mean `linear`?", "recipe.yml:1"],
    ),
    "no method": ("models: [{model: m0}]\n", ["`merge_method` is missing"]),
    "parameter": (
        "merge_method: ties\nbase_model: m0\nmodels: [{model: m1, parameters: {weihgt: 1}}]\n",
        ["ties has no parameter `weihgt`", "recipe.yml:3", "fix: did you mean `weight`?"],
    ),
    "parameter of another method": (
        "merge_method: linear\nmodels: [{model: m0}]\nparameters: {weight: 1, density: 0.5}\n",
        ["linear has no parameter `density`", "recipe.yml:3"],
    ),
    "method-wide per model": (
        "merge_method: linear\nmodels: [{model: m0, parameters: {weight: 1, normalize: true}}]\n",
        ["`normalize` is method-wide", "recipe.yml:2"],
    ),
    "missing parameter": (
        "merge_method: linear\nmodels: [{model: m0}]\n",
        ["linear needs `weight` for m0", "recipe.yml:2"],
    ),
    "dtype": (
        "merge_method: linear\ndtype: float61\nmodels: [{model: m0, parameters: {weight: 1}}]\n",
        ["float61", "fix: did you mean `float64`?", "recipe.yml:2"],
    ),
    "empty": ("", ["recipe.yml"]),
    "a list": ("- merge_method: linear\n", ["recipe.yml", "a list"]),
    "twice": ("merge_method: linear\nmerge_method: ties\nmodels: [{model: m0}]\n", ["merge_method", "recipe.yml:2"]),
    "python": (
        "merge_method: !!python/name:os.system linear\nmodels: [{model: m0, parameters: {weight: 1}}]\n",
        ["recipe.yml:1"],
    ),
    "broken": ("merge_method: [linear\nmodels: {\n", ["recipe.yml:"]),
    "no models": ("merge_method: linear\n", ["names no models to merge"]),
    "models empty": ("merge_method: linear\nmodels: []\n", ["`models` is empty"]),
    "models and slices": (
        "merge_method: passthrough\nmodels: [{model: m0}]\nslices: [{sources: [{model: m0, layer_range: [0, 1]}]}]\n",
        ["`models` and `slices` are both given"],
    ),
    "no base": (
        "merge_method: ties\nmodels: [{model: m0}]\nparameters: {weight: 1}\n",
        ["ties needs a base model", "recipe.yml:1", "fix: add `base_model: ...` to the recipe"],
    ),
    "too many models": (
        "merge_method: slerp\nbase_model: m0\nmodels: [{model: m0}, {model: m1}, {model: m2}]\nparameters: {t: 0.5}\n",
        ["slerp takes exactly 1 model besides the base, not 2", "recipe.yml:3", "fix: remove models"],
    ),
    "two for passthrough": (
        "merge_method: passthrough\nmodels: [{model: m0}, {model: m1}]\n",
        ["passthrough takes exactly 1 model, not 2"],
    ),
    "too few models": (
        "merge_method: model_stock\nbase_model: m0\nmodels: [{model: m1}]\n",
        ["model_stock takes at least 2 models besides the base, not 1", "fix: add a model"],
    ),
    "only the base": (
        "merge_method: ties\nbase_model: m0\nmodels: [{model: m0}]\nparameters: {weight: 1}\n",
        ["not 0", "fix: add models that are not the base"],
    ),
    "adapter": (
        "merge_method: linear\nmodels: [{model: m0+org/lora, parameters: {weight: 1}}]\n",
        ["adapters are not supported yet", "fix: merge 'org/lora' into 'm0' first"],
    ),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_with_one_mistake(folder: Path, name: str) -> None:
    text, says = RECIPES[name]
    refused(folder, text, code=USAGE, says=says)
    assert smelt("plan", folder / "recipe.yml").code == USAGE


def test_all_mistakes_of_a_recipe_are_told_at_once(folder: Path) -> None:
    text = "merge_method: ties\nbase_model: m0\nmodels:\n  - model: m1\n    parameters: {weihgt: 1, lambda: 7}\n"
    text += "  - model: m1\n    parameters: {weight: x}\nparameters: {normalise: true}\n"
    err = refused(
        folder, text, code=USAGE, says=["`weihgt`", "`lambda` is method-wide", "`weight`", "`normalise`"], problems=4
    )
    places = [line.split("recipe.yml:")[1] for line in err.splitlines() if "recipe.yml:" in line]
    assert [int(place.split(":")[0]) for place in places] == [5, 5, 7, 8]


def test_unknown_keys_and_unknown_parameters_are_told_together(folder: Path) -> None:
    text = "merge_method: linear\ndype: float16\nmodels: [{model: m0, parameters: {weihgt: 1}}]\n"
    refused(folder, text, code=USAGE, says=["`dype`", "`weihgt`"], problems=2)


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("recipes.yml", ["there is no such recipe", "fix: did you mean"]),
        ("nothing/at/all.yml", ["there is no such recipe"]),
        (".", ["the recipe is a folder", "fix: did you mean"]),
        ("pipe", ["the recipe is not a regular file"]),
        ("loop", ["recipe"]),
    ],
)
def test_recipes_that_are_no_file(folder: Path, path: str, says: list[str]) -> None:
    recipe(folder / "recipe.yml", linear("m0"))
    os.mkfifo(folder / "pipe")
    os.symlink("loop", folder / "loop")
    done = smelt("merge", folder / path, folder / "out")
    assert done.code == USAGE, done.text
    for said in says:
        assert said in done.err
    assert not (folder / "out").exists()


def test_binary_for_a_recipe(folder: Path) -> None:
    done = smelt("plan", folder / "m0" / "model.safetensors")
    assert done.code == USAGE, done.text
    assert len(done.err) < 1000
    assert done.err.isprintable() or all(c.isprintable() or c == "\n" for c in done.err)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("modules", {"vision_tower": {"models": [{"model": "m0"}]}}, ["module `vision_tower` is no part of m0"]),
        ("tokenizer", {"source": "union"}, ["tokenizer"]),
        ("tokenizer_source", "union", ["tokenizer"]),
        ("tokenizer_source", "m2", ["m2"]),
        ("methods", ["./mine.py"], ["mine.py"]),
    ],
)
def test_parts_of_the_language_that_cannot_be_done_are_never_ignored(
    folder: Path, key: str, value: Any, says: list[str]
) -> None:
    tree = linear("m0", "m1", **{key: value})
    if key == "modules":
        del tree["models"]
    path = recipe(folder / "recipe.yml", tree)
    before = snapshot(folder)
    done = smelt("merge", path, folder / "out")
    assert done.code in (USAGE, INPUT), done.text
    for said in says:
        assert said in done.err
    assert snapshot(folder) == before


# --- models that are not there, or not sound ------------------------------------------------------------------------


def test_a_missing_model_gets_the_near_folder(folder: Path) -> None:
    refused(folder, linear("./m0", "./m11"), code=INPUT, says=["there is no model at './m11'", "did you mean", "/m1?"])


def test_a_near_folder_below_another(folder: Path) -> None:
    (folder / "models").mkdir()
    factory.llamas(folder / "models" / "chat", 1)
    (folder / "models" / "chat" / "m0").rename(folder / "models" / "chat-v1")
    says = ["models/chat-v2", f"did you mean {folder / 'models' / 'chat-v1'}?"]
    refused(folder, linear("m0", "models/chat-v2"), code=INPUT, says=says)


def test_all_missing_models_are_told_at_once(folder: Path) -> None:
    tree = linear("./zzz", "../nowhere", "/no/such/folder", "org/name", "m0")
    says = ["'./zzz'", "'../nowhere'", "'/no/such/folder'", "org/name", "HF_HUB_OFFLINE is set"]
    refused(folder, tree, code=INPUT, says=says, problems=4)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda m: (m / "model.safetensors").unlink(), ["no weight files"]),
        (lambda m: (m / "model.safetensors").write_bytes(b""), ["bad: model.safetensors"]),
        (lambda m: os.truncate(m / "model.safetensors", 1000), ["bad: model.safetensors", "cut off"]),
        (
            lambda m: (m / "model.safetensors").rename(m / "pytorch_model.bin"),
            ["fix: convert the model to safetensors"],
        ),
        (lambda m: (m / "config.json").write_text("{"), ["config.json"]),
        (lambda m: (m / "config.json").write_text("[1]"), ["config.json", "JSON object"]),
        (lambda m: (m / "config.json").write_text('{"a": 1, "a": 2}'), ["config.json"]),
        (lambda m: (m / "config.json").write_bytes(b"\xff\xfe"), ["config.json"]),
        (lambda m: ((m / "config.json").unlink(), os.mkfifo(m / "config.json")), ["config.json"]),
        (
            lambda m: ((m / "config.json").unlink(), os.symlink("/etc/passwd", m / "config.json")),
            ["leaves the model's"],
        ),
    ],
)
def test_models_that_are_not_sound(folder: Path, spoil: Callable[[Path], Any], says: list[str]) -> None:
    bad = model(folder / "bad", llama(), config())
    spoil(bad)
    before = {name: what for name, what in snapshot(folder).items() if what != "other"}
    done = smelt("merge", recipe(folder / "recipe.yml", linear("m0", "bad")), folder / "out")
    assert done.code == INPUT, done.text
    assert "defect" not in done.err
    for said in says:
        assert said in done.err, done.err
    after = {name: what for name, what in snapshot(folder).items() if what != "other"}
    assert after.keys() - before.keys() == {"recipe.yml"}


def test_two_bad_models_are_told_together(folder: Path) -> None:
    for name in ("x", "y"):
        os.truncate(model(folder / name, llama(), config()) / "model.safetensors", 500)
    refused(folder, linear("x", "y"), code=INPUT, says=["x: model.safetensors", "y: model.safetensors"], problems=2)


def test_a_config_that_counts_other_layers(folder: Path) -> None:
    model(folder / "four", llama(layers=2), config(layers=4))
    says = ["model four: config.json says 4 layers, the files have 2", "num_hidden_layers: 4"]
    refused(folder, linear("four", "m0"), code=INPUT, says=says)


def test_a_layer_in_the_middle_is_missing(folder: Path) -> None:
    for name in ("a", "b"):
        tensors = {key: value for key, value in llama(layers=4).items() if ".layers.2." not in key}
        model(folder / name, tensors, config(layers=4))
    refused(folder, linear("a", "b"), code=INPUT, says=["model a has a gap in its layers", "N = 2"], problems=2)


def test_shapes_that_differ(folder: Path) -> None:
    def change(tensors: dict[str, Array]) -> None:
        tensors["model.norm.weight"] = np.zeros((1, 8), np.float32)  # would broadcast
        tensors["model.layers.1.self_attn.q_proj.weight"] = np.zeros((4, 16), np.float32)

    changed(folder, "other", change)
    says = ["2 tensors have different shapes", "m0  model.norm.weight [8] float32"]
    says += ["other  model.norm.weight [1, 8] float32", "[4, 16]", "drop the one that differs"]
    refused(folder, linear("m0", "other"), code=INPUT, says=says)
    assert smelt("plan", folder / "recipe.yml").code == INPUT


def test_a_scalar_is_not_a_vector_of_one(folder: Path) -> None:
    changed(folder, "a", lambda tensors: tensors.update({"model.scale": np.float32(1).reshape(())}))
    changed(folder, "b", lambda tensors: tensors.update({"model.scale": np.ones(1, np.float32)}))
    refused(folder, linear("a", "b"), code=INPUT, says=["tensor 'model.scale' has different shapes", "[] float32"])


def test_vocabularies_of_different_size(folder: Path) -> None:
    model(folder / "big", llama(vocabulary=18), config(vocabulary=18))
    says = ["model.embed_tokens.weight", "[16, 8]", "[18, 8]", "lm_head.weight", "fix: the vocabularies differ"]
    refused(folder, linear("m0", "big"), code=INPUT, says=says)


def test_tensors_missing_in_one_model(folder: Path) -> None:
    lost = ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"]
    changed(folder, "lacks", lambda tensors: [tensors.pop(name) for name in lost])
    err = refused(folder, linear("m0", "lacks"), code=INPUT, says=[*lost, "2 tensors are missing in lacks", "allow"])
    assert "present in m0" in err
    for words, tree in (
        (["--allow", "missing_tensor"], linear("m0", "lacks")),
        ([], linear("m0", "lacks", allow=["missing_tensor"])),
    ):
        accepted(folder, tree, "--overwrite", *words)
        out, kept = factory.stored(folder / "out"), factory.stored(folder / "m0")
        assert out.keys() == kept.keys()
        assert all(np.array_equal(out[name], kept[name]) for name in lost)


def test_tensors_that_only_one_model_has(folder: Path) -> None:
    extra = {"model.extra.weight": np.ones(3, np.float32)}
    changed(folder, "more", lambda tensors: tensors.update(extra))
    says = ["model more has 1 tensor that m0 lacks", "model.extra.weight", "--allow extra_tensor"]
    refused(folder, linear("m0", "more"), code=INPUT, says=says)
    done = accepted(folder, linear("m0", "more"), "--allow", "extra_tensor")
    assert "warning: model more has 1 tensor that m0 lacks: left out" in done.err
    assert "model.extra.weight" not in factory.stored(folder / "out")
    assert "extra_tensor is allowed" in (folder / "out" / "smelt.json").read_text()
    refused(
        folder, linear("m0", "more"), "--allow", "extra_tensor", "--strict", code=USAGE, says=["left out"], out="o2"
    )


def test_a_missing_tensor_allowed_does_not_allow_an_extra_one(folder: Path) -> None:
    changed(folder, "more", lambda tensors: tensors.update({"model.extra.weight": np.ones(3, np.float32)}))
    refused(folder, linear("m0", "more"), "--allow", "missing_tensor", code=INPUT, says=["model.extra.weight"])


def test_models_of_other_sizes_are_told_in_few_lines(folder: Path) -> None:
    """A wrong model differs in every tensor: that is one mistake, not a thousand."""
    for name, hidden in (("a", 8), ("b", 12)):
        model(folder / name, llama(layers=24, hidden=hidden), config(layers=24, hidden=hidden))
    done = smelt("merge", recipe(folder / "recipe.yml", linear("a", "b")), folder / "out")
    assert done.code == INPUT
    assert len(done.err.splitlines()) <= 60


# --- layers ---------------------------------------------------------------------------------------------------------


def slices(*parts: list[tuple[str, Any]], **keys: Any) -> dict[str, Any]:
    """A linear recipe of slices, each a list of (model, layer_range)."""
    sources = [{"sources": [{"model": name, "layer_range": span} for name, span in part]} for part in parts]
    return {"merge_method": "linear", "slices": sources, "parameters": {"weight": 1}} | keys


@pytest.mark.parametrize(
    ("tree", "says"),
    [
        (slices([("m0", [1, 1])]), ["`layer_range` [1, 1] is empty"]),
        (slices([("m0", [2, 1])]), ["`layer_range` [2, 1] is reversed"]),
        (slices([("m0", [-1, 1])]), ["begins before layer 0"]),
        (slices([("m0", [0, 1, 2])]), ["two whole numbers"]),
        (slices([("m0", [0, 1.5])]), ["two whole numbers"]),
        (slices([("m0", "0-1")]), ["two whole numbers"]),
        (slices([("m0", [0, 3])]), ["goes beyond m0, which has 2 layers", "fix: end the range at 2"]),
        (slices([("m0", [0, 10**12])]), ["goes beyond m0"]),
        (slices([("m0", [0, 2]), ("m1", [0, 1])]), ["[0, 2] has 2 layers and [0, 1] has 1"]),
        (slices([("m0", [0, 1]), ("m1", None)]), ["different lengths"]),
        (
            slices([("m0", [0, 2])], merge_method="task_arithmetic", base_model="m1"),
            ["does not list the base model m1", "fix: add `- model: m1`"],
        ),
    ],
)
def test_layer_ranges(folder: Path, tree: dict[str, Any], says: list[str]) -> None:
    refused(folder, tree, code=USAGE, says=[*says, "recipe.yml:"])


def test_all_bad_ranges_are_told_at_once(folder: Path) -> None:
    tree = slices([("m0", [0, 3])], [("m0", [0, 2])], [("m1", [1, 9])])
    refused(folder, tree, code=USAGE, says=["[0, 3] goes beyond m0", "[1, 9] goes beyond m1"], problems=2)


def test_an_empty_range_is_one_mistake_not_two(folder: Path) -> None:
    refused(folder, slices([("m0", [1, 1]), ("m1", [0, 1])]), code=USAGE, says=["is empty"])


def test_slices_of_models_without_layers(folder: Path) -> None:
    model(folder / "flat", {"w": np.ones(3, np.float32)}, {"model_type": "x"})
    refused(folder, slices([("flat", [0, 1])]), code=USAGE, says=["layer ranges need one stack of layers", "models:"])


def test_a_donor_that_is_in_no_slice(folder: Path) -> None:
    model(folder / "donor", llama(layers=4), config(layers=4))
    tree = slices([("m0", [0, 2])], merge_method="passthrough", base_model="donor", parameters={})
    accepted(folder, tree)
    assert factory.stored(folder / "out").keys() == factory.stored(folder / "m0").keys()


# --- numbers --------------------------------------------------------------------------------------------------------


def weighted(*weights: Any, **keys: Any) -> dict[str, Any]:
    models = [{"model": f"m{i}", "parameters": {"weight": weight}} for i, weight in enumerate(weights)]
    return {"merge_method": "linear", "models": models} | keys


@pytest.mark.parametrize("weights", [(1, -1), (0, 0), (0.1, -0.1), (1e-9, 0)])
def test_weights_that_sum_to_zero(folder: Path, weights: tuple[float, ...]) -> None:
    refused(folder, weighted(*weights), code=USAGE, says=["weights sum to 0", "recipe.yml", "first at tensor"])
    accepted(folder, weighted(*weights, parameters={"normalize": False}))


def test_weights_that_sum_to_zero_in_one_layer_only(folder: Path) -> None:
    model(folder / "m0", llama(layers=3), config(layers=3))
    model(folder / "m1", llama(layers=3, seed=1), config(layers=3))
    tree = weighted([1, -1], 0)
    refused(folder, tree, code=USAGE, says=["weights sum to 0", "model.layers.1."])


def test_a_weight_only_for_some_tensors(folder: Path) -> None:
    tree = weighted([{"filter": "mlp", "value": 1}], 1)
    refused(
        folder,
        tree,
        code=USAGE,
        says=["needs `weight`", "for m0 at 7 tensors", "model.embed_tokens.weight", "fix: add"],
    )


def test_a_new_infinity_ends_the_merge(folder: Path) -> None:
    changed(folder, "large", lambda tensors: tensors["model.norm.weight"].fill(3e38))
    tree = linear("large", "large", out_dtype="float16")
    says = ["tensor 'model.norm.weight' would get a NaN or infinity", "index [0]", "float16", "--allow nonfinite"]
    refused(folder, tree, code=NUMERIC, says=[*says, "large  model.norm.weight [8] float32"])
    done = accepted(folder, tree, "--allow", "nonfinite")
    assert "warning: 8 numbers of the output are NaN or infinite, in 1 tensor: model.norm.weight (8)" in done.err
    accepted(folder, {**tree, "allow": ["nonfinite"]}, out="out2")


def test_an_overflow_of_float32_itself(folder: Path) -> None:
    changed(folder, "large", lambda tensors: tensors["model.norm.weight"].fill(3e38))
    tree = linear("large", "large", parameters={"weight": 1, "normalize": False})
    refused(folder, tree, code=NUMERIC, says=["model.norm.weight", "NaN or infinity"])


def test_a_new_nan_keeps_an_output_that_is_there(folder: Path) -> None:
    accepted(folder, linear("m0", "m1"))
    changed(folder, "large", lambda tensors: tensors["model.norm.weight"].fill(3e38))
    tree = linear("large", "large", out_dtype="float16")
    refused(folder, tree, "--overwrite", code=NUMERIC, says=["model.norm.weight"])
    assert smelt("verify", folder / "out").code == 0


def test_inherited_nans_are_counted_and_told(folder: Path) -> None:
    def change(tensors: dict[str, Array]) -> None:
        tensors["model.norm.weight"][3] = np.nan
        tensors["lm_head.weight"][0, :2] = np.inf

    changed(folder, "spoilt", change)
    done = accepted(folder, linear("spoilt", "m0"))
    assert "warning: 3 numbers of the output are NaN or infinite, in 2 tensors:" in done.err
    assert "model.norm.weight (1)" in done.err
    told = smelt("merge", folder / "recipe.yml", folder / "out2", "--json").json
    assert told["nonfinite"] == {"lm_head.weight": 2, "model.norm.weight": 1}
    record = json.loads((folder / "out" / "smelt.json").read_text())
    assert record["tensors"]["model.norm.weight"]["nonfinite"] == 1
    refused(folder, linear("spoilt", "m0"), "--strict", code=NUMERIC, says=["3 numbers of the output"], out="out3")


def test_integers_that_differ(folder: Path) -> None:
    changed(folder, "a", lambda tensors: tensors.update({"model.ids": np.arange(4)}))
    changed(folder, "b", lambda tensors: tensors.update({"model.ids": np.arange(1, 5)}))
    says = ["tensor 'model.ids' holds int64 numbers that differ", "never averaged"]
    refused(folder, linear("a", "b"), code=INPUT, says=says)


def test_integers_that_agree(folder: Path) -> None:
    for name in ("a", "b"):
        changed(folder, name, lambda tensors: tensors.update({"model.ids": np.arange(4), "model.on": np.array([True])}))
    accepted(folder, linear("a", "b", out_dtype="bfloat16"))
    out = factory.stored(folder / "out")
    assert out["model.ids"].tolist() == [0, 1, 2, 3]
    assert out["model.ids"].dtype == np.int64
    assert out["model.on"].dtype == np.bool_


def test_integers_beside_floats(folder: Path) -> None:
    changed(folder, "a", lambda tensors: tensors.update({"model.x": np.arange(4)}))
    changed(folder, "b", lambda tensors: tensors.update({"model.x": np.ones(4, np.float32)}))
    refused(folder, linear("a", "b"), code=INPUT, says=["model.x", "int64", "float32", "only floating types"])


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "fp8", "compressed-tensors", "mxfp4"])
def test_quantised_models_are_refused_by_name(folder: Path, method: str) -> None:
    changed(folder, "packed", lambda tensors: None, quantization_config={"quant_method": method})
    says = [f"model packed is quantised ({method})", "fix: use the model's original weights"]
    refused(folder, linear("m0", "packed"), code=INPUT, says=says)


def test_fp8_with_scales_and_without_a_word_in_the_config(folder: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"

    def change(tensors: dict[str, Array]) -> None:
        tensors[name] = tensors[name].astype(ml_dtypes.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = np.ones((1, 1), np.float32)

    changed(folder, "a", change)
    says = [
        "model a is quantised (fp8)",
        f"tensor {name} [12, 8] float8_e4m3fn",
        "FineGrainedFP8Config(dequantize=True)",
    ]
    refused(folder, linear("a", "a"), code=INPUT, says=says)


def test_plain_fp8_is_merged(folder: Path) -> None:
    """Each half of the models with numbers of 8 bits: the means, rounded once."""
    name = "model.layers.0.mlp.up_proj.weight"
    kept = {}
    for place in ("a", "b"):

        def change(tensors: dict[str, Array], place: str = place) -> None:
            tensors[name] = kept[place] = (tensors[name] * (1 + len(kept))).astype(ml_dtypes.float8_e4m3fn)

        changed(folder, place, change)
    accepted(folder, linear("a", "b"))
    mean = (kept["a"].astype(np.float32) + kept["b"].astype(np.float32)) / 2
    out = factory.stored(folder / "out")
    assert out[name].dtype == ml_dtypes.float8_e4m3fn
    assert np.array_equal(out[name], mean.astype(ml_dtypes.float8_e4m3fn))
    assert out["model.norm.weight"].dtype == np.float32
    accepted(folder, linear("m0", "m1", dtype="float8_e5m2"), out="out2")
    assert {value.dtype.name for value in factory.stored(folder / "out2").values()} == {"float8_e5m2"}
    assert json.loads((folder / "out2" / "config.json").read_text())["torch_dtype"] == "float8_e5m2"
    assert smelt("verify", folder / "out2").code == 0


def test_fp8_with_scales_is_read_as_weights(folder: Path) -> None:
    """The scales are multiplied in, and neither they nor their word in the config are in the output."""
    name = "model.layers.0.mlp.up_proj.weight"
    scales = np.array([[0.5, 0.25], [2.0, 0.125]], np.float32)

    def change(tensors: dict[str, Array]) -> None:
        tensors[name] = tensors[name].astype(ml_dtypes.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scales

    setting = {"quant_method": "fp8", "weight_block_size": [8, 5]}
    changed(folder, "a", change, quantization_config=setting)
    whole = np.repeat(np.repeat(scales, 8, 0), 5, 1)[:12, :8]
    a = factory.stored(folder / "a")[name].astype(np.float32) * whole
    b = factory.stored(folder / "m0")[name]
    done = accepted(folder, linear("a", "m0"), "-v")
    assert "note: 1 tensor of a: float8_e4m3fn times the scales of 8 × 5 blocks, read as float32" in done.err
    out = factory.stored(folder / "out")
    assert np.array_equal(out[name], ((a.astype(np.float64) + b) / 2).astype(np.float32))
    assert f"{name}_scale_inv" not in out
    assert json.loads((folder / "out" / "config.json").read_text()) == config(torch_dtype="float32")
    accepted(folder, {"merge_method": "passthrough", "models": [{"model": "a"}]}, out="out2")
    assert np.array_equal(factory.stored(folder / "out2")[name], a)
    accepted(folder, linear("a", "m0", dtype="bfloat16"), out="out3")
    assert factory.stored(folder / "out3")[name].dtype == ml_dtypes.bfloat16
    assert smelt("verify", folder / "out3").code == 0
    scales[:] = 1
    changed(folder, "b", change, quantization_config={**setting, "weight_block_size": [8, 8]})
    says = ["model b is quantised (fp8)", "config.json  quantization_config", "dequantise it first"]
    refused(folder, linear("m0", "b", allow=["extra_tensor"]), code=INPUT, says=says, out="out4")


def test_a_number_that_fp8_cannot_hold(folder: Path) -> None:
    tree = linear("m0", "m1", parameters={"weight": 1e4, "normalize": False}, out_dtype="float8_e4m3fn")
    says = ["would get a NaN or a number beyond ±448", "written as float8_e4m3fn", "--allow nonfinite"]
    refused(folder, tree, code=NUMERIC, says=says)


def test_mixed_types_are_noted(folder: Path) -> None:
    model(folder / "half", llama(dtype=ml_dtypes.bfloat16), config(dtype="bfloat16"))
    done = accepted(folder, linear("m0", "half"), "-v")
    assert "note: 9 tensors mix bfloat16 and float32" in done.err
    assert factory.stored(folder / "out")["model.norm.weight"].dtype == np.float32


# --- what is said to no effect ----------------------------------------------------------------------------------------


def test_a_filter_that_matches_nothing(folder: Path) -> None:
    tree = linear("m0", "m1", parameters={"weight": [{"filter": "modelnorm", "value": 2}, {"value": 1}]})
    done = accepted(folder, tree)
    assert "warning: " in done.err
    assert "filter 'modelnorm' fits no tensor; near it are model.norm" in done.err
    says = ["--strict makes it an error", "filter 'modelnorm' fits no tensor", "recipe.yml:"]
    refused(folder, tree, "--strict", code=USAGE, says=says, out="out2")
    assert smelt("plan", folder / "recipe.yml", "--strict").code == USAGE
    assert "filter 'modelnorm'" in smelt("plan", folder / "recipe.yml").out


def test_lm_head_of_a_tied_model_is_a_warning(folder: Path) -> None:
    for i in range(2):
        model(folder / f"t{i}", llama(seed=i, tied=True), config(tied=True))
    tree = linear("t0", "t1", parameters={"weight": [{"filter": "lm_head", "value": 2}, {"value": 1}]})
    assert "filter 'lm_head' fits no tensor" in accepted(folder, tree).err


@pytest.mark.parametrize(
    ("tree", "says"),
    [
        (linear("m0", "m1", parameters={"weight": 1, "int8_mask": True}), "`int8_mask` has no effect in linear"),
        (
            linear("m1", merge_method="task_arithmetic", base_model="m0", parameters={"weight": 1, "density": 0.5}),
            "`density` has no effect in task_arithmetic",
        ),
    ],
)
def test_parameters_without_effect_are_noted(folder: Path, tree: dict[str, Any], says: str) -> None:
    assert says in accepted(folder, tree, "-v").err
    assert says in smelt("plan", folder / "recipe.yml").out


def test_settings_of_the_base_without_effect_are_noted(folder: Path) -> None:
    tree = {
        "merge_method": "task_arithmetic",
        "base_model": "m0",
        "models": [{"model": name, "parameters": {"weight": 1}} for name in ("m0", "m1")],
    }
    assert "`weight` of m0 has no effect: it is the base model" in accepted(folder, tree, "-v").err


# --- the base under other names -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["m0", "./m0", "m0/", "absolute", "link"])
def test_the_base_is_the_base_however_it_is_spelt(folder: Path, name: str) -> None:
    os.symlink("m0", folder / "link")
    named = str(folder / "m0") if name == "absolute" else name
    for method, parameters in (("slerp", {"t": 0.5}), ("task_arithmetic", {"weight": 0.5})):
        tree = linear(named, "m1", merge_method=method, base_model="m0", parameters=parameters)
        accepted(folder, tree, out=f"out-{method}")
        plain = linear("m0", "m1", merge_method=method, base_model="m0", parameters=parameters)
        accepted(folder, plain, out=f"plain-{method}")
        one, two = (factory.stored(folder / f"{kind}-{method}") for kind in ("out", "plain"))
        assert all(np.array_equal(one[key], two[key]) for key in two)


def test_a_base_counted_as_a_model_is_seen_before_anything_is_written(folder: Path) -> None:
    tree = linear("./m0", "m1", merge_method="model_stock", base_model="m0", parameters={})
    refused(folder, tree, code=USAGE, says=["model_stock takes at least 2 models besides the base, not 1"])


# --- the command line -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["marge", "r.yml", "out"], ["there is no command 'marge'", "fix: did you mean `smelt merge`?"]),
        (["bogus"], ["there is no command 'bogus'", "fix: commands are"]),
        (["--bogus"], ["--bogus", "fix: see `smelt --help`"]),
        (["merge"], ["RECIPE", "fix: see `smelt merge --help`"]),
        (["merge", "recipe.yml"], ["OUT"]),
        (["merge", "recipe.yml", "out", "more"], ["more"]),
        (["merge", "recipe.yml", "out", "--alow", "nonfinite"], ["--alow", "Did you mean --allow?"]),
        (["merge", "recipe.yml", "out", "--allow", "everything"], ["everything", "extra_tensor"]),
        (["merge", "recipe.yml", "out", "--threads", "many"], ["--threads", "many"]),
        (["merge", "recipe.yml", "out", "--threads", "0"], ["threads must be at least 1, not 0"]),
        (["merge", "recipe.yml", "out", "--threads", "-1"], ["threads must be at least 1, not -1"]),
        (["plan", "recipe.yml", "--threads", "-1"], ["threads must be at least 1, not -1"]),
        (["merge", "recipe.yml", "out", "--shard-size", "big"], ["'big' is not a size", "fix: write it like 5GB"]),
        (["merge", "recipe.yml", "out", "--shard-size", "0"], ["'0' is not a size"]),
        (["merge", "recipe.yml", "out", "--shard-size=-5GB"], ["'-5GB' is not a size"]),
        (["merge", "recipe.yml", "out", "--seed", "x"], ["--seed"]),
        (["plan"], ["RECIPE"]),
        (["methods", "tise"], ["there is no method 'tise'", "fix: did you mean ties?"]),
        (["verify"], ["OUT"]),
    ],
)
def test_misspelt_commands_and_options(
    folder: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], says: list[str]
) -> None:
    recipe(folder / "recipe.yml", linear("m0", "m1"))
    monkeypatch.chdir(folder)
    before = snapshot(folder)
    done = smelt(*words)
    assert done.code == USAGE, done.text
    assert done.out == ""
    for said in says:
        assert said in done.err, done.err
    assert snapshot(folder) == before
    told = smelt(*words, "--json")
    assert told.code == USAGE
    assert told.json["exit_code"] == USAGE


def test_the_library_refuses_the_same(folder: Path) -> None:
    import smelt as library

    tree = linear(folder / "m0", folder / "m1")
    for settings, says in (
        ({"workers": 0}, "threads must be at least 1"),
        ({"tile": -5}, "tile size must be at least 1"),
        ({"shard_bytes": 0}, "shard size must be at least 1"),
        ({"allow": ["everything"]}, "unknown word to allow: everything"),
        ({"allow": "everything"}, "unknown word to allow: everything"),
    ):
        with pytest.raises(library.RecipeError, match=says):
            library.merge(tree, folder / "out", **settings)  # type: ignore[arg-type]
    assert not (folder / "out").exists()
    report = library.merge(tree, folder / "out", allow=(word for word in ["nonfinite"]))
    assert report.bytes_written > 0


# --- names that write to the terminal -----------------------------------------------------------------------------


def test_names_cannot_write_to_the_terminal(folder: Path) -> None:
    evil = "model.\x1b[2Jevil\x07.weight"
    changed(folder, "a", lambda tensors: tensors.update({evil: np.ones(3, np.float32)}))
    changed(folder, "b", lambda tensors: tensors.update({evil: np.ones(4, np.float32)}))
    path = recipe(folder / "recipe.yml", linear("a", "b"))
    shapes = smelt("merge", path, folder / "out")
    extra = smelt("merge", recipe(path, linear("m0", "b")), folder / "out")
    plan = smelt("plan", recipe(path, linear("a", "a")))
    merged = smelt("merge", path, folder / "out", "-v")
    assert (shapes.code, extra.code, plan.code, merged.code) == (INPUT, INPUT, 0, 0)
    for done in (shapes, extra, plan, merged):
        assert "\x1b" not in done.text
        assert "\x07" not in done.text
    assert evil in factory.stored(folder / "out")
