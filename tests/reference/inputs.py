"""What a reference method is given, in float64: tensors, deltas, rows, per-model settings."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Models = Sequence[NDArray[np.float32]]
Base = NDArray[np.float32] | None


def tensor64(tensor: NDArray[np.float32] | None, method: str) -> Array:
    """The tensor in float64 (from float32, the type all inputs are decoded to); ValueError if there is none."""
    if tensor is None:
        raise ValueError(f"{method} needs a base")
    return np.asarray(np.asarray(tensor, dtype=np.float32), dtype=np.float64)


def models64(models: Models) -> Array:
    """The models' tensors in float64, stacked: [n, *shape]. ValueError without a model."""
    if not models:
        raise ValueError("no models")
    return np.stack([np.asarray(x, dtype=np.float32) for x in models]).astype(np.float64)


def deltas64(models: Models, base: Base, method: str) -> Array:
    """d_i = x_i - b, subtracted in float32 (one rounding), then float64: [n, *shape]. ValueError without a base."""
    b = np.asarray(tensor64(base, method), dtype=np.float32)
    if not models:
        raise ValueError("no models")
    return np.stack([np.asarray(x, dtype=np.float32) - b for x in models]).astype(np.float64)


def only(models: Models, method: str, *, count: int = 1) -> None:
    """ValueError unless there are exactly `count` models (the base not counted)."""
    if len(models) != count:
        raise ValueError(f"{method} takes {count} model(s), got {len(models)}")


def rows(tensor: Array) -> Array:
    """The tensor as a matrix of its vectors along the last dimension; 1-d is one row, 0-d one row of one element."""
    last = tensor.shape[-1] if tensor.ndim else 1
    return tensor.reshape(math.prod(tensor.shape[:-1]), last)


def per_model(values: Sequence[float] | None, default: float, count: int, name: str) -> list[float]:
    """One number per model; `default` for all where none are given. ValueError if their number is wrong."""
    given = [default] * count if values is None else [float(v) for v in values]
    if len(given) != count:
        raise ValueError(f"{name}: {len(given)} values for {count} models")
    return given


def column(values: Sequence[float], ndim: int) -> Array:
    """Per-model numbers as [n, 1, ..., 1], to meet a stack of tensors with `ndim` dimensions."""
    return np.asarray(values, dtype=np.float64).reshape(-1, *[1] * ndim)


def safe_divisor(divisor: Array) -> Array:
    """The divisor, 1 where its absolute value is below 1e-8."""
    return np.where(np.abs(divisor) < 1e-8, 1.0, divisor)
