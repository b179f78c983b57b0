"""A merge within a recipe gives the bits that writing it first would have given, for every method on either side."""

from __future__ import annotations

import threading
from typing import Any
from unittest import mock

import numpy as np
import pytest

from conformance.draws import NAMES, TYPES, kinds, plain, settings, tensors
from conformance.driver import BF16, F32, Memory, merge, plan_of
from conformance.test_invariance import busy_settings
from smelt.engine import run as engine
from smelt.engine.steps import StepSource
from smelt.errors import NumericError
from smelt.methods import api

pytestmark = pytest.mark.filterwarnings("error")

BLOCK = 65536
SHAPE = (311, 521)
"""Two blocks and a part of one; rows are odd in length, and an odd number of them makes a block."""
CUTS: list[dict[str, Any]] = [
    {"tile": BLOCK, "workers": 1},
    {"tile": BLOCK, "workers": 4, "keep_bytes": 0},
    {"tile": 1 << 20, "workers": 2},
]
OUTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "elements": ("linear", {"weight": (0.7, 0.6)}),
    "elements after a reduction": ("slerp", {"t": 0.3}),
    "rows": ("nuslerp", {"weight": (0.7, 0.6), "nuslerp_flatten": False}),
    "slabs": ("nuslerp", {"weight": (0.7, 0.6), "nuslerp_flatten": False, "nuslerp_row_wise": True}),
    "a cut first": ("ties", {"weight": (0.7, 0.6), "density": (0.5, 0.9)}),
}
"""How the outer method cuts tensors."""


def several_models(info: api.MethodInfo) -> tuple[int, bool]:
    return [(n, base) for n, base in kinds(info) if n <= 2 or n == info.models[0]][-1]


class Nested:
    """An outer merge of an inner one and of other tensors; the inner one stands first among its models."""

    def __init__(
        self,
        inner: str,
        inner_values: Any,
        outer: str,
        outer_values: Any,
        *,
        shape: tuple[int, ...] = SHAPE,
        between: np.dtype = F32,
        types: str = "mixed",
    ) -> None:
        n, with_base = several_models(api.get(inner))
        rng = np.random.default_rng(11)
        models, base = tensors(shape, rng, n, TYPES[types])
        self.inner = (inner, models, base if with_base else None)
        self.between = between
        self.inner_values = inner_values
        written = merge(*self.inner, values=inner_values, out=between, seed=3)
        count, outer_base = several_models(api.get(outer))
        others, origin = tensors(shape, rng, count, TYPES["mixed" if types == "mixed" else "float32"])
        self.outer = (outer, [written.values, *others[1:]], origin if outer_base else None)
        self.outer_values = outer_values
        self.expected = merge(*self.outer, values=outer_values, out=BF16, seed=3)

    def run(self, *, kernels: bool = False, keep_bytes: int = engine.KEEP_BYTES, **cuts: Any) -> engine.RunResult:
        """Run both as one; the bits must be those of one after the other."""
        method, models, base = self.inner
        named = None if base is None else {"w": base}
        plan, sources = plan_of(
            method, [{"w": m} for m in models], named, values=self.inner_values, out=self.between, seed=3
        )
        step = StepSource("step", plan, sources, documents={})
        method, models, base = self.outer
        named = None if base is None else {"w": base}
        plan, stored = plan_of(method, [{"w": m} for m in models], named, values=self.outer_values, out=BF16, seed=3)
        sink = Memory(plan.entries)
        with mock.patch.object(engine, "KEEP_BYTES", keep_bytes):
            done = engine.run(plan, [step, *stored[1:]], sink, kernels=kernels, **cuts)
        assert sink.data["w"].tobytes() == self.expected.bits, (self.inner[0], method, cuts, keep_bytes)
        assert done.tensors[0] == self.expected.result
        return done


@pytest.mark.parametrize("method", NAMES)
def test_every_method_may_stand_inside(method: str) -> None:
    info = api.get(method)
    n, _ = several_models(info)
    for values in busy_settings(info, n).values():
        for outer, numbers in OUTERS.values():
            nested = Nested(method, values, outer, numbers)
            for cut in CUTS:
                nested.run(**cut)


@pytest.mark.parametrize("method", NAMES)
def test_every_method_may_stand_outside(method: str) -> None:
    info = api.get(method)
    n, _ = several_models(info)
    for between in (F32, BF16):
        inner = {"weight": (0.7, 0.6), "density": (0.5, 0.9)}
        for values in busy_settings(info, n).values():
            nested = Nested("ties", inner, method, values, between=between)
            for cut in CUTS:
                nested.run(**cut)


