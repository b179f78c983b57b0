"""Granularity `model`, for every method that has it: the reference on joined tensors, and the same bits however cut.

One tensor alone gives the bits of granularity `tensor`, a merge within another those of one after the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pytest

from conformance.draws import NAMES, TYPES, kinds, settings, sound, tensors
from conformance.driver import BF16, F32, Memory, Streams, complete, merge, merge_tensors, plan_of
from conformance.test_methods import tolerance
from conformance.test_nested import CUTS, OUTERS
from reference.whole import over_model
from smelt.engine import run as engine
from smelt.engine.forecast import forecast
from smelt.engine.kernels import fused
from smelt.engine.reducing import bind
from smelt.engine.steps import StepSource
from smelt.errors import NumericError
from smelt.methods import api
from smelt.planning.entries import Action

pytestmark = pytest.mark.filterwarnings("error")

WHOLE = [name for name in NAMES if "model" in getattr(api.get(name).fields.get("granularity"), "words", ())]
BLOCK = 65536
SHAPES: list[tuple[int, ...]] = [(70, 33), (501,), (), (0,), (3, 5, 7), (311, 521), (1,), (2,)]
"""Tensors of one model: one of several blocks among small ones, a number, and an empty one."""
FLAGS = {"filter_wise": False, "nuslerp_flatten": True}
"""What asks for rows or columns is left out where the whole model is asked for."""

Tensors = dict[str, np.ndarray]


def drawn(info: api.MethodInfo, rng: np.random.Generator, n: int) -> dict[str, Any]:
    """Settings with granularity model; a few elections and cuts at least."""
    for _ in range(100):
        values = settings(info, rng, n)
        values |= {name: FLAGS[name] for name in values if name in FLAGS} | {"granularity": "model"}
        if sound(info, values, n):
            return values
    raise AssertionError(info.name)


def several(n: int, *, seed: int = 0, types: str = "float32", steps: bool = False) -> tuple[list[Tensors], Tensors]:
    """`n` models and a base of tensors whose moves differ in size, so that whole models rank otherwise than tensors."""
    rng = np.random.default_rng((n, seed))
    models: list[Tensors] = [{} for _ in range(n)]
    base: Tensors = {}
    for number, shape in enumerate(SHAPES):
        made, base[f"t{number}"] = tensors(shape, rng, n, TYPES[types], steps=steps)
        for model, tensor in zip(models, made, strict=True):
            move = tensor.astype(F32) - base[f"t{number}"].astype(F32)
            moved = base[f"t{number}"].astype(F32) + move * np.float32(2.0 ** (number % 3))
            model[f"t{number}"] = np.asarray(moved, dtype=tensor.dtype)
    return models, base


def bits(outcome: Mapping[str, Any]) -> dict[str, bytes]:
    return {name: one.bits for name, one in outcome.items()}


def test_the_methods_that_have_it() -> None:
    """Those for which it is a choice: docs/design/decisions.md tells of each of the others why not."""
    assert [
        *("breadcrumbs", "breadcrumbs_ties", "geometric_median", "karcher", "localize", "model_stock", "multislerp"),
        *("nuslerp", "pcb", "ramplus_tl", "sce", "slerp", "ties"),
    ] == WHOLE


@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize("method", WHOLE)
def test_it_agrees_with_the_reference(method: str, types: str) -> None:
    info = api.get(method)
    for turn, (n, with_base) in enumerate(kinds(info) * 2):
        rng = np.random.default_rng((turn, len(types)))
        models, base = several(n, seed=turn, types=types, steps=turn % 2 == 1)
        given = base if with_base else None
        values = drawn(info, rng, n)
        want = twin(method, models, given, dict.fromkeys(base, values), seed=turn)
        got = merge_tensors(method, models, given, values=values, seed=turn, workers=1 + turn % 3)
        unsure = elections(method, models, given, values, want, seed=turn)
        for name in base:
            inputs = [model[name] for model in (*models, base)]
            wrong = np.abs(got[name].values.astype(np.float64) - want[name]) > tolerance(want[name], inputs, F32)
            assert not (wrong & ~unsure[name]).any(), (name, values, wrong.sum())


def twin(
    method: str, models: list[Tensors], base: Tensors | None, values: Mapping[str, Mapping[str, Any]], *, seed: int
) -> dict[str, np.ndarray]:
    """The reference's tensors, for settings of each under their recipe names."""
    fields = api.get(method).fields
    given = {
        tensor: {fields[name].attribute: value for name, value in complete(api.get(method), its, len(models)).items()}
        for tensor, its in values.items()
    }
    decoded = [{name: tensor.astype(F32) for name, tensor in model.items()} for model in models]
    origin = None if base is None else {name: tensor.astype(F32) for name, tensor in base.items()}
    return over_model(method, decoded, origin, keep=lambda name: Streams(seed=seed, name=name), values=given)


