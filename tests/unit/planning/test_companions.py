"""`planning.companions`: config.json patched as raw JSON, and the small files that are copied."""

from __future__ import annotations

import json
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import factory
from factory import config, linear, llama
from smelt.dtypes import BY_CODE
from smelt.errors import InputError, RecipeError
from smelt.planning.anatomy import anatomy
from smelt.planning.build import build
from smelt.planning.companions import json_bytes, merged_config, small_files
from smelt.planning.entries import Plan, PlannedModel
from smelt.planning.locate import Model
from smelt.recipe.parse import from_dict
from smelt.specs import ModelRef, TensorSpec
from smelt.storage.sources.memory import MemoryCheckpoint

VOCABULARY = '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}'


def model(
    name: str, tensors: dict[str, Any], settings: dict[str, Any] | None, hub: bool = False, **documents: str | bytes
) -> Model:
    """An open model with documents beside its weights (`a__b` stands for `a.b`)."""
    stored = {}
    for key, value in tensors.items():
        code = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[value.dtype.name]
        spec = TensorSpec(key, BY_CODE[code], value.shape)
        stored[key] = (spec, np.ascontiguousarray(value).reshape(-1).view(np.uint8))
    papers = {k.replace("__", "."): v.encode() if isinstance(v, str) else v for k, v in documents.items()}
    source = MemoryCheckpoint(name, stored, documents=papers)
    planned = PlannedModel(ModelRef(name, name), name, "memory", *(("c" * 40, name) if hub else ()))
    return Model(planned, source, settings, anatomy(source.tensors, settings))


def plan_of(tree: dict[str, Any], *models: Model) -> tuple[Plan, list[Model]]:
    named = {one.name: one for one in models}
    plan = build(from_dict(tree), named)
    return plan, [named[one.published] for one in plan.models]


def patched(tree: dict[str, Any], *models: Model) -> dict[str, Any] | None:
    return merged_config(*plan_of(tree, *models))


def one(settings: dict[str, Any] | None, *, layers: int = 2, dtype: Any = np.float32, **more: Any) -> Model:
    return model("m0", llama(layers=layers, dtype=dtype, **more), settings)


def stacked(*spans: tuple[int, int], **keys: Any) -> dict[str, Any]:
    slices = [{"sources": [{"model": "m0", "layer_range": list(span)}]} for span in spans]
    return {"merge_method": "passthrough", "slices": slices} | keys


def test_nothing_changes_where_nothing_changed() -> None:
    settings = config(rope_theta=1e6, odd={"x": [1, None, "é"]}, pad_token_id=None)
    found = patched(linear("m0", "m0"), one(settings))
    assert found == settings
    assert found is not None
    assert list(found) == list(settings)
    assert json.loads(json_bytes(found)) == settings
    assert "é" in json_bytes(found).decode()
    assert json_bytes(found).endswith(b"}\n")


def test_the_models_own_config_is_not_touched() -> None:
    settings = config(layers=3, layer_types=["a", "b", "c"])
    before = json.dumps(settings)
    patched(stacked((0, 2), (1, 3), out_dtype="float16"), one(settings, layers=3))
    assert json.dumps(settings) == before


def test_without_a_config() -> None:
    assert patched(linear("m0", "m0"), one(None)) is None


def test_layers() -> None:
    settings = config(
        layers=4,
        layer_types=["full", "slide", "full", "slide"],
        mlp_only_layers=[0, 3],
        no_rope_layers=[1, 0, 1, 0],
        hidden_sizes_note="unrelated",
    )
    found = patched(stacked((0, 3), (2, 4), (3, 4)), one(settings, layers=4))
    assert found is not None
    assert found["num_hidden_layers"] == 6
    assert found["layer_types"] == ["full", "slide", "full", "full", "slide", "slide"]
    assert found["mlp_only_layers"] == [0, 4, 5]
    assert found["no_rope_layers"] == [1, 0, 1, 1, 0, 0]