@pytest.mark.parametrize("method", NAMES)
def test_kernels_do_not_show(method: str) -> None:
    """They take inputs of one type, begin at whole blocks, and remember by block what was drawn."""
    info = api.get(method)
    n, _ = several_models(info)
    drawn = settings(info, np.random.default_rng(5), n)
    half = plain(info, n) | {name: (0.5, 0.4)[:n] for name in ("density",) if name in info.fields}
    for values in (drawn, half):
        for outer in ("elements", "rows"):
            for types in ("bfloat16", "float32"):
                nested = Nested(method, values, *OUTERS[outer], types=types)
                nested.run(kernels=True, tile=BLOCK, workers=2)


@pytest.mark.parametrize("inner", ["linear", "ties", "dare_ties", "della", "model_stock", "slerp"])
def test_all_workers_help_with_the_reductions_of_a_large_tensor(inner: str) -> None:
    info = api.get(inner)
    n, _ = several_models(info)
    values = plain(info, n) | {name: 0.4 for name in ("density",) if name in info.fields}
    nested = Nested(inner, values, *OUTERS["a cut first"], shape=(1201, 1303))
    for workers, keep in ((1, 0), (5, 0), (5, engine.KEEP_BYTES)):
        nested.run(workers=workers, keep_bytes=keep, tile=BLOCK)


def test_wide_pieces_are_made_once() -> None:
    """Slabs of 200 003 numbers, asked for in parts: each is computed once, not once for each part."""
    nested = Nested(*OUTERS["slabs"], *OUTERS["elements"], shape=(3, 200_003))
    _, models, base = nested.inner
    stored = [*models, *nested.outer[1][1:], *([] if base is None else [base])]
    for cut in CUTS:
        again = 2 if cut.get("keep_bytes") == 0 else 1
        done = nested.run(**cut)
        assert done.bytes_read <= again * sum(tensor.nbytes for tensor in stored)


def test_a_new_infinity_of_the_merge_within_is_told_of_it() -> None:
    huge = np.full(SHAPE, 3e38, dtype=np.float32)
    plan, sources = plan_of("linear", [{"w": huge}] * 2, None, values={"weight": 1.0, "normalize": False}, out=F32)
    step = StepSource("step", plan, sources, documents={})
    outer, _ = plan_of("linear", [{"w": huge}], None, values={"weight": 1.0}, out=F32)
    with pytest.raises(NumericError, match="tensor 'w' would get a NaN or infinity"):
        engine.run(outer, [step], Memory(outer.entries), workers=3, tile=BLOCK)


def test_parts_of_a_step_may_be_read_without_a_run() -> None:
    rng = np.random.default_rng(2)
    models, base = tensors(SHAPE, rng, 2, TYPES["mixed"])
    values = {"weight": 0.5, "density": 0.5}
    whole = merge("ties", models, base, values=values).bits
    plan, sources = plan_of("ties", [{"w": m} for m in models], {"w": base}, values=values, out=F32)
    step = StepSource("step", plan, sources, documents={})
    for start, stop in ((0, 1), (5, 4099), (len(whole) - 3, len(whole)), (7, 7), (0, len(whole))):
        buffer = bytearray(stop - start)
        step.read_into(step.tensors["w"], start, stop, buffer)
        assert bytes(buffer) == whole[start:stop]


def test_a_run_that_is_stopped_leaves_no_thread_behind() -> None:
    """Workers stop between the tasks of a reduction within, not after all of it; the merge may be run again."""
    nested = Nested("ties", {"weight": (0.7, 0.6), "density": 0.5}, *OUTERS["a cut first"], shape=(1201, 1303))

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        nested.run(workers=4, tile=BLOCK, keep_bytes=0, progress=interrupt)
    assert threading.active_count() == before
    nested.run(workers=4, tile=BLOCK)


def test_a_failure_within_reaches_every_worker() -> None:
    """One reads a source that fails; the others, who wait for its reductions, end with the same error."""
    rng = np.random.default_rng(2)
    models, base = tensors((1201, 1303), rng, 2, TYPES["mixed"])
    values = {"weight": 0.5, "density": 0.5}
    plan, sources = plan_of("ties", [{"w": m} for m in models], {"w": base}, values=values, out=F32)
    step = StepSource("step", plan, sources, documents={})
    outer, _ = plan_of("linear", [{"w": models[0].astype(F32)}], None, values={"weight": 1.0}, out=F32)
    failing = mock.patch.object(sources[1], "read_into", side_effect=OSError("no more"))
    with failing, pytest.raises(OSError, match="no more"):
        engine.run(outer, [step], Memory(outer.entries), workers=4, tile=BLOCK)