def elections(
    method: str, models: list[Tensors], base: Tensors | None, values: dict[str, Any], want: Tensors, *, seed: int
) -> Tensors:
    """Entries whose sign election hangs on the last bit: weights that differ by 1e-13 give something else."""
    if "weight" not in values:
        return {name: np.zeros(tensor.shape, dtype=bool) for name, tensor in want.items()}
    nudged = []
    for sign in (1.0, -1.0):
        weight = tuple(w * (1.0 + sign * (-1) ** i * 1e-13) for i, w in enumerate(values["weight"]))
        nudged.append(twin(method, models, base, {name: {**values, "weight": weight} for name in want}, seed=seed))
    found = {name: np.abs(nudged[0][name] - nudged[1][name]) > 1e-7 for name in want}
    assert sum(int(one.sum()) for one in found.values()) <= 20
    return found


@pytest.mark.parametrize("method", WHOLE)
def test_tensors_may_differ_in_what_no_reduction_looks_at(method: str) -> None:
    """Each tensor gets what the whole model merged with its settings would have in its place."""
    info = api.get(method)
    n, with_base = kinds(info)[-1]
    models, base = several(n, seed=5)
    given = base if with_base else None
    rng = np.random.default_rng(8)
    first, other = drawn(info, rng, n), drawn(info, rng, n)
    second = first | {name: other[name] for name in info.type.per_tensor}
    assert sound(info, second, n)
    plan, sources = plan_of(method, models, given, values=first, out=F32)
    values = {entry.name: second if place % 2 else first for place, entry in enumerate(plan.entries)}
    full = {name: complete(info, its, n) for name, its in values.items()}
    plan = replace(plan, entries=tuple(replace(entry, values=full[entry.name]) for entry in plan.entries))
    sink = Memory(plan.entries)
    engine.run(plan, sources, sink, kernels=False)
    want = twin(method, models, given, values, seed=0)
    for name in base:
        got = sink.data[name].view(F32).reshape(base[name].shape)
        assert (np.abs(got - want[name]) <= tolerance(want[name], [m[name] for m in (*models, base)], F32)).all()


class Watched:
    """A method, of which some settings must not be looked at."""

    def __init__(self, method: Any, hidden: set[str]) -> None:
        self._method = method
        self._hidden = hidden

    def __getattr__(self, name: str) -> Any:
        assert name not in self._hidden, f"a reduction looks at {name}"
        return getattr(self._method, name)


@pytest.mark.parametrize("method", WHOLE)
def test_reductions_do_not_look_at_the_settings_that_may_differ(method: str) -> None:
    info = api.get(method)
    n, with_base = kinds(info)[-1]
    rng = np.random.default_rng(3)
    models, base = tensors((40, 30), rng, n, [F32])
    hidden = {info.fields[name].attribute for name in info.type.per_tensor}
    seen = set()
    for _ in range(20):
        values = drawn(info, rng, n)
        plan, _ = plan_of(
            method, [{"w": m} for m in models], {"w": base} if with_base else None, values=values, out=F32
        )
        watched = Watched(bind(plan.entries[0]), hidden)
        x = np.stack(models).reshape(n, -1)
        flat = base.reshape(-1)
        given: dict[str, Any] = {"x": x, "base": flat, "deltas": x - flat, "vectors": x, "size": flat.size}
        given |= {"uniform": rng.random(x.shape, dtype=np.float32)}
        for reduction in info.reductions:
            given[reduction.name] = None
            if reduction.when(watched):
                found = reduction.function(watched, *(given[name] for name in reduction.arguments))
                given[reduction.name] = reduction.reducer.whole(found)
                seen.add(reduction.name)
    assert seen == {reduction.name for reduction in info.reductions if reduction.scope == "tensor"}


