"""What the papers claim of the newer data-free methods, one property or more each."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from smelt.in_memory import merge_state_dicts

pytestmark = pytest.mark.filterwarnings("error")


def merge(models: list[np.ndarray], method: str, base: np.ndarray | None = None, **settings: Any) -> np.ndarray:
    """One tensor, merged as a user does, in float64."""
    states = [{"w": model} for model in models]
    merged = merge_state_dicts(states, method=method, base=None if base is None else {"w": base}, **settings)["w"]
    return np.asarray(merged, dtype=np.float64)


def moved(count: int, shape: tuple[int, ...] = (48, 32), *, seed: int = 0, scale: float = 0.25) -> list[np.ndarray]:
    """Task vectors of independent Gaussian entries; beside a base of zeros they are the models."""
    random = np.random.default_rng(seed)
    return [random.normal(0, scale, shape).astype(np.float32) for _ in range(count)]


def zeros(shape: tuple[int, ...] = (48, 32)) -> np.ndarray:
    return np.zeros(shape, dtype=np.float32)


# Averages of checkpoints


def test_sma_cancels_what_is_independent() -> None:
    """Checkpoints around one point: the average of ten is nearer to it by the square root of ten."""
    centre, *noise = moved(11, (300, 100))
    got = merge([(centre + one).astype(np.float32) for one in noise], "sma")
    before = np.sqrt(np.mean(np.square(noise[0], dtype=np.float64)))
    assert np.sqrt(np.mean((got - centre) ** 2)) == pytest.approx(before / np.sqrt(10), rel=0.02)


def test_moving_averages_lag_behind_a_steady_drift() -> None:
    """Checkpoints on a line at 0, 1, ... 9: the average stands at the mean age that its weights say."""
    start, drift = moved(2)
    line = [(start + step * drift).astype(np.float32) for step in range(10)]

    def place(method: str, **settings: float) -> float:
        return float(np.sum((merge(line, method, **settings) - start) * drift) / np.sum(np.square(drift)))

    assert place("sma") == pytest.approx(4.5, abs=1e-5)
    assert place("wma") == pytest.approx(6.0, abs=1e-5)
    assert place("ema", alpha=1.0) == pytest.approx(9.0, abs=1e-5)
    assert place("ema", alpha=0.5) == pytest.approx(8.0 + 2.0**-9, abs=1e-5)
    assert place("sma") < place("ema", alpha=0.3) < place("ema", alpha=0.5)


def test_expo_goes_on_along_the_line() -> None:
    base, step = moved(2)
    model = (base + step).astype(np.float32)
    assert np.array_equal(merge([model], "expo", base, alpha=0.0).astype(np.float32), model)
    there = merge([model], "expo", base, alpha=0.5)
    np.testing.assert_allclose(there - base, 1.5 * (model - base), atol=1e-6)
    back = merge([there.astype(np.float32)], "expo", base, alpha=-1.0 / 3.0)
    np.testing.assert_allclose(back, model, atol=1e-6)


@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_geometric_median_is_not_carried_away(granularity: str) -> None:
    """A model that goes to infinity moves the average as far, the median by less than the others' spread."""
    *sound, wild = moved(4)
    places = [
        merge([*sound, (wild * np.float32(far)).astype(np.float32)], "geometric_median", granularity=granularity)
        for far in (1e2, 1e5)
    ]
    spread = max(np.linalg.norm(a.astype(np.float64) - b) for a in sound for b in sound)
    assert np.linalg.norm(places[0] - places[1]) < 0.1 * spread
    assert np.linalg.norm(places[1] - np.mean(sound, axis=0)) < spread


def test_geometric_median_has_the_least_sum_of_distances() -> None:
    models = moved(5)
    weight = [1.0, 0.5, 2.0, 0.7, 0.3]
    got = merge(models, "geometric_median", weight=weight)

    def cost(place: np.ndarray) -> float:
        return float(sum(w * np.linalg.norm(place - x) for w, x in zip(weight, models, strict=True)))

    random = np.random.default_rng(1)
    assert all(cost(got) <= cost(got + random.normal(0, 1e-3, got.shape)) for _ in range(20))
    assert cost(got) < cost(np.average(np.asarray(models, dtype=np.float64), axis=0, weights=weight))


# Which entries count


