"""Granularity `model`: where a vector is cut into tensors does not matter, and exactly the share asked for is kept."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smelt.in_memory import merge_state_dicts

pytestmark = pytest.mark.filterwarnings("error")

SIZE = 240
CUTS = st.lists(st.integers(0, SIZE), max_size=5).map(sorted)
"""Where a vector of SIZE entries is cut; two cuts at one place leave an empty tensor between them."""


def vectors(count: int, seed: int) -> list[np.ndarray]:
    """Vectors of distinct magnitudes, also between parts: some parts are much larger than others."""
    random = np.random.default_rng(seed)
    scale = np.repeat(10.0 ** random.uniform(-3, 0, size=6), SIZE // 6)
    return [(random.permutation(np.arange(1, SIZE + 1)) / SIZE * scale).astype(np.float32) for _ in range(count)]


def parts(vector: np.ndarray, cuts: list[int]) -> dict[str, np.ndarray]:
    return {f"part {i:02}": part for i, part in enumerate(np.split(vector, cuts))}


def merged(models: list[np.ndarray], cuts: list[int], method: str, **values: Any) -> np.ndarray:
    """The merge of vectors that are cut, put together again; the base is zero."""
    states = [parts(model, cuts) for model in models]
    base = parts(np.zeros(SIZE, dtype=np.float32), cuts)
    found = merge_state_dicts(states, method=method, base=base, granularity="model", **values)
    return np.concatenate([found[name] for name in base])


@given(cuts=CUTS, density=st.floats(0.01, 0.99), seed=st.integers(0, 50))
@settings(max_examples=40, deadline=None)
def test_ties_keeps_exactly_the_share_of_the_whole_task_vector(cuts: list[int], density: float, seed: int) -> None:
    (vector,) = vectors(1, seed)
    got = merged([vector], cuts, "ties", weight=1.0, density=density)
    count = max(1, math.floor(density * SIZE))
    assert np.count_nonzero(got) == count
    assert np.array_equal(np.flatnonzero(got), np.sort(np.argsort(vector)[SIZE - count :]))


@given(cuts=CUTS, density=st.floats(0.01, 0.9), gamma=st.floats(0.0, 0.5), seed=st.integers(0, 50))
@settings(max_examples=40, deadline=None)
def test_breadcrumbs_keeps_a_band_of_the_whole_task_vector(
    cuts: list[int], density: float, gamma: float, seed: int
) -> None:
    (vector,) = vectors(1, seed)
    got = merged([vector], cuts, "breadcrumbs", weight=1.0, density=density, gamma=gamma)
    count = math.floor(density * SIZE)
    top = min(math.floor(gamma * SIZE), SIZE - count)
    order = np.argsort(vector)[::-1]
    assert np.array_equal(np.flatnonzero(got), np.sort(order[top : top + count]))


METHODS: dict[str, dict[str, Any]] = {
    "ties": {"weight": 1.0, "density": 0.3, "rescale": True},
    "breadcrumbs_ties": {"weight": 1.0, "density": 0.6, "gamma": 0.1},
    "localize": {"density": 0.1},
    "pcb": {"density": 0.2},
    "sce": {"select_topk": 0.3},
    "ramplus_tl": {"epsilon": 0.05},
    "model_stock": {},
    "multislerp": {"weight": 0.5},
}
WITHOUT_BASE: dict[str, dict[str, Any]] = {"karcher": {}, "geometric_median": {}}


@pytest.mark.parametrize("method", [*METHODS, *WITHOUT_BASE])
@given(cuts=CUTS, seed=st.integers(0, 50))
@settings(max_examples=25, deadline=None)
def test_where_it_is_cut_does_not_matter(method: str, cuts: list[int], seed: int) -> None:
    """To the last bit but for the rounding of sums, which are taken in another order."""
    models = vectors(3, seed)
    values = METHODS.get(method, {})
    one, cut = (merged(models, places, method, **values) for places in ([], cuts))
    np.testing.assert_allclose(cut, one, rtol=1e-6, atol=1e-9)


@given(cuts=CUTS, t=st.floats(0.0, 1.0))
@settings(max_examples=25, deadline=None)
def test_slerp_turns_the_whole_model_by_one_angle(cuts: list[int], t: float) -> None:
    """So the result is as long as the arc between two vectors of one length is far from the origin: that length."""
    one, two = (vector / np.linalg.norm(vector) for vector in vectors(2, 3))
    states = [parts(two.astype(np.float32), cuts)]
    base = parts(one.astype(np.float32), cuts)
    found = merge_state_dicts(states, method="slerp", base=base, t=t, granularity="model")
    length = np.linalg.norm(np.concatenate([found[name] for name in base]).astype(np.float64))
    assert length == pytest.approx(1.0, abs=1e-5)
