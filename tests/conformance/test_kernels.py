"""Compiled kernels against the array definitions: every method, every type that has a kernel, to the bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from conformance.draws import NAMES, TYPES, kinds, settings, tensors
from conformance.driver import merge
from smelt.engine.kernels import DEFINITIONS, fused
from smelt.engine.kernels.codecs import decode, encode, uniform
from smelt.engine.rng import key
from smelt.engine.rng import uniform as plain_uniform
from smelt.methods import api
from smelt.methods.reducers import Gram, Sum
from smelt.methods.selection import KthLargest

SHAPES = [(), (1,), (7,), (511,), (257, 3), (70001,), (300, 1000)]


def test_there_are_kernels() -> None:
    """Without numba every test here would compare the definitions with themselves."""
    assert fused() is not DEFINITIONS
    for method, *functions in fused().functions:
        info = api.get(method)
        assert functions == ["tile"] or {r.name for r in info.reductions}.issuperset(functions), (method, functions)


@pytest.mark.parametrize("types", ["bfloat16", "float32", "mixed"])
@pytest.mark.parametrize("method", NAMES)
def test_the_bits_are_those_of_the_definitions(method: str, types: str) -> None:
    info = api.get(method)
    rng = np.random.default_rng(8)
    for n, with_base in kinds(info)[-2:]:
        for round_ in range(3):
            values = settings(info, rng, n)
            for shape in SHAPES if round_ == 0 else SHAPES[-2:]:
                models, base = tensors(shape, rng, n, TYPES[types])
                outcomes = [
                    ended(method, models, base if with_base else None, values, kernels) for kernels in (False, True)
                ]
                assert outcomes[0] == outcomes[1], (shape, values)


def ended(method: str, models: Any, base: Any, values: Any, kernels: bool) -> Any:
    """The bytes of the result, or the kind of error."""
    try:
        return merge(method, models, base, values=values, kernels=kernels).values.tobytes()
    except Exception as error:
        return type(error).__name__


@pytest.mark.parametrize("method", ["ties", "breadcrumbs", "breadcrumbs_ties"])
def test_entries_that_equal_the_cut(method: str) -> None:
    """Deltas of a few sizes only: the random decision at the cut is the same."""
    rng = np.random.default_rng(2)
    info = api.get(method)
    for density, gamma in ((0.1, 0.0), (0.5, 0.1), (0.77, 0.2), (0.05, 0.6), (1.0, 0.1)):
        models = [rng.integers(-3, 4, 70001).astype(np.float32) for _ in range(3)]
        values = {**settings(info, rng, 3), "density": [density, density, 0.3]}
        values |= {"gamma": [gamma] * 3} if method != "ties" else {}
        base = np.zeros(70001, dtype=np.float32)
        one, two = (ended(method, models, base, values, kernels) for kernels in (False, True))
        assert one == two
        assert len(one) == base.nbytes


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "method", ["ties", "dare_ties", "dare_linear", "breadcrumbs", "arcee_fusion", "ram", "linear", "slerp"]
)
def test_numbers_that_are_none(method: str, bad: float) -> None:
    info = api.get(method)
    rng = np.random.default_rng(4)
    n, with_base = kinds(info)[-1]
    models, base = tensors((3000,), rng, n, TYPES["float32"])
    models[0][[5, 700]] = bad
    values = settings(info, rng, n)
    one, two = (ended(method, models, base if with_base else None, values, kernels) for kernels in (False, True))
    assert one == two


def test_codecs_over_all_of_bfloat16() -> None:
    from smelt import dtypes

    codes = np.arange(1 << 16, dtype=np.uint16)
    here, there = np.empty(1 << 16, dtype=np.float32), np.empty(1 << 16, dtype=np.float32)
    decode(codes.view(np.uint8), dtypes.BF16, here)
    dtypes.decode(codes.view(np.uint8), dtypes.BF16, there)
    assert here.tobytes() == there.tobytes()
    rng = np.random.default_rng(0)
    bits = np.concatenate(
        [rng.integers(0, 1 << 32, 1 << 20, dtype=np.uint32), np.array([0x7F800001, 0xFFFFFFFF], "u4")]
    )
    one, two = np.empty(2 * len(bits), dtype=np.uint8), np.empty(2 * len(bits), dtype=np.uint8)
    encode(bits.view(np.float32), dtypes.BF16, one)
    dtypes.encode(bits.view(np.float32), dtypes.BF16, two)
    assert one.tobytes() == two.tobytes()


@pytest.mark.parametrize(("start", "stop"), [(0, 0), (0, 1), (1, 1), (1, 2), (3, 1000), (4, 999), (65536, 131071)])
def test_random_numbers(start: int, stop: int) -> None:
    stream = key(3, "w", 1)
    out = np.empty(stop - start, dtype=np.float32)
    assert uniform(stream, start, stop, out).tobytes() == plain_uniform(stream, start, stop).tobytes()


@pytest.mark.parametrize("count", [1, 511, 512, 70001])
def test_entries_around_a_guess(count: int) -> None:
    rng = np.random.default_rng(count)
    numbers = np.abs(rng.standard_normal((2, count), dtype=np.float32))
    numbers[0, ::7] = 0.0
    values = (numbers, np.array([count // 2, count]))
    for low, high in ((0.0, 0.1), (0.5, 0.8), (0.6, 0.6), (0.1, np.inf), (5.0, 6.0)):
        reducer = KthLargest(scope="tensor", size=count)
        reducer.brackets = np.array([[[low, high]]] * 2, dtype=np.float32).view(np.uint32)
        one, two = reducer.partial(values), fused().partials[KthLargest](reducer, values, 65536)
        assert (one.counts.tolist(), one.above.tolist()) == (two.counts.tolist(), two.above.tolist())
        for here, there in zip(one.inside, two.inside, strict=True):
            kept = np.sort(np.concatenate(here[0]))
            assert kept[kept > 0].tolist() == np.sort(np.concatenate(there[0])).tolist()  # zeros pad the last run


@pytest.mark.parametrize("reducer", [Sum, Gram, KthLargest])
@pytest.mark.parametrize("count", [0, 1, 255, 256, 257, 65536, 65000])
def test_partial_results(reducer: Any, count: int) -> None:
    rng = np.random.default_rng(count)
    values: Any = np.abs(rng.standard_normal((3, count), dtype=np.float32))
    if reducer is KthLargest:
        values = (values, np.array([0, count // 2, count]))
    one, two = (reducer(scope="tensor", size=count) for _ in range(2))
    while not one.done:
        made = fused().partials[reducer](two, values, 65536)
        parts = one.partial(values), made[0] if reducer.ordered and count else made
        if not count:
            return
        assert np.asarray(parts[0][-1]).tobytes() == np.asarray(parts[1][-1]).tobytes()
        for side, part in zip((one, two), parts, strict=True):
            side.close(side.fold(None, part))


@pytest.mark.parametrize("share", [0.01, 0.3, 0.9, 1.0, 0.0])
def test_variances_that_equal_the_cut(share: float) -> None:
    rng = np.random.default_rng(6)
    base = np.zeros(70001, dtype=np.float32)
    for models in (
        [rng.integers(-2, 3, 70001).astype(np.float32) for _ in range(3)],
        [np.full(70001, np.nan, dtype=np.float32), *(rng.standard_normal(70001).astype(np.float32) for _ in range(2))],
    ):
        one, two = (ended("sce", models, base, {"select_topk": share}, kernels) for kernels in (False, True))
        assert one == two
        assert len(one) == base.nbytes


@pytest.mark.parametrize("t", [0.0, 1e-3, 0.5, 1e30])
def test_distances_at_the_bounds(t: float) -> None:
    """Differences of 0, below and at the least that counts, as large as t, and none that are numbers."""
    base = np.float32([1, 1, 1, 1, 0, 0, -0.0, 1, 1, 1, np.nan])
    model = base + np.float32([0, 1e-7, 1e-6, 0.5, 1e-6, 1e-3, 0, np.inf, -np.inf, np.nan, 1])
    one, two = (ended("nearswap", [model], base, {"t": t}, kernels) for kernels in (False, True))
    assert one == two
    assert len(one) == base.nbytes


def _clustered(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Magnitudes so close together that all of a row fall into one bucket."""
    numbers: np.ndarray[Any, Any] = (1.5 + rng.random(shape) * 2.0**-9).astype(np.float32)
    return numbers * rng.choice(np.float32([-1, 1]), shape)


