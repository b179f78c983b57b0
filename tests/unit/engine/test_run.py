"""The loop: what a run reports, how it ends when something fails, and what it may hold in memory."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import xxhash

from conformance.driver import BF16, F16, F32, F64, Memory, merge, merge_tensors, plan_of, source
from smelt.engine import run as engine
from smelt.engine.forecast import passes
from smelt.engine.run import check_equal, default_workers, run
from smelt.engine.tensor import Budget, TensorResult
from smelt.engine.tiles import TASK
from smelt.errors import InputError, ManyProblems, NumericError, SmeltError, StorageError
from smelt.lineage.verify import tensor_digest
from smelt.methods import api
from smelt.methods.api import Array, Method, Sum, reduce, register
from smelt.planning.entries import Action
from smelt.storage.sources.memory import MemoryCheckpoint

pytestmark = pytest.mark.filterwarnings("error")

TENSORS = {f"layer {i}": np.full((300, 1000), i, dtype=np.float32) for i in range(12)}
BIG = {"big": np.linspace(-1, 1, 3_000_000, dtype=np.float32)}


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    before = threading.active_count()
    yield
    assert threading.active_count() == before


class Watched(MemoryCheckpoint):
    """A model that counts its reads and can fail."""

    def __init__(self, inner: MemoryCheckpoint, *, fails_at: str | None = None, error: BaseException | None = None):
        super().__init__(inner.name, {k: (spec, inner._data[k]) for k, spec in inner.tensors.items()})
        self.fails_at = fails_at
        self.error = error
        self.reads: list[tuple[str, int, int]] = []
        self._lock = threading.Lock()

    def read_into(self, spec: Any, start: int, stop: int, buffer: Any) -> None:
        with self._lock:
            self.reads.append((spec.name, start, stop))
        if spec.name == self.fails_at:
            assert self.error is not None
            raise self.error
        super().read_into(spec, start, stop, buffer)


# Errors


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize(
    "error", [StorageError("the disk is gone"), ValueError("a defect")], ids=lambda e: type(e).__name__
)
def test_an_error_in_a_worker_surfaces_and_stops_the_rest(workers: int, error: Exception) -> None:
    plan, sources = plan_of("linear", [TENSORS], None, values={"weight": (1.0,)}, out=F32)
    watched = Watched(sources[0], fails_at="layer 3", error=error)
    with pytest.raises(type(error)) as caught:
        run(plan, [watched], Memory(plan.entries), workers=workers)
    assert caught.value is error
    names = [name for name, _, _ in watched.reads]
    assert "layer 11" not in names
    assert len(set(names)) <= 4 + workers


@pytest.mark.parametrize("workers", [1, 3])
def test_an_error_while_writing_surfaces(workers: int) -> None:
    plan, sources = plan_of("linear", [TENSORS], None, values={"weight": (1.0,)}, out=F32)
    sink = Memory(plan.entries)
    whole = sink.write

    def write(name: str, start: int, data: Any) -> None:
        if name == "layer 2":
            raise StorageError("no space left")
        whole(name, start, data)

    sink.write = write  # type: ignore[method-assign]
    with pytest.raises(StorageError, match="no space"):
        run(plan, sources, sink, workers=workers)
    assert not sink.data["layer 11"].any()


@pytest.mark.parametrize("number", range(4))
def test_an_error_in_any_part_of_a_method_surfaces(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a reduction's function, in its reducer, in a derived value, in the tile."""

    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("a defect in a method")

    info = api.get("slerp")
    if number == 0:
        monkeypatch.setattr(api.get("slerp").type, "tile", fail)
    elif number == 1:
        monkeypatch.setattr("smelt.methods.reducers.Gram.partial", fail)
    elif number == 2:
        monkeypatch.setattr("smelt.methods.reducers.Gram.close", fail)
    else:
        monkeypatch.setattr("smelt.methods.reducers.Gram.finish", fail)
    assert info.tile_arguments
    with pytest.raises((RuntimeError, SmeltError), match="a defect in a method"):
        merge_tensors("slerp", [TENSORS], TENSORS, values={"t": 0.5}, workers=3)


