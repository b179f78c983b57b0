"""`modules:` of models with several parts: a text model with a vision tower, an encoder with a decoder."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import architectures
import factory
import smelt
from smelt.errors import RecipeError, SmeltError

Tensors = dict[str, np.ndarray]
Tree = dict[str, Any]


class Family:
    """A base and two fine-tunes of one architecture, and merges of them."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.base, self.one, self.two = architectures.make(name, folder, count=3)

    def model(self, path: Path, **parameters: Any) -> Tree:
        return {"model": str(path), "parameters": parameters or {"weight": 1}}

    def layers(self, path: Path, first: int, end: int) -> Tree:
        return {"model": str(path), "layer_range": [first, end]}

    def merge(self, out: Path, tree: Tree, **options: Any) -> tuple[Tensors, Tree, smelt.MergeReport]:
        """The merged tensors, the config and the report; the output loads in transformers with nothing left over."""
        report = smelt.merge({"merge_method": "linear", **tree}, out, **options)
        _, info = architectures.load(self.name, out)
        architectures.assert_clean(info)
        return factory.stored(out), json.loads((out / "config.json").read_text()), report


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Family]:
    known: dict[str, Family] = {}

    def of(name: str) -> Family:
        if name not in known:
            known[name] = Family(name, tmp_path_factory.mktemp(name))
        return known[name]

    return of


def same(one: Tensors, two: Tensors, names: list[str]) -> bool:
    return all(one[name].tobytes() == two[name].tobytes() for name in names)


def part(tensors: Tensors, *words: str) -> list[str]:
    found = [name for name in tensors if any(word in name for word in words)]
    assert found
    return found


# --- which part -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words", "vision"),
    [
        ("qwen2_5_vl", ["text_decoder", "language_model", "text_model", "model"], ["visual"]),
        ("gemma3", ["text_decoder", "language_model"], ["vision_tower", "multi_modal_projector"]),
    ],
)
def test_the_text_alone(
    name: str, words: list[str], vision: list[str], family: Callable[[str], Family], tmp_path: Path
) -> None:
    """By any of its names the language model is merged; what is not named comes from the base, byte for byte."""
    own = family(name)
    base, one, two = (factory.stored(path) for path in (own.base, own.one, own.two))
    for word in words:
        models = [own.model(own.one, weight=0.75), own.model(own.two, weight=0.25)]
        tree = {"base_model": str(own.base), "modules": {word: {"models": models}}}
        merged, config, report = own.merge(tmp_path / word, tree)
        kept = part(base, *vision)
        assert same(merged, base, kept)
        assert not same(merged, one, kept)
        for key in set(base) - set(kept):
            assert np.allclose(merged[key], 0.75 * one[key] + 0.25 * two[key], atol=1e-6), key
        assert config == json.loads((own.base / "config.json").read_text())
        assert any(
            note.startswith("parts that `modules` does not name are copied from base: ") for note in report.plan.notes
        )


def test_without_a_base_the_first_model_gives_the_rest(family: Callable[[str], Family], tmp_path: Path) -> None:
    own = family("gemma3")
    models = [own.model(own.two), own.model(own.one)]
    merged, _, report = own.merge(tmp_path / "out", {"modules": {"text_decoder": {"models": models}}})
    two = factory.stored(own.two)
    assert same(merged, two, part(two, "vision_tower", "multi_modal_projector"))
    assert "parts that `modules` does not name are copied from tuned-2: multi_modal_projector, vision_tower" in (
        report.plan.notes
    )


def test_each_part_from_another_model(family: Callable[[str], Family], tmp_path: Path) -> None:
    own = family("gemma3")
    tree = {
        "merge_method": "passthrough",
        "base_model": str(own.base),
        "modules": {
            "vision_tower": {"models": [{"model": str(own.one)}]},
            "text_decoder": {"models": [{"model": str(own.two)}]},
        },
    }
    merged, _, _ = own.merge(tmp_path / "out", tree)
    base, one, two = (factory.stored(path) for path in (own.base, own.one, own.two))
    assert same(merged, one, part(base, "vision_tower"))
    assert same(merged, base, part(base, "multi_modal_projector"))
    assert same(merged, two, part(base, "language_model"))


def test_a_model_needs_only_the_parts_that_it_is_named_for(family: Callable[[str], Family], tmp_path: Path) -> None:
    """A fine-tune of the text alone, saved without its vision tower, can stand under text_decoder."""
    own = family("qwen2_5_vl")
    tensors = {name: value for name, value in factory.stored(own.one).items() if "visual" not in name}
    config = json.loads((own.one / "config.json").read_text())
    text = factory.model(tmp_path / "text", tensors, config)
    tree = {"base_model": str(own.base), "modules": {"text_decoder": {"models": [own.model(text)]}}}
    merged, _, _ = own.merge(tmp_path / "out", tree)
    assert same(merged, factory.stored(own.one), list(tensors))
    assert same(merged, factory.stored(own.base), part(merged, "visual"))


