"""`planning.align`: which stored tensors belong together."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import factory
from factory import Array, config, llama, opened
from smelt.methods import api
from smelt.planning.align import Alignment, ExtraTensors, align
from smelt.planning.anatomy import Role
from smelt.planning.sections import sections
from smelt.recipe.parse import from_dict


def aligned(tree: dict[str, Any], models: dict[str, Any], *, donor: str | None = None) -> Alignment:
    recipe = from_dict(tree)
    names = [name.text for name in recipe.model_names()]
    chosen = [models[name] for name in names]
    parts, problems = sections(recipe, api.get(recipe.merge_method), chosen, {name: i for i, name in enumerate(names)})
    assert not problems
    return align(recipe, chosen, parts, donor=names.index(donor or tree.get("base_model") or names[0]))


def several(count: int = 2, **shape: Any) -> dict[str, Any]:
    known = {key: value for key, value in shape.items() if key != "dtype"}
    return opened(**{f"m{i}": (llama(seed=i, **shape), config(**known)) for i in range(count)})


def linear(*names: str, **keys: Any) -> dict[str, Any]:
    return factory.linear(*names, **keys)


def sliced(*parts: list[tuple[str, list[int]]], **keys: Any) -> dict[str, Any]:
    slices = [{"sources": [{"model": name, "layer_range": span} for name, span in part]} for part in parts]
    return {"merge_method": "linear", "slices": slices, "parameters": {"weight": 1}} | keys


def inputs(alignment: Alignment) -> dict[str, list[str | None]]:
    """Output name -> the stored names that go in."""
    return {slot.name: [tensor and tensor.name for tensor in slot.tensors] for slot in alignment.slots}


def test_models_meet_by_name_in_the_donors_order() -> None:
    models = several(2)
    found = aligned(linear("m0", "m1"), models)
    names = list(models["m0"].source.tensors)
    assert [slot.name for slot in found.slots] == names
    assert inputs(found) == {name: [name, name] for name in names}
    assert (found.problems, found.ignored, found.restacked) == ([], {}, {})


def test_places_in_a_gradient() -> None:
    found = aligned(linear("m0"), several(1, layers=5))
    places = {slot.name: slot.t for slot in found.slots}
    assert [places[f"model.layers.{k}.mlp.up_proj.weight"] for k in range(5)] == [0, 0.25, 0.5, 0.75, 1]
    for outside in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert places[outside] == 0


def test_the_place_of_a_single_layer_is_one() -> None:
    found = aligned(linear("m0"), several(1, layers=1))
    assert {slot.t for slot in found.slots if slot.part.layer == 0} == {1.0}


def test_slices_stack_layers_under_new_numbers() -> None:
    found = aligned(sliced([("m0", [0, 2])], [("m1", [1, 3])]), several(2, layers=3))
    taken = inputs(found)
    for output, source in enumerate((0, 1, 1, 2)):
        for suffix in ("input_layernorm", "self_attn.q_proj", "mlp.up_proj"):
            name = f"model.layers.{output}.{suffix}.weight"
            assert taken[name] == [f"model.layers.{source}.{suffix}.weight"]
    assert found.restacked == {"model.layers": (0, 1, 1, 2)}
    sections_of = {slot.name: slot.section.label for slot in found.slots}
    assert sections_of["model.embed_tokens.weight"] == "slice 1"
    assert sections_of["model.layers.1.mlp.up_proj.weight"] == "slice 1"
    assert sections_of["model.layers.2.mlp.up_proj.weight"] == "slice 2"
    assert sections_of["model.norm.weight"] == sections_of["lm_head.weight"] == "slice 2"


def test_a_gradient_runs_over_each_slice() -> None:
    found = aligned(sliced([("m0", [0, 3])], [("m1", [2, 3])]), several(2, layers=3))
    places = [slot.t for slot in found.slots if slot.name.endswith("mlp.up_proj.weight")]
    assert places == [0, 0.5, 1, 1]


def test_sources_of_a_slice_are_shifted_against_each_other() -> None:
    found = aligned(sliced([("m0", [0, 2]), ("m1", [1, 3])]), several(2, layers=3))
    assert inputs(found)["model.layers.1.mlp.up_proj.weight"] == [
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.2.mlp.up_proj.weight",
    ]


def test_layers_of_no_slice_are_told() -> None:
    found = aligned(sliced([("m0", [0, 1])], [("m1", [2, 3])]), several(2, layers=3))
    reasons = found.ignored
    assert reasons["m0: model.layers.1.mlp.up_proj.weight"] == "its layer is in no slice"
    assert reasons["m1: model.layers.0.mlp.up_proj.weight"] == "its layer is in no slice"
    assert "m0: model.layers.0.mlp.up_proj.weight" not in reasons
    assert len(reasons) == 2 * 2 * 3


def test_layers_of_an_unlisted_donor_are_told_too() -> None:
    models = several(1, layers=2) | opened(donor=(llama(layers=4), config(layers=4)))
    tree = sliced([("m0", [0, 2])], merge_method="passthrough", base_model="donor")
    del tree["parameters"]
    found = aligned(tree, models)
    assert found.ignored["donor: model.layers.3.mlp.up_proj.weight"] == "its layer is in no slice"


def test_a_missing_tensor_leaves_a_gap() -> None:
    lacking = llama(seed=1)
    del lacking["model.norm.weight"]
    models = several(1) | opened(m1=(lacking, config()))
    assert inputs(aligned(linear("m0", "m1"), models))["model.norm.weight"] == ["model.norm.weight", None]


def test_extra_tensors_are_a_problem_named_in_full() -> None:
    more = llama(seed=1) | {f"model.extra.{letter}": np.ones(2, np.float32) for letter in "abcdefgh"}
    models = several(1) | opened(m1=(more, config()))
    (problem,) = aligned(linear("m0", "m1"), models).problems
    assert isinstance(problem, ExtraTensors)
    assert (problem.model, len(problem.names)) == ("m1", 8)
    assert problem.message == "model m1 has 8 tensors that m0 lacks"
    assert problem.where == (*[f"model.extra.{letter}" for letter in "abcdef"], "… and 2 more")
    found = aligned(linear("m1", "m0"), models)  # the other way round they are missing
    assert found.problems == []
    assert inputs(found)["model.extra.a"] == ["model.extra.a", None]


def test_buffers_of_others_are_ignored() -> None:
    old = llama(seed=1) | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    models = several(1) | opened(m1=(old, config()))
    found = aligned(linear("m0", "m1"), models)
    assert found.problems == []
    (name,) = found.ignored
    assert name == "m1: model.layers.0.self_attn.rotary_emb.inv_freq"
    found = aligned(linear("m1", "m0"), models)
    (slot,) = [slot for slot in found.slots if slot.part.role is Role.BUFFER]
    assert slot.tensors[1] is None


@pytest.mark.parametrize("tied_first", [True, False])
def test_a_tied_model_lends_its_embedding_as_head(tied_first: bool) -> None:
    models = opened(
        tied=(llama(seed=0, tied=True), config(tied=True)),
        own=(llama(seed=1), config()),
    )
    order = ["tied", "own"] if tied_first else ["own", "tied"]
    found = aligned(linear(*order), models)
    heads = inputs(found)["lm_head.weight"]
    assert heads[order.index("tied")] == "model.embed_tokens.weight"
    assert heads[order.index("own")] == "lm_head.weight"
    assert ("head of its own" in " ".join(found.notes)) is tied_first
    assert found.problems == []


def test_an_untied_model_without_head_lends_nothing() -> None:
    headless: dict[str, Array] = llama(seed=0, tied=True)
    models = opened(m0=(llama(seed=1), config()), m1=(headless, config(tied=False)))
    assert inputs(aligned(linear("m0", "m1"), models))["lm_head.weight"] == ["lm_head.weight", None]


def test_ranges_need_a_stack() -> None:
    models = opened(flat=({"w": np.ones(3, np.float32)}, {"model_type": "x"}))
    (problem,) = aligned(sliced([("flat", [0, 1])]), models).problems
    assert "layer ranges need one stack of layers" in problem.message
    assert problem.where == ("stacks of layers: none found",)


def test_a_second_stack_comes_whole_from_the_first_slice() -> None:
    def both(seed: int) -> dict[str, Array]:
        tower = {f"vision.blocks.{k}.attn.weight": np.full((2, 2), seed + k, np.float32) for k in range(5)}
        return llama(layers=2, seed=seed) | tower

    models = opened(m0=(both(0), config()), m1=(both(1), config()))
    found = aligned(sliced([("m0", [0, 1])], [("m1", [1, 2])]), models)
    sections_of = {slot.name: slot.section.label for slot in found.slots}
    assert sections_of["vision.blocks.4.attn.weight"] == "slice 1"
    assert "vision.blocks come whole from the first slice" in " ".join(found.notes)
