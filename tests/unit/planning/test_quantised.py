"""Quantised checkpoints are refused by name, whatever says that they are; plain numbers of 8 bits are not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from factory import Array, config, linear, llama, opened
from smelt.errors import InputError, SmeltError
from smelt.planning.build import build
from smelt.planning.entries import Action
from smelt.planning.quantised import SCALES, SHOWN, quantised, refuse
from smelt.recipe.parse import from_dict

E4M3 = ml_dtypes.float8_e4m3fn
E5M2 = ml_dtypes.float8_e5m2
AT = "model.layers.0.mlp.up_proj"
WEIGHT = f"{AT}.weight"
ONE = np.ones(1, np.float32)


def told(tensors: Mapping[str, Array], settings: Mapping[str, Any] | None = None) -> InputError | None:
    return refuse(opened(m=(tensors, settings))["m"])


def with_module(*leaves: tuple[str, Array]) -> dict[str, Array]:
    """A llama whose layer 0 stores its up projection as these tensors."""
    tensors = llama()
    if leaves[0][0] != "weight":
        del tensors[WEIGHT]
    return tensors | {f"{AT}.{leaf}": value for leaf, value in leaves}


def eight(kind: Any = E4M3) -> Array:
    return np.ones((12, 8), np.float32).astype(kind)


def packed(rows: int, columns: int, kind: Any = np.int32) -> Array:
    return np.ones((rows, columns), kind)


GPTQ = with_module(
    ("qweight", packed(1, 12)),
    ("qzeros", packed(1, 2)),
    ("scales", np.ones((1, 12), np.float16)),
    ("g_idx", packed(1, 8)),
)
OLD_GPTQ = {name: value for name, value in GPTQ.items() if not name.endswith("g_idx")}
AWQ = with_module(("qweight", packed(8, 2)), ("qzeros", packed(1, 2)), ("scales", np.ones((1, 16), np.float16)))
NF4 = with_module(
    ("weight", packed(48, 1, np.uint8)),
    ("weight.absmax", packed(2, 1, np.uint8)),
    ("weight.quant_map", np.ones(16, np.float32)),
    ("weight.nested_absmax", ONE),
    ("weight.nested_quant_map", np.ones(256, np.float32)),
    ("weight.quant_state.bitsandbytes__nf4", packed(1, 9, np.uint8)),
)
INT8 = with_module(("weight", packed(12, 8, np.int8)), ("SCB", np.ones(12, np.float32)))
FINE_GRAINED = with_module(("weight", eight()), ("weight_scale_inv", np.ones((1, 1), np.float32)))
COMPRESSED = with_module(
    ("weight_packed", packed(12, 1)), ("weight_scale", np.ones((12, 1), np.float32)), ("weight_shape", np.arange(2))
)
MXFP4 = llama() | {
    "model.layers.0.mlp.experts.down_proj_blocks": packed(4, 16, np.uint8),
    "model.layers.0.mlp.experts.down_proj_scales": packed(4, 1, np.uint8),
}
NVFP4 = with_module(
    ("weight", packed(12, 4, np.uint8)), ("weight_scale", eight()), ("weight_scale_2", ONE), ("input_scale", ONE)
)
HQQ = with_module(("W_q", packed(6, 8, np.uint8)), ("scale", ONE), ("zero", ONE))
QUANTO = with_module(("weight._data", packed(12, 8, np.int8)), ("weight._scale", ONE))
AQLM = with_module(("codes", packed(12, 1, np.int8)), ("codebooks", ONE), ("scales", ONE))


@pytest.mark.parametrize(
    ("tensors", "kind", "way", "first"),
    [
        (GPTQ, "gptq", "GPTQModel", f"{AT}.qweight [1, 12] int32"),
        (OLD_GPTQ, "gptq", "GPTQModel", f"{AT}.qweight [1, 12] int32"),
        (AWQ, "awq", "AutoAWQ", f"{AT}.qweight [8, 2] int32"),
        (NF4, "bitsandbytes", "model.dequantize()", f"{WEIGHT}.absmax [2, 1] uint8"),
        (INT8, "bitsandbytes", "model.dequantize()", f"{WEIGHT} [12, 8] int8"),
        (FINE_GRAINED, "fp8", "FineGrainedFP8Config(dequantize=True)", f"{WEIGHT} [12, 8] float8_e4m3fn"),
        (
            COMPRESSED,
            "compressed-tensors",
            "CompressedTensorsConfig(dequantize=True)",
            f"{AT}.weight_packed [12, 1] int32",
        ),
        (MXFP4, "mxfp4", "Mxfp4Config(dequantize=True)", "model.layers.0.mlp.experts.down_proj_blocks [4, 16] uint8"),
        (NVFP4, "nvfp4", "", f"{WEIGHT} [12, 4] uint8"),
        (HQQ, "hqq", "", f"{AT}.W_q [6, 8] uint8"),
        (QUANTO, "quanto", "", f"{WEIGHT}._data [12, 8] int8"),
        (AQLM, "aqlm", "", f"{AT}.codes [12, 1] int8"),
        (llama() | {"scaled_fp8": eight()}, "scaled", "multiply each weight by its scale", "scaled_fp8 [12, 8]"),
        (
            with_module(("weight", eight(ml_dtypes.float8_e8m0fnu))),
            "float8_e8m0fnu",
            "",
            f"{WEIGHT} [12, 8] float8_e8m0",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_what_names_and_types_say(tensors: Mapping[str, Array], kind: str, way: str, first: str) -> None:
    error = told(tensors)
    assert error is not None
    assert error.message == f"model m is quantised ({kind}), and its numbers cannot be merged as they are"
    assert error.where[0].startswith(f"tensor {first}")
    assert error.fix is not None
    assert error.fix.startswith("use the model's original weights (float16, bfloat16 or float32)")
    assert "dequantise it first" in error.fix
    assert way in error.fix
    assert error.exit_code == 3


@pytest.mark.parametrize("kind", [E4M3, E5M2, ml_dtypes.float8_e4m3fnuz, ml_dtypes.float8_e5m2fnuz, np.int8])
@pytest.mark.parametrize("leaf", SCALES)
def test_a_scale_beside_a_weight_of_8_bits(leaf: str, kind: Any) -> None:
    """Any of the names in use; the scale itself may have 8 bits too."""
    for scale in (ONE, np.ones(1, np.float32).astype(E4M3)):
        error = told(with_module(("weight", eight(kind)), (leaf, scale)))
        assert error is not None
        assert "is quantised" in error.message
        assert error.where == (f"tensor {WEIGHT} [12, 8] {np.dtype(kind).name}",)


@pytest.mark.parametrize("suffix", ["_scale", "_scale_inv", "_scales", ".scale"])
def test_a_scale_named_after_its_tensor(suffix: str) -> None:
    """Experts in one tensor have no module of their own."""
    name = "model.layers.0.mlp.experts.gate_up_proj"
    error = told(llama() | {name: eight(), name + suffix: ONE})
    assert error is not None
    assert error.where == (f"tensor {name} [12, 8] float8_e4m3fn",)


@pytest.mark.parametrize("kind", [E4M3, E5M2, ml_dtypes.float8_e4m3fnuz, ml_dtypes.float8_e5m2fnuz])
def test_plain_numbers_of_8_bits_pass(kind: Any) -> None:
    """As diffusion models store them, where a norm's weight may be called `scale`."""
    plain = {name: value.astype(kind) for name, value in llama().items()}
    plain |= {"model.layers.0.query_norm.scale": np.ones(8, kind), "model.layers.0.modulation.bias": np.ones(8, kind)}
    assert told(plain) is None
    recipe = from_dict(linear("a", "b"))
    plan = build(recipe, opened(a=(plain, config()), b=(plain, config())))
    assert {entry.dtype.name for entry in plan.entries} == {np.dtype(kind).name}
    assert all(entry.action is Action.MERGE for entry in plan.entries)


