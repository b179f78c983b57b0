"""Every registered method against its float64 twin, on equal inputs, and on inputs that merge tools stumble over.

The suite walks the registry: a new method is tested by being there. It needs a twin in `reference/registry.py`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from conformance.draws import NAMES, TYPES, bases, counts, kinds, number, plain, settings, sound, tensors, value
from conformance.driver import BF16, F16, F32, Outcome, Streams, complete, merge, step
from reference.registry import REFERENCE
from smelt.errors import NumericError, SmeltError
from smelt.methods import api

pytestmark = pytest.mark.filterwarnings("error")

SMALL = [(), (1,), (0,), (7,), (0, 3), (3, 0), (257, 1), (64, 33), (3, 5, 7)]
LARGE = [(70001,), (300, 1000)]

SHARE = 2.0**-40
"""Part of the largest input by which float64 sums in another order may differ (about 4000 of its roundings)."""

SINGULAR = {"model_stock": "t is not clamped: near opposite task vectors it multiplies the rounding of x - b by 1e5"}
"""Methods whose result is not determined by float32 inputs nearly, but not quite, on one line."""


def twin(
    method: str, models: list[np.ndarray], base: np.ndarray | None, values: dict[str, Any], *, seed: int = 0
) -> np.ndarray:
    """The reference's result, for inputs of any type and settings under their recipe names."""
    info = api.get(method)
    full = complete(info, values, len(models))
    given = {field.attribute: full[name] for name, field in info.fields.items()}
    decoded = [model.astype(F32) for model in models]
    return REFERENCE[method](decoded, None if base is None else base.astype(F32), keep=Streams(seed=seed), **given)


def tolerance(want: np.ndarray, inputs: list[np.ndarray], out: np.dtype) -> np.ndarray:
    """How far a result may lie from the reference's, per entry.

    Half a step of the output's type, for its rounding; two steps of float32 at the largest number of the entry (inputs
    and result), because results are rounded to float32 first, and because x - b is rounded to float32 where a formula
    that is written with x is worked out with the delta; and SHARE of the tensor's largest input, for what float64 sums
    taken in another order may differ where they cancel.
    """
    wide = [np.abs(tensor.astype(np.float64)) for tensor in inputs]
    largest = np.maximum.reduce([np.abs(want), *wide])
    overall = max((float(tensor.max()) for tensor in wide if tensor.size), default=0.0)
    return np.asarray(0.5 * step(want, out) + 2.0 * step(largest, F32) + SHARE * overall)


def agree(
    method: str,
    models: list[np.ndarray],
    base: np.ndarray | None,
    values: dict[str, Any],
    *,
    out: np.dtype = F32,
    seed: int = 0,
) -> Outcome | None:
    """Assert that the engine gives what the reference does; None where both refuse."""
    try:
        want = twin(method, models, base, values, seed=seed)
    except ValueError:
        with pytest.raises(SmeltError):
            merge(method, models, base, values=values, out=out, seed=seed)
        return None
    got = merge(method, models, base, values=values, out=out, seed=seed)
    assert got.values.shape == want.shape
    bound = tolerance(want, models if base is None else [*models, base], out)
    wrong = np.abs(got.values.astype(np.float64) - want) > bound
    if wrong.any() and "weight" in values:
        wrong &= ~undecided(method, models, base, values, seed=seed, bound=bound)
    worst = np.abs(got.values.astype(np.float64) - want)[wrong].max(initial=0.0)
    assert not wrong.any(), f"{values}, {want.shape}: {wrong.sum()} of {want.size} entries differ, by up to {worst}"
    assert (got.result.created, got.result.inherited) == (0, 0)
    return got


def undecided(
    method: str,
    models: list[np.ndarray],
    base: np.ndarray | None,
    values: dict[str, Any],
    *,
    seed: int,
    bound: np.ndarray,
) -> np.ndarray:
    """Entries whose sign election hangs on the last bit: weights that differ by 1e-13 give something else."""
    nudged = []
    for sign in (1.0, -1.0):
        weight = tuple(w * (1.0 + sign * (-1) ** i * 1e-13) for i, w in enumerate(values["weight"]))
        nudged.append(twin(method, models, base, {**values, "weight": weight}, seed=seed))
    found = np.abs(nudged[0] - nudged[1]) > bound
    assert found.sum() <= max(2, 1e-4 * found.size), "elections may hang on the last bit in a few entries only"
    return found


