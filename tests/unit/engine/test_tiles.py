"""Cuts: every element lies in exactly one block, one tile and one task, and a method sees whole rows."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smelt.engine.tiles import BLOCK, TASK, Geometry, Scratch
from smelt.specs import Grain

SHAPES = st.one_of(
    st.lists(st.integers(1, 40), max_size=4).map(tuple),
    st.tuples(st.integers(1, 3_000_000)),
    st.tuples(st.integers(1, 2000), st.integers(1, 2000)),
    st.tuples(st.integers(1, 4), st.integers(BLOCK - 2, 3 * BLOCK)),
    st.tuples(st.integers(1, 60), st.integers(1, 60), st.integers(1, 60)),
)
TILES = st.sampled_from([1, 1000, BLOCK, 2 * BLOCK, 3 * BLOCK, 1 << 20])


def rows_of(grain: Grain, shape: tuple[int, ...]) -> int:
    """Elements that must not be parted."""
    size = math.prod(shape)
    if grain is Grain.ROW:
        return shape[-1] if shape else 1
    if grain is Grain.SLAB:
        return size // shape[0] if shape else 1
    return size if grain is Grain.TENSOR else 1


@settings(deadline=None, max_examples=200)
@given(SHAPES, st.sampled_from(Grain), TILES)
def test_a_cut_covers_everything_once(shape: tuple[int, ...], grain: Grain, tile: int) -> None:
    geometry = Geometry.of(shape, grain, tile=tile)
    size, whole = math.prod(shape), rows_of(grain, shape)
    assert geometry.size == size
    position = 0
    block = -1
    for task in range(geometry.tasks):
        start, stop = geometry.span(task)
        assert start == position
        assert start < stop <= size
        for low, high in geometry.tile_spans(start, stop):
            assert low == position
            assert low < high <= stop
            assert low % whole == 0
            assert high % whole == 0
            unit = max(geometry.width, 1) if grain is not Grain.ELEMENT else 1
            inside = 0
            for number, first, last in geometry.blocks(low, high):
                block += 1
                assert number == block
                assert first == inside
                assert last > first
                inside = last
            assert inside * unit == high - low
            position = high
    assert position == size


@settings(deadline=None, max_examples=100)
@given(SHAPES, st.sampled_from([Grain.ELEMENT, Grain.ROW, Grain.SLAB]), st.lists(TILES, min_size=2, max_size=2))
def test_blocks_do_not_depend_on_the_tile(shape: tuple[int, ...], grain: Grain, tiles: list[int]) -> None:
    found = []
    for tile in tiles:
        geometry = Geometry.of(shape, grain, tile=tile)
        unit = 1 if grain is Grain.ELEMENT else max(geometry.width, 1)
        found.append(
            [
                (number, low + first * unit, low + last * unit)
                for task in range(geometry.tasks)
                for low, high in geometry.tile_spans(*geometry.span(task))
                for number, first, last in geometry.blocks(low, high)
            ]
        )
    assert found[0] == found[1]
    assert all(stop - start <= max(BLOCK, rows_of(grain, shape)) for _, start, stop in found[0])


@settings(deadline=None)
@given(SHAPES, st.sampled_from(Grain))
def test_a_view_shows_rows_as_the_tensor_has_them(shape: tuple[int, ...], grain: Grain) -> None:
    geometry = Geometry.of(shape, grain)
    tensor = np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
    low, high = geometry.tile_spans(*geometry.span(0))[0]
    tile = geometry.view(np.stack([tensor.reshape(-1)[low:high]] * 2))
    if grain is Grain.ELEMENT:
        assert tile.shape == (2, high - low)
    elif grain is Grain.TENSOR:
        assert np.array_equal(tile[1], tensor)
    else:
        width = rows_of(grain, shape)
        assert tile.shape == (2, (high - low) // width, width)
        assert np.array_equal(tile[1], tensor.reshape(-1, width)[low // width : high // width])


@pytest.mark.parametrize("grain", Grain)
@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 5)])
def test_empty_tensors_have_no_tasks(shape: tuple[int, ...], grain: Grain) -> None:
    geometry = Geometry.of(shape, grain)
    assert geometry.tasks == 0
    assert geometry.tile_spans(0, 0) == []
    assert geometry.blocks(0, 0) == []


def test_large_tensors_are_shared_out() -> None:
    """A task of a tensor that may be cut anywhere writes whole MiB of any type."""
    geometry = Geometry.of((4096, 4096), Grain.ELEMENT)
    assert geometry.tasks == 4096 * 4096 // TASK
    assert geometry.task * 2 % (1 << 20) == 0
    assert Geometry.of((4096, 4096), Grain.ROW).tasks > 4
    assert Geometry.of((4096, 4096), Grain.TENSOR).tasks == 1


def test_scratch_reuses_memory() -> None:
    scratch = Scratch()
    first = scratch.array("a", (2, 3), np.float32)
    assert first.shape == (2, 3)
    assert first.dtype == np.float32
    assert np.shares_memory(first, scratch.array("a", (4,), np.float32))
    assert not np.shares_memory(first, scratch.array("b", (4,), np.float32))
    assert not np.shares_memory(first, scratch.array("a", (4,), np.uint8))
    grown = scratch.array("a", (100,), np.float32)
    assert grown.size == 100
    assert np.shares_memory(grown, scratch.array("a", (7,), np.float32))
    assert scratch.array("empty", (0,), np.uint8).size == 0
    assert scratch.array("0-d", (), np.uint8).shape == ()
