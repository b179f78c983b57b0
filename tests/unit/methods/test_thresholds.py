"""What the methods do at their thresholds and beyond them: numbers worked out by hand from the definitions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from smelt.methods import api
from smelt.methods.api import Undefined
from smelt.methods.arcee_fusion import importance, softmax
from smelt.methods.karcher import mean_direction
from smelt.methods.ram import activity, average_active
from smelt.methods.sce import variance
from smelt.methods.selection import Cut

pytestmark = pytest.mark.filterwarnings("error")


def method(name: str, n: int, **values: Any) -> Any:
    """A method for `n` models, with defaults for what is not given."""
    full = {}
    for key, field in api.get(name).fields.items():
        value = values.get(key, field.default)
        full[key] = (value if isinstance(value, tuple) else (value,) * n) if field.per_model else value
    assert set(values) <= set(full)
    return api.get(name).type(full, models=n)


def matrix(*rows: list[float]) -> np.ndarray:
    return np.array(rows, dtype=np.float64)


def f32(*rows: list[float]) -> np.ndarray:
    return np.array(rows, dtype=np.float32)


# Settings that make no sense together


@pytest.mark.parametrize(
    ("weight", "fine"),
    [((1.0, -1.0), False), ((-2.0, 1.0), True), ((1e-8,), True), ((9e-9,), False), ((-9e-9,), False), ((0.0,), False)],
)
def test_weights_that_cancel_cannot_be_normalized(weight: tuple[float, ...], fine: bool) -> None:
    method("linear", len(weight), weight=weight, normalize=False).check()
    normalized = method("linear", len(weight), weight=weight)
    if fine:
        normalized.check()
    else:
        with pytest.raises(ValueError, match="the weights sum to 0"):
            normalized.check()


@pytest.mark.parametrize("name", ["della", "della_linear"])
@pytest.mark.parametrize(
    ("density", "epsilon", "fine"),
    [
        (0.5, 0.49, True),
        (0.5, 0.0, True),
        (0.5, 0.5, False),
        (0.25, 0.25, False),
        (0.25, -0.25, False),
        (0.75, 0.25, False),
        (0.75, -0.25, False),
        (0.75, -0.2, True),
        (1.0, 5.0, True),
        (1.5, 5.0, True),
        (0.0, 5.0, True),
        (-0.5, 5.0, True),
    ],
)
def test_keep_probabilities_lie_between_zero_and_one(name: str, density: float, epsilon: float, fine: bool) -> None:
    found = method(name, 2, weight=1.0, density=(0.5, density), epsilon=(0.1, epsilon))
    if fine:
        found.check()
    else:
        with pytest.raises(ValueError, match=r"must lie in \(0, 1\)"):
            found.check()


# Angles


def slerp(cosine: float, *, t: float = 0.25, lengths: tuple[float, float] = (1.0, 1.0)) -> tuple[float, float]:
    a, b = lengths
    found = method("slerp", 1, t=t).coefficients.function(
        method("slerp", 1, t=t), matrix([a * a, cosine * a * b], [cosine * a * b, b * b])
    )
    return float(found[0]), float(found[1])


def on_the_arc(cosine: float, t: float) -> list[float]:
    angle = math.acos(cosine)
    return [math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)]


@pytest.mark.parametrize("cosine", [0.9996, 1.0, 1.1, -0.9996, -1.0, math.nan, math.inf])
def test_slerp_of_nearly_parallel_tensors_is_linear(cosine: float) -> None:
    assert slerp(cosine) == (0.75, 0.25)


@pytest.mark.parametrize("cosine", [0.0, 0.5, -0.5, 0.9995, -0.9994])
def test_slerp_of_others_is_on_the_arc(cosine: float) -> None:
    found = slerp(cosine, lengths=(1.0, 1.0))
    assert found == pytest.approx(on_the_arc(cosine, 0.25), rel=1e-12)
    assert found[0] != 0.75
    assert slerp(cosine * 0.9, lengths=(3.0, 0.2)) == pytest.approx(on_the_arc(cosine * 0.9, 0.25), rel=1e-12)


def test_short_tensors_count_as_long_as_one_in_the_angle() -> None:
    """At a length of 1e-8 itself; just above it counts."""
    found = method("slerp", 1, t=0.25)
    at = found.coefficients.function(found, matrix([1e-16, 0.5e-8], [0.5e-8, 1.0]))
    assert at == pytest.approx(on_the_arc(0.5e-8, 0.25), rel=1e-12)
    above = found.coefficients.function(found, matrix([1e-14, 0.5e-7], [0.5e-7, 1.0]))
    assert above == pytest.approx(on_the_arc(0.5, 0.25), rel=1e-12)
    flat = method("nuslerp", 2, weight=(0.75, 0.25))
    assert flat._coefficients(matrix([1e-16, 0.5e-8], [0.5e-8, 1.0])) == pytest.approx(on_the_arc(0.5e-8, 0.25))
    assert flat._coefficients(matrix([1e-14, 0.5e-7], [0.5e-7, 1.0])) == pytest.approx(on_the_arc(0.5, 0.25))


@pytest.mark.parametrize(
    ("weight", "t"),
    [((3.0, 1.0), 0.25), ((-3.0, -1.0), 0.25), ((0.0, 1e-6), 1.0), ((0.0, 9e-7), 0.5), ((1.0, -1.0), 0.5)],
)
def test_nuslerp_takes_t_from_the_weights(weight: tuple[float, float], t: float) -> None:
    linear = method("nuslerp", 2, weight=weight)._coefficients(matrix([1, 1], [1, 1]))
    assert linear.tolist() == pytest.approx([1 - t, t], abs=1e-15)


@pytest.mark.parametrize(
    ("cosine", "linear"), [(0.99999, False), (-0.9994, False), (-0.9996, True), (-1.0, True), (1.0, True)]
)
def test_nuslerp_is_linear_only_where_there_is_no_arc(cosine: float, linear: bool) -> None:
    found = method("nuslerp", 2, weight=(3.0, 1.0))._coefficients(matrix([1, cosine], [cosine, 1]))
    expected = [0.75, 0.25] if linear else on_the_arc(cosine, 0.25)
    assert found.tolist() == pytest.approx(expected, rel=1e-9)
    if not linear:
        assert found[0] != 0.75


def karcher(*rows: list[float], **values: Any) -> list[float]:
    found = method("karcher", len(rows), **values)
    return found.coefficients.function(found, matrix(*rows)).tolist()  # type: ignore[no-any-return]


def test_karcher_leaves_short_models_out_of_the_direction() -> None:
    """Their length counts in the mean length."""
    assert karcher([1, 0], [0, 0.25], tol=0.5) == [0.75, 0.0]
    assert karcher([4, 0], [0, 0]) == [0.5, 0.0]
    assert karcher([4, 0], [0, 0], tol=0.0) == [0.5, 0.0]
    assert karcher([0, 0], [0, 0], tol=0.0) == [0.0, 0.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_karcher_without_angles_is_the_average(bad: float) -> None:
    assert karcher([1, 0.5, bad], [0.5, 1, bad], [bad, bad, bad]) == [1 / 3] * 3


def test_karcher_without_a_mean_starts_at_the_first_model_that_is_there() -> None:
    opposite = matrix([1, -1], [-1, 1])
    for tol in (0.0, 1e-5):
        assert mean_direction(opposite, np.array([True, True]), max_iter=10, tol=tol).tolist() == [1.0, 0.0]
    three = matrix([0, 0, 0], [0, 1, -1], [0, -1, 1])
    assert mean_direction(three, np.array([False, True, True]), max_iter=10, tol=1e-5).tolist() == [0.0, 1.0, 0.0]


def test_karcher_starts_at_the_normalised_mean() -> None:
    """With no step at all, or one that is shorter than tol, it ends there."""
    both = np.array([True, True])
    half = math.sqrt(0.5)
    for max_iter, tol in ((0, 0.0), (10, 1e-5), (10, 0.5)):
        found = mean_direction(np.eye(2), both, max_iter=max_iter, tol=tol)
        assert found.tolist() == pytest.approx([half, half], rel=1e-12)
    assert mean_direction(np.eye(2), both, max_iter=0, tol=0.8).tolist() == [1.0, 0.0], "a mean shorter than tol"


def test_karcher_steps_towards_the_mean_of_the_angles() -> None:
    """Three directions in a plane, at 0, 0 and 60 degrees: the mean is at 20, from whichever start."""
    plane = [(1.0, 0.0), (1.0, 0.0), (0.5, math.sqrt(0.75))]
    cosines = np.array([[a[0] * b[0] + a[1] * b[1] for b in plane] for a in plane])
    for present, degrees in (([True] * 3, 20), ([True, False, True], 30), ([False, False, True], 60)):
        found = mean_direction(cosines, np.array(present), max_iter=50, tol=1e-12)
        place = sum(np.array(vector) * share for vector, share in zip(plane, found, strict=True))
        wanted = [math.cos(math.radians(degrees)), math.sin(math.radians(degrees))]
        assert place.tolist() == pytest.approx(wanted, abs=1e-9)
    one_step = mean_direction(cosines, np.array([True] * 3), max_iter=1, tol=0.0)
    none = mean_direction(cosines, np.array([True] * 3), max_iter=0, tol=0.0)
    assert one_step.tolist() != none.tolist()


@pytest.mark.parametrize(
    ("cosine", "t"),
    [(1.0, 1.0), (0.5, 2 / 3), (0.0, 0.0), (-0.5, -2.0), (-1 + 1e-4, -2e4 + 2), (-1 + 1e-7, 0.0), (-1.0, 0.0)],
)
def test_model_stock_is_not_clamped_but_at_its_singularity(cosine: float, t: float) -> None:
    found = method("model_stock", 2)
    assert found._ratio(matrix([4, 2 * cosine], [2 * cosine, 1])) == pytest.approx(t, rel=1e-6)
    assert found._coefficients(matrix([4, 2 * cosine], [2 * cosine, 1])).tolist() == pytest.approx(
        [t / 2] * 2, rel=1e-6
    )


def test_model_stock_takes_the_mean_over_all_pairs() -> None:
    found = method("model_stock", 3)._ratio(matrix([1, 0.1, 0.2], [0.1, 1, 0.6], [0.2, 0.6, 1]))
    assert found == pytest.approx(3 * 0.3 / (1 + 2 * 0.3))


def test_model_stock_divides_by_no_product_of_lengths_below_a_millionth() -> None:
    found = method("model_stock", 2)
    assert found._ratio(matrix([1e-6, 1e-6], [1e-6, 1e-6])) == pytest.approx(1.0)
    assert found._ratio(matrix([1e-8, 1e-8], [1e-8, 1e-8])) == pytest.approx(2 * 0.01 / 1.01)
    assert found._ratio(matrix([0, 0], [0, 1])) == 0.0


def multislerp(*rows: list[float], **values: Any) -> list[float]:
    found = method("multislerp", len(rows), **values)
    return found.coefficients.function(found, matrix(*rows)).tolist()  # type: ignore[no-any-return]


def test_multislerp_keeps_the_weighted_length() -> None:
    half = math.sqrt(0.5)
    assert multislerp([1, 0], [0, 1], weight=1.0) == pytest.approx([half, half])
    assert multislerp([1, 0], [0, 1], weight=1.0, normalize_weights=False) == pytest.approx([2 * half, 2 * half])
    assert multislerp([9, 0], [0, 1], weight=(0.5, 0.5)) == pytest.approx([half * 2 / 3, half * 2])
    assert multislerp([1, 0], [0, 1], weight=1.0, eps=0.4) == pytest.approx([half * math.cos(0.4)] * 2)


def test_multislerp_without_a_direction() -> None:
    """Two models: their weighted sum. More: an error, unless all are zero."""
    assert multislerp([1, -1], [-1, 1], weight=(1.0, 3.0), normalize_weights=False, eps=5.0) == [1.0, 3.0]
    assert multislerp([1, -1], [-1, 1], weight=1.0) == [0.5, 0.5]
    assert multislerp([0, 0, 0], [0, 0, 0], [0, 0, 0], weight=(1.0, 1.0, 2.0)) == [0.25, 0.25, 0.5]
    assert multislerp([0.25, 0, 0], [0, 0.25, 0], [0, 0, 0], weight=1.0, eps=0.5) == [1 / 3] * 3, "as short as eps"
    assert multislerp([math.nan, 0], [0, 1], weight=1.0) == [0.5, 0.5]
    with pytest.raises(Undefined, match="cancel"):
        multislerp([1, -1, 0], [-1, 1, 0], [0, 0, 0], weight=1.0)


def test_a_direction_as_long_as_eps_is_one() -> None:
    at = multislerp([1.0], weight=0.75, eps=0.5, normalize_weights=False)
    assert at == pytest.approx([0.75 * math.cos(0.5)])
    assert multislerp([1.0], weight=0.74, eps=0.5, normalize_weights=False) == [0.74]


def test_multislerp_of_weights_that_cancel_divides_by_one() -> None:
    half = math.sqrt(0.5)
    assert multislerp([1, 0], [0, 1], weight=(1.0, -1.0)) == pytest.approx([0.0, 0.0], abs=1e-12)
    assert multislerp([4, 0], [0, 1], weight=(1.0, -1.0)) == pytest.approx([half / 2, -half])


# Entries


def test_active_entries_are_larger_than_epsilon() -> None:
    deltas = f32([0.5, -0.75, 0.25, 0.0], [1.0, 0.5, -2.0, 0.0])
    active, count = activity(deltas, 0.5)
    assert [one.tolist() for one in active] == [[False, True, False, False], [True, False, True, False]]
    assert count.tolist() == [1.0, 1.0, 1.0, 0.0]
    assert average_active(deltas, 0.5, None).tolist() == [1.0, -0.75, -2.0, 0.0]
    assert average_active(deltas, 0.0, None).tolist() == [0.75, -0.125, -0.875, 0.0]
    assert average_active(deltas, 0.25, np.array([2.0, 3.0])).tolist() == [0.75, -0.125, -6.0, 0.0]


def test_only_entries_of_one_model_are_boosted() -> None:
    plus = method("ramplus_tl", 3, r=0.5, alpha=0.25, epsilon=1e-5)
    boost = plus.boost.function
    assert boost(plus, np.array([10.0, 10.0, 0.0]), np.array([1.0, 8.0, 0.0])).tolist() == [1.05, 1.125, 1.0]
    assert boost(method("ramplus_tl", 1, r=0.5, epsilon=20.0), np.array([10.0]), np.array([2.0])).tolist() == [1.05]
    assert boost(method("ramplus_tl", 1, r=0.5, epsilon=0.0), np.array([0.0]), np.array([0.0])).tolist() == [1.0]
    deltas = f32([1, 1, 0, 1], [0, 1, 0, 1], [0, 0, 2, 1])
    assert plus.unique.function(plus, deltas).tolist() == [[1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0]]
    assert plus.shared.function(plus, deltas).tolist() == [[0, 1, 0, 1], [0, 1, 0, 1], [0, 0, 0, 1]]


def test_variance_over_the_models() -> None:
    assert variance(f32([1, 0, 2], [3, 0, 2])).tolist() == [[1.0, 0.0, 0.0]]
    assert variance(f32([1], [3], [8]))[0].tolist() == pytest.approx([26 / 3])
    assert variance(f32([5, 6])).tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize(("topk", "count"), [(0.5, 3), (0.3, 2), (0.0, 0), (-1.0, 0), (0.99, 6)])
def test_sce_keeps_a_share_of_the_positions_that_vary(topk: float, count: int) -> None:
    sce = method("sce", 2, select_topk=topk)
    cut = next(step for step in sce.info.reductions if step.name == "cut")
    deltas = f32([1, 2, 3], [1, 3, 5])
    numbers, counts = cut.function(sce, deltas, np.array([7.0]))
    assert counts.tolist() == [count]
    assert numbers.tolist() == [[0.0, 0.25, 1.0]]


def test_sce_shares() -> None:
    sce = method("sce", 2)
    assert sce.shares.function(sce, np.array([1.0, 3.0])).tolist() == [0.25, 0.75]
    assert sce.shares.function(sce, np.array([0.0, 0.0])).tolist() == [0.5, 0.5]


@pytest.mark.parametrize(("share", "expected"), [(1e-8, 3.0), (0.5e-8, 1.5e-8), (0.25, 3.0)])
def test_sce_divides_by_shares_from_1e_8_on(share: float, expected: float) -> None:
    sce = method("sce", 2)
    deltas = f32([3.0], [-2.0])
    found = sce.tile(f32([0.0])[0], deltas, None, np.zeros_like(deltas), np.array([share, 1.0]))
    assert found.tolist() == pytest.approx([expected])


def test_nearswap_goes_all_the_way_where_models_are_close() -> None:
    near = method("nearswap", 1, t=0.5)
    base, x = f32([0.0, 0.0, 0.0, 0.0])[0], f32([0.25, 0.5, 1.0, -2.0])
    assert near.tile(x, base, x - base).tolist() == [0.25, 0.5, 0.5, -0.5]
    tiny = method("nearswap", 1, t=2.0**-21)
    least = f32([2.0**-30, 2.0**-21, 2.0**-19])
    found = tiny.tile(least, base[:3], least)
    assert found.tolist() == pytest.approx([2.0**-30 * 2.0**-21 / 1e-6, 2.0**-42 / 1e-6, 2.0**-21], rel=1e-6)
    back = method("nearswap", 1, t=-1.0)
    assert back.tile(x, base, x - base).tolist() == [0.0] * 4


def test_arcee_fusion_takes_over_what_stands_out() -> None:
    assert softmax(np.log(matrix([1, 3], [2, 2]))).tolist() == [pytest.approx([0.25, 0.75]), pytest.approx([0.5, 0.5])]
    assert softmax(matrix([1000.0, 1000.0])).tolist() == [[0.5, 0.5]]
    base = np.log(matrix([1, 3])).astype(np.float32)
    x = np.log(matrix([2, 2])).astype(np.float32)
    divergence = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    found = importance(x, base, x - base)
    assert found.tolist() == [pytest.approx([math.log(2) * divergence, math.log(1.5) * divergence], rel=1e-6)]
    fusion = method("arcee_fusion", 1)
    cut = Cut(matrix([1.0, 2.0, 5.0]), *[np.zeros((1, 3))] * 4)
    assert fusion.threshold.function(fusion, cut) == 2.0 + 1.5 * 4.0
    stands = float(found[0, 0])
    assert fusion.tile(x[None], base, x - base, stands).tolist() == [[x[0, 0], base[0, 1]]]
    assert fusion.tile(x[None], base, x - base, math.nextafter(stands, 9.0)).tolist() == base.tolist()


def test_arcee_fusion_counts_its_quantiles_from_the_top() -> None:
    fusion = method("arcee_fusion", 1)
    step = fusion.info.reductions[0]
    tensor = f32([1.0, 2.0])
    for size, counts in ((101, [76, 51, 26]), (1, [1, 1, 1]), (10, [8, 6, 4])):
        assert step.function(fusion, tensor[None], tensor, tensor[None] * 0, size)[1].tolist() == [counts]
