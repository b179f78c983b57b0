"""Outputs of 8 bits through the engine: new NaNs and infinities fail the run, and so does a cut to the range."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from conformance.driver import F32, merge
from smelt.errors import NumericError

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
E5M2 = np.dtype(ml_dtypes.float8_e5m2)
E4M3_FNUZ = np.dtype(ml_dtypes.float8_e4m3fnuz)
KERNELS = pytest.mark.parametrize("kernels", [False, True])


def scaled(values: Any, factor: float, out: np.dtype, **options: Any) -> Any:
    return merge("passthrough", [np.asarray(values)], values={"scale": (factor,)}, out=out, **options)


@KERNELS
@pytest.mark.parametrize("out", [E4M3, E5M2, E4M3_FNUZ], ids=str)
def test_a_number_beyond_the_range(out: np.dtype, kernels: bool) -> None:
    values = np.ones(100_000, dtype=np.float32)
    values[70_003] = -1e6
    with pytest.raises(NumericError) as caught:
        scaled(values, 2.0, out, kernels=kernels)
    assert "first at index [70003]" in caught.value.where[0]
    assert out.name in caught.value.where[0]
    beyond = "a number beyond ±448" if out is E4M3 else "infinity"
    assert caught.value.message == f"tensor 'w' would get a NaN or {beyond} where every model has a number"
    done = scaled(values, 2.0, out, kernels=kernels, allow_nonfinite=True)
    assert (done.result.created, done.result.inherited) == (1, 0)
    written = {E4M3: -448.0, E5M2: -np.inf, E4M3_FNUZ: np.nan}[out]
    assert np.array_equal(done.values.astype(np.float32)[70_003], written, equal_nan=True)


@KERNELS
def test_the_largest_numbers_pass(kernels: bool) -> None:
    for out, largest in ((E4M3, 464.0), (E5M2, 61439.0)):
        done = scaled(np.array([largest, -largest], np.float32), 1.0, out, kernels=kernels)
        assert (done.result.created, done.result.inherited) == (0, 0)
        assert np.isfinite(done.values.astype(np.float32)).all()


@KERNELS
def test_infinities_of_the_input_are_inherited(kernels: bool) -> None:
    """In float8_e4m3fn they are cut, as torch does it, and counted all the same."""
    values = np.array([np.inf, 1.0, -np.inf, np.nan], np.float32)
    for source in (values, values.astype(E5M2)):
        done = scaled(source, 0.5, E4M3, kernels=kernels)
        assert (done.result.created, done.result.inherited) == (0, 3)
        assert np.array_equal(done.values.astype(np.float32), [448, 0.5, -448, np.nan], equal_nan=True)


@KERNELS
@pytest.mark.parametrize("kind", [E4M3, E5M2, E4M3_FNUZ], ids=str)
def test_one_rounding_of_the_mean(kind: np.dtype, kernels: bool) -> None:
    rng = np.random.default_rng(3)
    models = [rng.standard_normal(70_001, dtype=np.float32).astype(kind) for _ in range(3)]
    done = merge("linear", models, values={"weight": (1.0, 1.0, 2.0)}, out=kind, kernels=kernels)
    exact = sum(w * m.astype(np.float64) for w, m in zip((0.25, 0.25, 0.5), models, strict=True))
    assert np.array_equal(done.values, exact.astype(np.float32).astype(kind))


@pytest.mark.parametrize("kind", [E4M3, E5M2], ids=str)
@pytest.mark.parametrize("method", ["ties", "dare_ties", "slerp", "nuslerp", "model_stock"])
def test_kernels_change_nothing(method: str, kind: np.dtype) -> None:
    rng = np.random.default_rng(5)
    n = 1 if method == "slerp" else 2
    models = [rng.standard_normal((300, 250), dtype=np.float32).astype(kind) for _ in range(n)]
    base = rng.standard_normal((300, 250), dtype=np.float32).astype(kind)
    values = {
        "ties": {"weight": 0.5, "density": 0.4},
        "dare_ties": {"weight": 0.5, "density": 0.4},
        "slerp": {"t": 0.3},
    }
    given = {"nuslerp": {"weight": 1.0}}.get(method, values.get(method, {}))
    for out in (kind, F32):
        one, two = (merge(method, models, base, values=given, out=out, kernels=k) for k in (False, True))
        assert one.bits == two.bits
