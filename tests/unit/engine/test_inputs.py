"""Kernels that read by themselves: the same bits as from memory, the same errors, and the bytes that were foretold."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conformance.draws import TYPES, kinds, settings, tensors
from conformance.driver import Memory, plan_of
from smelt.engine.forecast import forecast, passes
from smelt.engine.kernels import STREAMED, fused
from smelt.engine.kernels.loops.picking import (
    _marked_keys,
    _packed_keys,
    add_chosen,
    marked_places,
    multiply_two,
    packed_places,
)
from smelt.engine.kernels.sizes import PLACES, RUN, SPILL
from smelt.engine.run import RunResult, run
from smelt.engine.tiles import PIECE, TASK
from smelt.errors import InputError
from smelt.methods import api
from smelt.methods.reducers import LANES
from smelt.planning.entries import Plan
from smelt.storage.sources.memory import MemoryCheckpoint

LENGTH = TASK + PIECE + 777
BY_ROW = {"della", "della_linear", "arcee_fusion"}
"""The methods whose kernels work on rows, which are not wider than a piece."""


class Filed(MemoryCheckpoint):
    """A model whose tensors lie in a file too, of which only the place is told."""

    def __init__(self, inner: MemoryCheckpoint, path: Path) -> None:
        super().__init__(inner.name, {k: (spec, inner._data[k]) for k, spec in inner.tensors.items()})
        self.asked: list[tuple[int, int]] = []
        self.read = 0
        self._starts: dict[str, int] = {}
        with open(path, "wb") as file:
            for name, data in self._data.items():
                self._starts[name] = file.write(b"x" * 13) and file.tell()
                file.write(data.tobytes())
        self.descriptor = os.open(path, os.O_RDONLY)

    def place_of(self, spec: Any, start: int, stop: int) -> tuple[int, int]:
        self.asked.append((start, stop))
        return self.descriptor, self._starts[spec.name] + start

    def read_into(self, spec: Any, start: int, stop: int, buffer: Any) -> None:
        self.read += stop - start
        super().read_into(spec, start, stop, buffer)

    def close(self) -> None:
        os.close(self.descriptor)


def merged(plan: Plan, sources: list[Any], **settings: Any) -> tuple[bytes, RunResult]:
    sink = Memory(plan.entries)
    done = run(plan, sources, sink, workers=2, kernels=True, allow_nonfinite=True, **settings)
    return b"".join(data.tobytes() for data in sink.data.values()), done


def test_the_methods_whose_kernels_read() -> None:
    assert {method for method, *functions in fused().functions if functions == ["tile"]} == STREAMED


@pytest.mark.parametrize("types", ["bfloat16", "float32"])
@pytest.mark.parametrize("method", sorted(STREAMED))
def test_the_bits_are_those_from_memory(method: str, types: str, tmp_path: Path) -> None:
    info = api.get(method)
    rng = np.random.default_rng(3)
    n, with_base = kinds(info)[-1]
    shape = (LENGTH // 4096, 4096) if method in BY_ROW else (LENGTH,)
    models, base = tensors(shape, rng, n, TYPES[types])
    values = settings(info, rng, n)
    plan, plain = plan_of(
        method,
        [{"t": model} for model in models],
        {"t": base} if with_base else None,
        values=values,
        out=TYPES[types][0],
    )
    filed = [Filed(source, tmp_path / str(i)) for i, source in enumerate(plain)]
    try:
        expected, _ = merged(plan, list(plain))
        found, done = merged(plan, list(filed), keep_bytes=0)
        assert found == expected
        assert {stop for source in filed for _, stop in source.asked}, "no kernel read by itself"
        told = forecast(plan, workers=2, kernels=True, keep_bytes=0, in_files=range(len(filed)))
        sampled = done.bytes_read - told.bytes_read  # a sample of each model is read beside
        assert 0 <= sampled <= len(filed) * 4 * 32768
        found, kept = merged(plan, list(filed))
        assert found == expected
        assert (kept.bytes_read < done.bytes_read) == (passes(plan.entries[0]) > 1)
    finally:
        for source in filed:
            source.close()


@pytest.mark.parametrize("method", ["linear", "slerp", "ties", "dare_ties"])
def test_a_file_that_cannot_be_read_is_read_the_ordinary_way(method: str, tmp_path: Path) -> None:
    """Which then says what is wrong, or finds that all is well."""
    info = api.get(method)
    rng = np.random.default_rng(5)
    n, with_base = kinds(info)[-1]
    models, base = tensors((LENGTH,), rng, n, TYPES["bfloat16"])
    plan, plain = plan_of(
        method,
        [{"t": model} for model in models],
        {"t": base} if with_base else None,
        values=settings(info, rng, n),
        out=TYPES["bfloat16"][0],
    )
    expected, _ = merged(plan, list(plain))
    filed = [Filed(source, tmp_path / str(i)) for i, source in enumerate(plain)]
    os.truncate(tmp_path / "1", 3 * PIECE)
    try:
        assert merged(plan, list(filed))[0] == expected
        assert filed[1].read > 0
        filed[1]._data["t"] = filed[1]._data["t"][:1000]
        with pytest.raises((InputError, ValueError)):
            merged(plan, list(filed))
    finally:
        for source in filed:
            source.close()


@pytest.mark.parametrize("share", [0.0, 0.001, 0.02, 0.5, 1.0])
def test_places_of_a_run(share: float) -> None:
    """Both ways find what NumPy finds, whatever the processor can do."""
    rng = np.random.default_rng(11)
    bits = rng.integers(0, 1 << 32, RUN, dtype=np.uint32)
    low, width = np.uint32(1 << 28), np.uint32(share * ((1 << 31) - (1 << 28) - 1))
    bits[rng.permutation(RUN)[:3]] = [low, low + width, np.uint32(0x80000000) | low]
    magnitudes = bits & np.uint32(0x7FFFFFFF)
    expected = np.flatnonzero((magnitudes >= low) & (magnitudes <= low + width))
    for way in (packed_places, marked_places):
        places = np.zeros(PLACES, dtype=np.uint32)
        found = way(bits, low, width, places)
        assert sorted(places[:found].tolist()) == expected.tolist(), way


@pytest.mark.parametrize("share", [0.0, 0.001, 0.02, 0.5, 1.0])
def test_keys_of_a_run(share: float) -> None:
    """Both ways count those above and keep those inside, behind what was there; no further than the room goes."""
    rng = np.random.default_rng(12)
    bits = rng.integers(0, 1 << 31, RUN, dtype=np.uint32)
    low = np.uint32(1 << 28)
    high = np.uint32(low + share * ((1 << 31) - (1 << 28) - 1))
    bits[rng.permutation(RUN)[:3]] = [low, high, low - 1]
    inside = bits[(bits >= low) & (bits <= high)]
    for way in (_packed_keys, _marked_keys):
        room = np.zeros(7 + inside.size + SPILL + 1, dtype=np.uint32)
        above, found = way(bits, low, high, room, np.zeros(PLACES, dtype=np.uint32), 7)
        assert above == np.count_nonzero(bits > high), way
        assert found == 7 + inside.size, way
        assert sorted(room[7:found].tolist()) == sorted(inside.tolist()), way
        assert not room[:7].any()
        assert room[-1] == 0


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_sums_of_what_is_chosen(share: float) -> None:
    """All numbers of a run and those of set bits, each added to its lane in the order of the run."""
    rng = np.random.default_rng(13)
    values = (rng.standard_normal(RUN) * np.exp(rng.normal(0, 8, RUN))).astype(np.float32)
    chosen = rng.random(RUN) < share
    bits = np.packbits(chosen, bitorder="little")
    start = rng.standard_normal((2, LANES))
    expected = start.copy()
    for j in range(RUN):
        expected[0, j % LANES] += np.float64(values[j])
        expected[1, j % LANES] += np.float64(values[j]) if chosen[j] else 0.0
    whole, kept = start.copy()
    add_chosen(values, bits, whole, kept)
    assert whole.tobytes() == expected[0].tobytes()
    assert kept.tobytes() == expected[1].tobytes()


def test_products_of_two() -> None:
    """Fused sums of products have the bits of separate ones: products of float32 numbers are exact."""
    rng = np.random.default_rng(14)
    x, y = (rng.standard_normal((2, RUN)) * np.exp(rng.normal(0, 20, (2, RUN)))).astype(np.float32)
    start = rng.standard_normal((3, LANES))
    expected = start.copy()
    for j in range(RUN):
        a, b = np.float64(x[j]), np.float64(y[j])
        for total, product in zip(expected, (a * a, a * b, b * b), strict=True):
            total[j % LANES] += product
    sums = start.copy()
    multiply_two(x, y, sums[0], sums[1], sums[2])
    assert sums.tobytes() == expected.tobytes()


def test_a_guess_of_zeros_alone() -> None:
    """All is kept, and some deltas are 0: the cut lies among them, where nothing may be written beyond the room."""
    rng = np.random.default_rng(7)
    size = (1 << 20) + 5
    base = rng.standard_normal(size).astype(np.float32)
    models = [
        np.where(rng.random(size) < 0.05, base, base + rng.standard_normal(size).astype(np.float32)) for _ in "ab"
    ]
    values = {"weight": (0.5, 0.5), "density": (1.0, 0.97)}
    plan, sources = plan_of("ties", [{"t": m} for m in models], {"t": base}, values=values, out=base.dtype)
    outcomes = []
    for kernels in (False, True):
        sink = Memory(plan.entries)
        run(plan, sources, sink, workers=1, kernels=kernels)
        outcomes.append(sink.data["t"])
    np.testing.assert_array_equal(*outcomes)
