"""What a merge writes: weights, index, config, papers and record; and that `verify` sees every change to them."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from ruamel.yaml import YAML

import factory
import smelt as library
from architectures import assert_clean, load
from factory import GOLDEN, config, linear, llama, model, process, recipe, smelt, snapshot, stored

LLAMAS = [GOLDEN / "models" / f"llama-{name}" for name in ("ft1", "ft2", "base")]


def yaml(text: str) -> Any:
    return YAML(typ="safe", pure=True).load(text)


def front_matter(out: Path) -> dict[str, Any]:
    text = (out / "README.md").read_text(encoding="utf-8")
    assert text.startswith("---\n")
    return yaml(text[4:].split("\n---\n", 1)[0])


def merged(folder: Path, tree: Any, *words: object, out: str = "out") -> Path:
    done = smelt("merge", recipe(folder / "recipe.yml", tree), folder / out, "-q", *words)
    assert (done.code, done.text) == (0, ""), done.text
    return folder / out


def ties(*models: Path, base: Path = LLAMAS[2], **keys: Any) -> dict[str, Any]:
    return linear(
        *models, merge_method="ties", base_model=str(base), parameters={"weight": 0.5, "density": 0.5}, **keys
    )


# --- weights --------------------------------------------------------------------------------------------------------


def test_one_file_has_no_index_and_loads(tmp_path: Path) -> None:
    out = merged(tmp_path, ties(*LLAMAS[:2]))
    assert [path.name for path in out.glob("*.safetensors*")] == ["model.safetensors"]
    loaded, info = load("llama", out)
    assert_clean(info)
    weights = stored(out)
    name = "model.layers.0.mlp.up_proj.weight"
    assert np.array_equal(loaded.state_dict()[name].numpy(), weights[name])


def test_shards_with_an_index_load(tmp_path: Path) -> None:
    out = merged(tmp_path, ties(*LLAMAS[:2]), "--shard-size", "60kB")
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(files) > 2
    assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    index = json.loads((out / "model.safetensors.index.json").read_text())
    weights = stored(out)
    assert index["weight_map"].keys() == weights.keys()
    assert set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in weights.values())
    assert index["metadata"]["total_parameters"] == sum(value.size for value in weights.values())
    for file in files:  # the header is no tensor data
        assert (out / file).stat().st_size < 60_000 + 8_000
    _, info = load("llama", out)
    assert_clean(info)
    whole = stored(merged(tmp_path, ties(*LLAMAS[:2]), out="whole"))
    assert all(np.array_equal(weights[name], whole[name]) for name in whole)
    assert smelt("verify", out).code == 0


def test_a_shard_size_below_a_tensor(tmp_path: Path) -> None:
    out = merged(tmp_path, linear(*factory.llamas(tmp_path, 2)), "--shard-size", "1")
    assert len(list(out.glob("*.safetensors"))) == len(stored(out)) == 9


def test_sharded_inputs_and_single_ones_give_the_same(tmp_path: Path) -> None:
    for i in range(2):
        model(tmp_path / "one" / f"m{i}", llama(seed=i), config())
        model(tmp_path / "many" / f"m{i}", llama(seed=i), config(), shards=3)
    one, many = (merged(tmp_path / kind, linear("m0", "m1")) for kind in ("one", "many"))
    first, second = stored(one), stored(many)
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("name", ["with space", "ünï.cødé", "a/b\\c", "x" * 500, "0", "model..weight", "__metadata"])
def test_odd_tensor_names_and_shapes_survive(tmp_path: Path, name: str) -> None:
    shapes = {name: (2, 3), "scalar": (), "none": (0, 4), "one": (1,)}
    for i in range(2):
        values = {key: np.full(shape, i + 1, np.float32) for key, shape in shapes.items()}
        model(tmp_path / f"m{i}", values, {"model_type": "x"})
    out = merged(tmp_path, linear("m0", "m1"))
    found = stored(out)
    assert {key: value.shape for key, value in found.items()} == shapes
    assert (found[name] == 1.5).all()
    assert smelt("verify", out).code == 0


def test_a_model_without_config(tmp_path: Path) -> None:
    for i in range(2):
        model(tmp_path / f"m{i}", {"w": np.full(3, i, np.float32)})
    out = merged(tmp_path, linear("m0", "m1"))
    assert not (out / "config.json").exists()
    assert "library_name" not in front_matter(out)
    assert smelt("verify", out).code == 0


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    models = factory.llamas(tmp_path, 2)
    path = recipe(tmp_path / "recipe.yml", linear(*models))
    for umask in (0o022, 0o077, 0o002):
        out = tmp_path / f"out-{umask:o}"
        done = process("merge", path, out, umask=umask)
        assert done.code == 0, done.text
        assert stat.S_IMODE(out.stat().st_mode) == 0o777 & ~umask
        modes = {entry.name: stat.S_IMODE(entry.stat().st_mode) for entry in out.iterdir()}
        assert set(modes.values()) == {0o666 & ~umask}, modes


# --- config ---------------------------------------------------------------------------------------------------------


def test_a_stack_of_layers_patches_the_config(tmp_path: Path) -> None:
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    for i in range(2):
        settings = config(layers=3, layer_types=kinds, sliding_window=4, dtype="float32")
        model(tmp_path / f"m{i}", llama(layers=3, seed=i), settings)
    sources = [("m0", [0, 2]), ("m1", [1, 3]), ("m0", [1, 2])]
    tree = {
        "merge_method": "passthrough",
        "slices": [{"sources": [{"model": name, "layer_range": span}]} for name, span in sources],
        "out_dtype": "bfloat16",
    }
    out = merged(tmp_path, tree)
    found = json.loads((out / "config.json").read_text())
    assert found["num_hidden_layers"] == 5
    assert found["layer_types"] == [kinds[i] for i in (0, 1, 1, 2, 1)]
    assert found["torch_dtype"] == "bfloat16"
    assert list(found) == list(json.loads((tmp_path / "m0" / "config.json").read_text()))  # order kept, nothing added
    weights = stored(out)
    assert {value.dtype for value in weights.values()} == {np.dtype(ml_dtypes.bfloat16)}
    source = stored(tmp_path / "m1")["model.layers.2.mlp.up_proj.weight"].astype(ml_dtypes.bfloat16)
    assert np.array_equal(weights["model.layers.3.mlp.up_proj.weight"], source)
    assert not any(".layers.5." in name for name in weights)


@pytest.mark.parametrize("tied_first", [True, False])
@pytest.mark.parametrize("method", ["linear", "task_arithmetic"])
def test_tied_and_untied_heads_in_both_orders(tmp_path: Path, tied_first: bool, method: str) -> None:
    tied = model(tmp_path / "tied", llama(seed=1, tied=True), config(tied=True))
    own = model(tmp_path / "own", llama(seed=2), config(tied=False))
    order = [tied, own] if tied_first else [own, tied]
    tree = linear(*order)
    if method == "task_arithmetic":
        tree = linear(order[1], merge_method=method, base_model=str(order[0]), parameters={"weight": 0.5})
    out = merged(tmp_path, tree)
    weights = stored(out)
    head = (stored(tied)["model.embed_tokens.weight"] + stored(own)["lm_head.weight"]) / 2
    assert np.allclose(weights["lm_head.weight"], head, atol=1e-6)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False


def test_tied_models_stay_tied(tmp_path: Path) -> None:
    for i in range(2):
        model(tmp_path / f"m{i}", llama(seed=i, tied=True), config(tied=True))
    out = merged(tmp_path, linear("m0", "m1"))
    assert "lm_head.weight" not in stored(out)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is True


def test_a_mix_of_heads_loads(tmp_path: Path) -> None:
    """As above, with a real model: the merged head is loaded, not the embedding in its place."""
    base = GOLDEN / "models" / "qwen-base"
    own = factory.copy(GOLDEN / "models" / "qwen-ft1", tmp_path / "own")
    weights = stored(own)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] * np.float32(3)
    settings = json.loads((own / "config.json").read_text()) | {"tie_word_embeddings": False}
    model(own, weights, settings)
    for i, pair in enumerate(((base, own), (own, base))):
        out = merged(tmp_path, linear(*pair), out=f"out{i}")
        loaded, info = load("qwen2", out)
        assert_clean(info)
        head = loaded.get_output_embeddings().weight.detach().numpy()
        assert np.array_equal(head, stored(out)["lm_head.weight"])
        assert not np.array_equal(head, stored(out)["model.embed_tokens.weight"])


def test_private_keys_and_code_stay_behind(tmp_path: Path) -> None:
    settings = config(_name_or_path="/home/me/secret", auto_map={"AutoModel": "modeling_x.X"}, _flag=True)
    files = {"modeling_x.py": "open('owned', 'w')", "training_args.bin": b"x", "events.out": b"y"}
    m0 = model(tmp_path / "m0", llama(), settings, files=files)
    out = merged(tmp_path, linear(m0, m0))
    found = json.loads((out / "config.json").read_text())
    assert found.keys() == settings.keys() - {"_name_or_path", "auto_map"}
    assert found["_flag"] is True
    names = {path.name for path in out.iterdir()}
    assert names == {"README.md", "config.json", "mergekit_config.yml", "model.safetensors", "smelt.json"}


# --- what is copied ---------------------------------------------------------------------------------------------------


def test_small_files_come_from_the_donor(tmp_path: Path) -> None:
    files: dict[str, str | bytes] = {
        "tokenizer.json": '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}',
        "tokenizer_config.json": '{"chat_template": "{{ messages }}"}',
        "generation_config.json": '{"eos_token_id": 2}',
        "special_tokens_map.json": "{}",
        "chat_template.jinja": "{{ messages }}",
        "LICENSE": "do as you like",
        "LICENSE.md": "more",
        "NOTICE.txt": "notice",
        "merges.txt": b"\xff\x00",
    }
    m0 = model(tmp_path / "m0", llama(seed=0), config(), files=files | {"README.md": "---\nlicense: llama3.1\n---\n"})
    m1 = model(tmp_path / "m1", llama(seed=1), config(), files={"LICENSE": "strict"})
    out = merged(tmp_path, linear(m1, merge_method="task_arithmetic", base_model=str(m0), parameters={"weight": 1}))
    for name, content in files.items():
        assert (out / name).read_bytes() == (content.encode() if isinstance(content, str) else content), name
    assert front_matter(out)["license"] == "llama3.1"


# --- the papers -----------------------------------------------------------------------------------------------------


def test_the_card_is_what_the_hub_reads(tmp_path: Path) -> None:
    out = merged(tmp_path, ties(*LLAMAS[:2]))
    front = front_matter(out)
    assert front["base_model"] == ["llama-ft1", "llama-ft2", "llama-base"]
    assert front["base_model_relation"] == "merge"
    assert front["library_name"] == "transformers"
    assert front["tags"] == ["merge", "smelt"]
    text = (out / "README.md").read_text()
    assert "# out\n" in text
    written = yaml(re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)[0])
    assert written == yaml((out / "mergekit_config.yml").read_text())


@pytest.mark.parametrize("name", ["true", "123", "1e5", "no", "null", "a: b", "quote\"d'", "ünï", "- x", "a|b", "#x"])
def test_cards_of_oddly_named_models(tmp_path: Path, name: str) -> None:
    factory.llamas(tmp_path, 1)
    (tmp_path / "m0").rename(tmp_path / name)
    out = merged(tmp_path, linear(f"./{name}", f"./{name}"))
    assert front_matter(out)["base_model"] == [name]
    assert yaml((out / "mergekit_config.yml").read_text())["models"][0]["model"] == name
    assert json.loads((out / "smelt.json").read_text())["inputs"][0]["model"] == name


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: apache-2.0\n---\n", "apache-2.0"),
        ('---\r\nlicense: "mit"\r\ntags: []\r\n---\r\n', "mit"),
        ("---\nlicense: mit # free\n---\n", "mit"),
        ("\ufeff---\nlicense: mit\n---\n", "mit"),
        ("license: mit\n", None),
        ("---\ntags: []\n---\nlicense: mit\n", None),
        ("---\nlicense: [a, b]\n---\n", None),
        ("---\nlicense: mit\nbase_model: x", "mit"),
        ("", None),
    ],
)
def test_the_licence_is_the_donors(tmp_path: Path, card: str, licence: str | None) -> None:
    m0 = model(tmp_path / "m0", llama(), config(), files={"README.md": card.encode()})
    assert front_matter(merged(tmp_path, linear(m0))).get("license") == licence


def test_the_written_recipe_gives_the_same_again(tmp_path: Path) -> None:
    work = tmp_path / "work"
    for i in range(3):
        model(work / "sub" / f"m{i}", llama(layers=3, seed=i), config(layers=3))
    tree = {
        "name": "mine",
        "merge_method": "ties",
        "base_model": "sub/m0",
        "models": [
            {"model": "./sub/m1/", "parameters": {"weight": [0.1, 0.9], "density": [{"filter": "mlp", "value": 0.3}]}},
            {"model": str(work / "sub" / "m2"), "parameters": {"weight": "1e-1"}},
        ],
        "parameters": {"density": 1, "normalize": "yes", "lambda": 0.7},
        "out_dtype": "bf16",
    }
    out = merged(work, tree)
    text = (out / "mergekit_config.yml").read_text()
    assert str(tmp_path) not in text
    assert "sub" not in text
    again = merged(work / "sub", text)  # beside the models, which are named by their folders alone
    assert (again / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    assert (again / "smelt.json").read_bytes() == (out / "smelt.json").read_bytes()


def test_the_record_is_complete(tmp_path: Path) -> None:
    tree = ties(*LLAMAS[:2])
    tree["parameters"]["int8_mask"] = True
    tree["parameters"]["density"] = [{"filter": "nothing_such", "value": 0.1}, {"value": 0.5}]
    path = recipe(tmp_path / "recipe.yml", tree)
    done = smelt("merge", path, tmp_path / "out", "--seed", 7)
    assert done.code == 0, done.text
    out = tmp_path / "out"
    record = json.loads((out / "smelt.json").read_text())
    assert (record["smelt"], record["method"]) == (library.__version__, "ties")
    assert record["recipe"]["seed"] == 7
    assert record["recipe"]["text"] == yaml((out / "mergekit_config.yml").read_text())
    assert [entry["model"] for entry in record["inputs"]] == ["llama-ft1", "llama-ft2", "llama-base"]
    assert [entry["role"] for entry in record["inputs"]] == ["model", "model", "base"]
    assert record["donor"] == "llama-base"
    weights = stored(out)
    assert record["tensors"].keys() == weights.keys()
    entry = record["tensors"]["model.norm.weight"]
    assert entry["values"]["weight"] == [0.5, 0.5]
    assert [source["model"] for source in entry["inputs"]] == ["llama-ft1", "llama-ft2"]
    assert entry["base"]["model"] == "llama-base"
    present = {entry.name for entry in out.iterdir()} - {"smelt.json"}
    assert record["files"].keys() == present
    assert record["files"]["config.json"]["sha256"] == hashlib.sha256((out / "config.json").read_bytes()).hexdigest()
    assert record["files"]["model.safetensors"]["size"] == (out / "model.safetensors").stat().st_size
    assert "int8_mask" in " ".join(record["notes"])
    assert "nothing_such" in " ".join(record["warnings"])
    assert_nothing_local(out, tmp_path)


def assert_nothing_local(out: Path, *secrets: Path) -> None:
    """No paper may tell where anything lay, when it was made, or by whom."""
    for path in out.iterdir():
        if path.suffix == ".safetensors":
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        for secret in (*secrets, GOLDEN, Path.home(), Path.cwd()):
            assert len(secret.parts) < 2 or str(secret) not in text, f"{path.name} tells {secret}"
        assert time.strftime("%Y-%m-%d") not in text


def test_the_same_merge_elsewhere_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other places, other spellings, other threads, another hash seed: the same output, byte for byte."""
    models = factory.llamas(tmp_path / "store", 3)
    settings = {"weight": [{"filter": "modelnorm", "value": 2}, {"value": 0.5}], "density": 0.5, "int8_mask": True}
    keys = {"merge_method": "dare_ties", "parameters": settings, "chat_template": "auto"}
    outs = []
    for place in ("here", "there/deep er"):
        work = tmp_path / place
        copies = [factory.copy(path, work / "models" / path.name) for path in models]
        names = [str(path) for path in copies] if place == "here" else [f"./models/{path.name}/" for path in copies]
        tree = linear(*names, base_model=names[0], **keys)
        path = recipe(work / "recipe.yml", tree)
        done = process(
            *("merge", path, work / "out", "--threads", 1 if place == "here" else 3),
            cwd=tmp_path if place == "here" else work,
            PYTHONHASHSEED="1" if place == "here" else "2",
            TZ="UTC" if place == "here" else "Asia/Tokyo",
            LC_ALL="C.UTF-8" if place == "here" else "C",
        )
        assert done.code == 0, done.text
        assert "modelnorm" in done.err
        outs.append(work / "out")
        assert_nothing_local(work / "out", tmp_path)
    assert snapshot(outs[0]) == snapshot(outs[1])