def test_localize_leaves_all_but_the_regions_to_the_base() -> None:
    """Small regions hardly meet: nearly all of each is taken whole; every other entry is the base's, to the bit."""
    models = moved(3, (200, 100))
    base = moved(1, (200, 100), seed=9)[0]
    tuned = [(base + one).astype(np.float32) for one in models]
    got = merge(tuned, "localize", base, density=0.02)
    deltas = [(model - base).astype(np.float32) for model in tuned]
    regions = [np.abs(delta) >= np.sort(np.abs(delta), axis=None)[-400] for delta in deltas]
    covered = np.sum(regions, axis=0)
    assert np.array_equal(got[covered == 0], base[covered == 0].astype(np.float64))
    assert (covered > 1).sum() < 0.1 * (covered > 0).sum()
    for tensor, region in zip(tuned, regions, strict=True):
        alone = region & (covered == 1)
        np.testing.assert_allclose(got[alone], tensor[alone], rtol=1e-6)


def test_consensus_removes_what_one_model_or_none_asks_for() -> None:
    base = np.zeros(4, dtype=np.float32)
    shared, selfish, torn, small = 1.0, 1.0, 1.0, 0.1
    one = np.array([shared, selfish, torn, small], dtype=np.float32)
    two = np.array([shared, 0.0, -torn, small], dtype=np.float32)
    three = np.array([shared, 0.0, 0.0, small], dtype=np.float32)
    got = merge([one, two, three], "consensus", base, threshold=0.4)
    np.testing.assert_allclose(got, [3.0, 0.0, 0.0, 0.3], atol=1e-6)
    nothing = merge([one, two, three], "consensus", base, threshold=0.6)
    np.testing.assert_allclose(nothing, [0.0, 0.0, 0.0, 0.0], atol=1e-6)  # shared by all, and for each too small a part


def test_consensus_of_none_is_task_arithmetic() -> None:
    models, base = moved(3), moved(1, seed=4)[0]
    plain = merge(models, "task_arithmetic", base, weight=[0.4, 0.3, 0.5], lambda_=0.8)
    got = merge(models, "consensus", base, weight=[0.4, 0.3, 0.5], lambda_=0.8, agreement=0)
    np.testing.assert_allclose(got, plain, atol=1e-6)
    counts = [
        int((merge(models, "consensus", zeros(), agreement=agreement, threshold=level) != 0.0).sum())
        for level in (0.2, 0.6)
        for agreement in (0, 1, 2, 3)
    ]
    assert counts[:4] == sorted(counts[:4], reverse=True)
    assert counts[4:] == sorted(counts[4:], reverse=True)
    assert counts[5] < counts[1]


@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_pcb_balances_between_the_models(granularity: str) -> None:
    """Its coefficients sum to 1 at each entry, and the larger entry has the larger one."""
    models = moved(2)
    got = merge(models, "pcb", zeros(), density=1.0, granularity=granularity)
    low, high = np.minimum(*models), np.maximum(*models)
    assert ((got >= low - 1e-6) & (got <= high + 1e-6)).all()
    apart = np.abs(models[0] - models[1]) > 0.3
    share = ((got - models[1]) / (models[0] - models[1]))[apart]
    larger = (np.abs(models[0]) - np.abs(models[1]))[apart]
    assert np.corrcoef(share, larger)[0, 1] > 0.7
    doubled = merge([2 * model for model in models], "pcb", zeros(), density=1.0, granularity=granularity)
    np.testing.assert_allclose(doubled, 2 * got, atol=1e-6)


def test_pcb_drops_what_matters_least() -> None:
    model = moved(1)[0]
    got = merge([model], "pcb", zeros(), density=0.25)
    kept = got != 0.0
    assert kept.sum() == model.size // 4
    assert np.abs(model[kept]).min() > np.abs(model[~kept]).max()
    np.testing.assert_allclose(got[kept], model[kept], rtol=1e-6)


# Singular directions


def low_rank(count: int, rank: int, *, seed: int = 0, shape: tuple[int, int] = (60, 40)) -> list[np.ndarray]:
    """Task vectors of a few directions with lengths that fall off."""
    random = np.random.default_rng(seed)
    m, n = shape
    lengths = 2.0 ** -np.arange(rank)
    made = []
    for _ in range(count):
        left, right = (np.linalg.qr(random.normal(size=(side, rank)))[0] for side in (m, n))
        made.append(((left * lengths) @ right.T).astype(np.float32))
    return made