def test_layers_of_a_nested_config() -> None:
    text = {"num_hidden_layers": 2, "hidden_size": 8, "vocab_size": 16, "layer_types": ["a", "b"]}
    found = patched(stacked((0, 2), (1, 2)), one({"model_type": "x", "text_config": text, "dtype": "float32"}))
    assert found is not None
    assert (found["text_config"]["num_hidden_layers"], found["text_config"]["layer_types"]) == (3, ["a", "b", "b"])


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_type_under_the_key_that_is_there(key: str) -> None:
    settings = {name: value for name, value in config().items() if name != "torch_dtype"} | {key: "float32"}
    found = patched(linear("m0", "m0", out_dtype="bfloat16"), one(settings))
    assert found is not None
    assert found[key] == "bfloat16"
    assert {"dtype", "torch_dtype"} & found.keys() == {key}


def test_the_type_is_stated_where_it_was_not() -> None:
    settings = {name: value for name, value in config().items() if name != "torch_dtype"}
    found = patched(linear("m0", "m0"), one(settings, dtype=ml_dtypes.bfloat16))
    assert found is not None
    assert found["torch_dtype"] == "bfloat16"


def test_a_nested_type_follows() -> None:
    settings = config(text_config={"dtype": "float32"}, vision_config={"torch_dtype": "float32", "depth": 0})
    found = patched(linear("m0", "m0", dtype="float16"), one(settings))
    assert found is not None
    assert found["text_config"]["dtype"] == found["vision_config"]["torch_dtype"] == found["torch_dtype"] == "float16"


@pytest.mark.parametrize("order", [("tied", "own"), ("own", "tied")])
@pytest.mark.parametrize("stated", [True, False])
def test_ties(order: tuple[str, str], stated: bool) -> None:
    untied = config(tied=False)
    tied = config(tied=True)
    if not stated:  # silence ties a llama in older configs; here the files alone say so
        del tied["tie_word_embeddings"]
    models = (model("tied", llama(seed=0, tied=True), tied), model("own", llama(seed=1), untied))
    found = patched(linear(*order), *models)
    assert found is not None
    assert found["tie_word_embeddings"] is False


def test_two_tied_models_say_nothing_new() -> None:
    settings = config(tied=True)
    found = patched(linear("m0", "m0"), one(settings, tied=True))
    assert found == settings
    del settings["tie_word_embeddings"]
    assert patched(linear("m0", "m0"), one(settings, tied=True)) == settings


def test_private_keys_go_and_flags_stay() -> None:
    settings = config(_name_or_path="/home/me", _commit_hash="abc", _attn_implementation="sdpa", _remove_norm=True)
    found = patched(linear("m0", "m0"), one(settings))
    assert found is not None
    assert {key for key in found if key.startswith("_")} == {"_remove_norm"}


@pytest.mark.parametrize(
    ("mapped", "hub", "wanted"),
    [
        ({"AutoModel": "modeling_x.X"}, False, None),
        ({"AutoModel": "modeling_x.X"}, True, {"AutoModel": "m0--modeling_x.X"}),
        ({"AutoModel": "org/x--modeling_x.X"}, False, {"AutoModel": "org/x--modeling_x.X"}),
        ({"AutoModel": "org/x--a.B", "AutoConfig": "c.D"}, False, {"AutoModel": "org/x--a.B"}),
        ("nonsense", False, None),
    ],
)
def test_code_is_named_where_it_is_or_not_at_all(mapped: Any, hub: bool, wanted: Any) -> None:
    found = patched(linear("m0", "m0"), model("m0", llama(), config(auto_map=mapped), hub))
    assert found is not None
    assert found.get("auto_map") == wanted


# --- files ----------------------------------------------------------------------------------------------------------


def files_of(tree: dict[str, Any], *models: Model, giver: int = 0) -> dict[str, bytes]:
    plan, used = plan_of(tree, *models)
    return small_files(plan, used, models[giver])