def test_encoder_and_decoder(family: Callable[[str], Family], tmp_path: Path) -> None:
    own = family("t5")
    tree = {
        "merge_method": "task_arithmetic",
        "base_model": str(own.base),
        "modules": {
            "encoder": {"models": [own.model(own.one, weight=0.5)]},
            "decoder": {"models": [own.model(own.two, weight=0.25)]},
        },
    }
    merged, _, report = own.merge(tmp_path / "out", tree)
    base, one, two = (factory.stored(path) for path in (own.base, own.one, own.two))
    for name, b in base.items():
        tuned, weight = (one, 0.5) if name.startswith("encoder.") else (two, 0.25)
        weight = 0.0 if name == "shared.weight" else weight
        assert np.allclose(merged[name], b + weight * (tuned[name] - b), atol=1e-6), name
    assert "parts that `modules` does not name are copied from base: shared" in report.plan.notes


def test_all_parts_at_once_are_the_same_as_no_parts(family: Callable[[str], Family], tmp_path: Path) -> None:
    own = family("t5")
    models = [own.model(own.one, weight=0.3), own.model(own.two, weight=0.7)]
    parts = {name: {"models": models} for name in ("encoder", "decoder", "shared")}
    merged, _, report = own.merge(tmp_path / "parts", {"modules": parts})
    whole, _, _ = own.merge(tmp_path / "whole", {"models": models})
    assert same(merged, whole, list(whole))
    assert not [note for note in report.plan.notes if "copied" in note]


@pytest.mark.parametrize("word", ["model", "text_decoder", "default"])
def test_a_model_of_one_part(word: str, family: Callable[[str], Family], tmp_path: Path) -> None:
    own = family("llama")
    models = [own.model(own.one, weight=0.3), own.model(own.two, weight=0.7)]
    merged, _, _ = own.merge(tmp_path / "parts", {"modules": {word: {"models": models}}})
    whole, _, _ = own.merge(tmp_path / "whole", {"models": models})
    assert same(merged, whole, list(whole))


# --- numbers --------------------------------------------------------------------------------------------------------


def test_levels_of_settings(family: Callable[[str], Family], tmp_path: Path) -> None:
    """The model's own, then the module's, then the recipe's; a gradient runs over the layers of the module's stack."""
    own = family("gemma3")
    tree = {
        "base_model": str(own.base),
        "modules": {
            "text_decoder": {
                "models": [own.model(own.one, weight=[0, 1]), {"model": str(own.two)}],
                "parameters": {"weight": 3},
            },
            "vision_tower": {"models": [{"model": str(own.one)}, {"model": str(own.two)}]},
        },
        "parameters": {"weight": [1, 2], "normalize": False},
    }
    plan = smelt.plan({"merge_method": "linear", **tree})
    values = {entry.name: entry.values.get("weight") for entry in plan.entries}
    text = [value for name, value in values.items() if name.endswith("mlp.up_proj.weight")]
    assert text == [(0.0, 3), (0.5, 3), (1.0, 3)]
    tower = [value for name, value in values.items() if re.search(r"layers\.\d\.mlp\.fc1\.weight", name)]
    assert tower == [(1.0, 1.0), (2.0, 2.0)]


def test_filters_see_the_whole_name(family: Callable[[str], Family]) -> None:
    own = family("t5")
    cases = [
        {"filter": "decoder.block.1.", "value": 0.5},
        {"match": "encoder.*.wo.weight", "value": 0.25},
        {"value": 1},
    ]
    models = [{"model": str(own.one), "parameters": {"weight": cases}}]
    tree = {
        "merge_method": "task_arithmetic",
        "base_model": str(own.base),
        "modules": {"encoder": {"models": models}, "decoder": {"models": models}},
    }
    plan = smelt.plan(tree)
    assert plan.warnings == ()
    for entry in plan.entries:
        if entry.values:
            wanted = 0.5 if "decoder.block.1." in entry.name else 1.0
            if entry.name.startswith("encoder.") and entry.name.endswith("wo.weight"):
                wanted = 0.25
            assert entry.values["weight"] == (wanted,), entry.name


# --- slices ---------------------------------------------------------------------------------------------------------


def stacked(own: Family, module: str, *ranges: tuple[Path, int, int]) -> Tree:
    slices = [{"sources": [own.layers(*chosen)]} for chosen in ranges]
    return {"merge_method": "passthrough", "base_model": str(own.base), "modules": {module: {"slices": slices}}}


