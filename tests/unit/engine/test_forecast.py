"""`engine.forecast.within`: which settings are given up for memory, in which order, and when it says no."""

from __future__ import annotations

import re

import numpy as np
import pytest

from conformance.driver import F32, plan_of
from smelt.engine import run as engine
from smelt.engine.forecast import Forecast, forecast, within
from smelt.engine.tiles import BLOCK, DEFAULT_TILE
from smelt.errors import RecipeError
from smelt.methods import api
from smelt.methods.api import Array, Grain, Method, register
from smelt.planning.entries import Plan

BIG = {f"w{i}": np.zeros((3000, 2000), dtype=np.float32) for i in range(3)}


def plan(method: str = "ties") -> Plan:
    """Three tensors of 24 MB from three models: their inputs fit what may be kept, one at a time."""
    values = {"weight": (1.0, 1.0), "density": (0.5, 0.5)} if method == "ties" else {}
    return plan_of(method, [BIG, BIG], BIG if method == "ties" else None, values=values, out=F32)[0]


def settings(found: Forecast) -> tuple[bool, int, int, int]:
    return found.kernels, found.workers, found.tile, found.keep_bytes


def test_with_room_nothing_is_given_up() -> None:
    free = forecast(plan(), workers=8)
    assert settings(within(free.memory, plan(), workers=8)) == settings(free)
    assert settings(free) == (True, 8, DEFAULT_TILE, engine.KEEP_BYTES)


def test_less_memory_is_never_more_of_anything() -> None:
    free = forecast(plan(), workers=8)
    found = free
    seen = [settings(free)]
    for memory in range(free.memory, 128_000_000, -4_000_000):
        try:
            found = within(memory, plan(), workers=8)
        except RecipeError:
            break
        assert found.memory <= memory
        assert settings(found)[:2] <= seen[-1][:2]  # kernels are given up last, threads before them
        if settings(found)[:2] == seen[-1][:2]:
            assert settings(found)[2:] <= seen[-1][2:]
        seen.append(settings(found))
    assert {workers for kernels, workers, *_ in seen if kernels} == set(range(1, 9))
    assert {tile for *_, tile, _ in seen} == {DEFAULT_TILE, BLOCK}
    assert {keep for *_, keep in seen} == {engine.KEEP_BYTES, engine.KEEP_BYTES // 2}  # the half holds no tensor here
    assert not found.kernels
    assert found.bytes_read > free.bytes_read  # what is not kept is read again


def test_the_least_it_names_is_enough() -> None:
    with pytest.raises(RecipeError, match="does not fit into 1 MB of memory") as caught:
        within(1_000_000, plan(), workers=8)
    named = re.search(r"--memory (\d+)MB", caught.value.fix or "")
    assert named is not None
    found = within(int(named[1]) * 1_000_000, plan(), workers=8)
    assert settings(found)[:3] == (False, 1, BLOCK)
    assert any("w0 [3000, 2000]" in line for line in caught.value.where)


def test_a_method_of_whole_tensors_gets_fewer_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "_REGISTRY", dict(api._REGISTRY))

    @register("whole", source="here")
    class Whole(Method):
        """The first model."""

        grain = Grain.TENSOR

        def tile(self, x: Array) -> Array:
            return x[0]

    several = forecast(plan("whole"), workers=8)
    one = forecast(plan("whole"), workers=1)
    assert several.memory - one.memory > 7 * 2 * 24_000_000  # each thread holds the inputs of a tensor
    assert within((several.memory + one.memory) // 2, plan("whole"), workers=8).workers in (3, 4, 5)
    assert within(one.memory, plan("whole"), workers=8).workers == 1