@pytest.mark.parametrize("shape", [(40, 64), (3, 1023), (5, 4099), (2, 65536), (1, 70001), (700, 1), (9, 31)])
@pytest.mark.parametrize("kind", ["equal", "mostly zero", "clustered", "spread", "not finite"])
def test_ranks(kind: str, shape: tuple[int, int]) -> None:
    """Rows of equal, of nearly equal and of far different magnitudes; rows wider than a piece; NaN."""
    rng = np.random.default_rng(5)
    made = {
        "equal": lambda: rng.integers(-2, 3, shape).astype(np.float32),
        "mostly zero": lambda: (rng.standard_normal(shape) * (rng.random(shape) < 0.1)).astype(np.float32),
        "clustered": lambda: _clustered(rng, shape),
        "spread": lambda: np.exp(rng.uniform(-60, 60, shape)).astype(np.float32),
        "not finite": lambda: np.where(rng.random(shape) < 0.1, np.float32(np.nan), rng.standard_normal(shape)),
    }[kind]
    models, base = [made().astype(np.float32) for _ in range(2)], np.zeros(shape, dtype=np.float32)
    info = api.get("della")
    for epsilon, rescale in ((0.3, True), (-0.2, True), (0.3, False)):
        values = {**settings(info, rng, 2), "density": [0.5, 0.4], "epsilon": [epsilon, 0.05], "rescale": rescale}
        one, two = (ended("della", models, base, values, kernels) for kernels in (False, True))
        assert one == two
        assert len(one) == base.nbytes