def test_notes_name_no_local_path(tmp_path: Path) -> None:
    models = factory.llamas(tmp_path / "private place", 2)
    tree = linear(*models, merge_method="task_arithmetic", base_model=str(models[0]), parameters={"weight": 1})
    tree["models"][0]["parameters"] = {"weight": 3}
    tree["parameters"]["weight"] = [{"filter": "no such thing", "value": 1}, {"value": 1}]
    path = recipe(tmp_path / "recipe.yml", tree)
    assert smelt("merge", path, tmp_path / "out").code == 0
    record = json.loads((tmp_path / "out" / "smelt.json").read_text())
    assert any("`weight` of m0 has no effect" in note for note in record["notes"]), record["notes"]
    assert record["warnings"][0].startswith("recipe:")
    assert_nothing_local(tmp_path / "out", tmp_path)


def test_a_method_file_is_named_without_its_folder(tmp_path: Path) -> None:
    code = tmp_path / "private" / "mine.py"
    code.parent.mkdir()
    code.write_text(
        "from smelt.methods.api import Method, register\n\n\n"
        '@register("mine_of_outputs", source="nowhere")\nclass Mine(Method):\n'
        '    """Take the first."""\n\n    def tile(self, x):\n        return x[0]\n'
    )
    models = factory.llamas(tmp_path, 2)
    tree = linear(*models, merge_method="mine_of_outputs", methods=[str(code)], parameters={})
    out = merged(tmp_path, tree, "--trust-methods")
    assert_nothing_local(out, tmp_path)
    record = json.loads((out / "smelt.json").read_text())
    assert record["method_files"] == {"mine.py": hashlib.sha256(code.read_bytes()).hexdigest()}
    assert yaml((out / "mergekit_config.yml").read_text())["methods"] == ["mine.py"]


