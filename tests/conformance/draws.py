"""Settings and tensors to try a method on, drawn from what its declaration says and from nothing else."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from conformance.driver import BF16, F16, F32
from smelt.methods import api
from smelt.methods.fields import Field

NAMES = api.names()

TYPES: dict[str, list[np.dtype]] = {"float32": [F32], "bfloat16": [BF16], "float16": [F16], "mixed": [BF16, F32, F16]}
"""The types of the inputs, dealt to models and base in turn."""


def counts(info: api.MethodInfo) -> list[int]:
    """The numbers of models to try: 1 to 4 as the arity allows."""
    low, high = info.models
    return [n for n in range(1, 5) if low <= n and (high is None or n <= high)]


def bases(info: api.MethodInfo) -> list[bool]:
    """Whether to give a base: each way that the method allows."""
    return {"none": [False], "required": [True], "optional": [False, True]}[info.base]


def kinds(info: api.MethodInfo) -> list[tuple[int, bool]]:
    """Every (number of models, with a base) to try."""
    return [(n, with_base) for n in counts(info) for with_base in bases(info)]


def number(field: Field, rng: np.random.Generator) -> float:
    """A number that the field allows: mostly in the middle of things, now and then at an end or beyond the usual."""
    low, high = (-math.inf, math.inf) if field.within is None else (field.within.low, field.within.high)
    if math.isfinite(low) and math.isfinite(high):
        share = float(rng.choice([0.0, 1.0])) if rng.random() < 0.1 else float(rng.uniform(0.02, 0.98))
        value = low + (high - low) * share
        return value if field.within is None or field.within.holds(value) else low + (high - low) * 0.5
    if math.isfinite(low):
        return low + 10.0 ** float(rng.uniform(-6.0, 0.3))
    turn = rng.random()
    if turn < 0.65:
        return float(rng.uniform(0.05, 1.0))
    if turn < 0.8:
        return float(10.0 ** rng.uniform(-8.0, 0.0))
    return float(rng.choice([-0.4, 0.0, 1.0, 1.3]))


def value(field: Field, rng: np.random.Generator, n: int) -> Any:
    """A value for a field; one number per model where it is per model.

    What goes over a whole model is tried in `test_whole`, over several tensors.
    """
    if field.kind == "word":
        words = [word for word in field.words if word != "model"]
        return words[int(rng.integers(len(words)))] if len(words) > 1 else field.default
    if field.per_model:
        return tuple(number(field, rng) for _ in range(n))
    if field.kind == "bool":
        choices: list[Any] = [True, False, *field.words]
        return choices[int(rng.integers(len(choices)))]
    if field.kind == "int":
        low = 0 if field.within is None else max(field.within.low, 0)
        return int(rng.integers(int(low) + 1, int(low) + 12))
    if field.words and rng.random() < 0.3:
        return field.words[int(rng.integers(len(field.words)))]
    return number(field, rng)


def sound(info: api.MethodInfo, values: dict[str, Any], n: int) -> bool:
    """Whether the method accepts the settings together, and its weights do not nearly cancel.

    Weights of opposite sign that leave a small sum are refused because dividing by it amplifies every rounding: that
    says something about the weights, not about the method.
    """
    for name, field in info.fields.items():
        if field.per_model and field.within is None:
            row = values[name]
            if abs(sum(row)) < 0.2 * sum(map(abs, row)):
                return False
    try:
        info.type(values, models=n).check()
    except ValueError:
        return False
    return True


def settings(info: api.MethodInfo, rng: np.random.Generator, n: int) -> dict[str, Any]:
    """Settings drawn from the declaration that make sense together."""
    for _ in range(10_000):
        values = {name: value(field, rng, n) for name, field in info.fields.items()}
        if sound(info, values, n):
            return values
    raise AssertionError(f"{info.name}: no settings found that its own check accepts")


def plain(info: api.MethodInfo, n: int) -> dict[str, Any]:
    """The defaults, with numbers near 0.5 where the recipe must choose."""
    return {
        name: tuple(0.5 + 0.1 * i for i in range(n)) if field.per_model else 0.5
        for name, field in info.fields.items()
        if field.is_required
    }


def active(info: api.MethodInfo, n: int) -> Iterator[dict[str, Any]]:
    """A few settings that set as much of the method in motion as they can: its defaults, then drawn ones."""
    yield plain(info, n)
    for seed in range(3):
        yield settings(info, np.random.default_rng((seed, n, 77)), n)


def tensors(
    shape: tuple[int, ...], rng: np.random.Generator, n: int, types: Sequence[np.dtype], *, steps: bool = False
) -> tuple[list[np.ndarray], np.ndarray]:
    """`n` models near a base. A tenth of their entries are not moved; `steps`: moves are few multiples of one step.

    Steps give many equal magnitudes, as fine-tunes stored in two bytes have.
    """
    base = np.asarray(rng.normal(scale=0.05, size=shape), dtype=np.float32)
    if steps:
        base = np.asarray(np.round(base * 1024) / 1024, dtype=np.float32)
    models = []
    for i in range(n):
        move = rng.integers(-3, 4, size=shape) / 1024 if steps else rng.normal(scale=0.01 * (1 + i), size=shape)
        move = np.where(rng.random(size=shape) < 0.1, 0.0, move)
        models.append(np.asarray(base + move, dtype=np.float32).astype(types[i % len(types)]))
    return models, base.astype(types[n % len(types)])


@functools.cache
def big(shape: tuple[int, ...], n: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Tensors for the tests of cuts, made once."""
    return tensors(shape, np.random.default_rng(5), n, TYPES["mixed"])