def test_iso_c_makes_all_singular_values_equal() -> None:
    models = moved(3)
    total = np.sum(models, axis=0, dtype=np.float64)
    got = merge(models, "iso_c", zeros())
    values = np.linalg.svd(got, compute_uv=False)
    mean = np.linalg.svd(total, compute_uv=False).mean()
    np.testing.assert_allclose(values, mean, rtol=1e-5)
    left, _, right = np.linalg.svd(total, full_matrices=False)
    np.testing.assert_allclose(got, mean * left @ right, atol=1e-6)


def test_iso_c_flattens_the_directions_that_there_are() -> None:
    """Adapters merged into weights have few: the others stay nought."""
    models = low_rank(2, 3)
    values = np.linalg.svd(merge(models, "iso_c", zeros((60, 40))), compute_uv=False)
    np.testing.assert_allclose(values[:6], values[0], rtol=1e-5)
    assert (values[6:] < 1e-6).all()
    first = np.linalg.svd(merge(models, "iso_c", zeros((60, 40)), rank=2), compute_uv=False)
    np.testing.assert_allclose(first[:2], first[0], rtol=1e-5)
    assert (first[2:] < 1e-6).all()


def test_tsv_makes_singular_vectors_orthogonal_across_tasks() -> None:
    """So the singular values of the result are those kept of each task: no task lengthens or shortens another's."""
    models = [(2.0**i * one).astype(np.float32) for i, one in enumerate(moved(3))]
    got = merge(models, "tsv", zeros())
    own = 32 // 3
    kept = np.concatenate([np.linalg.svd(x.astype(np.float64), compute_uv=False)[:own] for x in models])
    values = np.linalg.svd(got, compute_uv=False)
    np.testing.assert_allclose(values[: 3 * own], np.sort(kept)[::-1], rtol=1e-5)
    assert (values[3 * own :] < 1e-5).all()


def test_tsv_of_orthogonal_tasks_is_their_sum() -> None:
    """Task vectors of low rank whose directions do not meet are all kept, and nothing is turned."""
    random = np.random.default_rng(3)
    left, right = (np.linalg.qr(random.normal(size=(side, 12)))[0] for side in (60, 40))
    models = [(left[:, i : i + 4] @ right[:, i : i + 4].T).astype(np.float32) for i in (0, 4, 8)]
    got = merge(models, "tsv", zeros((60, 40)))
    np.testing.assert_allclose(got, np.sum(models, axis=0, dtype=np.float64), atol=2e-6)


def test_iso_cts_holds_what_a_task_has_for_itself() -> None:
    """A direction of one task that the sum's leading ones leave out is as long as all others in the result."""
    random = np.random.default_rng(3)
    left, right = (np.linalg.qr(random.normal(size=(side, 20)))[0] for side in (60, 40))
    shared = left[:, :6] @ right[:, :6].T
    own = 0.3 * np.outer(left[:, 6], right[:, 6])
    others = 0.5 * left[:, 7:15] @ right[:, 7:15].T
    models = [(shared + own).astype(np.float32), (shared + others).astype(np.float32)]

    def length(method: str, **settings: Any) -> float:
        merged = merge(models, method, zeros((60, 40)), rank=10, **settings)
        return float(np.linalg.norm(merged @ right[:, 6]) / np.linalg.norm(merged, ord=2))

    assert length("iso_c") < 1e-4
    assert length("iso_cts", common=0.6) == pytest.approx(1.0, abs=1e-4)
    values = np.linalg.svd(merge(moved(2), "iso_cts", zeros(), common=0.5), compute_uv=False)
    np.testing.assert_allclose(values, values[0], rtol=1e-4)


def test_iso_cts_without_own_directions_is_iso_c() -> None:
    models = moved(3)
    np.testing.assert_allclose(
        merge(models, "iso_cts", zeros(), common=1.0), merge(models, "iso_c", zeros()), atol=1e-6
    )


def interference(merged: np.ndarray, models: list[np.ndarray]) -> float:
    wide = [model.astype(np.float64) for model in models]
    return float(sum(np.linalg.norm((merged - x) @ x.T) ** 2 / np.linalg.norm(x) ** 2 for x in wide))


def test_wudi_has_the_least_interference() -> None:
    models = moved(3)
    got = merge(models, "wudi", zeros(), ridge=0.0)
    best = interference(got, models)
    random = np.random.default_rng(1)
    assert all(best <= interference(got + random.normal(0, 1e-3, got.shape), models) for _ in range(20))
    for method, settings in (("task_arithmetic", {"weight": 1.0}), ("task_arithmetic", {"weight": 1 / 3}), ("tsv", {})):
        assert best < 0.9 * interference(merge(models, method, zeros(), **settings), models)