@pytest.mark.parametrize("method", WHOLE)
def test_one_tensor_alone_is_its_whole_model(method: str) -> None:
    """Also a large one, whose cut is guessed from a sample where it is its own."""
    info = api.get(method)
    for n, with_base in kinds(info)[-2:]:
        rng = np.random.default_rng(21)
        for shape in ((37, 11), (1201, 1303)):
            models, base = tensors(shape, rng, n, TYPES["bfloat16"], steps=True)
            values = drawn(info, rng, n)
            given = base if with_base else None
            for kernels in (False, True):
                run = {"values": values, "kernels": kernels, "seed": 4}
                whole = merge(method, models, given, **run)
                each = merge(method, models, given, **{**run, "values": {**values, "granularity": "tensor"}})
                assert whole.bits == each.bits, (values, shape, kernels)


@pytest.mark.parametrize("method", WHOLE)
def test_neither_cuts_nor_threads_nor_kernels_show(method: str) -> None:
    info = api.get(method)
    n, with_base = kinds(info)[-1]
    for types in ("mixed", "bfloat16"):
        models, base = several(n, types=types, steps=True)
        given = base if with_base else None
        values = drawn(info, np.random.default_rng(2), n)
        first = bits(merge_tensors(method, models, given, values=values, out=BF16, workers=1))
        for cut in (
            {"tile": BLOCK, "workers": 1},
            {"tile": BLOCK, "workers": 5, "keep_bytes": 0},
            {"tile": 1 << 20, "workers": 3},
            {"tile": BLOCK, "workers": 3, "kernels": True},
        ):
            assert bits(merge_tensors(method, models, given, values=values, out=BF16, **cut)) == first, cut


@pytest.mark.parametrize("method", WHOLE)
def test_it_is_something_else_than_each_tensor_for_itself(method: str) -> None:
    info = api.get(method)
    n, with_base = kinds(info)[-1]
    models, base = several(n)
    given = base if with_base else None
    rng = np.random.default_rng(13)
    for _ in range(20):
        values = drawn(info, rng, n)
        ways = [
            bits(merge_tensors(method, models, given, values={**values, "granularity": one}))
            for one in ("tensor", "model")
        ]
        if ways[0] != ways[1]:
            return
    pytest.fail(f"{method}: granularity has no effect")


@pytest.mark.parametrize("method", ["pcb", "localize", "model_stock", "geometric_median"])
def test_each_row_by_itself(method: str) -> None:
    """Rows differ from the tensor that they make; a tensor of one row does not."""
    n, with_base = kinds(api.get(method))[-1]
    for shape, same in (((64, 33), False), ((1, 2112), True)):
        models, base = tensors(shape, np.random.default_rng(1), n, [F32], steps=True)
        given = base if with_base else None
        rows, whole = (merge(method, models, given, values={"granularity": one}).values for one in ("row", "tensor"))
        assert np.allclose(rows, whole, rtol=1e-5) == same


def test_rows_by_either_name() -> None:
    info = api.get("model_stock")
    models, base = tensors((64, 33), np.random.default_rng(1), 2, [F32], steps=True)
    rows = merge("model_stock", models, base, values={"granularity": "row"})
    assert rows.bits == merge("model_stock", models, base, values={"filter_wise": True}).bits
    assert rows.bits != merge("model_stock", models, base, values={}).bits
    with pytest.raises(ValueError, match="filter_wise asks for each row"):
        info.type(complete(info, {"filter_wise": True, "granularity": "model"}, 2), models=2).check()


