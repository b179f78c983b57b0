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


@pytest.mark.parametrize("row_wise", [False, True])
def test_geometric_median_is_not_carried_away(row_wise: bool) -> None:
    """A model that goes to infinity moves the average as far, the median by less than the others' spread."""
    *sound, wild = moved(4)
    places = [
        merge([*sound, (wild * np.float32(far)).astype(np.float32)], "geometric_median", row_wise=row_wise)
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


@pytest.mark.parametrize("row_wise", [False, True])
def test_pcb_balances_between_the_models(row_wise: bool) -> None:
    """Its coefficients sum to 1 at each entry, and the larger entry has the larger one."""
    models = moved(2)
    got = merge(models, "pcb", zeros(), density=1.0, row_wise=row_wise)
    low, high = np.minimum(*models), np.maximum(*models)
    assert ((got >= low - 1e-6) & (got <= high + 1e-6)).all()
    apart = np.abs(models[0] - models[1]) > 0.3
    share = ((got - models[1]) / (models[0] - models[1]))[apart]
    larger = (np.abs(models[0]) - np.abs(models[1]))[apart]
    assert np.corrcoef(share, larger)[0, 1] > 0.7
    doubled = merge([2 * model for model in models], "pcb", zeros(), density=1.0, row_wise=row_wise)
    np.testing.assert_allclose(doubled, 2 * got, atol=1e-6)


def test_pcb_drops_what_matters_least() -> None:
    model = moved(1)[0]
    got = merge([model], "pcb", zeros(), density=0.25)
    kept = got != 0.0
    assert kept.sum() == model.size // 4
    assert np.abs(model[kept]).min() > np.abs(model[~kept]).max()
    np.testing.assert_allclose(got[kept], model[kept], rtol=1e-6)