def test_wudi_is_where_the_papers_descent_leads() -> None:
    models = moved(3)
    wide = [model.astype(np.float64) for model in models]
    place = np.sum(wide, axis=0)
    scale = [2.0 / np.linalg.norm(x) ** 2 for x in wide]
    for _ in range(4000):
        place -= 0.2 * sum(s * (place - x) @ x.T @ x for s, x in zip(scale, wide, strict=True))
    got = merge(models, "wudi", zeros(), ridge=0.0)
    np.testing.assert_allclose(got, place, atol=1e-5)


def test_wudi_of_tasks_with_inputs_of_their_own_keeps_each() -> None:
    """Rows that share no direction: every task's layer gives on its inputs what it gave alone."""
    random = np.random.default_rng(5)
    inputs = np.linalg.qr(random.normal(size=(40, 24)))[0].T
    models = [(random.normal(size=(60, 8)) @ inputs[8 * i : 8 * i + 8]).astype(np.float32) for i in range(3)]
    got = merge(models, "wudi", zeros((60, 40)), ridge=0.0)
    for i, model in enumerate(models):
        part = inputs[8 * i : 8 * i + 8].T
        np.testing.assert_allclose(got @ part, model @ part, atol=1e-4)


def test_a_ridge_leads_wudi_from_its_minimum_to_the_sum() -> None:
    """And keeps it from stretching directions in which the tasks differ by little."""
    models = moved(3)
    total = np.sum(models, axis=0, dtype=np.float64)
    ways = [merge(models, "wudi", zeros(), ridge=ridge) for ridge in (0.0, 0.1, 1.0, 10.0, 1e6)]
    off = [float(np.linalg.norm(way - total)) for way in ways]
    assert off == sorted(off, reverse=True)
    assert off[-1] < 1e-4 * np.linalg.norm(total)
    costs = [interference(way, models) for way in ways]
    assert costs == sorted(costs)
    inputs = np.zeros((2, 40))
    inputs[0, 0] = inputs[1, 0] = 1.0
    inputs[1, 1] = 1e-3  # nearly the same input, and another answer
    near = [np.outer(np.eye(60)[i], row).astype(np.float32) for i, row in enumerate(inputs)]
    wild, tame = (np.linalg.norm(merge(near, "wudi", zeros((60, 40)), ridge=ridge)) for ridge in (0.0, 0.1))
    assert wild > 100.0
    assert tame < 2.0


@pytest.mark.parametrize("method", ["iso_c", "iso_cts", "tsv", "wudi"])
@pytest.mark.parametrize("shape", [(), (48,), (6, 5, 3), (4, 3, 3, 3)])
def test_what_is_no_matrix_gets_the_mean(method: str, shape: tuple[int, ...]) -> None:
    models = moved(3, shape)
    base = moved(1, shape, seed=8)[0]
    tuned = [np.asarray(base + one, dtype=np.float32) for one in models]
    want = base + 0.5 * np.mean([(x - base).astype(np.float64) for x in tuned], axis=0)
    np.testing.assert_allclose(merge(tuned, method, base, lambda_=0.5), want, atol=1e-6)


@pytest.mark.parametrize("method", ["iso_c", "iso_cts", "tsv", "wudi"])
def test_a_matrix_that_is_not_to_be_decomposed_gets_the_mean(method: str) -> None:
    models = moved(3)
    want = np.mean(models, axis=0, dtype=np.float64)
    np.testing.assert_allclose(merge(models, method, zeros(), decompose=False), want, atol=1e-6)


@pytest.mark.parametrize("method", ["iso_c", "iso_cts", "tsv"])
def test_the_randomised_svd_comes_to_the_same(method: str) -> None:
    """Where the spectrum falls off; and more iterations come nearer."""
    models = low_rank(2, 30, shape=(160, 120))
    exact = merge(models, method, zeros((160, 120)), rank=8)
    off = [
        np.linalg.norm(
            merge(models, method, zeros((160, 120)), rank=8, randomized=True, oversampling=4, power=power) - exact
        )
        for power in (0, 1, 3)
    ]
    assert off[0] > off[1] > off[2]
    assert off[2] < 1e-4 * np.linalg.norm(exact)