@pytest.mark.parametrize("method", WHOLE)
def test_every_method_may_stand_inside(method: str) -> None:
    """A merge within a recipe, of several tensors, read by merges that cut tensors in other ways."""
    info = api.get(method)
    n, with_base = kinds(info)[-1]
    models, base = several(n, types="mixed")
    named = base if with_base else None
    values = drawn(info, np.random.default_rng(4), n)
    written = {name: one.values for name, one in merge_tensors(method, models, named, values=values, seed=3).items()}
    others, origin = several(2, seed=9)
    for outer, numbers in [*OUTERS.values(), ("ties", {"weight": (0.7, 0.6), "density": 0.4, "granularity": "model"})]:
        outside = {**origin} if api.get(outer).base != "none" else None
        given = [written, others[1]][: 1 if api.get(outer).models[1] == 1 else 2]
        expected = bits(merge_tensors(outer, given, outside, values=numbers, out=BF16, seed=3))
        inner, sources = plan_of(method, models, named, values=values, out=F32, seed=3)
        step = StepSource("step", inner, sources, documents={})
        plan, stored = plan_of(outer, given, outside, values=numbers, out=BF16, seed=3)
        for cut in CUTS:
            sink = Memory(plan.entries)
            engine.run(plan, [step, *stored[1:]], sink, **cut)
            assert {name: data.tobytes() for name, data in sink.data.items()} == expected, (outer, cut)


def test_parts_of_a_step_may_be_read_without_a_run() -> None:
    models, base = several(2)
    values = {"weight": 0.5, "density": 0.5, "granularity": "model", "rescale": True}
    whole = bits(merge_tensors("ties", models, base, values=values))
    plan, sources = plan_of("ties", models, base, values=values, out=F32)
    inner = StepSource("inner", plan, sources, documents={})
    numbers = {"weight": 1.0, "density": 0.3, "granularity": "model"}
    plan, stored = plan_of("ties", [models[0]], base, values=numbers, out=F32)
    outer = StepSource("outer", plan, [inner, stored[1]], documents={})
    first = {name: np.frombuffer(whole[name], dtype=F32).reshape(base[name].shape) for name in base}
    twice = bits(merge_tensors("ties", [first], base, values=numbers))
    for step, expected in ((inner, whole), (outer, twice)):
        for name in ("t0", "t5", "t2"):
            buffer = bytearray(len(expected[name]))
            step.read_into(step.tensors[name], 0, len(buffer), buffer)
            assert bytes(buffer) == expected[name]


def test_a_stored_tensor_counts_once() -> None:
    """An output that repeats a layer has its task vector once; the layer is merged in both places."""
    models, base = several(2)
    values = {"weight": 0.5, "density": 0.3, "granularity": "model"}
    plain, sources = plan_of("ties", models, base, values=values, out=F32)
    again = replace(plain.entries[0], name="again")
    plan = replace(plain, entries=(*plain.entries, again))
    sink, once = Memory(plan.entries), Memory(plain.entries)
    done = engine.run(plan, sources, sink)
    engine.run(plain, sources, once)
    assert all(np.array_equal(sink.data[entry.name], once.data[entry.name]) for entry in plain.entries)
    assert np.array_equal(sink.data["again"], sink.data["t0"])  # no two numbers are equal, so that none is drawn for
    assert done.bytes_read == 3 * plain.input_bytes + again.input_bytes == forecast(plan).bytes_read


@pytest.mark.parametrize("keep_bytes", [0, None])
@pytest.mark.parametrize("method", WHOLE)
def test_the_forecast_counts_every_pass(method: str, keep_bytes: int | None) -> None:
    info = api.get(method)
    n, with_base = kinds(info)[-1]
    models, base = several(n)
    values = drawn(info, np.random.default_rng(6), n)
    plan, sources = plan_of(method, models, base if with_base else None, values=values, out=F32)
    done = engine.run(plan, sources, Memory(plan.entries), keep_bytes=keep_bytes, kernels=False)
    assert done.bytes_read == forecast(plan, keep_bytes=keep_bytes).bytes_read
    active = bind(plan.entries[0]).active()
    assert (done.bytes_read > plan.input_bytes) == bool(active)


