"""Singular vectors as shared steps: rank, the randomised SVD and its bound, polar factors, costs."""

from __future__ import annotations

import numpy as np
import pytest

from smelt.methods import api
from smelt.methods.api import Cost
from smelt.methods.decomposition import (
    halko_bound,
    is_cheaper,
    leading_cost,
    normal,
    polar,
    randomised_svd,
    svd,
    svd_cost,
)

pytestmark = pytest.mark.filterwarnings("error")


def spectrum(values: np.ndarray, shape: tuple[int, int], *, seed: int = 0) -> np.ndarray:
    """A matrix with these singular values."""
    random = np.random.default_rng(seed)
    left, right = (np.linalg.qr(random.normal(size=(side, len(values))))[0] for side in shape)
    return (left * values) @ right.T


def bound(method: str, **settings: float) -> api.Method:
    info = api.get(method)
    values = {name: settings.get(name, (1.0,) * 3 if f.per_model else f.default) for name, f in info.fields.items()}
    return info.type(values, models=3)


def test_directions_that_are_rounding_are_left_out() -> None:
    found = svd(spectrum(np.array([3.0, 1.0, 1e-9]), (30, 20)))
    np.testing.assert_allclose(found.values, [3.0, 1.0], rtol=1e-12)
    assert found.left.shape == (30, 2)
    assert found.right.shape == (2, 20)
    assert svd(np.zeros((4, 3))).rank == 0


def test_normal_numbers() -> None:
    uniform = np.random.default_rng(0).random((400, 500), dtype=np.float32)
    numbers = normal(uniform, 200)
    assert numbers.shape == (500, 200)
    assert abs(numbers.mean()) < 0.02
    assert numbers.std() == pytest.approx(1.0, abs=0.01)
    assert np.mean(np.abs(numbers) < 1.0) == pytest.approx(0.6827, abs=0.01)
    assert np.isfinite(normal(np.zeros((2, 3), np.float32), 1)).all()


@pytest.mark.parametrize("decay", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("power", [0, 1, 2])
@pytest.mark.parametrize("oversampling", [2, 10])
def test_the_randomised_svd_keeps_to_its_bound(decay: float, power: int, oversampling: int) -> None:
    """The mean error over draws lies below the bound of Halko et al., and above the error of the best choice."""
    values = (1.0 + np.arange(60)) ** -decay
    matrix = spectrum(values, (90, 60))
    count = 8
    errors = []
    for seed in range(12):
        test = np.random.default_rng(seed).normal(size=(60, count + oversampling))
        found = randomised_svd(matrix, test, power=power)
        assert found.rank == count + oversampling
        np.testing.assert_allclose(found.left.T @ found.left, np.eye(found.rank), atol=1e-10)
        rest = matrix - found.left @ (found.left.T @ matrix)
        errors.append(np.linalg.norm(rest, ord=2))
    limit = halko_bound(values, count, oversampling=oversampling, power=power)
    assert values[count + oversampling] * (1 - 1e-9) <= np.mean(errors) <= limit


def test_the_bound() -> None:
    values = np.array([4.0, 2.0, 1.0])
    nearest, tail = 1 + np.sqrt(1 / 3), np.e * np.sqrt(5) / 4
    plain = halko_bound(values, 1, oversampling=4, power=0)
    assert plain == pytest.approx(nearest * 2.0 + tail * np.sqrt(5.0))
    cubed = halko_bound(values, 1, oversampling=4, power=1)
    assert cubed == pytest.approx((nearest * 8.0 + tail * np.sqrt(64.0 + 1.0)) ** (1 / 3))
    assert halko_bound(values, 3, oversampling=4, power=1) == 0.0
    assert halko_bound(np.array([1.0, 0.0]), 1, oversampling=4, power=1) == 0.0
    assert halko_bound(values, 1, oversampling=4, power=200) == pytest.approx(2.0, rel=0.01)


def test_polar() -> None:
    matrix = np.random.default_rng(1).normal(size=(20, 6))
    got = polar(matrix)
    np.testing.assert_allclose(got.T @ got, np.eye(6), atol=1e-12)
    stretched = got.T @ matrix
    np.testing.assert_allclose(stretched, stretched.T, atol=1e-12)
    assert np.linalg.eigvalsh(stretched).min() > 0
    twice = np.concatenate([matrix[:, :1], matrix[:, :1]], axis=1) / np.linalg.norm(matrix[:, 0])
    np.testing.assert_allclose(polar(twice), twice / np.sqrt(2), atol=1e-12)


def test_costs() -> None:
    assert Cost(2.0, 5) + Cost(3.0, 4) == Cost(5.0, 5)
    assert Cost(2.0, 5).times(3) == Cost(6.0, 5)
    assert svd_cost(100, 10) == svd_cost(10, 100)
    assert svd_cost(10, 10).flops == 26_000
    for method in ("iso_c", "iso_cts", "tsv", "wudi"):
        assert bound(method).cost((64,)) is None
        small, large = bound(method).cost((64, 64)), bound(method).cost((128, 128))
        assert small is not None
        assert large is not None
        assert large.flops == pytest.approx(8 * small.flops, rel=0.1)
        assert large.bytes == pytest.approx(4 * small.bytes, rel=0.1)
    assert bound("linear", weight=(1.0,) * 3).cost((64, 64)) is None


@pytest.mark.parametrize("method", ["iso_c", "iso_cts", "tsv"])
def test_the_randomised_svd_is_taken_where_it_costs_less(method: str) -> None:
    exact, few, many = (
        bound(method, rank=rank, randomized=randomized).cost((4096, 4096))
        for rank, randomized in ((60, False), (60, True), (0, True))
    )
    assert exact is not None
    assert few is not None
    assert many is not None
    assert few.flops < 0.1 * exact.flops
    assert is_cheaper((100, 60), 29)
    assert not is_cheaper((100, 60), 30)
    settings = bound(method, randomized=True)
    assert leading_cost(100, 60, 20, settings) == svd_cost(100, 60)  # type: ignore[arg-type]
