"""The references on vectors small enough for paper, and on the tensors that merge tools stumble over."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from reference.keep import keep_ranks
from reference.registry import REFERENCE
from reference.task_vectors import band, prune_by_rank, trim

HALF = np.sqrt(0.5)


class Given:
    """Uniform numbers written down, one array per model."""

    def __init__(self, *numbers: Any) -> None:
        self.numbers = [np.asarray(n, dtype=np.float64) for n in numbers]

    def uniform(self, model_index: int, shape: tuple[int, ...]) -> np.ndarray:
        return np.broadcast_to(self.numbers[model_index], shape)


class Seeded:
    """Uniform numbers from a generator, the same each time."""

    def uniform(self, model_index: int, shape: tuple[int, ...]) -> np.ndarray:
        return np.random.default_rng((7, model_index)).random(shape)


def f32(*values: Any) -> list[np.ndarray]:
    return [np.asarray(v, dtype=np.float32) for v in values]


def merge(method: str, models: list[Any], base: Any = None, **parameters: Any) -> np.ndarray:
    """The reference of `method` on float32 arrays made of the given numbers."""
    return REFERENCE[method](f32(*models), None if base is None else f32(base)[0], **parameters)


def expect(got: np.ndarray, want: Any) -> None:
    np.testing.assert_allclose(got, np.asarray(want, dtype=np.float64), rtol=1e-7, atol=1e-9)


@pytest.fixture(autouse=True)
def _no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_the_registry() -> None:
    assert len(REFERENCE) == 32
    assert list(REFERENCE) == sorted(REFERENCE)


# Plain averages


def test_linear() -> None:
    expect(merge("linear", [[1, 2], [3, 6]], weight=[1, 3]), [2.5, 5])
    expect(merge("linear", [[1, 2], [3, 6]], weight=[1, 3], normalize=False), [10, 20])
    expect(merge("linear", [[1, 2], [3, 6]], weight=[1, -1], normalize=False), [-2, -4])
    with pytest.raises(ValueError, match="zero"):
        merge("linear", [[1, 2], [3, 6]], weight=[1, -1])


def test_passthrough() -> None:
    expect(merge("passthrough", [[1, 2]]), [1, 2])
    expect(merge("passthrough", [[1, 2]], scale=[0.5]), [0.5, 1])
    expect(merge("passthrough", [[1, 2]], scale=[None]), [1, 2])


# On the sphere


def test_slerp() -> None:
    expect(merge("slerp", [[0, 2]], [1, 0], t=0.5), [HALF, 2 * HALF])
    expect(merge("slerp", [[0, 2]], [1, 0], t=0.0), [1, 0])
    expect(merge("slerp", [[0, 2]], [1, 0], t=1.0), [0, 2])
    expect(merge("slerp", [[3, 0]], [1, 0], t=0.25), [1.5, 0])  # parallel: linear
    expect(merge("slerp", [[-1, 0]], [1, 0], t=0.25), [0.5, 0])  # antiparallel: linear
    expect(merge("slerp", [[0, 0]], [2, 0], t=0.5), [2 * HALF, 0])  # a zero vector is at a right angle


def test_nuslerp() -> None:
    s22, s67 = np.sin(np.pi / 8), np.sin(3 * np.pi / 8)
    expect(merge("nuslerp", [[1, 0], [0, 1]], weight=[1, 3]), [s22, s67])
    expect(merge("nuslerp", [[2, 1], [1, 2]], [1, 1], weight=[1, 3]), [1 + s22, 1 + s67])
    expect(merge("nuslerp", [[1, 0], [0, 1]], weight=[1, -1]), [HALF, HALF])  # weights cancel: half way
    expect(merge("nuslerp", [[1, 0], [3, 0]], weight=[1, 1]), [2, 0])  # parallel: linear
    expect(merge("nuslerp", [[1, 1e-3], [-1, 0]], weight=[3, 1]), [0.5, 0.75e-3])  # nearly antiparallel: linear


def test_nuslerp_per_vector() -> None:
    one, two = [[1, 0], [1, 0]], [[1, 0], [0, 1]]
    rows = merge("nuslerp", [one, two], weight=[1, 1], nuslerp_flatten=False)
    expect(rows, [[1, 0], [HALF, HALF]])
    k = np.sin(np.pi / 8) / np.sin(np.pi / 4)  # columns: (1, 1) and (1, 0) at 45 degrees, (0, 0) and (0, 1)
    columns = merge("nuslerp", [one, two], weight=[1, 1], nuslerp_flatten=False, nuslerp_row_wise=True)
    expect(columns, [[2 * k, 0], [k, HALF]])
    flat = merge("nuslerp", [one, two], weight=[1, 1], nuslerp_row_wise=True)
    expect(flat, merge("nuslerp", [one, two], weight=[1, 1]))


def test_multislerp() -> None:
    expect(merge("multislerp", [[1, 0], [0, 3]], weight=[1, 1]), [2 * HALF, 2 * HALF])
    expect(merge("multislerp", [[2, 1], [1, 4]], [1, 1], weight=[1, 1]), [1 + 2 * HALF, 1 + 2 * HALF])
    expect(merge("multislerp", [[1, 0], [0, 1]], weight=[3, 4]), [0.6, 0.8])
    expect(merge("multislerp", [[1, 0], [0, 1]], weight=[3, 4], normalize_weights=False)[0] > 1, True)
    expect(merge("multislerp", [[1, 0], [-3, 0]], weight=[1, 1]), [-1, 0])  # two that cancel: the plain sum
    with pytest.raises(ValueError, match="cancel"):
        merge("multislerp", [[1, 0], [-1, 0], [2, 0], [-2, 0]], weight=[1, 1, 1, 1])


def test_karcher() -> None:
    expect(merge("karcher", [[1, 0], [0, 3]]), [2 * HALF, 2 * HALF])
    thirty = [np.cos(np.pi / 6), np.sin(np.pi / 6)]  # on a circle the mean of 0, 0 and 90 degrees
    expect(merge("karcher", [[1, 0], [1, 0], [0, 1]], tol=1e-12), thirty)
    assert abs(merge("karcher", [[1, 0], [1, 0], [0, 1]], max_iter=0)[1] - 0.5) > 0.01
    expect(merge("karcher", [[2, 0], [0, 0]]), [1, 0])  # a zero vector counts in the norm only
    assert np.isfinite(merge("karcher", [[1, 0], [-1, 0]])).all()


# Task vectors


def test_task_arithmetic() -> None:
    models, base = [[2, 1], [1, 4]], [1, 1]  # deltas (1, 0) and (0, 3)
    expect(merge("task_arithmetic", models, base, weight=[0.5, 2]), [1.5, 7])
    expect(merge("task_arithmetic", models, base, weight=[0.5, 2], lambda_=0.5), [1.25, 4])
    expect(merge("task_arithmetic", models, base, weight=[0.5, 2], normalize=True), [1.2, 3.4])
    expect(merge("task_arithmetic", models, base, weight=[1, -1], normalize=True), [2, -2])  # divisor 0 counts as 1
    expect(merge("task_arithmetic", models, base, weight=[0.5, 2], density=[0.1, 0.1], rescale=True), [1.5, 7])


def test_deltas_are_float32() -> None:
    got = merge("task_arithmetic", [[1.0]], [1e-9], weight=[1])  # 1 - 1e-9 is 1 in float32
    assert got[0] == 1.0 + float(np.float32(1e-9))


def test_ties() -> None:
    models, base = [[4, -3, 2, 1], [-1, 5, 1, 3]], [0, 0, 0, 0]
    common: dict[str, Any] = {"weight": [1, 0.5], "density": [0.5, 0.5]}
    # trimmed (4, -3, 0, 0) and (0, 5, 0, 3); weighted sums (4, -0.5, 0, 1.5)
    expect(merge("ties", models, base, **common), [4, -3, 0, 3])
    expect(merge("ties", models, base, **common, normalize=False), [4, -3, 0, 1.5])
    expect(merge("ties", models, base, **common, lambda_=0.5), [2, -1.5, 0, 1.5])
    expect(merge("ties", models, base, **common, rescale="density"), [8, -6, 0, 6])
    expect(merge("ties", models, base, **common, rescale=True), [4 * 10 / 7, -3 * 10 / 7, 0, 3 * 10 / 8])


def test_election() -> None:
    expect(merge("ties", [[1], [-1]], [0], weight=[1, 1]), [1])  # a sum of zero elects plus
    expect(merge("ties", [[1], [-2]], [0], weight=[1, -0.5]), [4])  # W = 1 and 1, divided by 1 - 0.5
    expect(merge("ties", [[1], [-3]], [0], weight=[1, -1]), [4])  # divisor 0 counts as 1
    expect(merge("ties", [[0], [-3]], [0], weight=[1, 1]), [-3])  # a zero entry does not vote
    expect(merge("ties", [[5], [5]], [5], weight=[1, 1]), [5])


@pytest.mark.parametrize(("density", "kept"), [(2.0, 4), (1.0, 4), (0.99, 3), (0.5, 2), (0.01, 1), (0.0, 0), (-1, 0)])
def test_trim_counts(density: float, kept: int) -> None:
    assert np.count_nonzero(trim(np.array([4.0, -3, 2, 1]), density, keep=None, model_index=0)) == kept


def test_equals_at_the_cut() -> None:
    delta = np.array([1.0, -1, 1, -1, 2])  # density 0.6 keeps 3: the 2, and 2 of the 4 equals: uniform < 1/2
    keep = Given([0.1, 0.6, 0.49, 0.5, 0.9])
    expect(trim(delta, 0.6, keep=keep, model_index=0), [1, 0, 1, 0, 2])
    with pytest.raises(ValueError, match="keep"):
        trim(delta, 0.6, keep=None, model_index=0)
    expect(trim(delta, 0.2, keep=None, model_index=0), [0, 0, 0, 0, 2])  # the cut falls between: no chance
    expect(trim(np.array([0.0, 0, 0, 3]), 0.5, keep=None, model_index=0), [0, 0, 0, 3])  # zeros need no decision


def test_equals_keep_their_share() -> None:
    delta = np.repeat([2.0, 1.0], [10_000, 90_000])
    kept = trim(delta, 0.5, keep=Seeded(), model_index=0)
    assert np.count_nonzero(kept[:10_000]) == 10_000
    assert abs(np.count_nonzero(kept) - 50_000) < 5 * np.sqrt(90_000) / 2


def test_band() -> None:
    delta = np.array([1.0, -2, 3, -4, 5, -6, 7, -8, 9, -10])

    def magnitudes(density: float, gamma: float) -> list[int]:
        kept = band(delta, density, gamma, keep=None, model_index=0)
        return [int(abs(v)) for v in kept if v]

    assert magnitudes(0.5, 0.2) == [4, 5, 6, 7, 8]
    assert magnitudes(0.5, 0.0) == [6, 7, 8, 9, 10]
    assert magnitudes(0.9, 0.2) == [1, 2, 3, 4, 5, 6, 7, 8, 9]  # the top shrinks to 1
    assert magnitudes(0.05, 0.2) == []
    assert magnitudes(0.0, 0.2) == []
    assert magnitudes(1.0, 0.5) == list(range(1, 11))  # density 1 ignores gamma


def test_band_equals() -> None:
    u = Given([0.7, 0.6, 0.4, 0.3])
    # ranks 1 and 2 are kept. Upper cut: one of the two 3s has to go, the 2 stays.
    expect(band(np.array([3.0, -3, 2, 1]), 0.5, 0.25, keep=u, model_index=0), [0, 0, 2, 0])
    expect(band(np.array([1.0, 2, -3, 3]), 0.5, 0.25, keep=u, model_index=0), [0, 2, -3, 3])
    # Lower cut: the 2 stays, one of the two 1s.
    expect(band(np.array([3.0, 2, 1, 1]), 0.5, 0.25, keep=u, model_index=0), [0, 2, 1, 1])
    # Both cuts on one magnitude: kept when uniform < 2/4, decided once.
    expect(band(np.array([1.0, 1, -1, 1]), 0.5, 0.25, keep=u, model_index=0), [0, 0, -1, 1])
    # Three equals, two of them inside: uniform < 2/3.
    expect(band(np.array([3.0, 3, 3, 1]), 0.5, 0.25, keep=u, model_index=0), [0, 3, 3, 0])


def test_ranks_hold_the_right_share() -> None:
    rng = np.random.default_rng(3)
    for _ in range(50):
        magnitude = rng.integers(1, 6, size=40).astype(np.float64)
        first, count = (int(v) for v in rng.integers(0, 20, size=2))
        expected = np.sort(magnitude)[::-1][first : first + count].sum()  # the mass of those ranks, whoever gets in
        levels = [Given(level) for level in (np.arange(4000) + 0.5) / 4000]
        sums = [magnitude[keep_ranks(magnitude, first=first, count=count, keep=k, model_index=0)].sum() for k in levels]
        assert abs(np.mean(sums) - expected) < 0.2


def test_breadcrumbs() -> None:
    models, base = [[4, -3, 2, 1], [-1, 5, 1.5, 3]], [0, 0, 0, 0]
    common: dict[str, Any] = {"weight": [1, 2], "density": [0.5, 0.5], "gamma": [0.25, 0.25]}
    # kept (0, -3, 2, 0) and (0, 0, 1.5, 3)
    expect(merge("breadcrumbs", models, base, **common), [0, -3, 5, 6])
    expect(merge("breadcrumbs", models, base, **common, normalize=True), [0, -1, 5 / 3, 2])
    expect(merge("breadcrumbs_ties", models, base, **common, normalize=True), [0, -3, 5 / 3, 3])
    expect(merge("breadcrumbs_ties", models, base, **common), [0, -3, 5, 6])
    expect(merge("breadcrumbs", models, base, **common, rescale="density"), [0, -6, 10, 12])


def test_dare() -> None:
    common: dict[str, Any] = {"weight": [1], "density": [0.5], "keep": Given([0.0, 0.9, 0.0])}
    for method in ("dare_linear", "dare_ties"):
        expect(merge(method, [[1, 2, 3]], [0, 0, 0], **common), [1.5, 0, 4.5])  # 6 / 4
        expect(merge(method, [[1, 2, 3]], [0, 0, 0], **common, rescale="density"), [2, 0, 6])
        expect(merge(method, [[1, 2, 3]], [0, 0, 0], **common, rescale=False), [1, 0, 3])
        expect(merge(method, [[1, 2, 3]], [0, 0, 0], weight=[1], density=[1.0]), [1, 2, 3])
        expect(merge(method, [[1, 2, 3]], [0, 0, 0], weight=[1], density=[0.0]), [0, 0, 0])
        expect(merge(method, [[1, 2, 3]], [0, 0, 0], weight=[1], density=[2.0], rescale="density"), [1, 2, 3])
        with pytest.raises(ValueError, match="keep"):
            merge(method, [[1, 2, 3]], [0, 0, 0], weight=[1], density=[0.5])
    expect(merge("dare_linear", [[1], [-2]], [0], weight=[1, 1]), [-1])
    expect(merge("dare_ties", [[1], [-2]], [0], weight=[1, 1]), [-2])


def test_rank_probabilities() -> None:
    def survives(delta: Any, level: float) -> list[Any]:
        kept = prune_by_rank(np.asarray(delta, float), 0.5, 0.25, keep=Given(level), model_index=0)
        return (kept != 0).tolist()

    assert survives([1, -2, 3], 0.26) == [False, True, True]  # probabilities 0.25, 0.5, 0.75
    assert survives([1, -2, 3], 0.24) == [True, True, True]
    assert survives([1, -2, 3], 0.74) == [False, False, True]
    assert survives([[1, 2], [8, 9]], 0.5) == [[False, True], [False, True]]  # each row by itself
    assert survives([2, -2, 5, 7], 0.33) == [True, True, True, True]  # equals share rank 0.5: 0.25 + 0.5 / 6
    assert survives([2, -2, 5, 7], 0.34) == [False, False, True, True]
    assert survives([3], 0.49) == [True]  # a row of one: the density
    assert survives([[3], [4]], 0.51) == [[False], [False]]
    assert survives(3, 0.49) is True


def test_della() -> None:
    common: dict[str, Any] = {"weight": [1, 3], "density": [0.5, 0.5], "epsilon": [0.25, 0.25]}
    models, base, keep = [[1, 2, 3], [3, 2, 1]], [0, 0, 0], Given(0.3, 0.6)  # kept (0, 2, 3) and (3, 0, 0)
    expect(merge("della", models, base, **common, keep=keep, rescale=False), [3, 2, 3])
    expect(merge("della", models, base, **common, keep=keep), [6, 2.4, 3.6])  # times 6 / 5 and 6 / 3
    expect(merge("della_linear", models, base, **common, keep=keep, rescale=False), [9, 2, 3])
    expect(merge("della_linear", models, base, **common, keep=keep, rescale=False, normalize=True), [2.25, 0.5, 0.75])
    with pytest.raises(ValueError, match="epsilon"):
        merge("della", models, base, weight=[1, 1], density=[0.1, 0.1], keep=keep)
    expect(merge("della", models, base, weight=[1, 1], density=[1, 0]), [1, 2, 3])  # epsilon plays no part at the ends


# The others


def test_model_stock() -> None:
    base, models = [1, 1], [[2, 1], [2, 2]]  # deltas (1, 0) and (1, 1): 45 degrees
    t = 2 * HALF / (1 + HALF)
    expect(merge("model_stock", models, base), [1 + t, 1 + t / 2])
    expect(merge("model_stock", [[2, 1], [1, 2]], base), base)  # a right angle: the base
    expect(merge("model_stock", [[2, 1], [0, 1]], base), base)  # opposite: the formula is singular, t = 0
    expect(merge("model_stock", [[2, 1], [1, 1]], base), base)  # a zero delta has cos 0
    expect(merge("model_stock", [[2, 1]] * 3, base), [2, 1])
    c = -0.5  # 120 degrees: t = -1 / 0.5 = -2, not clamped; the mean delta is (0.25, sin(120) / 2)
    s = np.sqrt(0.75)
    expect(merge("model_stock", [[1, 0], [c, s]], [0, 0]), [-2 * 0.25, -s])
    rows = merge("model_stock", [[[1, 0], [1, 0]], [[1, 0], [0, 1]]], [[0, 0], [0, 0]], filter_wise=True)
    expect(rows, [[1, 0], [0, 0]])
    with pytest.raises(ValueError, match="two models"):
        merge("model_stock", [[1, 0]], base)


def test_sce() -> None:
    models, base = [[1, 2, 0, 3], [1, -2, 0, 1]], [0, 0, 0, 0]  # variances 0, 4, 0, 1
    expect(merge("sce", models, base), [1, 2, 0, 0.7 * 3 + 0.3 * 1])  # energies 14 and 6
    expect(merge("sce", models, base, select_topk=0.5), [0, 2, 0, 0])
    expect(merge("sce", models, base, select_topk=0.4), [0, 0, 0, 0])
    expect(merge("sce", models, base, select_topk=0.0), [0, 0, 0, 0])
    tied = [[2, 2, 2, 2], [0, 0, 0, 0]]  # all variances 1: two of four, the same ones in both models
    keep = Given([0.6, 0.4, 0.5, 0.1])
    expect(merge("sce", tied, base, select_topk=0.5, keep=keep), [0, 2, 0, 2])
    with pytest.raises(ValueError, match="keep"):
        merge("sce", tied, base, select_topk=0.5)


def test_averages_of_checkpoints() -> None:
    models = [[1, 0], [2, 0], [6, 3]]
    expect(merge("sma", models), [3, 1])
    expect(merge("wma", models), [23 / 6, 1.5])
    expect(merge("ema", models, alpha=0.5), [3.75, 1.5])
    expect(merge("ema", models, alpha=1.0), [6, 3])


def test_expo() -> None:
    expect(merge("expo", [[3, 1]], [1, 1], alpha=0.5), [4, 1])
    expect(merge("expo", [[3, 1]], [1, 1], alpha=-1.0), [1, 1])


def test_geometric_median() -> None:
    expect(merge("geometric_median", [[0], [1], [100]], tol=0.0, max_iter=9999)[0].round(4), 1)  # on a line: the median
    corner = [[0, 0], [1, 0], [0, 1]]  # the Fermat point of a triangle with a right angle
    side = (3 - np.sqrt(3)) / 6
    np.testing.assert_allclose(merge("geometric_median", corner), [side, side], rtol=1e-6)
    expect(merge("geometric_median", corner, max_iter=0), [1 / 3, 1 / 3])
    expect(merge("geometric_median", corner, weight=[0, 1, 1], max_iter=0), [0.5, 0.5])
    rows = merge("geometric_median", [[[0, 0], [5, 5]], [[1, 0], [5, 5]], [[0, 1], [5, 5]]], granularity="row")
    np.testing.assert_allclose(rows, [[side, side], [5, 5]], rtol=1e-6)
    for wrong in ([-1, 1, 1], [0, 0, 0]):
        with pytest.raises(ValueError, match="weights"):
            merge("geometric_median", corner, weight=wrong)


def test_localize() -> None:
    models, base = [[5, 1, 3, 0], [4, 1, -2, 0]], [0, 0, 0, 0]
    expect(merge("localize", models, base, density=[0.5, 0.25], keep=Given(0.5, 0.5)), [4.5, 0, 3, 0])
    expect(merge("localize", models, base, density=[1, 0], lambda_=2.0, keep=Given(0.5, 0.5)), [10, 2, 6, 0])
    rows = [[[5, 1], [3, 0]], [[4, 1], [-2, 0]]]
    halves = merge("localize", rows, np.zeros((2, 2)), density=[0.5, 0.5], granularity="row", keep=Given(0.5, 0.5))
    expect(halves, [[4.5, 0], [0.5, 0]])


def test_consensus() -> None:
    models, base = [[4, 1, 0, 2], [1, 1, 0, -2], [0, 1, 3, 1]], [0, 0, 0, 0]
    expect(merge("consensus", models, base, threshold=[0.5] * 3), [0, 3, 0, 1])
    expect(merge("consensus", models, base, threshold=[0.5] * 3, agreement=1), [5, 3, 3, 1])
    expect(merge("consensus", models, base, threshold=[0.6] * 3, agreement=1), [5, 0, 3, 1])
    expect(merge("consensus", models, base, agreement=0, weight=[1, 2, 0], lambda_=0.5), [3, 1.5, 0, -1])
    for wrong in (models[:1], models[:2]):
        with pytest.raises(ValueError, match="two models"):
            merge("consensus", wrong, base, agreement=3)


def test_pcb() -> None:
    models, base = [[1, 0], [1, 2]], [0, 0]
    # squares (1, 0) and (1, 4), products (1, 0): norms (1, 0), (0, 1), (1, 0)
    high, low = np.e / (1 + np.e), 1 / (1 + np.e)
    intra = np.array([[np.e**2, 1], [1, np.e**2]]) / (1 + np.e**2)
    beta = intra * np.array([[2 * high, 2 * low], [low + high, high + low]])
    want = [(beta[0, 0] + beta[1, 0]) / beta[:, 0].sum(), 2 * beta[1, 1] / beta[:, 1].sum()]
    expect(merge("pcb", models, base, density=[1, 1]), want)
    expect(merge("pcb", models, base, density=[0.5, 0.5], keep=Given(0.5, 0.5)), [1, 2])
    expect(merge("pcb", [[3, 1]], base, density=[1], lambda_=0.5), [1.5, 0.5])


def test_isotropic() -> None:
    base, models = np.zeros((2, 2)), [[[3, 0], [0, 0]], [[0, 0], [0, 1]]]
    expect(merge("iso_c", models, base), [[2, 0], [0, 2]])
    expect(merge("iso_c", models, base, weight=[1, -1], lambda_=0.5), [[1, 0], [0, -1]])
    expect(merge("iso_c", models, base, rank=1), [[3, 0], [0, 0]])
    expect(merge("iso_c", models[:1], base), [[3, 0], [0, 0]])  # one direction: there is no other to lengthen
    expect(merge("iso_c", [[2, 4], [4, 0]], [0, 0]), [3, 2])  # no matrix: the mean
    expect(merge("iso_cts", models, base, common=1.0), [[2, 0], [0, 2]])
    expect(merge("iso_cts", models, base, common=0.0), [[2, 0], [0, 2]])  # one direction of each
    expect(merge("iso_cts", [models[0], base], base, common=0.0), [[3, 0], [0, 0]])


def test_tsv() -> None:
    base, models = np.zeros((2, 2)), [[[3, 0], [0, 0]], [[0, 0], [0, 1]]]
    expect(merge("tsv", models, base), [[3, 0], [0, 1]])
    expect(merge("tsv", models, base, weight=[1, 2], lambda_=0.5), [[1.5, 0], [0, 1]])
    expect(merge("tsv", [[[3, 0], [0, 1]]] * 2, base), [[3, 0], [0, 0]])  # the same first direction: half of each
    expect(merge("tsv", [[2, 4], [4, 0]], [0, 0]), [3, 2])
    expect(merge("tsv", [base], base), base)


def test_wudi() -> None:
    base = np.zeros((2, 2))
    own = [[[3, 0], [1, 0]], [[0, 2], [0, 5]]]  # inputs that do not meet: each keeps its column
    expect(merge("wudi", own, base, ridge=0.0), [[3, 2], [1, 5]])
    same = [[[3, 0], [0, 0]], [[1, 0], [0, 0]]]  # (3 + 1) / 2 on the one input they share
    expect(merge("wudi", same, base, ridge=0.0, lambda_=2.0), [[4, 0], [0, 0]])
    expect(
        merge("wudi", same, base, ridge=1.0), [[(4 + 4) / 3, 0], [0, 0]]
    )  # (sum of d + rho times it) / (2 + rho), rho 1
    expect(merge("wudi", [[2, 4], [4, 0]], [0, 0]), [3, 2])
    expect(merge("wudi", [base, base], base), base)


def test_nearswap() -> None:
    expect(merge("nearswap", [[1, 0.001, 3]], [0, 0, 3], t=0.002), [0.002, float(np.float32(0.001)), 3])


def test_arcee_fusion() -> None:
    base = np.zeros(5)
    got = merge("arcee_fusion", [[0.1, 0.2, -0.3, 0.4, 2]], base)  # threshold 0.3 + 1.5 (0.4 - 0.2) = 0.6, times KL
    expect(got, [0, 0, 0, 0, 2])
    expect(merge("arcee_fusion", [[0.5, 0.5, -0.5, 0.5]], np.zeros(4)), [0.5, 0.5, -0.5, 0.5])  # equal to the threshold


def test_ram() -> None:
    models, base = [[1, 0, 2, 1e-6], [0, 0, 4, 0]], [0, 0, 0, 0]
    expect(merge("ram", models, base), [1, 0, 3, 0])
    expect(merge("ram", models, base, epsilon=1e-7), [1, 0, 3, float(np.float32(1e-6))])
    expect(merge("ramplus_tl", models, base), [1.02, 0, 3, 0])  # 1 + 0.1 clamp(1 / 1, 0, 0.2)
    expect(merge("ramplus_tl", models, base, r=0.5, alpha=2.0), [1.5, 0, 3, 0])
    expect(merge("ramplus_tl", [[1, 1, 1, 1], [0, 0, 0, 3]], base, r=1.0, alpha=1.0), [4 / 3, 4 / 3, 4 / 3, 2])


# Tensors that merge tools stumble over

SHAPES = [(), (1,), (5,), (4, 1), (1, 4), (3, 4), (2, 3, 4), (0,), (0, 3), (3, 0)]
WITHOUT_BASE = {"linear", "karcher", "passthrough", "sma", "wma", "ema", "geometric_median"}
ONE_MODEL = {"slerp", "nearswap", "arcee_fusion", "passthrough", "expo"}
TWO_MODELS = {"nuslerp"}
SPARSE = {"ties", "dare_linear", "dare_ties", "breadcrumbs", "breadcrumbs_ties", "della", "della_linear"}
WEIGHTED = SPARSE | {"linear", "nuslerp", "multislerp", "task_arithmetic"}


def settings(method: str, n: int) -> dict[str, Any]:
    """Plain settings that set every mechanism of the method in motion."""
    found: dict[str, Any] = {}
    if method in WEIGHTED:
        found["weight"] = [0.6] * n
    if method in SPARSE:
        found.update(density=[0.5] * n, rescale=True)
    if method in ("slerp", "nearswap"):
        found["t"] = 0.4
    if method == "sce":
        found["select_topk"] = 0.5
    if method in ("localize", "pcb"):
        found["density"] = [0.5] * n
    if method == "expo":
        found["alpha"] = 0.3
    return found


def counts(method: str) -> list[int]:
    if method in ONE_MODEL:
        return [1]
    if method in TWO_MODELS:
        return [2]
    return [2, 3] if method in ("model_stock", "consensus") else [1, 2, 3]


VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in REFERENCE),
    *((name, {"rescale": "density"}) for name in sorted(SPARSE)),
    *((name, {"density": [d]}) for name in sorted(SPARSE) for d in (0.0, 1.0)),
    ("model_stock", {"filter_wise": True}),
    ("nuslerp", {"nuslerp_flatten": False}),
    ("nuslerp", {"nuslerp_flatten": False, "nuslerp_row_wise": True}),
]


@pytest.mark.parametrize(("method", "extra"), VARIANTS, ids=lambda v: v if isinstance(v, str) else ",".join(v))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_edge_shapes(method: str, extra: dict[str, Any], shape: tuple[int, ...]) -> None:
    """Any shape, any number of models: float64 of the same shape, finite; untouched tensors stay as they are."""
    rng = np.random.default_rng(11)
    base = rng.normal(size=shape).astype(np.float32)
    zero = np.zeros(shape, np.float32)
    for n in counts(method):
        moved = [(base + 0.1 * rng.normal(size=shape)).astype(np.float32) for _ in range(n)]
        parameters = settings(method, n) | extra
        if "density" in extra:
            parameters["density"] = extra["density"] * n

        def run(models: list[np.ndarray], b: np.ndarray | None, given: dict[str, Any] = parameters) -> np.ndarray:
            got = REFERENCE[method](models, b, keep=Seeded(), **given)
            assert isinstance(got, np.ndarray)
            assert got.dtype == np.float64
            assert got.shape == shape
            assert np.isfinite(got).all()
            return got

        run(moved, base)
        run([zero] * n, zero)
        expect(run([base] * n, base), base)
        if method in ("nuslerp", "multislerp"):
            run(moved, None)
            run([zero] * n, None)
            expect(run([base] * n, None), base)


def needs_base() -> list[str]:
    return sorted(set(REFERENCE) - WITHOUT_BASE - {"nuslerp", "multislerp"})


@pytest.mark.parametrize("method", needs_base())
def test_base_is_needed(method: str) -> None:
    n = counts(method)[-1]
    with pytest.raises(ValueError, match="needs a base"):
        REFERENCE[method]([np.ones(3, np.float32)] * n, None, keep=Seeded(), **settings(method, n))


@pytest.mark.parametrize("method", sorted(ONE_MODEL | TWO_MODELS))
def test_number_of_models_is_checked(method: str) -> None:
    base = np.ones(3, np.float32)
    with pytest.raises(ValueError, match="takes"):
        REFERENCE[method]([base] * 4, base, **settings(method, 4))


@pytest.mark.parametrize("method", sorted(REFERENCE))
def test_inputs_are_left_alone(method: str) -> None:
    rng = np.random.default_rng(5)
    n = counts(method)[-1]
    arrays = [rng.normal(size=(3, 4)).astype(np.float32) for _ in range(n + 1)]
    before = [a.copy() for a in arrays]
    REFERENCE[method](arrays[1:], arrays[0], keep=Seeded(), **settings(method, n))
    assert all(np.array_equal(a, b) for a, b in zip(arrays, before, strict=True))


def test_rescale_sums_in_float64() -> None:
    """The L1 norm of a delta that would overflow a half-precision sum is matched."""
    size = 70_000
    models = [np.full(size, 3.0, np.float32)]
    base = np.zeros(size, np.float32)
    got = REFERENCE["dare_linear"](models, base, keep=Seeded(), weight=[1.0], density=[0.5])
    assert abs(got.sum() / (3.0 * size) - 1.0) < 1e-12
