"""Several settings of every method in one run: the bits of one run for each, and reductions that are truly the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from conformance import draws
from conformance.driver import F16, F32, Memory, complete, plan_of
from smelt.engine import run as engine
from smelt.engine.sharing import Known
from smelt.engine.variants import bytes_together, run_variants
from smelt.errors import NumericError, RecipeError
from smelt.methods import api
from smelt.methods.api import Array, Method, per_model, reduce, register, scalar
from smelt.methods.reducers import Sum
from smelt.planning.entries import Plan
from smelt.storage.sources.memory import MemoryCheckpoint

KINDS = [(name, kind) for name in draws.NAMES for kind in draws.kinds(api.get(name))[-2:]]
Case = tuple[list[Plan], list[MemoryCheckpoint]]


def case(name: str, kind: tuple[int, bool], *, out: np.dtype = F32) -> Case:
    """Plans of one method that differ in settings: drawn ones, and each of them with one other setting changed."""
    info, (n, with_base) = api.get(name), kind
    rng = np.random.default_rng((n, 3))
    models, base = draws.tensors((60, 40), rng, n, draws.TYPES["bfloat16"], steps=True)
    chosen = [complete(info, values, n) for values in list(draws.active(info, n))[:3]]
    for values in chosen[:2]:
        for field in info.fields.values():
            other = values | {field.name: draws.value(field, rng, n)}
            if draws.sound(info, other, n):
                chosen.append(other)
    given = [{"a": model, "b": model[:7]} for model in models]
    bases = {"a": base, "b": base[:7]} if with_base else None
    planned = [plan_of(name, given, bases, values=values, out=out) for values in chosen]
    return [plan for plan, _ in planned], planned[0][1]


def alone(plan: Plan, sources: list[MemoryCheckpoint], **settings: Any) -> Memory | NumericError:
    sink = Memory(plan.entries)
    try:
        engine.run(plan, sources, sink, workers=1, **settings)
    except NumericError as error:
        return error
    return sink


@pytest.mark.parametrize("kernels", [False, True], ids=["definitions", "kernels"])
@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_variants_are_the_same_bits(name: str, kind: tuple[int, bool], kernels: bool) -> None:
    plans, sources = case(name, kind)
    expected = [alone(plan, sources, kernels=kernels) for plan in plans]
    for workers, keep in ((1, 0), (3, 1 << 20)):
        sinks = [Memory(plan.entries) for plan in plans]
        done = run_variants(plans, sources, sinks, workers=workers, kernels=kernels, keep_bytes=keep)
        for number, (one, sink) in enumerate(zip(expected, sinks, strict=True)):
            assert isinstance(one, NumericError) == (number in done.failed)
            if isinstance(one, Memory):
                assert all(np.array_equal(one.data[tensor], sink.data[tensor]) for tensor in one.data)


def flat(result: Any) -> list[Any]:
    """The arrays of what a reduction gave."""
    if hasattr(result, "__dataclass_fields__"):
        return [array for field in result.__dataclass_fields__ for array in flat(getattr(result, field))]
    return [array for part in result for array in flat(part)] if isinstance(result, tuple) else [np.asarray(result)]


@pytest.mark.parametrize("kernels", [False, True], ids=["definitions", "kernels"])
@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_reductions_depend_on_what_they_name(name: str, kind: tuple[int, bool], kernels: bool) -> None:
    """Whatever else is set: reductions that count as the same, made for each setting apart, are the same bits."""
    plans, sources = case(name, kind)
    found: dict[Any, list[Any]] = {}
    for plan in plans:
        known = Known()
        try:
            run_variants([plan], sources, [Memory(plan.entries)], workers=1, kernels=kernels, known=known)
        except NumericError:
            continue
        for key, (result,) in known._results.items():
            arrays = flat(result)
            for before, now in zip(found.setdefault(key, arrays), arrays, strict=True):
                assert before.tobytes() == now.tobytes(), key
    reductions = [r for r in api.get(name).reductions if r.uses is not None]
    assert bool(found) or not reductions or name in ("nuslerp",)


def test_variants_over_the_whole_model() -> None:
    """Their reductions are not those of one tensor: the plans are carried out one by one, and all is as alone."""
    rng = np.random.default_rng(1)
    models, base = draws.tensors((70, 30), rng, 2, draws.TYPES["bfloat16"])
    given = [{"a": model, "b": model[:9]} for model in models]
    values = [
        {"weight": (0.6, 0.4), "density": (d, d), "granularity": g} for d in (0.2, 0.5) for g in ("model", "tensor")
    ]
    planned = [plan_of("ties", given, {"a": base, "b": base[:9]}, values=one, out=F32) for one in values]
    plans, sources = [plan for plan, _ in planned], planned[0][1]
    sinks = [Memory(plan.entries) for plan in plans]
    told: list[tuple[int, str]] = []
    done = run_variants(plans, sources, sinks, on_tensor=lambda number, result: told.append((number, result.name)))
    assert sorted(told) == [(number, name) for number in range(4) for name in "ab"]
    assert done.bytes_read == bytes_together(plans)
    for plan, sink in zip(plans, sinks, strict=True):
        expected = alone(plan, sources)
        assert isinstance(expected, Memory)
        assert all(np.array_equal(expected.data[name], sink.data[name]) for name in "ab")


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("tile", [1 << 16, 1 << 18])
def test_threads_and_tiles_do_not_show(workers: int, tile: int) -> None:
    rng = np.random.default_rng(1)
    models, base = draws.tensors((700, 3000), rng, 2, draws.TYPES["bfloat16"])
    settings = [{"weight": (0.6, 0.4), "density": (d, d), "lambda": f} for d in (0.2, 0.5) for f in (0.5, 1.0)]
    planned = [plan_of("ties", [{"w": m} for m in models], {"w": base}, values=v, out=F32) for v in settings]
    plans, sources = [plan for plan, _ in planned], planned[0][1]
    sinks = [Memory(plan.entries) for plan in plans]
    run_variants(plans, sources, sinks, workers=workers, tile=tile, kernels=True)
    for plan, sink in zip(plans, sinks, strict=True):
        expected = alone(plan, sources, kernels=True)
        assert isinstance(expected, Memory)
        assert np.array_equal(expected.data["w"], sink.data["w"])


def slerps(count: int) -> Case:
    rng = np.random.default_rng(2)
    models, base = draws.tensors((2200, 1000), rng, 1, draws.TYPES["bfloat16"])
    given = [{"a": models[0], "b": models[0][:50]}]
    bases = {"a": base, "b": base[:50]}
    planned = [plan_of("slerp", given, bases, values={"t": i / count}, out=F32) for i in range(count)]
    return [plan for plan, _ in planned], planned[0][1]


class Counting:
    """A source that counts the bytes that are read of it."""

    def __init__(self, source: MemoryCheckpoint) -> None:
        self._source = source
        self.name, self.tensors, self.files, self.read = source.name, source.tensors, source.files, 0

    def read_into(self, spec: Any, start: int, stop: int, buffer: Any) -> None:
        self.read += stop - start
        self._source.read_into(spec, start, stop, buffer)


@pytest.mark.parametrize("keep", [0, 1 << 30])
def test_inputs_are_read_once_for_all(keep: int) -> None:
    """A pass of reductions and one that writes read the inputs once each; kept inputs once; those in memory never."""
    plans, sources = slerps(5)
    counting: Any = [Counting(source) for source in sources]
    known = Known()
    sinks = [Memory(plan.entries) for plan in plans]
    done = run_variants(plans, counting, sinks, workers=2, keep_bytes=keep, known=known)
    size = plans[0].input_bytes
    multiple = plans[0].entries[0].input_bytes  # the small tensor is done by one worker, in whose buffers it stays
    expected = size if keep else size + multiple
    assert done.bytes_read == sum(one.read for one in counting)
    assert done.bytes_read == expected
    assert bytes_together(plans, keep_bytes=keep) == (size if keep else 2 * size)
    before = sum(one.read for one in counting)
    again = run_variants(plans[:1], counting, [Memory(plans[0].entries)], workers=2, keep_bytes=0, known=known)
    assert again.bytes_read == sum(one.read for one in counting) - before == size  # no pass but the one that writes
    there = [MemoryCheckpoint(s.name, {n: (t, s.data(n).copy()) for n, t in s.tensors.items()}) for s in sources]
    assert run_variants(plans, there, sinks, workers=2).bytes_read == 0


def test_equal_tensors_are_worked_out_once() -> None:
    """Tensors that a setting does not reach go to all candidates from one computation; -0 and 0 are two settings."""
    plans, sources = slerps(2)
    one = plans[0]
    calls = []
    original = api.get("slerp").type.tile  # type: ignore[attr-defined]

    def counted(self: Any, *arguments: Any) -> Any:
        calls.append(self.t)
        return original(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api.get("slerp").type, "tile", counted)
        alone(one, sources, kernels=False)
        once = len(calls)
        sinks = [Memory(one.entries) for _ in range(3)]
        run_variants([one, one, one], sources, sinks, workers=1, kernels=False)
        assert len(calls) == 2 * once
    assert all(np.array_equal(sinks[0].data[name], sink.data[name]) for sink in sinks for name in sink.data)
    models, base = draws.tensors((5, 5), np.random.default_rng(0), 1, [F32])
    signed = [
        plan_of("task_arithmetic", [{"w": models[0]}], {"w": base * 0}, values={"weight": (1.0,), "lambda": f}, out=F32)
        for f in (0.0, -0.0)
    ]
    sinks = [Memory(signed[0][0].entries) for _ in signed]
    run_variants([plan for plan, _ in signed], signed[0][1], sinks, workers=1)
    for (plan, given), sink in zip(signed, sinks, strict=True):
        expected = alone(plan, given)
        assert isinstance(expected, Memory)
        assert np.array_equal(expected.data["w"], sink.data["w"])


def test_one_candidate_that_fails_does_not_end_the_others() -> None:
    rng = np.random.default_rng(4)
    models, base = draws.tensors((30, 20), rng, 1, [F32])
    values = [{"weight": (1.0,), "lambda": f} for f in (1.0, 1e9, 0.5)]
    given = [{"a": models[0], "b": models[0]}], {"a": base, "b": base}
    planned = [plan_of("task_arithmetic", *given, values=v, out=F16) for v in values]
    plans = [plan for plan, _ in planned]
    sinks = [Memory(plan.entries) for plan in plans]
    done = run_variants(plans, planned[0][1], sinks, workers=2)
    assert list(done.failed) == [1]
    assert "NaN or infinity" in str(done.failed[1])
    for number in (0, 2):
        expected = alone(plans[number], planned[0][1])
        assert isinstance(expected, Memory)
        assert np.array_equal(expected.data["b"], sinks[number].data["b"])
        assert len(done.tensors[number]) == 2
    with pytest.raises(NumericError, match="NaN or infinity"):
        run_variants([plans[1]], planned[0][1], [sinks[1]], workers=2)


# --- methods of one's own -------------------------------------------------------------------------------------------


def method(uses: tuple[str, ...] | None) -> Callable[[], None]:
    """Define `own`: its reduction reads `scale`, and names `uses`."""

    def define() -> None:
        @register("own", source="a test")
        class Own(Method):
            """x · shift · Σ scale · abs(x)."""

            scale: Any = per_model(1.0, doc="of the sum")
            shift: float = scalar(1.0, doc="of the result")

            @reduce(Sum, uses=uses)
            def total(self, x: Array) -> Array:
                return abs(x) * self.scale

            def tile(self, x: Array, total: Array) -> Array:
                return (x[0] * self.shift + total[0]).astype(np.float32)

    return define


@pytest.fixture(params=[None, (), ("scale",)], ids=["undeclared", "wrong", "right"])
def own(request: pytest.FixtureRequest) -> Iterator[tuple[str, ...] | None]:
    method(request.param)()
    yield request.param
    api.forget("own")


def test_own_methods_are_shared_as_they_declare(own: tuple[str, ...] | None) -> None:
    """What names no settings is made for each candidate; what names too few is refused, and never wrong."""
    x = np.arange(2000, dtype=np.float32)
    values = [{"scale": (s,), "shift": f} for s in (1.0, 2.0) for f in (1.0, 3.0)]
    planned = [plan_of("own", [{"w": x}], None, values=v, out=F32) for v in values]
    plans, sources = [plan for plan, _ in planned], planned[0][1]
    sinks = [Memory(plan.entries) for plan in plans]
    known = Known()
    if own == ():
        with pytest.raises(RecipeError, match="total reads the setting `scale`, which it does not name"):
            run_variants(plans, sources, sinks, workers=1, known=known)
        return
    run_variants(plans, sources, sinks, workers=1, known=known)
    assert len(known._results) == (4 if own is None else 2)
    for plan, sink in zip(plans, sinks, strict=True):
        expected = alone(plan, sources)
        assert isinstance(expected, Memory)
        assert np.array_equal(expected.data["w"], sink.data["w"])


def test_uses_are_settings() -> None:
    with pytest.raises(TypeError, match=r"total uses \['size'\], which are no settings"):
        method(("size",))()