@pytest.mark.parametrize(
    "more",
    [
        {f"{AT}.scale": ONE, f"{AT}.input_scale": ONE, f"{AT}.weight_scale": ONE},
        {f"{AT}.W_q": ONE, f"{AT}.codes": ONE, f"{AT}.qweight": ONE},
        {f"{AT}.scales": ONE},
        {
            "model.ids": np.ones(4, np.uint8),
            "model.ids.weight": np.ones(4, np.uint8),
            "model.mask": np.ones(4, np.int8),
        },
        {"model.layers.0.cross_blocks": ONE, "model.layers.0.cross_scales": ONE},
    ],
)
def test_names_that_prove_nothing(more: dict[str, Array]) -> None:
    """Learned scales beside wide weights, integers without a scale."""
    assert told(llama() | more, config()) is None


@pytest.mark.parametrize(
    ("settings", "place", "kind"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config", "gptq"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "compression_config", "compressed-tensors"),
        ({"text_config": {"quantization_config": {"quant_method": "fp8"}}}, "text_config.quantization_config", "fp8"),
        ({"quantization_config": {"bits": 4}}, "quantization_config", "unknown"),
    ],
)
def test_what_the_config_says(settings: dict[str, Any], place: str, kind: str) -> None:
    error = told(llama(), config(**settings))
    assert error is not None
    assert f"is quantised ({kind})" in error.message
    assert error.where == (f"config.json  {place}",)
    assert told(llama(), config(quantization_config=None)) is None


def test_config_and_tensors_together() -> None:
    error = told(GPTQ, config(quantization_config={"quant_method": "gptq", "bits": 4}))
    assert error is not None
    assert error.message.startswith("model m is quantised (gptq),")
    assert error.where == ("config.json  quantization_config", f"tensor {AT}.qweight [1, 12] int32")
    error = told(GPTQ, config(quantization_config={"bits": 4}))
    assert error is not None
    assert "(gptq)" in error.message


def test_many_tensors_are_counted_and_every_kind_is_named() -> None:
    tensors = llama(layers=9)
    for layer in range(9):
        name = f"model.layers.{layer}.self_attn.q_proj.weight"
        tensors[name] = tensors[name].astype(E4M3)
        tensors[f"{name}_scale_inv"] = ONE
    error = told(tensors | {f"{AT}.weight_packed": packed(12, 1)})
    assert error is not None
    assert "(fp8, compressed-tensors)" in error.message or "(compressed-tensors, fp8)" in error.message
    assert sum("q_proj.weight " in line for line in error.where) == SHOWN
    assert "… and 5 more such tensors (fp8)" in error.where


def test_all_quantised_models_are_told_once_each() -> None:
    """And not once more for each of their tensors."""
    models = opened(
        plain=(llama(), config()), eight=(FINE_GRAINED, config()), four=(NF4, config()), bytes=(INT8, config())
    )
    assert list(quantised(list(models.values()))) == [1, 2, 3]
    with pytest.raises(SmeltError) as caught:
        build(from_dict(linear("plain", "eight", "four", "bytes")), models)
    told_of = [problem.message for problem in caught.value.problems]
    assert sum("is quantised" in message for message in told_of) == 3
    assert not any("types that cannot be merged" in message for message in told_of)
