"""`merge_state_dicts`: NumPy and torch in, the same kind out, and the numbers of a merge of files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

import factory
import smelt
from factory import llama
from smelt.errors import InputError, NumericError, RecipeError, SmeltError

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def merged(*models: Any, **settings: Any) -> dict[str, Any]:
    return smelt.merge_state_dicts(models, **({"method": "linear", "weight": 0.5} | settings))


# --- kinds and types ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, BFLOAT16])
@pytest.mark.parametrize("shape", [(), (1,), (0,), (7,), (3, 5), (2, 0, 4), (2, 3, 4)])
def test_numpy(dtype: Any, shape: tuple[int, ...]) -> None:
    values = [np.arange(int(np.prod(shape)), dtype=np.float32).reshape(shape).astype(dtype) * k for k in (1, 3)]
    result = merged({"w": values[0]}, {"w": values[1]})
    assert list(result) == ["w"]
    assert isinstance(result["w"], np.ndarray)
    assert (result["w"].dtype, result["w"].shape) == (np.dtype(dtype), shape)
    assert np.array_equal(result["w"].astype(np.float32), 2 * values[0].astype(np.float32))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 5)])
def test_torch(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    one = torch.arange(int(np.prod(shape)), dtype=torch.float32).reshape(shape).to(dtype)
    result = merged({"w": one}, {"w": 3 * one})
    assert isinstance(result["w"], torch.Tensor)
    assert (result["w"].dtype, tuple(result["w"].shape)) == (dtype, shape)
    assert torch.equal(result["w"], 2 * one)
    assert not result["w"].requires_grad


def test_parameters_of_a_module() -> None:
    layers = [torch.nn.Linear(3, 2) for _ in range(2)]
    result = merged(*(layer.state_dict() for layer in layers))
    layers[0].load_state_dict(result)
    assert torch.allclose(layers[0].weight, result["weight"])
    assert merged({"w": layers[0].weight}, {"w": layers[1].weight})["w"].requires_grad is False


def test_views_and_orders() -> None:
    base = np.arange(24, dtype=np.float32).reshape(4, 6)
    strided, fortran = base[::2, ::3], np.asfortranarray(base)
    assert np.array_equal(merged({"w": strided}, {"w": strided})["w"], strided)
    assert np.array_equal(merged({"w": fortran}, {"w": base})["w"], base)
    assert np.array_equal(merged({"w": base.T}, {"w": base.T})["w"], base.T)
    tensor = torch.arange(24.0).reshape(4, 6)
    assert torch.equal(merged({"w": tensor.t()}, {"w": tensor.t()})["w"], tensor.t())
    assert torch.equal(merged({"w": tensor[::2]}, {"w": tensor[::2]})["w"], tensor[::2])


def test_big_endian_numbers_are_numbers() -> None:
    one = np.array([1, 2, 3], dtype=">f4")
    result = merged({"w": one, "n": np.array([7], ">i8")}, {"w": 3 * one, "n": np.array([7], ">i8")})
    assert result["w"].tolist() == [2, 4, 6]
    assert result["n"].tolist() == [7]


def test_inputs_are_not_touched_and_results_are_the_callers() -> None:
    one, two = np.ones(5, np.float32), np.full(5, 3, np.float32)
    one.flags.writeable = False
    result = merged({"w": one}, {"w": two})
    result["w"][:] = 9
    assert one.tolist() == [1] * 5
    assert two.tolist() == [3] * 5
    copied = smelt.merge_state_dicts([{"w": one}], method="passthrough")
    copied["w"][:] = 5
    assert one.tolist() == [1] * 5


def test_kinds_may_mix_and_the_first_decides() -> None:
    array, tensor = np.ones(3, np.float32), torch.full((3,), 3.0)
    assert isinstance(merged({"w": array}, {"w": tensor})["w"], np.ndarray)
    assert torch.equal(merged({"w": tensor}, {"w": array})["w"], torch.full((3,), 2.0))


@pytest.mark.parametrize(
    ("types", "wanted"),
    [
        ((np.float16, np.float16), "float16"),
        ((np.float16, np.float32), "float32"),
        ((BFLOAT16, np.float16), "float32"),
        ((np.float32, np.float64), "float64"),
    ],
)
def test_types_are_promoted(types: tuple[Any, Any], wanted: str) -> None:
    one, two = (np.ones(3).astype(dtype) for dtype in types)
    assert merged({"w": one}, {"w": two})["w"].dtype.name == wanted


@pytest.mark.parametrize("word", ["float64", "float32", "float16", "bfloat16", "bf16"])
def test_the_output_type_on_request(word: str) -> None:
    one = {"w": np.array([1, 1 / 3], np.float32)}
    wanted = {"bf16": "bfloat16"}.get(word, word)
    result = merged(one, one, dtype=word)["w"]
    assert result.dtype.name == wanted
    assert np.array_equal(result, one["w"].astype(result.dtype))
    tensor = merged({"w": torch.tensor([1, 1 / 3])}, dtype=word)["w"]
    assert tensor.dtype == getattr(torch, wanted)


def test_integers_and_booleans() -> None:
    one = {"w": np.ones(2, np.float32), "n": np.arange(3), "b": np.array([True, False]), "u": np.array(7, np.uint8)}
    result = merged(one, one, dtype="float16")
    for name in ("n", "b", "u"):
        assert (result[name].dtype, result[name].tolist()) == (one[name].dtype, one[name].tolist())
    tensors = {name: torch.from_numpy(np.atleast_1d(value)) for name, value in one.items()}
    result = merged(tensors, tensors)
    assert (result["n"].dtype, result["b"].dtype) == (torch.int64, torch.bool)
    assert result["b"].tolist() == [True, False]


def test_order_and_names() -> None:
    names = ["z", "a.1.weight", "a.0.weight", "ünï", ""]
    one = {name: np.ones(2, np.float32) for name in names}
    assert list(merged(one, one)) == names
    assert merged({}, {}) == {}


# --- the same as files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    ("method", "base", "settings"),
    [
        ("linear", False, {"weight": [0.3, 0.7]}),
        ("slerp", True, {"t": 0.4}),
        ("nuslerp", False, {"weight": [1, 3]}),
        ("task_arithmetic", True, {"weight": 0.5, "lambda_": 0.8}),
        ("ties", True, {"weight": [1, 0.5], "density": 0.4}),
        ("dare_ties", True, {"weight": 0.5, "density": 0.5}),
        ("model_stock", True, {}),
    ],
)
def test_the_same_numbers_as_a_merge_of_files(
    tmp_path: Path, method: str, base: bool, settings: dict[str, Any], seed: int
) -> None:
    count = 1 if method == "slerp" else 2
    models = [llama(seed=i + 1, layers=2) for i in range(count)]
    foundation = llama(seed=0)
    result = smelt.merge_state_dicts(models, method=method, base=foundation if base else None, seed=seed, **settings)
    for i, tensors in enumerate([foundation, *models]):
        factory.model(tmp_path / f"m{i}", tensors, factory.config())
    tree: dict[str, Any] = {"merge_method": method, "models": [], "parameters": {}}
    for i in range(count):
        own = {name: value[i] for name, value in settings.items() if isinstance(value, list)}
        tree["models"].append({"model": str(tmp_path / f"m{i + 1}"), "parameters": own})
    shared = {name: value for name, value in settings.items() if not isinstance(value, list)}
    tree["parameters"] = {name.removesuffix("_"): value for name, value in shared.items()}
    if base:
        tree["base_model"] = str(tmp_path / "m0")
    smelt.merge(tree, tmp_path / "out", seed=seed)
    written = factory.stored(tmp_path / "out")
    assert result.keys() == written.keys()
    for name, value in written.items():
        assert np.array_equal(result[name], value), name


def test_threads_and_tiles_change_nothing() -> None:
    random = np.random.default_rng(0)
    models = [{"w": random.standard_normal(300_000, dtype=np.float32)} for _ in range(3)]
    settings: dict[str, Any] = {"method": "dare_ties", "base": models[0], "weight": 0.5, "density": 0.5}
    first = smelt.merge_state_dicts(models[1:], **settings)["w"]
    for workers, tile in ((1, 65536), (3, 131072), (5, 1 << 20)):
        again = smelt.merge_state_dicts(models[1:], workers=workers, tile=tile, **settings)["w"]
        assert np.array_equal(first, again)
    assert not np.array_equal(first, smelt.merge_state_dicts(models[1:], seed=1, **settings)["w"])


def test_per_model_settings() -> None:
    one, two = {"w": np.float32([1.0])}, {"w": np.float32([5.0])}
    for weight in ([1, 3], (1, 3), np.array([1, 3]), np.float32([1, 3])):
        assert merged(one, two, weight=weight)["w"].tolist() == [4.0]
    assert merged(one, two, weight=1, normalize=False)["w"].tolist() == [6.0]
    assert merged(one, two, weight=np.float64(0.5))["w"].tolist() == [3.0]


# --- errors ---------------------------------------------------------------------------------------------------------

ONE = {"w": np.ones(3, np.float32)}


@pytest.mark.parametrize(
    ("models", "settings", "kind", "says"),
    [
        ([], {}, RecipeError, "no model to merge"),
        ([ONE, ONE], {"method": "linaer"}, RecipeError, "did you mean `linear`"),
        ([ONE, ONE], {"weight": [1]}, RecipeError, "weight has 1 numbers for 2 models"),
        ([ONE, ONE], {"weight": "heavy"}, RecipeError, "`weight` must be a number"),
        ([ONE, ONE], {"weight": float("nan")}, RecipeError, "nan"),
        ([ONE, ONE], {"weight": [1, -1]}, RecipeError, "weights sum to 0"),
        ([ONE, ONE], {"weihgt": 1}, RecipeError, "did you mean `weight`"),
        ([ONE, ONE], {"dtype": "float61"}, RecipeError, "float61"),
        ([ONE, ONE], {"dtype": "int8"}, RecipeError, "int8"),
        ([ONE, ONE], {"allow": ["everything"]}, RecipeError, "everything"),
        ([ONE, ONE], {"workers": 0}, RecipeError, "workers must be at least 1"),
        ([ONE, ONE], {"tile": -1}, RecipeError, "tile must be at least 1"),
        ([ONE, ONE], {"method": "ties", "weight": 1}, RecipeError, "ties needs a base model"),
        (
            [ONE, dict(ONE), dict(ONE)],
            {"method": "slerp", "base": ONE, "weight": None, "t": 0.5},
            RecipeError,
            "exactly 1 model",
        ),
        ([ONE, {"w": np.ones(4, np.float32)}], {}, InputError, "tensor 'w' has different shapes"),
        ([ONE, {"w": np.ones((1, 3), np.float32)}], {}, InputError, "different shapes"),
        ([ONE, {}], {}, InputError, "missing in #2"),
        ([ONE, ONE | {"x": ONE["w"]}], {}, InputError, "model #2 has 1 tensor that #1 lacks"),
        ([ONE, {"w": [1, 2, 3]}], {}, InputError, "not an array but list"),
        ([ONE, {"w": 1.0}], {}, InputError, "not an array but float"),
        ([ONE, {"w": None}], {}, InputError, "not an array but NoneType"),
        ([ONE, {"w": np.array(["a", "b", "c"])}], {}, InputError, "cannot be merged"),
        ([ONE, {"w": np.array([object()] * 3)}], {}, InputError, "numbers of type object cannot be merged"),
        ([ONE, {"w": np.ones(3, np.longdouble)}], {}, InputError, "cannot be merged"),
        ([ONE, {"w": np.arange(3)}], {}, InputError, "types that cannot be merged"),
        ([ONE, {3: ONE["w"]}], {}, InputError, "a tensor's name is text, not 3"),
        ([{"n": np.arange(3)}, {"n": np.arange(1, 4)}], {}, InputError, "int64 numbers that differ"),
        ([{"w": ONE["w"].astype(ml_dtypes.float8_e4m3fn), "w_scale": ONE["w"]}], {}, InputError, "quantised (scaled)"),
        ([{"w": np.zeros(4).astype(ml_dtypes.float8_e8m0fnu)}], {}, InputError, "quantised (float8_e8m0fnu)"),
        ([{"w": np.ones(3, np.complex64)}] * 2, {}, None, ""),
    ],
)
def test_errors(models: list[Any], settings: dict[str, Any], kind: type[SmeltError] | None, says: str) -> None:
    given = {"method": "linear", "weight": 1} | settings
    given = {name: value for name, value in given.items() if value is not None}
    if kind is None:
        assert smelt.merge_state_dicts(models, **given)
        return
    with pytest.raises(kind) as caught:
        smelt.merge_state_dicts(models, **given)
    assert says in str(caught.value)
    assert "defect" not in str(caught.value)


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"])
def test_floats_of_8_bits(name: str) -> None:
    """Without a scale they are plain numbers, in NumPy and in torch."""
    kind = np.dtype(getattr(ml_dtypes, name))
    one, two = (np.float32(values).astype(kind) for values in ([1, -2, 0.25], [3, 2, 0.75]))
    assert merged({"w": one}, {"w": two})["w"].dtype == kind
    assert merged({"w": one}, {"w": two})["w"].astype(np.float32).tolist() == [2, 0, 0.5]
    target = getattr(torch, name)
    tensors = [{"w": torch.tensor(values.astype(np.float32)).to(target)} for values in (one, two)]
    done = merged(*tensors)["w"]
    assert done.dtype == target
    assert done.float().tolist() == [2, 0, 0.5]


def test_a_word_for_floats_of_8_bits() -> None:
    done = merged({"w": np.float32([1, 2])}, {"w": np.float32([3, 500])}, dtype="float8_e4m3fn")["w"]
    assert done.dtype == ml_dtypes.float8_e4m3fn
    assert done.astype(np.float32).tolist() == [2, 256]
    with pytest.raises(NumericError, match="or a number beyond ±448"):
        merged({"w": np.float32([1000])}, {"w": np.float32([1000])}, dtype="float8_e4m3fn")


def test_a_new_infinity() -> None:
    large = {"w": np.full(3, 3e38, np.float32)}
    with pytest.raises(NumericError, match="tensor 'w' would get a NaN or infinity"):
        merged(large, large, dtype="float16")
    assert np.isinf(merged(large, large, dtype="float16", allow=["nonfinite"])["w"]).all()
    assert np.isinf(merged(large, large, dtype="float16", allow=iter(["nonfinite"]))["w"]).all()
    inherited = {"w": np.float32([np.nan, 1, np.inf])}
    assert np.isnan(merged(inherited, {"w": np.ones(3, np.float32)})["w"]).tolist() == [True, False, False]


def test_what_may_be_allowed() -> None:
    more = {"w": np.full(3, 3, np.float32), "x": np.ones(2, np.float32)}
    assert list(merged(ONE, more, allow=["extra_tensor"])) == ["w"]
    result = merged(more, ONE, allow=["missing_tensor"])
    assert result["x"].tolist() == [1, 1]
    assert result["w"].tolist() == [2, 2, 2]


def test_an_unknown_kind_of_torch_tensor() -> None:
    strange = torch.ones(3, dtype=torch.complex128)
    with pytest.raises(InputError, match="numbers of type complex128 cannot be merged"):
        merged({"w": strange}, {"w": strange})


def test_scalars_of_numpy_are_arrays_without_dimensions() -> None:
    result = merged({"w": np.float16(1), "b": np.bool_(True)}, {"w": np.float16(3), "b": np.bool_(True)})
    assert (result["w"].shape, result["w"].dtype.name, result["w"].item()) == ((), "float16", 2.0)
    assert result["b"].item() is True


def test_models_named_like_the_base_do_not_mix_with_it() -> None:
    result = smelt.merge_state_dicts([ONE], method="task_arithmetic", base={"w": np.zeros(3, np.float32)}, weight=2)
    assert result["w"].tolist() == [2, 2, 2]
    same = smelt.merge_state_dicts([ONE, ONE], method="task_arithmetic", base=ONE, weight=1)
    assert same["w"].tolist() == [1, 1, 1]