# --- the hub cache ----------------------------------------------------------------------------------------------------

COMMITS = ("1" * 40, "2" * 40)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache with org/base (one commit) and org/chat (two: main, and v2)."""
    home = tmp_path / "home"
    monkeypatch.setenv("HF_HOME", str(home))
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    models = factory.llamas(tmp_path / "made", 3)
    (models[0] / "README.md").write_text("---\nlicense: mit\n---\n")
    factory.hub_model(home, "org/base", models[0], commit=COMMITS[0])
    factory.hub_model(home, "org/chat", models[1], commit=COMMITS[0])
    factory.hub_model(home, "org/chat", models[2], commit=COMMITS[1], refs=("v2",))
    return home


def test_hub_models_offline(tmp_path: Path, cache: Path) -> None:
    tree = linear("org/chat@v2", merge_method="task_arithmetic", base_model="org/base", parameters={"weight": 0.5})
    out = merged(tmp_path, tree)
    made = tmp_path / "made"
    record = json.loads((out / "smelt.json").read_text())
    chat, base = record["inputs"]
    assert (chat["commit"], base["commit"]) == (COMMITS[1], COMMITS[0])
    for entry, source in ((chat, made / "m2"), (base, made / "m0")):
        content = (source / "model.safetensors").read_bytes()
        assert entry["files"][0]["sha256"] == hashlib.sha256(content).hexdigest()
        assert entry["files"][0]["size"] == len(content)
    front = front_matter(out)
    assert front["base_model"] == ["org/chat", "org/base"]
    assert front["license"] == "mit"
    written = yaml((out / "mergekit_config.yml").read_text())
    assert written["base_model"] == "org/base"
    assert written["models"][0]["model"] == "org/chat@v2"
    again = merged(tmp_path, (out / "mergekit_config.yml").read_text(), out="again")
    assert stored(again).keys() == stored(out).keys()
    assert (again / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    half = (stored(made / "m0")["model.norm.weight"] + stored(made / "m2")["model.norm.weight"]) / 2
    assert np.allclose(stored(out)["model.norm.weight"], half, atol=1e-6)
    assert_nothing_local(out, cache)
    assert smelt("verify", out).code == 0


def test_two_revisions_of_one_repository(tmp_path: Path, cache: Path) -> None:
    out = merged(tmp_path, linear("org/chat", "org/chat@v2"))
    record = json.loads((out / "smelt.json").read_text())
    assert [entry["commit"] for entry in record["inputs"]] == list(COMMITS)
    assert [entry["model"] for entry in record["inputs"]] == ["org/chat", "org/chat@v2"]
    assert front_matter(out)["base_model"] == ["org/chat"]
    names = [entry["model"] for entry in yaml((out / "mergekit_config.yml").read_text())["models"]]
    assert names == ["org/chat", "org/chat@v2"]


def test_the_recipe_digest_tells_revisions_apart(tmp_path: Path, cache: Path) -> None:
    digests = set()
    for name in ("org/chat", "org/chat@v2"):
        plan = library.plan(linear("org/base", name))
        digests.add(plan.recipe_digest)
    assert len(digests) == 2


def test_the_plan_says_where_a_name_led(tmp_path: Path, cache: Path) -> None:
    path = recipe(tmp_path / "recipe.yml", linear("org/chat@v2", "made/m0"))
    text = smelt("plan", path).out
    assert f"hub, commit {COMMITS[1][:12]}" in text
    assert str(tmp_path / "made" / "m0") in text
    told = smelt("plan", path, "--json").json
    assert [entry["commit"] for entry in told["models"]] == [COMMITS[1], None]


def test_a_folder_beside_the_recipe_goes_before_the_hub(tmp_path: Path, cache: Path) -> None:
    factory.copy(tmp_path / "made" / "m0", tmp_path / "org" / "chat")
    told = smelt("plan", recipe(tmp_path / "recipe.yml", linear("org/chat")), "--json").json
    assert told["models"][0]["commit"] is None
    assert told["models"][0]["place"] == str(tmp_path / "org" / "chat")


def test_hash_inputs(tmp_path: Path) -> None:
    models = factory.llamas(tmp_path, 2)
    plain, hashed = merged(tmp_path, linear(*models)), merged(tmp_path, linear(*models), "--hash-inputs", out="hashed")
    for out, wanted in ((plain, False), (hashed, True)):
        for entry, path in zip(json.loads((out / "smelt.json").read_text())["inputs"], models, strict=True):
            digest = hashlib.sha256((path / "model.safetensors").read_bytes()).hexdigest()
            assert entry["files"][0]["sha256"] == (digest if wanted else None)


# --- verify ---------------------------------------------------------------------------------------------------------


def _flip(path: Path, place: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[place] ^= 1
    path.write_bytes(raw)


def _retitle(out: Path) -> None:
    """Another name in the header, of the same length."""
    path = out / "model-00001-of-00002.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"format":"pt"', b'"format":"px"', 1))


def _swap(out: Path) -> None:
    one, two = (out / f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    content = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(content)


TAMPERINGS: dict[str, tuple[Any, str]] = {
    "first byte of data": (
        lambda out: _flip(out / "model-00001-of-00002.safetensors", _start(out / "model-00001-of-00002.safetensors")),
        "is not what was written",
    ),
    "last byte": (lambda out: _flip(out / "model-00002-of-00002.safetensors", -1), "is not what was written"),
    "header": (_retitle, "another size or header"),
    "config": (lambda out: (out / "config.json").write_text("{}"), "config.json is not what was written"),
    "recipe": (lambda out: _flip(out / "mergekit_config.yml", 3), "mergekit_config.yml is not what was written"),
    "extra file": (lambda out: (out / "modeling.py").write_text("x"), "modeling.py is not in the record"),
    "extra tokens": (lambda out: (out / "added_tokens.json").write_text("{}"), "added_tokens.json is not in the"),
    "extra weights": (lambda out: (out / "x.safetensors").write_bytes(b"x"), "x.safetensors"),
    "missing card": (lambda out: (out / "README.md").unlink(), "README.md is missing"),
    "missing config": (lambda out: (out / "config.json").unlink(), "config.json is missing"),
    "missing shard": (lambda out: (out / "model-00002-of-00002.safetensors").unlink(), "model-00002-of-00002"),
    "missing index": (lambda out: (out / factory.INDEX).unlink(), factory.INDEX),
    "index": (lambda out: (out / factory.INDEX).open("a").write("\n"), f"{factory.INDEX} is not what was written"),
    "cut": (lambda out: os.truncate(out / "model-00002-of-00002.safetensors", 2000), "model-00002-of-00002"),
    "swapped": (_swap, "model-0000"),
    "no record": (lambda out: (out / "smelt.json").unlink(), "has no smelt.json"),
    "broken record": (lambda out: (out / "smelt.json").write_text("{"), "smelt.json"),
    "foreign record": (lambda out: (out / "smelt.json").write_text('{"format": 99}'), "not a record"),
    "pipe": (lambda out: ((out / "README.md").unlink(), os.mkfifo(out / "README.md")), "README.md"),
}


def _start(path: Path) -> int:
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    for i in range(2):
        model(folder / f"m{i}", llama(hidden=32, seed=i), config(hidden=32))
    out = merged(folder, linear("m0", "m1"), "--shard-size", "14kB")
    assert len(list(out.glob("*.safetensors"))) == 2
    return out


@pytest.mark.parametrize("name", TAMPERINGS)
def test_verify_sees_every_change(tmp_path: Path, sound: Path, name: str) -> None:
    out = factory.copy(sound, tmp_path / "out")
    assert smelt("verify", out).code == 0
    change, says = TAMPERINGS[name]
    change(out)
    done = smelt("verify", out)
    assert done.code == 3, done.text
    assert says in done.err
    assert "defect" not in done.err
    told = smelt("verify", out, "--json")
    assert (told.code, told.json["ok"], told.json["exit_code"]) == (3, False, 3)


@pytest.mark.parametrize("rows", [{"tensors": {"a": 3}}, {"files": {"config.json": 3}}, {"files": 1}, {"tensors": []}])
def test_verify_of_a_hostile_record(tmp_path: Path, sound: Path, rows: dict[str, Any]) -> None:
    out = factory.copy(sound, tmp_path / "out")
    record = json.loads((out / "smelt.json").read_text()) | rows
    (out / "smelt.json").write_text(json.dumps(record))
    done = smelt("verify", out)
    assert done.code == 3, done.text
    assert "smelt.json" in done.err


def test_verify_warns_of_what_a_publisher_does(tmp_path: Path, sound: Path) -> None:
    out = factory.copy(sound, tmp_path / "out")
    (out / ".gitattributes").write_text("x")
    (out / "README.md").open("a").write("x")
    done = smelt("verify", out)
    assert done.code == 0
    assert "warning: file .gitattributes is not in the record" in done.err
    assert "warning: file README.md is not what was written" in done.err
    assert len(smelt("verify", out, "--json").json["warnings"]) == 2
    assert smelt("verify", out, "--strict").code == 3


def test_verify_reports_all_changes_at_once(tmp_path: Path, sound: Path) -> None:
    out = factory.copy(sound, tmp_path / "out")
    _flip(out / "model-00001-of-00002.safetensors", -1)
    (out / "config.json").write_text("{}")
    (out / "extra.py").write_text("x")
    (out / "README.md").unlink()
    done = smelt("verify", out)
    assert done.err.count("error: ") == 4


# --- --json, and the plan -----------------------------------------------------------------------------------------


def test_every_command_speaks_json(tmp_path: Path) -> None:
    path = recipe(tmp_path / "recipe.yml", ties(*LLAMAS[:2]))
    plan = smelt("plan", path, "--json")
    merge = smelt("merge", path, tmp_path / "out", "--json")
    verify = smelt("verify", tmp_path / "out", "--json")
    methods, one = smelt("methods", "--json"), smelt("methods", "ties", "--json")
    check, schema = smelt("check", path, "--json"), smelt("schema")
    for done in (plan, merge, verify, methods, one, check, schema):
        assert (done.code, done.err) == (0, "")
        assert done.json
    assert merge.json["ok"] is verify.json["ok"] is True
    assert merge.json["tensors"] == verify.json["tensors"] == len(plan.json["tensors"]) == 39
    assert [entry["name"] for entry in one.json] == ["ties"]
    assert {"linear", "ties", "slerp"} <= {entry["name"] for entry in methods.json}


def test_the_plan_prints_what_the_merge_then_does(tmp_path: Path) -> None:
    path = recipe(tmp_path / "recipe.yml", ties(*LLAMAS[:2], out_dtype="bfloat16"))
    plan = smelt("plan", path, "--json").json
    merge = smelt("merge", path, tmp_path / "out", "--json").json
    record = json.loads((tmp_path / "out" / "smelt.json").read_text())
    weights = stored(tmp_path / "out")
    assert plan["recipe"] == record["recipe"]["digest"]
    assert plan["forecast"]["bytes_read"] == merge["bytes_read"]
    assert plan["bytes_out"] == sum(value.nbytes for value in weights.values())
    assert plan["parameters"] == merge["parameters"] == sum(value.size for value in weights.values())
    for row in plan["tensors"]:
        value, entry = weights[row["name"]], record["tensors"][row["name"]]
        assert (list(value.shape), value.nbytes) == (row["shape"], row["bytes"])
        assert row["dtype"] == value.dtype.name == "bfloat16"
        assert (row["values"], row["action"], row["inputs"]) == (entry["values"], entry["action"], entry["inputs"])
        assert row["passes"] >= 1
    assert not (tmp_path / "out2").exists()


def test_the_plan_of_sixty_thousand_tensors(tmp_path: Path) -> None:
    """A mixture of experts by its headers alone: the files are holes."""
    experts, layers = 625, 32
    shapes: dict[str, list[int]] = {"model.embed_tokens.weight": [1000, 64], "lm_head.weight": [1000, 64]}
    for layer in range(layers):
        at = f"model.layers.{layer}"
        shapes[f"{at}.input_layernorm.weight"] = [64]
        for expert in range(experts):
            for part in ("gate", "up", "down"):
                shapes[f"{at}.mlp.experts.{expert}.{part}_proj.weight"] = [64, 32]
    shapes["model.norm.weight"] = [64]
    assert len(shapes) > 60_000
    header, position = {}, 0
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header).encode()
    for i in range(2):
        folder = tmp_path / f"m{i}"
        folder.mkdir()
        with (folder / "model.safetensors").open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + position)
        (folder / "config.json").write_text(json.dumps(config(layers=layers, vocabulary=1000, hidden=64)))
    started = time.perf_counter()
    done = smelt("plan", recipe(tmp_path / "recipe.yml", linear("m0", "m1")))
    seconds = time.perf_counter() - started
    print(f"plan of {len(shapes)} tensors: {seconds:.1f} s")
    assert done.code == 0, done.err
    assert f"{len(shapes)} tensors" in done.out
