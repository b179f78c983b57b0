"""What must hold of the methods for any numbers, whatever the reference says.

Through `merge_state_dicts`, as a user calls it. Tensors and settings are drawn by hypothesis.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from smelt.in_memory import merge_state_dicts

pytestmark = pytest.mark.filterwarnings("error")

SETTINGS = settings(deadline=None, max_examples=40)
SHAPES = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=9)
NUMBERS = st.integers(-4096, 4096).map(lambda i: i / 1024)
WEIGHTS = st.integers(-200, 200).map(lambda i: i / 100)


@st.composite
def models(draw: st.DrawFn, *, low: int = 1, high: int = 4, min_side: int = 0, min_dims: int = 0) -> list[np.ndarray]:
    """Some float32 tensors of one shape, of numbers with few digits, so that many are equal."""
    count = draw(st.integers(low, high))
    shape = draw(hnp.array_shapes(min_dims=min_dims, max_dims=3, min_side=min_side, max_side=9))
    return [draw(hnp.arrays(np.float32, shape, elements=NUMBERS)) for _ in range(count)]


def merge(tensors: Sequence[np.ndarray], method: str, base: np.ndarray | None = None, **given: Any) -> np.ndarray:
    states = [{"w": tensor} for tensor in tensors]
    merged = merge_state_dicts(states, method=method, base=None if base is None else {"w": base}, workers=1, **given)
    return np.asarray(merged["w"])


def close(got: np.ndarray, want: Any, *, steps: float = 4.0, scale: float = 8.0) -> None:
    """Equal within a few float32 steps of numbers as large as the inputs."""
    np.testing.assert_allclose(got.astype(np.float64), want, rtol=0, atol=steps * scale * 2.0**-24)


def same(one: np.ndarray, other: np.ndarray) -> None:
    assert one.tobytes() == other.tobytes()


# linear


@SETTINGS
@given(models(), st.data())
def test_linear_does_not_depend_on_the_order(x: list[np.ndarray], data: st.DataObject) -> None:
    w = data.draw(st.lists(WEIGHTS, min_size=len(x), max_size=len(x)))
    order = data.draw(st.permutations(range(len(x))))
    one = merge(x, "linear", weight=w, normalize=False)
    other = merge([x[i] for i in order], "linear", weight=[w[i] for i in order], normalize=False)
    close(one, other, scale=16.0)


@SETTINGS
@given(models(low=2), st.floats(0.01, 100.0), st.data())
def test_normalized_weights_are_relative(x: list[np.ndarray], factor: float, data: st.DataObject) -> None:
    w = data.draw(st.lists(st.floats(0.01, 2.0), min_size=len(x), max_size=len(x)))
    close(merge(x, "linear", weight=w), merge(x, "linear", weight=[v * factor for v in w]))


@SETTINGS
@given(models(low=2, high=2), st.floats(0.0, 1.0))
def test_an_average_lies_between(x: list[np.ndarray], t: float) -> None:
    got = merge(x, "linear", weight=[1.0 - t, t])
    assert (np.minimum(*x) <= got).all()
    assert (got <= np.maximum(*x)).all()


@SETTINGS
@given(models())
def test_a_model_with_all_the_weight_is_the_result(x: list[np.ndarray]) -> None:
    weight = [1.0] + [0.0] * (len(x) - 1)
    assert np.array_equal(merge(x, "linear", weight=weight), x[0])


# Task vectors


@SETTINGS
@given(models(low=2), st.floats(-2.0, 2.0), st.floats(-2.0, 2.0))
def test_task_arithmetic_is_linear_in_lambda(x: list[np.ndarray], one: float, two: float) -> None:
    *moved, base = x
    weight = [0.7, -0.4, 1.1][: len(moved)]

    def step(factor: float) -> np.ndarray:
        got = merge(moved, "task_arithmetic", base, weight=weight, lambda_=factor)
        return got.astype(np.float64) - base.astype(np.float64)

    close(step(one) + step(two), step(one + two), scale=64.0)
    same(merge(moved, "task_arithmetic", base, weight=weight, lambda_=0.0), base + np.float32(0.0))


@SETTINGS
@given(models(low=2, high=2))
def test_one_whole_task_vector_is_the_model(x: list[np.ndarray]) -> None:
    """b + (x - b), up to the rounding of x - b."""
    model, base = x
    for method in ("task_arithmetic", "ties", "dare_linear", "dare_ties"):
        close(merge([model], method, base, weight=1.0), model)


@SETTINGS
@given(models(low=2), st.booleans(), st.sampled_from([1.0, 1.5]))
def test_density_one_trims_nothing(x: list[np.ndarray], normalize: bool, density: float) -> None:
    *moved, base = x
    weight = [0.7, 0.4, 1.1][: len(moved)]
    plain = merge(moved, "ties", base, weight=weight, normalize=normalize)
    same(merge(moved, "ties", base, weight=weight, normalize=normalize, density=density), plain)
    close(merge(moved, "ties", base, weight=weight, normalize=normalize, density=density, rescale=True), plain)


@SETTINGS
@given(models(low=2), st.sampled_from([True, False, "density"]), st.booleans())
def test_dare_with_density_one_is_task_arithmetic(x: list[np.ndarray], rescale: Any, normalize: bool) -> None:
    *moved, base = x
    weight = [0.7, 0.4, 1.1][: len(moved)]
    plain = merge(moved, "task_arithmetic", base, weight=weight, normalize=normalize)
    got = merge(moved, "dare_linear", base, weight=weight, normalize=normalize, density=1.0, rescale=rescale)
    close(got, plain, scale=32.0)


@SETTINGS
@given(models(low=2), st.sampled_from(["ties", "dare_linear", "dare_ties"]))
def test_density_zero_leaves_the_base(x: list[np.ndarray], method: str) -> None:
    *moved, base = x
    same(merge(moved, method, base, weight=1.0, density=0.0), base + np.float32(0.0))


@SETTINGS
@given(models(low=2, high=2, min_side=1), st.floats(0.01, 0.99))
def test_ties_keeps_the_count_where_magnitudes_differ(x: list[np.ndarray], density: float) -> None:
    model, base = x
    base = np.zeros_like(base)
    magnitude = np.sort(np.abs(model).ravel())
    assume(np.unique(magnitude).size == magnitude.size)
    assume(magnitude[0] > 0)
    got = merge([model], "ties", base, weight=1.0, density=density)
    kept = got != 0
    assert kept.sum() == max(1, int(density * model.size))
    assert np.array_equal(got[kept], model[kept])
    assert np.abs(model[kept]).min(initial=np.inf) > np.abs(model[~kept]).max(initial=0.0)


@SETTINGS
@given(models(low=3, high=4))
def test_an_election_takes_one_side(x: list[np.ndarray]) -> None:
    """Where all task vectors agree in sign it is their weighted sum; elsewhere no larger than one side's."""
    *moved, base = x
    got = merge(moved, "ties", base, weight=1.0, normalize=False).astype(np.float64) - base
    deltas = np.stack([tensor - base for tensor in moved]).astype(np.float64)
    positive, negative = np.maximum(deltas, 0).sum(axis=0), np.minimum(deltas, 0).sum(axis=0)
    close(got, np.where(positive + negative >= 0, positive, negative), scale=32.0)


