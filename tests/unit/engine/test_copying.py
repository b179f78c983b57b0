"""Tensors that are copied: read once, digested, searched for bad numbers; or moved unread where they are known."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

from conformance.driver import BF16, F16, F32, F64, Memory, plan_of
from smelt.engine.copying import MOVE, PIECE, TASK, Known
from smelt.engine.forecast import forecast
from smelt.engine.run import WORTH_KERNELS, run, worth_kernels
from smelt.lineage.verify import tensor_digest
from smelt.planning.entries import Action
from smelt.storage.sources.memory import MemoryCheckpoint

U8 = np.dtype(np.uint8)


def copying(out: np.dtype, **tensors: np.ndarray) -> tuple[Any, list[MemoryCheckpoint]]:
    return plan_of("passthrough", [tensors], None, values={}, out=out, action=Action.COPY)


class Unreadable(MemoryCheckpoint):
    """A model whose reads fail."""

    def read_into(self, spec: Any, start: int, stop: int, buffer: Any) -> None:
        raise AssertionError("it was read")


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("size", [1, PIECE - 1, PIECE + 1, TASK, TASK + 1, 3 * TASK - 5])
def test_bytes_and_digest(size: int, workers: int) -> None:
    data = np.random.default_rng(size).integers(0, 256, size=size, dtype=np.uint8)
    plan, sources = copying(U8, w=data)
    sink = Memory(plan.entries)
    done = run(plan, sources, sink, workers=workers)
    assert np.array_equal(sink.data["w"], data)
    assert done.tensors[0].digest == tensor_digest(sources[0], "w")
    assert (done.bytes_read, done.bytes_written) == (size, size)


@pytest.mark.parametrize("kernels", [False, True], ids=["definitions", "kernels"])
@pytest.mark.parametrize("stored", [F64, F32, F16, BF16], ids=lambda dtype: dtype.name)
def test_bad_numbers_are_counted_wherever_they_stand(stored: np.dtype, kernels: bool) -> None:
    values = np.linspace(-1, 1, 3_000_001, dtype=np.float32).astype(stored)
    step = PIECE // stored.itemsize
    bad = {0: np.nan, 1: np.inf, step - 1: -np.inf, step: np.nan, 2 * step + 7: np.inf, 3_000_000: np.nan}
    for place, number in bad.items():
        values[place] = number
    plan, sources = copying(stored, w=values)
    (found,) = run(plan, sources, Memory(plan.entries), workers=2, kernels=kernels).tensors
    assert (found.inherited, found.created) == (len(bad), 0)


def test_integers_have_no_bad_numbers() -> None:
    plan, sources = copying(np.dtype(np.int64), w=np.full(1000, -1))
    (found,) = run(plan, sources, Memory(plan.entries)).tensors
    assert found.inherited == 0


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("action", [Action.COPY, Action.EQUAL])
def test_known_tensors_are_moved_unread(action: Action, workers: int) -> None:
    size = 2 * MOVE + 3
    data = np.zeros(size, dtype=np.uint8)
    plan, (source,) = plan_of("passthrough", [{"w": data}], None, values={}, out=U8, action=action)
    closed = Unreadable(source.name, {"w": (source.tensors["w"], data)})
    moved: list[tuple[int, int]] = []
    lock = threading.Lock()

    def move(start: int, stop: int) -> None:
        with lock:
            moved.append((start, stop))

    (found,) = run(plan, [closed], Memory(plan.entries), workers=workers, known={"w": Known("d" * 32, 7, move)}).tensors
    assert sorted(moved) == [(0, MOVE), (MOVE, 2 * MOVE), (2 * MOVE, size)]
    assert (found.digest, found.inherited, found.created) == ("d" * 32, 7, 0)


def test_a_move_that_fails_ends_the_run() -> None:
    plan, sources = copying(U8, v=np.ones(9, np.uint8), w=np.ones(9, np.uint8))
    failure = OSError("gone")

    def move(start: int, stop: int) -> None:
        raise failure

    with pytest.raises(OSError, match="gone") as caught:
        run(plan, sources, Memory(plan.entries), known={"w": Known("d" * 32, 0, move)})
    assert caught.value is failure


def test_merged_tensors_are_never_known() -> None:
    plan, sources = plan_of("linear", [{"w": np.ones(9, np.float32)}], None, values={"weight": (1.0,)}, out=F32)
    sink = Memory(plan.entries)
    known = {"w": Known("d" * 32, 5, lambda start, stop: pytest.fail("it was moved"))}
    (found,) = run(plan, sources, sink, known=known).tensors
    assert found.inherited == 0
    assert sink.data["w"].view(F32).tolist() == [1.0] * 9


def test_copies_load_no_compiler() -> None:
    large = np.zeros(WORTH_KERNELS, dtype=np.uint8)
    copied, _ = copying(U8, w=large)
    merged, _ = plan_of("linear", [{"w": large.view(F32)}], None, values={"weight": (1.0,)}, out=F32)
    assert not worth_kernels(copied)
    assert worth_kernels(merged)
    assert forecast(copied, workers=1).memory < forecast(merged, workers=1).memory - (100 << 20)
