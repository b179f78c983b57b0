"""Runs one method on arrays through the real engine, with plans made by hand: no recipe, no files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import ml_dtypes
import numpy as np

from smelt.dtypes import BY_NAME
from smelt.engine import run as engine
from smelt.engine.backends import HOST, Backend
from smelt.engine.rng import key, uniform
from smelt.engine.tensor import TensorResult
from smelt.methods import api
from smelt.planning.anatomy import Part, Role
from smelt.planning.entries import Action, Entry, Input, Plan, PlannedModel
from smelt.specs import ModelRef, TensorSpec
from smelt.storage.sources.memory import MemoryCheckpoint

BF16 = np.dtype(ml_dtypes.bfloat16)
F16 = np.dtype(np.float16)
F32 = np.dtype(np.float32)
F64 = np.dtype(np.float64)

Tensors = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Outcome:
    """One output tensor: `values` in the output's type, and what the engine reports of it."""

    values: np.ndarray
    result: TensorResult

    @property
    def bits(self) -> bytes:
        return self.values.tobytes()


class Memory:
    """A sink of byte arrays."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.data = {entry.name: np.zeros(entry.nbytes, dtype=np.uint8) for entry in entries}

    def write(self, name: str, start: int, data: Any) -> None:
        piece = np.frombuffer(data, dtype=np.uint8)
        self.data[name][start : start + piece.size] = piece

    def read_back(self, name: str, start: int, stop: int, buffer: Any) -> None:
        np.frombuffer(buffer, dtype=np.uint8)[:] = self.data[name][start:stop]


def complete(info: api.MethodInfo, values: Mapping[str, Any], n: int) -> dict[str, Any]:
    """All settings of a method: those given, defaults for the others; a per-model one as one number per model."""
    full = {}
    for name, field in info.fields.items():
        value = values.get(name, field.default)
        full[name] = tuple(value if isinstance(value, Sequence) else [value] * n) if field.per_model else value
    assert set(values) <= set(full)
    return full


def source(number: int, tensors: Tensors) -> MemoryCheckpoint:
    """A model in memory."""
    stored = {
        name: (
            TensorSpec(name, BY_NAME[values.dtype.name], values.shape),
            np.frombuffer(np.ascontiguousarray(values).tobytes(), dtype=np.uint8),
        )
        for name, values in tensors.items()
    }
    return MemoryCheckpoint(f"model {number + 1}", stored)


def plan_of(
    method: str,
    models: Sequence[Tensors],
    base: Tensors | None,
    *,
    values: Mapping[str, Any],
    out: np.dtype,
    seed: int = 0,
    action: Action = Action.MERGE,
) -> tuple[Plan, list[MemoryCheckpoint]]:
    """A plan with one entry for each tensor of the first model, and the models to run it on (the base last)."""
    given = [*models] if base is None else [*models, base]
    sources = [source(i, tensors) for i, tensors in enumerate(given)]
    full = complete(api.get(method), values, len(models)) if action is Action.MERGE else {}
    entries = []
    for name, first in models[0].items():
        inputs = tuple(Input(i, s.tensors[name], i) for i, s in enumerate(sources))
        entries.append(
            Entry(
                name=name,
                dtype=BY_NAME[out.name],
                shape=first.shape,
                part=Part(Role.AFTER, None, None, name),
                action=action,
                method=method,
                inputs=inputs[: len(models)],
                base=None if base is None else inputs[-1],
                values=full,
            )
        )
    planned = tuple(PlannedModel(ModelRef(s.name, s.name), s.name, "memory") for s in sources)
    return Plan(method, planned, 0, None, tuple(entries), "", seed=seed), sources


def merge_tensors(
    method: str,
    models: Sequence[Tensors],
    base: Tensors | None = None,
    *,
    values: Mapping[str, Any],
    out: np.dtype = F32,
    seed: int = 0,
    tile: int | None = None,
    workers: int = 1,
    keep_bytes: int = engine.KEEP_BYTES,
    allow_nonfinite: bool = False,
    kernels: bool = False,
    backend: Backend = HOST,
) -> dict[str, Outcome]:
    """Merge several tensors in one run. `keep_bytes` is what the engine may hold between passes."""
    plan, sources = plan_of(method, models, base, values=values, out=out, seed=seed)
    sink = Memory(plan.entries)
    with mock.patch.object(engine, "KEEP_BYTES", keep_bytes):
        done = engine.run(
            plan,
            sources,
            sink,
            workers=workers,
            tile=tile,
            allow_nonfinite=allow_nonfinite,
            kernels=kernels,
            backend=backend,
        )
    return {
        entry.name: Outcome(sink.data[entry.name].view(out).reshape(entry.shape), result)
        for entry, result in zip(plan.entries, done.tensors, strict=True)
    }


def merge(
    method: str, models: Sequence[np.ndarray], base: np.ndarray | None = None, *, name: str = "w", **options: Any
) -> Outcome:
    """Merge one tensor; `options` are those of `merge_tensors`."""
    inputs = [{name: model} for model in models]
    return merge_tensors(method, inputs, None if base is None else {name: base}, **options)[name]


class Streams:
    """The engine's random numbers, for the references: what a tensor called `name` is given."""

    def __init__(self, *, seed: int = 0, name: str = "w") -> None:
        self._seed = seed
        self._name = name

    def uniform(self, model_index: int, shape: tuple[int, ...]) -> np.ndarray:
        size = int(np.prod(shape, dtype=np.int64))
        numbers = uniform(key(self._seed, self._name, model_index), 0, size)
        return numbers.astype(np.float64).reshape(shape)


def step(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The distance between neighbouring numbers of a floating type at these values (float64 in and out)."""
    bits, lowest = {"float64": (52, -1022), "float32": (23, -126), "float16": (10, -14), "bfloat16": (7, -126)}[
        dtype.name
    ]
    _, exponent = np.frexp(np.asarray(values, dtype=np.float64))
    return np.asarray(np.ldexp(1.0, np.maximum(exponent - 1, lowest) - bits))