@pytest.mark.parametrize("method", NAMES)
def test_it_has_a_reference(method: str) -> None:
    assert method in REFERENCE


@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize("method", NAMES)
def test_it_agrees_with_the_reference(method: str, types: str) -> None:
    info = api.get(method)
    rng = np.random.default_rng((len(types), NAMES.index(method)))
    ways = kinds(info)
    for i, shape in enumerate(SMALL * 3):
        n, with_base = ways[int(rng.integers(len(ways)))] if i >= len(ways) else ways[i]
        models, base = tensors(shape, rng, n, TYPES[types], steps=i % 2 == 1)
        out = TYPES[types][i % len(TYPES[types])]
        agree(method, models, base if with_base else None, settings(info, rng, n), out=out, seed=i % 3)
    shape = LARGE[list(TYPES).index(types) % 2]
    for n, with_base in (ways[0], ways[-1]):
        models, base = tensors(shape, rng, n, TYPES[types], steps=with_base)
        agree(method, models, base if with_base else None, settings(info, rng, n), out=TYPES[types][0])


@pytest.mark.parametrize("method", NAMES)
def test_defaults_agree_with_the_reference(method: str) -> None:
    info = api.get(method)
    rng = np.random.default_rng(4)
    for n, with_base in kinds(info):
        models, base = tensors((41, 23), rng, n, [F32])
        agree(method, models, base if with_base else None, plain(info, n))