@SETTINGS
@given(st.integers(0, 5), st.floats(0.05, 0.95))
def test_dare_keeps_the_share_and_the_strength(seed: int, density: float) -> None:
    size = 40_000
    base = np.zeros(size, np.float32)
    model = np.random.default_rng(seed).normal(size=size).astype(np.float32)
    kept = merge([model], "dare_linear", base, weight=1.0, density=density, seed=seed)
    count = int((kept != 0).sum())
    assert abs(count - density * size) < 5.0 * np.sqrt(size * density * (1 - density))
    assert np.abs(kept).sum(dtype=np.float64) == pytest.approx(np.abs(model).sum(dtype=np.float64), rel=1e-5)
    by_density = merge([model], "dare_linear", base, weight=1.0, density=density, seed=seed, rescale="density")
    close(by_density[by_density != 0], (model / density)[by_density != 0], scale=128.0)


@SETTINGS
@given(st.integers(0, 3))
def test_equal_magnitudes_are_thinned_evenly(seed: int) -> None:
    """All of one size: the share kept is right in every part of the tensor, not filled from one end."""
    size = 40_000
    model = np.where(np.random.default_rng(seed).random(size) < 0.5, -0.25, 0.25).astype(np.float32)
    kept = merge([model], "ties", np.zeros(size, np.float32), weight=1.0, density=0.3, seed=seed) != 0
    parts = kept.reshape(8, -1).mean(axis=1)
    assert np.abs(parts - 0.3).max() < 5.0 * np.sqrt(0.3 * 0.7 / (size / 8))


# On the sphere


@SETTINGS
@given(models(low=2, high=2))
def test_slerp_begins_at_the_base_and_ends_at_the_model(x: list[np.ndarray]) -> None:
    model, base = x
    assert np.array_equal(merge([model], "slerp", base, t=0.0), base)
    close(merge([model], "slerp", base, t=1.0), model, steps=1.0)


@SETTINGS
@given(models(low=2, high=2), st.floats(0.0, 1.0))
def test_slerp_can_be_turned_round(x: list[np.ndarray], t: float) -> None:
    model, base = x
    close(merge([model], "slerp", base, t=t), merge([base], "slerp", model, t=1.0 - t), scale=64.0)