def test_layers_of_the_text(family: Callable[[str], Family], tmp_path: Path) -> None:
    own = family("gemma3")
    tree = stacked(own, "text_decoder", (own.one, 1, 3), (own.two, 0, 3))
    merged, config, _ = own.merge(tmp_path / "out", tree)
    base, one, two = (factory.stored(path) for path in (own.base, own.one, own.two))
    before = json.loads((own.base / "config.json").read_text())
    kinds = before["text_config"]["layer_types"]
    assert config["text_config"]["num_hidden_layers"] == 5
    assert config["text_config"]["layer_types"] == [kinds[layer] for layer in (1, 2, 0, 1, 2)]
    assert config["vision_config"] == before["vision_config"]
    assert same(merged, base, part(base, "vision_tower", "multi_modal_projector"))
    stem = next(name for name in base if name.endswith("layers.0.mlp.up_proj.weight") and "vision" not in name)
    for place, (model, layer) in enumerate([(one, 1), (one, 2), (two, 0), (two, 1), (two, 2)]):
        there, origin = (stem.replace("layers.0.", f"layers.{number}.") for number in (place, layer))
        assert merged[there].tobytes() == model[origin].tobytes()


def test_lists_of_a_vision_tower_follow_its_layers(family: Callable[[str], Family], tmp_path: Path) -> None:
    """fullatt_block_indexes names layers of the tower: the copy of a layer with full attention has it too."""
    own = family("qwen2_5_vl")
    merged, config, _ = own.merge(tmp_path / "out", stacked(own, "visual", (own.one, 0, 2), (own.two, 0, 2)))
    before = json.loads((own.base / "config.json").read_text())
    assert before["vision_config"]["fullatt_block_indexes"] == [1]
    assert config["vision_config"]["depth"] == 4
    assert config["vision_config"]["fullatt_block_indexes"] == [1, 3]
    assert config["text_config"] == before["text_config"]
    assert len({name.split(".")[2] for name in merged if "visual.blocks" in name}) == 4


@pytest.mark.parametrize(
    ("module", "key", "layers"), [("encoder", "num_layers", 3), ("decoder", "num_decoder_layers", 2)]
)
def test_layers_of_t5(module: str, key: str, layers: int, family: Callable[[str], Family], tmp_path: Path) -> None:
    own = family("t5")
    tree = stacked(own, module, (own.one, 0, layers), (own.two, layers - 1, layers))
    merged, config, _ = own.merge(tmp_path / "out", tree)
    before = json.loads((own.base / "config.json").read_text())
    assert config == before | {key: layers + 1}
    name = f"{module}.block.{{}}.layer.0.SelfAttention.q.weight"
    assert merged[name.format(layers)].tobytes() == factory.stored(own.two)[name.format(layers - 1)].tobytes()


# --- mistakes -------------------------------------------------------------------------------------------------------


def refused(tree: Tree) -> SmeltError:
    with pytest.raises(SmeltError) as caught:
        smelt.plan({"merge_method": "linear", **tree})
    return caught.value


def test_two_names_of_one_part(family: Callable[[str], Family]) -> None:
    own = family("qwen2_5_vl")
    models = {"models": [own.model(own.one)]}
    error = refused({"modules": {"text_decoder": models, "language_model": models}})
    assert "text_decoder" in str(error)
    assert "language_model" in str(error)
    assert "did you mean" not in str(error)


def test_no_such_part(family: Callable[[str], Family]) -> None:
    own = family("qwen2_5_vl")
    error = refused({"modules": {"text_decodr": {"models": [own.model(own.one)]}}})
    assert isinstance(error, RecipeError)
    assert error.message == "module `text_decodr` is no part of tuned-1"
    assert error.fix == "did you mean `text_decoder`?"
    error = refused({"modules": {"audio": {"models": [own.model(own.one)]}}})
    assert error.fix == "the parts are model, visual"


def test_slices_at_the_top_of_a_model_without_a_main_stack(family: Callable[[str], Family]) -> None:
    own = family("t5")
    error = refused({"merge_method": "passthrough", "slices": [{"sources": [own.layers(own.base, 0, 2)]}]})
    assert "which one of base is meant is not clear" in error.message
    assert "`modules:`" in (error.fix or "")


def test_a_range_beyond_the_parts_own_stack(family: Callable[[str], Family]) -> None:
    """The encoder has three layers, the decoder two: each range is held against its own."""
    own = family("t5")
    error = refused(stacked(own, "decoder", (own.one, 0, 3)))
    assert "layer_range [0, 3] goes beyond tuned-1, which has 2 layers" in error.message
    smelt.plan(stacked(own, "encoder", (own.one, 0, 3)))


def test_a_base_is_needed_by_the_method(family: Callable[[str], Family]) -> None:
    own = family("t5")
    error = refused({"merge_method": "ties", "modules": {"encoder": {"models": [own.model(own.one)]}}})
    assert "ties needs a base model" in str(error)


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ({}, "`modules` is empty"),
        ({"text_decoder": {}}, "module `text_decoder` names no models to merge"),
        ({"text_decoder": {"models": [{"model": "a"}], "slices": [{"sources": [{"model": "a"}]}]}}, "are both given"),
        ({"text_decoder": {"modles": [{"model": "a"}]}}, "unknown key `modles`"),
        ({"text_decoder": [{"model": "a"}]}, "must be a mapping"),
    ],
    ids=str,
)
def test_what_a_module_must_say(modules: Any, message: str) -> None:
    assert message in str(refused({"modules": modules}))