@pytest.mark.parametrize("out", [F32, BF16, F16], ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("method", NAMES)
def test_equal_inputs_come_out_as_they_are(method: str, out: np.dtype) -> None:
    """Within one step of the output's type: whatever the settings are where there is a base, since nothing moved;
    without one for per-model numbers that sum to 1, and tolerances (method-wide numbers) at their defaults."""
    info = api.get(method)
    rng = np.random.default_rng(6)
    for n, with_base in kinds(info):
        for shape in [(), (1,), (0,), (31,), (257, 1), (64, 33), (3, 5, 7)]:
            _, tensor = tensors(shape, rng, n, [out])
            values = settings(info, rng, n)
            if not with_base:
                for name, field in info.fields.items():
                    if field.per_model:
                        row = [abs(v) + 0.1 for v in values[name]]
                        values[name] = tuple(v / sum(row) for v in row)
                    elif field.kind not in ("bool", "word"):
                        values[name] = field.default
            got = merge(method, [tensor] * n, tensor if with_base else None, values=values, out=out).values
            want = tensor.astype(np.float64)
            assert (np.abs(got.astype(np.float64) - want) <= step(want, out)).all(), (values, shape, n, with_base)


@pytest.mark.parametrize(
    ("method", "name"),
    [(m, name) for m in NAMES for name, field in api.get(m).fields.items() if field.words != ("tensor", "model")],
)
def test_every_parameter_changes_something(method: str, name: str) -> None:
    info = api.get(method)
    field = info.fields[name]
    ways = kinds(info)[::-1]
    for attempt in range(120):
        rng = np.random.default_rng((attempt, 9))
        n, with_base = ways[attempt % len(ways)]
        models, base = tensors((40, 30), rng, n, [F32])
        values = settings(info, rng, n)
        other = {**values, name: value(field, rng, n)}
        if other[name] == values[name] or not sound(info, other, n):
            continue
        both = [merge(method, models, base if with_base else None, values=v) for v in (values, other)]
        if both[0].bits != both[1].bits:
            return
    pytest.fail(f"{method}: no two values of {name} were found to give different results")


@pytest.mark.parametrize("method", NAMES)
def test_per_model_numbers_belong_to_their_model(method: str) -> None:
    """Exchanging the models together with their per-model numbers exchanges nothing but the random streams."""
    info = api.get(method)
    if info.models[1] == 1:
        pytest.skip("it takes one model: there is nothing to exchange")
    if not any(field.per_model for field in info.fields.values()):
        pytest.skip("it has no per-model numbers")
    rng = np.random.default_rng(12)
    n = counts(info)[-1]
    models, base = tensors((40, 30), rng, n, [F32])
    values = settings(info, rng, n)
    if "randomized" in values:
        values["randomized"] = False
    if uses(info, "uniform"):
        seeds = [merge(method, models, base, values=values, seed=seed).bits for seed in (0, 1)]
        if seeds[0] != seeds[1]:
            pytest.skip("it draws numbers, whose streams follow the place of a model: another order is another draw")
    turned = {k: v[::-1] if info.fields[k].per_model else v for k, v in values.items()}
    given = base if bases(info)[-1] else None
    got = [
        merge(method, m, given, values=v).values.astype(np.float64)
        for m, v in ((models, values), (models[::-1], turned))
    ]
    assert np.abs(got[0] - got[1]).max() <= 1e-6


def uses(info: api.MethodInfo, argument: str) -> bool:
    """Whether any function of the method asks for `argument`."""
    return argument in info.tile_arguments or any(argument in reduction.arguments for reduction in info.reductions)


# Inputs that merge tools stumble over


def ended(work: Callable[[], Any], seconds: float = 30.0) -> Any:
    """The result of `work`, or the error it raised; fails where it does not come to an end."""
    found: list[Any] = []

    def attempt() -> None:
        try:
            found.append(work())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(seconds)
    assert found, "it hangs"
    return found[0]


@pytest.mark.parametrize("method", NAMES)
def test_all_zero_inputs_give_zero(method: str) -> None:
    info = api.get(method)
    rng = np.random.default_rng(2)
    for zero in (0.0, -0.0):
        for n, with_base in kinds(info):
            for shape in [(), (1,), (5,), (9, 1), (1, 9), (12, 10)]:
                tensor = np.full(shape, zero, dtype=F32)
                values = settings(info, rng, n)
                got = merge(method, [tensor] * n, tensor if with_base else None, values=values)
                assert (got.values == 0.0).all(), (values, shape)


@pytest.mark.parametrize("method", NAMES)
def test_one_model_that_moved(method: str) -> None:
    """All models but the last are the base itself: zero task vectors beside one that is not."""
    info = api.get(method)
    rng = np.random.default_rng(8)
    for n, with_base in kinds(info):
        models, base = tensors((23, 19), rng, n, [F32])
        agree(method, [base] * (n - 1) + models[-1:], base if with_base else None, settings(info, rng, n))


@pytest.mark.parametrize("power", [-20, -13, 8])
@pytest.mark.parametrize("method", NAMES)
def test_small_and_large_numbers(method: str, power: int) -> None:
    """Moves down to 1e-8, where formulas have least divisors; numbers near 20, where softmax has peaks."""
    info = api.get(method)
    rng = np.random.default_rng(11)
    for n, with_base in kinds(info):
        for steps in (False, True):
            models, base = tensors((37, 11), rng, n, [F32], steps=steps)
            scaled = [np.ldexp(tensor, power) for tensor in (*models, base)]
            for turn in range(4):
                values = settings(info, rng, n)
                for name, field in info.fields.items():  # a number without a range may be a length: half the time it is
                    if turn % 2 and field.kind == "float" and field.within is None and not field.per_model:
                        values[name] = values[name] * 2.0**power
                agree(method, scaled[:-1], scaled[-1] if with_base else None, values)


@pytest.mark.parametrize("method", [name for name in NAMES if "weight" in api.get(name).fields])
def test_weights_that_cancel(method: str) -> None:
    """Their sum is 0, or nearly: a divisor of 1 or half way, as the reference says, or refused before anything runs."""
    info = api.get(method)
    rng = np.random.default_rng(16)
    for n, with_base in kinds(info):
        models, base = tensors((37, 11), rng, n, [F32])
        for rest in (0.0, 4e-9, 3e-7):
            weight = [0.5 * (-1) ** i for i in range(n)]
            weight[-1] = rest - sum(weight[:-1])
            values = {**settings(info, rng, n), "weight": tuple(weight)}
            try:
                info.type(values, models=n).check()
            except ValueError:
                continue
            agree(method, models, base if with_base else None, values)


@pytest.mark.parametrize("signs", [(1, 1), (1, -1), (1, 2), (1, -0.5), (2, -1, -1), (1, 1, 1, -3)], ids=str)
@pytest.mark.parametrize("method", NAMES)
def test_tensors_on_one_line(method: str, signs: tuple[float, ...]) -> None:
    """Parallel and antiparallel ones, and some whose sum is 0: angles of 0 and of 180 degrees, exactly and nearly."""
    info = api.get(method)
    rng = np.random.default_rng(len(signs))
    direction = np.round(rng.normal(size=(12, 10)) * 256).astype(F32) / 1024
    for n, with_base in kinds(info):
        for noise in (0.0,) if method in SINGULAR else (0.0, 1e-3):
            base = np.round(rng.normal(size=(12, 10)) * 256).astype(F32) / 1024 * with_base
            lengths = [signs[i % len(signs)] for i in range(n)]
            models = [base + direction * F32.type(length) for length in lengths]
            models = [(x + noise * rng.normal(size=x.shape)).astype(F32) for x in models]
            for values in (plain(info, n), settings(info, rng, n)):
                agree(method, models, base if with_base else None, values)


@pytest.mark.parametrize("method", NAMES)
def test_subnormal_numbers(method: str) -> None:
    info = api.get(method)
    rng = np.random.default_rng(10)
    for n, with_base in kinds(info):
        models, base = tensors((23, 19), rng, n, [F32])
        tiny = [np.ldexp(tensor, -130).astype(F32) for tensor in (*models, base)]
        agree(method, tiny[:-1], tiny[-1] if with_base else None, settings(info, rng, n))


@pytest.mark.parametrize("method", NAMES)
def test_huge_numbers_are_right_or_refused(method: str) -> None:
    """Near the end of float32: a finite result where there is one, else an error that names the tensor."""
    info = api.get(method)
    rng = np.random.default_rng(13)
    for n, with_base in kinds(info):
        models, base = tensors((23, 19), rng, n, [F32])
        huge = [(tensor / np.abs(tensor).max() * 3.3e38).astype(F32) for tensor in (*models, base)]
        values = settings(info, rng, n)
        found = ended(lambda m=huge, v=values, b=with_base: merge(method, m[:-1], m[-1] if b else None, values=v))
        if isinstance(found, NumericError):
            assert "'w'" in found.message
        else:
            assert isinstance(found, Outcome), found
            assert np.isfinite(found.values).all()


def lost(method: str, place: str, bad: float) -> str | None:
    """What is wrong with the way a bad number is dealt with; None where it is reported."""
    info = api.get(method)
    rng = np.random.default_rng(14)
    for n, with_base in kinds(info):
        if place == "base" and not with_base:
            continue
        models, base = tensors((23, 19), rng, n, [F32])
        target = models[0] if place == "model" else base
        target[3, 4] = bad
        given, values = base if with_base else None, plain(info, n)
        found = ended(lambda m=models, b=given, v=values: merge(method, m, b, values=v))
        if isinstance(found, NumericError):
            assert "'w'" in found.message
        elif not isinstance(found, Outcome):
            return f"{found!r} with {n} models"
        elif found.result.inherited < 1 or np.isfinite(found.values[3, 4]):
            return f"it became {found.values[3, 4]} with {n} models"
    return None


@pytest.mark.parametrize("bad", [np.nan, np.inf], ids=str)
@pytest.mark.parametrize("place", ["model", "base"])
@pytest.mark.parametrize("method", NAMES)
def test_a_bad_number_is_reported(method: str, place: str, bad: float) -> None:
    """It stays where it is and is counted, or the merge is refused with the tensor's name. It is never lost."""
    if place == "base" and api.get(method).base == "none":
        pytest.skip("no base is read")
    found = lost(method, place, bad)
    assert found is None, found


@pytest.mark.parametrize("method", NAMES)
def test_inputs_are_left_alone(method: str) -> None:
    info = api.get(method)
    n, with_base = kinds(info)[-1]
    models, base = tensors((64, 33), np.random.default_rng(1), n, TYPES["mixed"])
    before = [tensor.tobytes() for tensor in (*models, base)]
    merge(method, models, base if with_base else None, values=settings(info, np.random.default_rng(1), n))
    assert [tensor.tobytes() for tensor in (*models, base)] == before


def test_numbers_drawn_lie_in_their_range() -> None:
    rng = np.random.default_rng(0)
    for method in NAMES:
        for field in api.get(method).fields.values():
            if field.kind == "float":
                for _ in range(50):
                    assert field.check(number(field, rng)) is not None