def test_no_memory_is_said_in_words() -> None:
    plan, sources = plan_of("linear", [TENSORS], None, values={"weight": (1.0,)}, out=F32)
    watched = Watched(sources[0], fails_at="layer 3", error=MemoryError())
    with pytest.raises(SmeltError, match="not enough memory"):
        run(plan, [watched], Memory(plan.entries), workers=2)


def test_an_interrupt_in_a_worker_is_passed_on() -> None:
    plan, sources = plan_of("linear", [TENSORS], None, values={"weight": (1.0,)}, out=F32)
    watched = Watched(sources[0], fails_at="layer 3", error=KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        run(plan, [watched], Memory(plan.entries), workers=2)


def test_an_interrupt_of_the_caller_stops_the_workers() -> None:
    """Ctrl-C arrives in the calling thread, here while it reports progress."""
    plan, sources = plan_of("linear", [TENSORS], None, values={"weight": (1.0,)}, out=F32)
    watched = Watched(sources[0])
    whole = watched.read_into

    def slow(spec: Any, start: int, stop: int, buffer: Any) -> None:
        time.sleep(0.1)
        whole(spec, start, stop, buffer)

    watched.read_into = slow  # type: ignore[method-assign]

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(plan, [watched], Memory(plan.entries), workers=2, progress=interrupt)
    assert len(watched.reads) < len(TENSORS)


def test_after_an_error_the_kept_inputs_are_given_back() -> None:
    """A run that failed leaves nothing behind for the next one."""
    plan, sources = plan_of("slerp", [TENSORS], TENSORS, values={"t": 0.5}, out=F32)
    for _ in range(2):
        watched = Watched(sources[1], fails_at="layer 5", error=StorageError("gone"))
        with pytest.raises(StorageError):
            run(plan, [sources[0], watched], Memory(plan.entries), workers=3)
    run(plan, sources, Memory(plan.entries), workers=3)


# Numbers that are not finite


def test_a_new_infinity_is_refused() -> None:
    x = np.ones((3, 5), dtype=np.float32)
    x[2, 1] = 3e38
    with pytest.raises(NumericError) as caught:
        merge("linear", [x], values={"weight": (4.0,), "normalize": False}, name="model.norm")
    assert "'model.norm'" in caught.value.message
    assert "[2, 1]" in caught.value.where[0]
    assert "linear" in caught.value.where[0]
    assert caught.value.exit_code == 5
    assert "model 1" in caught.value.where[1]
    assert caught.value.fix


@pytest.mark.parametrize("place", [0, 131_072, 524_287, 524_288, 700_000])
def test_the_index_is_that_of_the_tensor(place: int) -> None:
    x = np.ones((1001, 700), dtype=np.float32)
    x.reshape(-1)[place] = 3e38
    with pytest.raises(NumericError) as caught:
        merge("linear", [x], values={"weight": (4.0,), "normalize": False})
    index = [int(i) for i in np.unravel_index(place, x.shape)]
    assert f"index {index}," in caught.value.where[0]


def test_a_scalar_has_an_index_too() -> None:
    with pytest.raises(NumericError) as caught:
        merge("linear", [np.float32(3e38).reshape(())], values={"weight": (4.0,), "normalize": False})
    assert "index []" in caught.value.where[0]


def test_what_does_not_fit_float16_is_new() -> None:
    x = np.array([1.0, 65504.0, 65519.0, 65520.0, -1e6], dtype=np.float32)
    with pytest.raises(NumericError, match="NaN or infinity") as caught:
        merge("linear", [x], values={"weight": (1.0,)}, out=F16)
    assert "[3]" in caught.value.where[0]
    assert "float16" in caught.value.where[0]
    allowed = merge("linear", [x], values={"weight": (1.0,)}, out=F16, allow_nonfinite=True)
    assert (allowed.result.created, allowed.result.inherited) == (2, 0)
    assert allowed.values.tolist() == [1.0, 65504.0, 65504.0, np.inf, -np.inf]
    inside = merge("linear", [x[:3]], values={"weight": (1.0,)}, out=F16)
    assert inside.result.created == 0


def test_what_an_input_has_is_counted() -> None:
    x, y = np.ones((2, 400_000), dtype=np.float32)
    x[5] = np.nan
    y[399_999] = -np.inf
    y[7] = np.inf
    x[7] = -np.inf
    found = merge("linear", [x, y], values={"weight": (1.0, 1.0)}, workers=2)
    assert (found.result.created, found.result.inherited) == (0, 3)
    assert np.isnan(found.values[[5, 7]]).all()
    assert found.values[399_999] == -np.inf


@pytest.mark.parametrize("bad", [np.nan, np.inf], ids=str)
def test_a_base_gives_its_bad_numbers_too(bad: float) -> None:
    base = np.ones(10, dtype=np.float32)
    base[4] = bad
    found = merge("task_arithmetic", [np.ones(10, dtype=np.float32)], base, values={"weight": (0.5,)})
    assert (found.result.created, found.result.inherited) == (0, 1)


def test_inherited_and_new_are_told_apart() -> None:
    x = np.array([np.nan, 3e38, 1.0], dtype=np.float32)
    values = {"weight": (4.0,), "normalize": False}
    with pytest.raises(NumericError) as caught:
        merge("linear", [x], values=values)
    assert "[1]" in caught.value.where[0]
    allowed = merge("linear", [x], values=values, allow_nonfinite=True)
    assert (allowed.result.created, allowed.result.inherited) == (1, 1)


@pytest.mark.parametrize("stored", [BF16, F16, F32, F64], ids=lambda dtype: dtype.name)
def test_bad_numbers_of_every_type_are_seen(stored: np.dtype) -> None:
    x = np.array([1.0, np.nan, np.inf, 2.0]).astype(stored)
    found = merge("linear", [x], values={"weight": (1.0,)}, out=F32)
    assert (found.result.created, found.result.inherited) == (0, 2)


def test_float64_beyond_float32_is_new() -> None:
    with pytest.raises(NumericError):
        merge("linear", [np.array([1e300])], values={"weight": (1.0,)}, out=F64)


def test_a_copy_counts_but_does_not_refuse() -> None:
    x = np.array([np.nan, np.inf, 1.0], dtype=np.float32)
    plan, sources = plan_of("passthrough", [{"w": x}], None, values={}, out=F32, action=Action.COPY)
    done = run(plan, sources, Memory(plan.entries))
    assert (done.tensors[0].created, done.tensors[0].inherited) == (0, 2)


# Reading, keeping, writing


@pytest.mark.parametrize("method", ["linear", "slerp", "ties"])
def test_inputs_are_read_once_where_they_fit(method: str) -> None:
    values: dict[str, Any] = {"linear": {"weight": (1.0,)}, "slerp": {"t": 0.5}}.get(
        method, {"weight": (1.0,), "density": (0.5,)}
    )
    base = None if method == "linear" else BIG
    plan, sources = plan_of(method, [BIG], base, values=values, out=F32)
    watched = [Watched(one) for one in sources]
    run(plan, watched, Memory(plan.entries), workers=2)
    for one in watched:
        sample = 32 * 1024 * 4 if method == "ties" else 0
        assert sum(stop - start for _, start, stop in one.reads) == BIG["big"].nbytes + sample


def test_inputs_that_do_not_fit_are_read_for_every_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, sources = plan_of("ties", [BIG], BIG, values={"weight": (1.0,), "density": (0.5,)}, out=F32)
    assert passes(plan.entries[0]) == 3  # at most: here one pass around a guess finds the cut
    monkeypatch.setattr(engine, "KEEP_BYTES", 2 * BIG["big"].nbytes - 1)
    watched = [Watched(one) for one in sources]
    run(plan, watched, Memory(plan.entries), workers=2)
    for one in watched:
        assert (
            sum(stop - start for _, start, stop in one.reads) == 2 * BIG["big"].nbytes + 32 * 1024 * 4
        )  # the cut takes one: a sample


def test_the_budget() -> None:
    budget = Budget(10)
    first = budget.take(6)
    assert first.size == 6
    assert budget.take(5) is None
    assert budget.take(4).size == 4
    assert budget.take(1) is None
    budget.give(first)
    assert budget.take(6) is first  # reused as it is
    budget.give(first)
    assert budget.take(5).size == 5  # the spare array makes room
    assert budget.take(2) is None
    assert budget.take(0).size == 0


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_every_byte_is_written_once(workers: int) -> None:
    models = [{**TENSORS, **BIG, "scalar": np.float32(3.0).reshape(()), "empty": np.zeros((0, 4), np.float32)}]
    plan, sources = plan_of("linear", models, None, values={"weight": (1.0,)}, out=BF16)
    sink = Memory(plan.entries)
    written: list[tuple[str, int, int]] = []
    whole = sink.write

    def write(name: str, start: int, data: Any) -> None:
        written.append((name, start, start + memoryview(data).nbytes))
        whole(name, start, data)

    sink.write = write  # type: ignore[method-assign]
    done = run(plan, sources, sink, workers=workers)
    for entry in plan.entries:
        spans = sorted(span[1:] for span in written if span[0] == entry.name)
        assert sum(stop - start for start, stop in spans) == entry.nbytes
        assert all(one[1] == other[0] for one, other in itertools.pairwise(spans))
    assert [result.name for result in done.tensors] == list(models[0])
    assert (done.bytes_read, done.bytes_written) == (plan.input_bytes, plan.output_bytes)
    assert done.seconds > 0


def test_progress_ends_with_everything_done() -> None:
    plan, sources = plan_of("slerp", [TENSORS], TENSORS, values={"t": 0.5}, out=F32)
    calls: list[tuple[int, int]] = []
    callers = set()

    def progress(done: int, total: int) -> None:
        calls.append((done, total))
        callers.add(threading.current_thread())

    run(plan, sources, Memory(plan.entries), workers=2, progress=progress)
    total = plan.input_bytes + plan.output_bytes
    assert calls[-1] == (total, total)
    assert all(0 <= done <= total for done, _ in calls)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert callers == {threading.current_thread()}


def test_a_plan_without_tensors() -> None:
    plan, sources = plan_of("linear", [{}], None, values={"weight": (1.0,)}, out=F32)
    assert run(plan, sources, Memory(plan.entries)).tensors == ()


def test_an_empty_tensor_has_a_digest() -> None:
    found = merge("slerp", [np.zeros((0, 3), np.float32)], np.zeros((0, 3), np.float32), values={"t": 0.5})
    assert found.result.digest == xxhash.xxh3_128_hexdigest(b"")


def test_workers() -> None:
    assert default_workers() >= 1


# Digests


@pytest.mark.parametrize("out", [F32, BF16, F16, F64], ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("shape", [(), (1,), (524_288,), (524_289,), (1_600_000,), (1000, 1003), (3, 400_001)])
@pytest.mark.parametrize("rows", [False, True], ids=["anywhere", "rows"])
def test_digests_are_those_that_verify_takes(shape: tuple[int, ...], out: np.dtype, rows: bool) -> None:
    rng = np.random.default_rng(3)
    models = [np.asarray(rng.normal(size=shape), dtype=np.float32) for _ in range(3)]
    found = merge("model_stock", models[:2], models[2], values={"filter_wise": rows}, out=out, workers=2)
    assert found.result.digest == tensor_digest(source(0, {"w": found.values}), "w")


@pytest.mark.parametrize("size", [0, 1, 1 << 20, (1 << 20) + 1, 5_000_001])
def test_digests_of_copies(size: int) -> None:
    data = np.random.default_rng(1).integers(0, 256, size=size, dtype=np.uint8)
    plan, sources = plan_of("passthrough", [{"w": data}], None, values={}, out=np.dtype(np.uint8), action=Action.COPY)
    sink = Memory(plan.entries)
    done = run(plan, sources, sink, workers=2)
    assert done.tensors[0].digest == tensor_digest(sources[0], "w")
    assert np.array_equal(sink.data["w"], data)


# Tensors that must be equal


def equal_plan(*models: dict[str, np.ndarray]) -> tuple[Any, list[MemoryCheckpoint]]:
    return plan_of("linear", models, None, values={}, out=np.dtype(np.int64), action=Action.EQUAL)


def test_equal_integers_pass() -> None:
    ids = {"position_ids": np.arange(400_000)}
    plan, sources = equal_plan(ids, ids, ids)
    check_equal(plan, sources)
    sink = Memory(plan.entries)
    run(plan, sources, sink)
    assert sink.data["position_ids"].tobytes() == ids["position_ids"].tobytes()


@pytest.mark.parametrize("place", [0, 131_071, 131_072, 399_999])
def test_integers_that_differ_are_named(place: int) -> None:
    ids, other = np.arange(400_000), np.arange(400_000)
    other[place] = -1
    plan, sources = equal_plan({"ids": ids}, {"ids": ids}, {"ids": other})
    with pytest.raises(InputError) as caught:
        check_equal(plan, sources)
    assert "'ids'" in caught.value.message
    assert "int64" in caught.value.message
    assert any("model 3" in line for line in caught.value.where)
    assert not any("model 2" in line for line in caught.value.where)


def test_all_that_differ_are_told_at_once() -> None:
    plan, sources = equal_plan(
        {"a": np.arange(3), "b": np.arange(4), "c": np.arange(5)},
        {"a": np.ones(3, int), "b": np.arange(4), "c": -np.arange(5)},
    )
    with pytest.raises(ManyProblems) as caught:
        check_equal(plan, sources)
    assert [problem.message.split("'")[1] for problem in caught.value.problems] == ["a", "c"]


def test_tensors_that_are_merged_may_differ() -> None:
    models = [{"w": np.full(3, float(i), np.float32)} for i in range(2)]
    plan, sources = plan_of("linear", models, None, values={"weight": (1.0, 1.0)}, out=F32)
    check_equal(plan, sources)


# Passes


def test_passes_begin_as_early_as_they_can() -> None:
    """ties with rescale: the cut (two rounds) beside the whole norm, then the kept norm, then the result."""
    x = {"w": np.ones(3, np.float32)}
    for given, expected in (
        ({"density": (1.0,)}, 1),
        ({"density": (0.5,)}, 3),
        ({"density": (0.5,), "rescale": True}, 4),
    ):
        plan, _ = plan_of("ties", [x], x, values={"weight": (1.0,), **given}, out=F32)
        assert passes(plan.entries[0]) == expected


def test_sums_are_folded_in_the_order_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever worker is first. The numbers are such that another order gives another sum."""

    class Total(Method):
        @reduce(Sum)
        def total(self, x: Array) -> Array:
            return x

        def tile(self, x: Array, total: Array) -> Array:
            return np.full(x.shape[1:], total[0], dtype=np.float32)

    arrived = [threading.Event() for _ in range(4)]

    class LastFirst(Watched):
        """In the first pass a task's bytes come only after those of the next task."""

        def read_into(self, spec: Any, start: int, stop: int, buffer: Any) -> None:
            super().read_into(spec, start, stop, buffer)
            task = start // (4 * TASK)
            if task < 3 and arrived[task + 1].wait(5.0):
                time.sleep(0.02)
            arrived[task].set()

    monkeypatch.setattr(api, "_REGISTRY", dict(api._REGISTRY))
    register("a total", source="")(Total)
    values = np.zeros(4 * TASK, dtype=np.float32)
    values[::TASK] = [2.0**60, 1.0, -(2.0**60), 3.0]
    plan, sources = plan_of("a total", [{"w": values}], None, values={}, out=F32)
    sink = Memory(plan.entries)
    run(plan, [LastFirst(sources[0])], sink, workers=4)
    assert (sink.data["w"].view(np.float32) == 3.0).all()


def test_a_reduction_that_is_not_needed_is_none() -> None:
    """ties with density 1 and rescale: `kept` asks for a cut that does not exist."""
    x = np.array([1.0, 2.0, 3.0], dtype=np.float32)
    found = merge("ties", [x], np.zeros(3, np.float32), values={"weight": (1.0,), "rescale": True})
    assert found.values.tolist() == [1.0, 2.0, 3.0]


# Tensors that are there already


@pytest.mark.parametrize("workers", [1, 3])
def test_what_is_done_is_not_done_again(workers: int) -> None:
    plan, sources = plan_of("linear", [TENSORS], None, values={"weight": (1.0,)}, out=F32)
    told: list[TensorResult] = []
    whole = run(plan, sources, Memory(plan.entries), workers=workers, on_tensor=told.append)
    assert sorted(told, key=lambda r: r.name) == sorted(whole.tensors, key=lambda r: r.name)
    done = {result.name: result for result in whole.tensors if result.name in ("layer 0", "layer 7", "layer 11")}
    watched = Watched(sources[0])
    sink = Memory(plan.entries)
    again: list[TensorResult] = []
    totals: list[tuple[int, int]] = []
    rest = run(
        plan,
        [watched],
        sink,
        workers=workers,
        done=done,
        on_tensor=again.append,
        progress=lambda *now: totals.append(now),
    )
    assert rest.tensors == whole.tensors
    assert {name for name, _, _ in watched.reads} == {result.name for result in again} == set(TENSORS) - set(done)
    assert not sink.data["layer 7"].any()
    assert totals[-1] == (rest.bytes_read + rest.bytes_written,) * 2


def test_nothing_is_left_to_do() -> None:
    plan, sources = plan_of("linear", [TENSORS], None, values={"weight": (1.0,)}, out=F32)
    whole = run(plan, sources, Memory(plan.entries))
    watched = Watched(sources[0])
    rest = run(plan, [watched], Memory(plan.entries), done={result.name: result for result in whole.tensors})
    assert rest.tensors == whole.tensors
    assert watched.reads == []


def test_an_error_of_who_is_told_surfaces() -> None:
    plan, sources = plan_of("linear", [TENSORS], None, values={"weight": (1.0,)}, out=F32)

    def refuse(result: TensorResult) -> None:
        raise StorageError("the journal cannot be written")

    with pytest.raises(StorageError, match="the journal"):
        run(plan, sources, Memory(plan.entries), workers=3, on_tensor=refuse)


def test_kernels_that_cannot_be_loaded_are_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Any:
        raise OSError("cannot map the library")

    plan, sources = plan_of("linear", [TENSORS], None, values={"weight": (1.0,)}, out=F32)
    whole = run(plan, sources, Memory(plan.entries), kernels=False)
    monkeypatch.setattr(engine, "fused", fail)
    assert run(plan, sources, Memory(plan.entries), kernels=True).tensors == whole.tensors


def test_threads_that_cannot_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one: the first must not be left waiting."""
    plan, sources = plan_of("linear", [TENSORS], None, values={"weight": (1.0,)}, out=F32)
    real = threading.Thread.start

    def start(thread: threading.Thread) -> None:
        if thread.name == "smelt-1":
            raise RuntimeError("can't start new thread")
        real(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(StorageError, match="cannot start a thread"):
        run(plan, sources, Memory(plan.entries), workers=3)


def test_a_worker_that_cannot_even_tell_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, sources = plan_of("linear", [TENSORS], None, values={"weight": (1.0,)}, out=F32)
    watched = Watched(sources[0], fails_at="layer 3", error=MemoryError())

    def fail(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(engine._Crew, "_fail", fail)
    with pytest.raises(StorageError, match="not enough memory"):
        run(plan, [watched], Memory(plan.entries), workers=3)