def test_what_is_copied_and_what_is_not() -> None:
    wanted = ["tokenizer__json", "tokenizer_config__json", "vocab__txt", "merges__txt", "chat_template__jinja"]
    wanted += ["generation_config__json", "LICENSE", "LICENCE__txt", "NOTICE", "USE_POLICY__md", "x__tiktoken"]
    wanted += ["preprocessor_config__json", "special_tokens_map__json", "tokenizer__model"]
    unwanted = ["README__md", "modeling_x__py", "training_args__txt", "optimizer__dat", "trainer_state__json"]
    documents = dict.fromkeys(wanted + unwanted, "{}") | {"tokenizer__json": VOCABULARY}
    found = files_of(linear("m0", "m0"), model("m0", llama(), config(), **documents))
    assert found.keys() == {name.replace("__", ".") for name in wanted} | {"config.json"}
    assert found["LICENSE"] == b"{}"


def test_the_tokenizers_files_come_from_its_giver_the_licence_from_the_donor() -> None:
    donor = model("m0", llama(seed=0), config(), LICENSE="donor", vocab__txt="donor", generation_config__json="{}")
    other = model("m1", llama(seed=1), config(), LICENSE="other", vocab__txt="other", merges__txt="other")
    found = files_of(linear("m0", "m1"), donor, other, giver=1)
    assert (found["LICENSE"], found["vocab.txt"], found["merges.txt"]) == (b"donor", b"other", b"other")
    assert "generation_config.json" in found


def test_a_chat_template_replaces_every_other() -> None:
    documents = {
        "chat_template__jinja": "old",
        "chat_template__json": "{}",
        "tokenizer_config__json": '{"chat_template": "older", "eos": "x"}',
        "tokenizer__json": VOCABULARY,
    }
    found = files_of(linear("m0", "m0", chat_template="{{ new }}"), model("m0", llama(), config(), **documents))
    assert found["chat_template.jinja"] == b"{{ new }}"
    assert "chat_template.json" not in found
    assert json.loads(found["tokenizer_config.json"]) == {"eos": "x"}


def test_a_broken_tokenizer_config_is_told() -> None:
    documents = {"tokenizer_config__json": "{"}
    with pytest.raises(InputError, match="tokenizer_config"):
        files_of(linear("m0", "m0", chat_template="{{ new }}"), model("m0", llama(), config(), **documents))


def test_factory_and_this_agree() -> None:
    assert factory.opened(m0=(llama(), config()))["m0"].anatomy == one(config()).anatomy


# --- configs that nobody would write ----------------------------------------------------------------------------------

KEYS = [
    *("num_hidden_layers", "vocab_size", "hidden_size", "tie_word_embeddings", "torch_dtype", "dtype", "layer_types"),
    *(
        "text_config",
        "vision_config",
        "auto_map",
        "architectures",
        "model_type",
        "mlp_only_layers",
        "is_encoder_decoder",
    ),
    *(
        "num_nextn_predict_layers",
        "num_hidden_groups",
        "quantization_config",
        "rope_parameters",
        "_x",
        "decoder_layers",
    ),
]
SCALARS = st.none() | st.booleans() | st.integers(-3, 5) | st.floats(allow_nan=True) | st.sampled_from(["", "x", "4"])
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=6), st.sampled_from(["models", "slices"]))
def test_any_config_is_patched_or_refused(odd: dict[str, Any], form: str) -> None:
    """Whatever a config holds, planning ends with a plan or with an error for people."""
    tree = linear("m0", "m0", out_dtype="bfloat16") if form == "models" else stacked((0, 2), (1, 2))
    tied = odd.get("tie_word_embeddings") is True
    try:
        found = patched(tree, model("m0", llama(tied=tied), config() | odd))
    except (RecipeError, InputError):
        return
    assert found is not None
    assert json.loads(json_bytes(found)) is not None
