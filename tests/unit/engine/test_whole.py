"""`engine.whole` and `planning.whole`: what is folded in which order, what counts, what a group is told to be."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from conformance.driver import F32, Memory, plan_of
from smelt.engine import run as engine
from smelt.engine.forecast import forecast
from smelt.engine.whole import Sweep, passes_of, reduced, result_bytes
from smelt.planning.anatomy import Part, Role
from smelt.planning.entries import Plan
from smelt.planning.whole import groups, notes

TENSORS = {f"t{i}": np.zeros((3, i + 2), dtype=F32) for i in range(3)}


def plan(method: str = "karcher", models: int = 2, **values: Any) -> Plan:
    base = TENSORS if method not in ("karcher",) else None
    given = {"granularity": "model", **values}
    return plan_of(method, [TENSORS] * models, base, values=given, out=F32)[0]


def inner_products(number: float) -> list[Any]:
    """What a tensor gives to a Gram matrix of two models: the number in every lane."""
    return [np.full((2, 2, 256), number)]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0), (2, 0, 1)])
def test_tensors_are_folded_in_the_order_of_the_plan(order: tuple[int, ...]) -> None:
    """1e16, 1 and -1e16 give 0 in this order and 1 in another: whichever tensor is done first, it is 0."""

    def carry_out(sweep: Sweep) -> None:
        for place in order:
            sweep.take(sweep.entries[place], inner_products([1e16, 1.0, -1e16][place]))

    found = reduced(plan(), carry_out)
    assert set(found) == set(TENSORS)
    for part in found.values():
        assert np.array_equal(part.results["products"], np.zeros((2, 2)))
        assert part.results["size"] == 27
        assert part.running == ()


def test_passes_follow_from_what_is_asked_for() -> None:
    def rounds(method: str, **values: Any) -> int:
        (group,) = groups(plan(method, **values).entries, tied=False)
        return passes_of(group)

    assert rounds("karcher") == 1
    assert rounds("ties", weight=1.0, density=1.0) == 0
    assert rounds("ties", weight=1.0, density=0.5) == 2
    assert rounds("ties", weight=1.0, density=0.5, rescale=True) == 3
    assert rounds("ties", weight=1.0, density=1.0, rescale=True) == 1
    assert rounds("sce", select_topk=0.5) == 6  # what varies, four rounds of the cut, what is kept
    assert rounds("pcb") == 6


def test_a_group_that_is_done_is_left_alone() -> None:
    def carry_out(sweep: Sweep) -> None:
        raise AssertionError("nothing is to be read")

    assert reduced(plan(), carry_out, done=set(TENSORS)) == {}
    assert reduced(plan("ties", weight=1.0, density=1.0), carry_out).keys() == TENSORS.keys()


def test_a_tied_head_counts_once() -> None:
    """Where the config ties it, a head that is stored all the same is the embedding once more."""
    made = plan()
    roles = [Role.EMBEDDING, Role.LAYER, Role.HEAD]
    entries = [replace(e, part=Part(role, None, None, e.name)) for e, role in zip(made.entries, roles, strict=True)]
    entries[2] = replace(entries[2], shape=entries[0].shape)
    (tied,) = groups(entries, tied=True)
    assert [entry.name for entry in tied.counted] == ["t0", "t1"]
    assert [entry.name for entry in tied.entries] == ["t0", "t1", "t2"]
    (untied,) = groups(entries, tied=False)
    assert [entry.name for entry in untied.counted] == ["t0", "t1", "t2"]
    other = [entries[0], entries[1], replace(entries[2], shape=(9, 9))]
    assert len(groups(other, tied=True)[0].counted) == 3


def test_nothing_counts_where_all_are_empty() -> None:
    empty = {"a": np.zeros((0, 3), dtype=F32)}
    made, _ = plan_of("ties", [empty], empty, values={"weight": 1.0, "density": 0.5, "granularity": "model"}, out=F32)
    (group,) = groups(made.entries, tied=False)
    assert (group.size, passes_of(group), result_bytes(group, 4)) == (0, 0, 0)


def test_several_groups_are_told_of() -> None:
    made = plan("ties", weight=1.0, density=0.5)
    full = dict(made.entries[1].values)
    one = {name: value[:1] if isinstance(value, tuple) else value for name, value in full.items()}
    entries = [
        made.entries[0],
        replace(made.entries[1], inputs=made.entries[1].inputs[:1], values=one),
        made.entries[2],
    ]
    found = groups(entries, tied=False)
    assert [[entry.name for entry in group.entries] for group in found] == [["t0", "t2"], ["t1"]]
    assert notes(found) == [
        "granularity model: 2 and 1 tensors are of different models, and each of these groups is a whole"
    ]
    assert notes(found[:1]) == []


def test_what_a_tensor_has_counted_goes_with_it() -> None:
    """120 tensors of two models: as many histograms of 512 KiB each would be 120 MiB, twice."""
    tensors = {f"t{i:03}": np.full(7, i, dtype=F32) for i in range(120)}
    base = {name: np.zeros(7, dtype=F32) for name in tensors}
    values = {"weight": 1.0, "density": 0.5, "granularity": "model"}
    made, sources = plan_of("ties", [tensors, base], base, values=values, out=F32)
    tracemalloc.start()
    try:
        engine.run(made, sources, Memory(made.entries), workers=2, kernels=False)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    (group,) = groups(made.entries, tied=False)
    assert peak < result_bytes(group, 2) + (8 << 20)


def test_what_is_found_takes_memory_with_the_models_and_not_with_their_size() -> None:
    small = forecast(plan("ties", weight=1.0, density=0.5), workers=2, kernels=False)
    each = forecast(plan("ties", weight=1.0, density=0.5, granularity="tensor"), workers=2, kernels=False)
    more = forecast(plan("ties", models=4, weight=1.0, density=0.5), workers=2, kernels=False)
    assert 1 << 20 < small.memory - each.memory < 32 << 20
    assert more.memory - small.memory < 32 << 20
