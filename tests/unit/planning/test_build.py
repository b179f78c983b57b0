"""`planning.build`: every number resolved, every type chosen, every problem told."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from ruamel.yaml import YAML

import factory
import smelt
from factory import Array, config, linear, llama, opened
from smelt.errors import SmeltError
from smelt.planning.build import build, output_dtype
from smelt.planning.entries import Action, Entry, Plan
from smelt.recipe.parse import from_dict


def several(count: int = 2, **shape: Any) -> dict[str, Any]:
    known = {key: value for key, value in shape.items() if key != "dtype"}
    return opened(**{f"m{i}": (llama(seed=i, **shape), config(**known)) for i in range(count)})


def planned(tree: dict[str, Any], models: dict[str, Any] | None = None, *allow: str, seed: int = 0) -> Plan:
    return build(from_dict(tree), models or several(3), allow=frozenset(allow), seed=seed)


def entry(plan: Plan, name: str) -> Entry:
    (found,) = [entry for entry in plan.entries if entry.name == name]
    return found


def refused(tree: dict[str, Any], models: dict[str, Any] | None = None, *allow: str) -> list[SmeltError]:
    with pytest.raises(SmeltError) as caught:
        planned(tree, models, *allow)
    return list(caught.value.problems)


def weights(plan: Plan, name: str) -> list[float]:
    return list(entry(plan, name).values["weight"])


UP = "model.layers.{}.mlp.up_proj.weight"


# --- settings -------------------------------------------------------------------------------------------------------


def test_defaults_and_order_of_inputs() -> None:
    plan = planned(linear("m2", "m0", merge_method="ties", base_model="m1", parameters={"weight": 0.5}))
    found = entry(plan, UP.format(0))
    assert [plan.models[source.model].published for source in found.inputs] == ["m2", "m0"]
    assert found.base is not None
    assert plan.models[found.base.model].published == "m1"
    assert dict(found.values) == {
        "weight": (0.5, 0.5),
        "density": (1.0, 1.0),
        "normalize": True,
        "rescale": False,
        "lambda": 1.0,
        "granularity": "tensor",
    }
    assert (plan.donor, plan.base) == (2, 2)


def test_the_nearest_level_wins() -> None:
    tree = {
        "merge_method": "linear",
        "slices": [
            {
                "sources": [
                    {"model": "m0", "layer_range": [0, 1], "parameters": {"weight": 3}},
                    {"model": "m1", "layer_range": [0, 1]},
                ],
                "parameters": {"weight": 2},
            },
            {"sources": [{"model": "m0", "layer_range": [1, 2]}, {"model": "m1", "layer_range": [1, 2]}]},
        ],
        "parameters": {"weight": 1},
    }
    plan = planned(tree)
    assert weights(plan, UP.format(0)) == [3, 2]
    assert weights(plan, UP.format(1)) == [1, 1]
    assert weights(plan, "model.embed_tokens.weight") == [3, 2]
    assert weights(plan, "model.norm.weight") == [1, 1]


def test_filters_fall_through_to_the_next_level() -> None:
    tree = linear("m0", "m1", parameters={"weight": 1})
    tree["models"][0]["parameters"] = {"weight": [{"filter": "mlp", "value": 5}]}
    plan = planned(tree)
    assert weights(plan, UP.format(0)) == [5, 1]
    assert weights(plan, "model.norm.weight") == [1, 1]
    origin = entry(plan, UP.format(0)).origins["weight"]
    assert (origin[0].level, origin[0].case) == ("model m0", "filter: mlp")
    assert origin[1].level == "recipe"


def test_gradients_per_layer() -> None:
    tree = linear("m0", "m1", parameters={"weight": [1, 2]})
    plan = planned(tree, several(2, layers=5))
    assert [weights(plan, UP.format(k))[0] for k in range(5)] == [1, 1.25, 1.5, 1.75, 2]
    assert weights(plan, "lm_head.weight") == [1, 1]


def test_per_model_filters_see_the_source_layer_and_shared_ones_the_output_layer() -> None:
    slices = [{"sources": [{"model": name, "layer_range": [1, 2]} for name in ("m0", "m1")]}]
    tree = {
        "merge_method": "ties",
        "base_model": "m0",
        "slices": slices,
        "parameters": {
            "weight": [{"filter": "layers.1.", "value": 7}, {"value": 1}],
            "lambda": [{"filter": "layers.0.", "value": 0.5}, {"value": 1}],
        },
    }
    found = entry(planned(tree), UP.format(0))
    assert (found.values["weight"], found.values["lambda"]) == ((7,), 0.5)


def test_match_takes_whole_names() -> None:
    tree = linear("m0", "m1", parameters={"weight": [{"match": "model.layers.*.weight", "value": 2}, {"value": 1}]})
    plan = planned(tree)
    assert weights(plan, UP.format(1)) == [2, 2]
    assert weights(plan, "model.norm.weight") == [1, 1]


def test_a_filter_without_a_fit_is_a_warning() -> None:
    plan = planned(linear("m0", "m1", parameters={"weight": [{"filter": "moe", "value": 2}, {"value": 1}]}))
    (warning,) = plan.warnings
    assert "filter 'moe' fits no tensor" in warning


def test_a_filter_may_name_an_output_layer_that_no_model_has() -> None:
    slices = [{"sources": [{"model": "m0", "layer_range": [0, 2]}]} for _ in range(2)]
    parameters = {"scale": [{"filter": "layers.3.", "value": 2}, {"filter": "layers.9.", "value": 3}, {"value": 1}]}
    plan = planned({"merge_method": "passthrough", "slices": slices, "parameters": parameters})
    (warning,) = plan.warnings
    assert "layers.9." in warning


def test_required_settings_that_hold_for_some_tensors_only() -> None:
    (problem,) = refused(linear("m0", "m1", parameters={"weight": [{"filter": "mlp", "value": 1}]}), several(2))[:1]
    assert "linear needs `weight`" in problem.message
    assert problem.exit_code == 2


def test_settings_that_do_not_fit_together() -> None:
    tree = linear("m0", "m1")
    tree["models"][0]["parameters"] = {"weight": -1}
    (problem,) = refused(tree)
    assert "weights sum to 0" in problem.message
    assert "first at tensor 'model.embed_tokens.weight'" in problem.where
    assert planned(tree | {"parameters": {"weight": 1, "normalize": False}})


# --- types ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "name"),
    [
        ({}, "float32"),
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"dtype": "float32", "out_dtype": "bfloat16"}, "bfloat16"),
        ({"out_dtype": "fp16"}, "float16"),
    ],
)
def test_the_output_type(keys: dict[str, str], name: str) -> None:
    plan = planned(linear("m0", "m1", **keys))
    assert {entry.dtype.name for entry in plan.entries} == {name}
    chosen = output_dtype(plan)
    assert chosen is not None
    assert chosen.name == name


@pytest.mark.parametrize(
    ("types", "name"),
    [
        ((np.float16, np.float16), "float16"),
        ((ml_dtypes.bfloat16, ml_dtypes.bfloat16), "bfloat16"),
        ((ml_dtypes.bfloat16, np.float16), "float32"),
        ((np.float16, np.float32), "float32"),
        ((np.float32, np.float64), "float64"),
    ],
)
def test_inputs_are_promoted(types: tuple[Any, ...], name: str) -> None:
    models = opened(**{f"m{i}": (llama(seed=i, dtype=dtype), config()) for i, dtype in enumerate(types)})
    plan = planned(linear("m0", "m1"), models)
    assert {entry.dtype.name for entry in plan.entries} == {name}
    assert (len(set(types)) > 1) is any("tensors mix" in note for note in plan.notes)


def test_norms_in_float32_stay_so_and_the_config_names_the_most() -> None:
    def one(seed: int) -> dict[str, Array]:
        tensors = llama(seed=seed, dtype=ml_dtypes.bfloat16)
        tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float32)
        return tensors

    plan = planned(linear("m0", "m1"), opened(m0=(one(0), config()), m1=(one(1), config())))
    assert entry(plan, "model.norm.weight").dtype.name == "float32"
    chosen = output_dtype(plan)
    assert chosen is not None
    assert chosen.name == "bfloat16"
    assert not any("mix" in note for note in plan.notes)


# --- copies ---------------------------------------------------------------------------------------------------------


def test_passthrough_is_a_copy_where_nothing_changes() -> None:
    tree = {"merge_method": "passthrough", "models": [{"model": "m0"}]}
    assert {entry.action for entry in planned(tree).entries} == {Action.COPY}
    assert {entry.action for entry in planned(tree | {"out_dtype": "bfloat16"}).entries} == {Action.MERGE}
    tree["parameters"] = {"scale": [{"filter": "mlp", "value": 0.5}, {"value": 1}]}
    actions = {entry.name: entry.action for entry in planned(tree).entries}
    assert actions[UP.format(0)] is Action.MERGE
    assert actions["model.norm.weight"] is Action.COPY


def test_buffers_are_the_donors() -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    models = opened(
        **{f"m{i}": (llama(seed=i) | {name: np.full(4, i, np.float32)}, config()) for i in range(2)},
    )
    found = entry(planned(linear("m0", "m1", out_dtype="bfloat16"), models), name)
    assert (found.action, found.dtype.name, found.inputs[0].model) == (Action.COPY, "float32", 0)
    assert "a buffer" in found.reason
    tree = linear("m0", merge_method="task_arithmetic", base_model="m1", parameters={"weight": 1})
    plan = planned(tree, models)
    assert plan.models[entry(plan, name).inputs[0].model].published == "m1"


def test_integers_are_compared_and_copied() -> None:
    models = opened(**{f"m{i}": (llama(seed=i) | {"model.ids": np.arange(3)}, config()) for i in range(2)})
    plan = planned(linear("m0", "m1", out_dtype="float16"), models)
    found = entry(plan, "model.ids")
    assert (found.action, found.dtype.name, len(found.inputs)) == (Action.EQUAL, "int64", 2)
    alone = entry(planned(linear("m0"), models), "model.ids")
    assert alone.action is Action.COPY


def test_integers_among_floats() -> None:
    models = opened(
        m0=(llama(seed=0) | {"model.ids": np.arange(3)}, config()),
        m1=(llama(seed=1) | {"model.ids": np.ones(3, np.float32)}, config()),
    )
    (problem,) = refused(linear("m0", "m1"), models)
    assert problem.message == "tensor 'model.ids' has types that cannot be merged"
    assert problem.exit_code == 3


# --- what does not fit ------------------------------------------------------------------------------------------------


def lacking(*names: str, seed: int = 1) -> dict[str, Array]:
    return {name: value for name, value in llama(seed=seed).items() if name not in names}


def test_missing_tensors() -> None:
    models = several(1) | opened(m1=(lacking("model.norm.weight", "lm_head.weight"), config()))
    problems = refused(linear("m0", "m1"), models)
    assert all("missing in m1" in problem.message for problem in problems)
    told = " ".join(problem.render() for problem in problems)
    assert "model.norm.weight" in told
    assert "lm_head.weight" in told
    plan = planned(linear("m0", "m1"), models, "missing_tensor")
    assert [source.model for source in entry(plan, "model.norm.weight").inputs] == [0]
    assert entry(plan, "model.norm.weight").values["weight"] == (1,)
    assert len(entry(plan, UP.format(0)).inputs) == 2


def test_missing_in_the_base_is_a_copy_where_a_base_is_needed() -> None:
    models = several(1) | opened(m1=(lacking("model.norm.weight"), config()))
    tree = linear("m0", merge_method="task_arithmetic", base_model="m1", parameters={"weight": 1})
    problems = refused(tree, models)
    assert "model m0 has 1 tensor that m1 lacks" in problems[0].message
    tree = linear("m1", merge_method="task_arithmetic", base_model="m0", parameters={"weight": 1})
    found = entry(planned(tree, models, "missing_tensor"), "model.norm.weight")
    assert (found.action, found.inputs[0].model) == (Action.COPY, 1)
    assert "the models that the method needs lack it" in found.reason


def test_a_pair_that_lost_one_is_not_interpolated() -> None:
    models = several(1) | opened(m1=(lacking("model.norm.weight"), config()))
    found = entry(
        planned(linear("m0", "m1", merge_method="nuslerp"), models, "missing_tensor"),
        "model.norm.weight",
    )
    assert found.action is Action.COPY


def test_extra_tensors() -> None:
    more = llama(seed=1) | {"model.more.weight": np.ones(2, np.float32)}
    models = several(1) | opened(m1=(more, config()))
    (problem,) = refused(linear("m0", "m1"), models)
    assert (problem.message, problem.exit_code) == ("model m1 has 1 tensor that m0 lacks", 3)
    plan = planned(linear("m0", "m1"), models, "extra_tensor")
    assert plan.ignored == {"m1: model.more.weight": "extra_tensor is allowed"}
    assert any("left out, as extra_tensor is allowed" in warning for warning in plan.warnings)
    by_recipe = planned(linear("m0", "m1", allow=["extra_tensor"]), models)
    assert by_recipe.ignored == plan.ignored


def test_shapes() -> None:
    def one(seed: int, shape: tuple[int, ...]) -> dict[str, Array]:
        return llama(seed=seed) | {"model.norm.weight": np.ones(shape, np.float32)}

    for shape in ((1, 8), (8, 1), (7,), ()):
        models = opened(m0=(one(0, (8,)), config()), m1=(one(1, shape), config()))
        (problem,) = refused(linear("m0", "m1"), models)
        assert problem.message == "tensor 'model.norm.weight' has different shapes"
        assert problem.where == (
            "model m0  model.norm.weight [8] float32",
            f"model m1  model.norm.weight {list(shape)} float32",
        )


def test_alike_problems_are_one() -> None:
    models = several(1, layers=12) | opened(m1=(llama(layers=12, hidden=12), config(layers=12, hidden=12)))
    problems = refused(linear("m0", "m1"), models)
    assert len(problems) <= 2
    assert sum(len(problem.render().splitlines()) for problem in problems) < 40


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "bitsandbytes"}, "bitsandbytes"),
        ({}, "unknown"),
    ],
)
def test_quantised(settings: dict[str, Any], kind: str) -> None:
    models = several(1) | opened(m1=(llama(seed=1), config(quantization_config=settings)))
    (problem,) = refused(linear("m0", "m1"), models)
    assert f"model m1 is quantised ({kind})" in problem.message
    assert problem.exit_code == 3


def test_all_kinds_of_problems_at_once() -> None:
    wrong = lacking("lm_head.weight", seed=2) | {
        "model.norm.weight": np.ones(9, np.float32),
        "model.more.weight": np.ones(2, np.float32),
    }
    models = several(2) | opened(m2=(wrong, config(quantization_config={"quant_method": "awq"})))
    problems = refused(linear("m0", "m1", "m2"), models)
    told = " ".join(problem.message for problem in problems)
    for said in ("missing in m2", "different shapes", "that m0 lacks", "quantised (awq)"):
        assert said in told, said


# --- the plan as a whole ----------------------------------------------------------------------------------------------


def test_heads() -> None:
    models = opened(
        tied=(llama(seed=0, tied=True), config(tied=True)),
        too=(llama(seed=1, tied=True), config(tied=True)),
        own=(llama(seed=2), config()),
    )
    assert planned(linear("tied", "too"), models).tied is True
    assert planned(linear("tied", "own"), models).tied is False
    assert planned(linear("own", "tied"), models).tied is False


def test_two_names_of_one_model_are_one_input_twice() -> None:
    models = several(1)
    models["again"] = models["m0"]
    plan = planned(linear("m0", "again"), models)
    assert len(plan.models) == 1
    assert [source.model for source in plan.entries[0].inputs] == [0, 0]


def test_the_digest_follows_what_the_recipe_says_not_how() -> None:
    first = planned(linear("m0", "m1", parameters={"weight": 1}))
    same = planned(linear("m0", "m1", parameters={"weight": "1.0"}))
    other = planned(linear("m0", "m1", parameters={"weight": 2}))
    turned = planned(linear("m1", "m0", parameters={"weight": 1}))
    assert first.recipe_digest == same.recipe_digest
    assert len({plan.recipe_digest for plan in (first, other, turned)}) == 3


def test_sizes() -> None:
    plan = planned(linear("m0", "m1", out_dtype="bfloat16"), several(2))
    count = sum(value.size for value in llama().values())
    assert (plan.parameters, plan.output_bytes, plan.input_bytes) == (count, 2 * count, 8 * count)


def test_an_empty_model() -> None:
    plan = planned(linear("m0"), opened(m0=({}, None)))
    assert (plan.entries, plan.parameters, output_dtype(plan)) == ((), 0, None)


def test_reading_no_data() -> None:
    models = several(2)
    for model in models.values():
        model.source.read_into = None  # a plan that reads fails
    assert planned(linear("m0", "m1"), models).entries


def test_the_golden_recipes_plan_alike_twice() -> None:
    case = factory.GOLDEN / "cases" / "ties-density-gradient" / "recipe.yml"
    text = case.read_text(encoding="utf-8").replace("models/", f"{factory.GOLDEN}/models/")
    tree = YAML(typ="safe", pure=True).load(text)
    assert smelt.plan(tree) == smelt.plan(tree)