@SETTINGS
@given(models(low=2, high=2, min_side=2, min_dims=1), st.floats(0.05, 0.95))
def test_slerp_of_equal_lengths_keeps_the_length(x: list[np.ndarray], t: float) -> None:
    wide = [tensor.astype(np.float64) for tensor in x]
    lengths = [np.sqrt((tensor**2).sum()) for tensor in wide]
    assume(min(lengths) > 0.1)
    model, base = (np.asarray(tensor / length, np.float32) for tensor, length in zip(wide, lengths, strict=True))
    assume(abs(float((model.astype(np.float64) * base).sum())) < 0.999)
    got = merge([model], "slerp", base, t=t).astype(np.float64)
    assert np.sqrt((got**2).sum()) == pytest.approx(1.0, abs=1e-5)


@SETTINGS
@given(models(low=2, high=2, min_side=2, min_dims=1), st.floats(0.1, 2.0), st.floats(0.1, 2.0))
def test_nuslerp_is_slerp_at_the_share_of_the_second_weight(x: list[np.ndarray], one: float, two: float) -> None:
    first, second = (tensor.astype(np.float64).ravel() for tensor in x)
    lengths = np.sqrt((first**2).sum()), np.sqrt((second**2).sum())
    assume(min(lengths) > 0.1 and abs(first @ second) / (lengths[0] * lengths[1]) < 0.999)
    got = merge(x, "nuslerp", weight=[one, two])
    close(got, merge([x[1]], "slerp", x[0], t=two / (one + two)), scale=64.0)


# Others


@SETTINGS
@given(models(high=1), st.sampled_from(["float32", "float16", "bfloat16"]))
def test_passthrough_keeps_every_byte(x: list[np.ndarray], name: str) -> None:
    stored = x[0].astype(ml_dtypes.bfloat16 if name == "bfloat16" else name)
    same(merge([stored], "passthrough"), stored)


@SETTINGS
@given(hnp.arrays(np.uint16, SHAPES))
def test_passthrough_keeps_nan_payloads(codes: np.ndarray) -> None:
    same(merge([codes.view(np.float16)], "passthrough"), codes.view(np.float16))
    same(merge([codes.view(ml_dtypes.bfloat16)], "passthrough"), codes.view(ml_dtypes.bfloat16))


@SETTINGS
@given(models(low=3))
def test_model_stock_of_equal_models_is_the_model(x: list[np.ndarray]) -> None:
    """Unless the task vector is so short that its square counts as 1e-6."""
    model, base = x[0], x[-1]
    length = float(np.sqrt(((model - base).astype(np.float64) ** 2).sum()))
    assume(length == 0.0 or length > 1e-2)
    close(merge([model] * (len(x) - 1), "model_stock", base), model, scale=32.0)


@pytest.mark.parametrize(
    ("method", "given_settings"),
    [
        ("linear", {"weight": [0.7, 0.4]}),
        ("task_arithmetic", {"weight": [0.7, -0.4], "lambda_": 0.6}),
        ("ties", {"weight": [0.7, 0.4], "density": 0.5, "rescale": True}),
        ("dare_ties", {"weight": [0.7, 0.4], "density": 0.5}),
        ("nuslerp", {"weight": [0.7, 0.4]}),
        ("model_stock", {}),
    ],
)
@SETTINGS
@given(models(low=3, high=3, min_side=1), st.integers(-8, 8))
def test_a_power_of_two_passes_through(
    method: str, given_settings: dict[str, Any], x: list[np.ndarray], power: int
) -> None:
    """f(2**k x) = 2**k f(x): no method has a scale of its own. Bit for bit where nothing is near a threshold."""
    deltas = [float(np.sqrt(((tensor - x[2]).astype(np.float64) ** 2).sum())) for tensor in x[:2]]
    assume(min(deltas) > 0.5)
    assume(min(float(np.sqrt((tensor.astype(np.float64) ** 2).sum())) for tensor in x[:2]) > 0.5)
    base = None if method == "linear" else x[2]
    plain = merge(x[:2], method, base, **given_settings)
    scaled = [np.asarray(np.ldexp(tensor, power), np.float32) for tensor in x]
    got = merge(scaled[:2], method, None if base is None else scaled[2], **given_settings)
    assert np.array_equal(np.ldexp(got, -power), plain)


@pytest.mark.parametrize("method", ["linear", "slerp", "task_arithmetic", "ties", "model_stock", "nuslerp"])
@SETTINGS
@given(models(low=3, high=3, min_side=2), st.randoms(use_true_random=False))
def test_entries_may_be_shuffled(method: str, x: list[np.ndarray], random: Any) -> None:
    """Methods with one decision per tensor do not see where an entry stands."""
    flat = [tensor.reshape(-1) for tensor in x]
    order = list(range(flat[0].size))
    random.shuffle(order)
    given_settings: dict[str, Any] = {"slerp": {"t": 0.3}, "model_stock": {}}.get(method, {"weight": 0.7})
    count = 1 if method == "slerp" else 2
    base = None if method == "linear" else flat[2]
    plain = merge(flat[:count], method, base, **given_settings)
    shuffled = [tensor[order] for tensor in flat]
    got = merge(shuffled[:count], method, None if base is None else shuffled[2], **given_settings)
    close(got, plain[order], scale=32.0)