def test_groups_are_apart() -> None:
    """Tensors with another granularity, copies, and those of other models stay out of it."""
    models, base = several(3)
    values = {"weight": 0.5, "density": 0.3, "granularity": "model"}
    plan, sources = plan_of("ties", models, base, values=values, out=F32)
    full = dict(plan.entries[0].values)
    entries = list(plan.entries)
    entries[1] = replace(entries[1], values={**full, "granularity": "tensor"})
    two = {name: value[:2] if isinstance(value, tuple) else value for name, value in full.items()}
    entries[0] = replace(entries[0], inputs=entries[0].inputs[:2], values=two)
    entries[5] = replace(entries[5], inputs=entries[5].inputs[:2], values=two)
    entries[4] = replace(entries[4], action=Action.COPY, inputs=entries[4].inputs[:1], base=None)
    mixed = replace(plan, entries=tuple(entries))
    sink = Memory(mixed.entries)
    engine.run(mixed, sources, sink, workers=3)
    found = {name: data.tobytes() for name, data in sink.data.items()}
    pick = lambda names, count: ([{k: m[k] for k in names} for m in models[:count]], {k: base[k] for k in names})  # noqa: E731
    pair = bits(merge_tensors("ties", *pick(["t0", "t5"], 2), values=values))
    rest = bits(merge_tensors("ties", *pick(["t2", "t3", "t6", "t7"], 3), values=values))
    alone = bits(merge_tensors("ties", *pick(["t1"], 3), values={**values, "granularity": "tensor"}))
    assert found == {**pair, **rest, **alone, "t4": models[0]["t4"].tobytes()}


def test_what_goes_wrong_in_a_pass_ends_the_run() -> None:
    models, base = several(2)
    values = {"weight": 0.5, "density": 0.3, "granularity": "model"}
    plan, sources = plan_of("ties", models, base, values=values, out=F32)
    with (
        mock.patch.object(sources[1], "read_into", side_effect=OSError("no more")),
        pytest.raises(OSError, match="no more"),
    ):
        engine.run(plan, sources, Memory(plan.entries), workers=4)
    engine.run(plan, sources, Memory(plan.entries), workers=4)


def test_directions_that_cancel_over_the_model() -> None:
    base = {"a": np.zeros(4, dtype=F32), "b": np.zeros(3, dtype=F32)}
    one = {"a": np.float32([1, 0, 0, 0]), "b": np.float32([0, 1, 0])}
    models = [
        one,
        {name: -tensor for name, tensor in one.items()},
        one,
        {name: -tensor for name, tensor in one.items()},
    ]
    with pytest.raises(NumericError, match="tensor 'a': the weighted directions of the models cancel"):
        merge_tensors("multislerp", models, base, values={"weight": 1.0, "granularity": "model"})


def test_progress_covers_all_passes() -> None:
    models, base = several(2)
    values = {"weight": 0.5, "density": 0.3, "granularity": "model"}
    plan, sources = plan_of("ties", models, base, values=values, out=F32)
    seen: list[tuple[int, int]] = []
    engine.run(plan, sources, Memory(plan.entries), progress=lambda done, total: seen.append((done, total)))
    total = 3 * plan.input_bytes + plan.output_bytes
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert {one for _, one in seen} == {total}


def test_kernels_take_part() -> None:
    """With inputs of one type the compiled cut of ties counts digits of stored bytes, in every pass."""
    models, base = several(2, types="bfloat16", steps=True)
    values = {"weight": 0.5, "density": 0.3, "granularity": "model"}
    if ("ties", "cut") not in fused().functions:
        pytest.skip("no compiled kernels")
    plain = bits(merge_tensors("ties", models, base, values=values))
    assert bits(merge_tensors("ties", models, base, values=values, kernels=True, workers=2)) == plain
