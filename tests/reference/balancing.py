"""localize, consensus, pcb: which entries of which task vectors count, decided entry by entry."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from reference.inputs import Array, Base, Models, column, deltas64, per_model, rows, tensor64
from reference.keep import Keep, keep_ranks, uniform


class _Drawn:
    """Random numbers that are there already."""

    def __init__(self, numbers: Array) -> None:
        self.numbers = numbers

    def uniform(self, model_index: int, shape: tuple[int, ...], /) -> Array:
        return self.numbers.reshape(shape)


def largest(score: Array, density: float, *, over_rows: bool, keep: Keep | None, model_index: int) -> NDArray[np.bool_]:
    """Mark the max(1, floor(density N)) largest scores of the tensor, or of each row; equals as in `keep_ranks`."""
    if density >= 1.0 or not score.size:
        return np.ones(score.shape, dtype=bool)
    parts = rows(score) if over_rows else score.reshape(1, score.size)
    drawn = uniform(keep, model_index, score.shape).reshape(parts.shape)
    count = max(1, math.floor(density * parts.shape[1])) if density > 0.0 else 0
    marked = [
        keep_ranks(part, first=0, count=count, keep=_Drawn(numbers), model_index=model_index)
        for part, numbers in zip(parts, drawn, strict=True)
    ]
    return np.asarray(marked).reshape(score.shape)


def localize(
    models: Models,
    base: Base,
    *,
    keep: Keep | None = None,
    density: Sequence[float] | None = None,
    lambda_: float = 1.0,
    granularity: str = "tensor",
) -> Array:
    """b + lambda times the mean, at each entry, of those d_i that are among their model's largest and not 0."""
    over_rows = granularity == "row"
    d = deltas64(models, base, "localize")
    rho = per_model(density, 0.05, len(d), "density")
    masks = [largest(np.abs(d[i]), rho[i], over_rows=over_rows, keep=keep, model_index=i) for i in range(len(d))]
    kept = np.where(np.stack(masks), d, 0.0)
    overlap = np.sum(kept != 0.0, axis=0)
    return np.asarray(tensor64(base, "localize") + lambda_ * np.sum(kept, axis=0) / np.maximum(overlap, 1))


def consensus(
    models: Models,
    base: Base,
    *,
    keep: Keep | None = None,
    weight: Sequence[float] | None = None,
    threshold: Sequence[float] | None = None,
    agreement: int = 2,
    lambda_: float = 1.0,
) -> Array:
    """b + lambda tau where at least `agreement` models have |w_i d_i| >= threshold_i |tau - w_i d_i|; b elsewhere.

    tau = sum_i w_i d_i. ValueError unless there are two models or more and as many as must agree.
    """
    d = deltas64(models, base, "consensus")
    if len(d) < 2 or agreement > len(d):
        raise ValueError("consensus takes two models or more, and as many as must agree")
    own = column(per_model(weight, 1.0, len(d), "weight"), d.ndim - 1) * d
    level = per_model(threshold, 0.4, len(d), "threshold")
    masks = [np.abs(own[i]) >= level[i] * np.abs(np.sum(np.delete(own, i, axis=0), axis=0)) for i in range(len(d))]
    agreed = np.sum(masks, axis=0) >= agreement
    return np.asarray(tensor64(base, "consensus") + lambda_ * np.where(agreed, np.sum(own, axis=0), 0.0))


def pcb(
    models: Models,
    base: Base,
    *,
    keep: Keep | None = None,
    density: Sequence[float] | None = None,
    lambda_: float = 1.0,
    granularity: str = "tensor",
) -> Array:
    """b + lambda sum_i beta_i d_i / sum_i beta_i, beta_i = softmax(n norm(d_i d_i)) sum_j softmax(norm(d_i d_j)).

    Only the largest beta_i of each model count. norm maps least to 0 and largest to 1 (all to 0 where they are equal),
    over the tensor or over each row, as softmax does.
    """
    over_rows = granularity == "row"
    d = deltas64(models, base, "pcb")
    b = tensor64(base, "pcb")
    n = len(d)
    if not b.size:
        return b
    rho = per_model(density, 0.1, n, "density")
    parts = np.stack([rows(v) if over_rows else v.reshape(1, v.size) for v in d])
    beta = np.empty_like(parts)
    for i in range(n):
        inter = [_softmax(_norm(parts[i] * parts[j]), 1) for j in range(n)]
        beta[i] = _softmax(_norm(parts[i] * parts[i]), n) * np.sum(inter, axis=0)
    beta = beta.reshape(d.shape)
    kept = [largest(beta[i], rho[i], over_rows=over_rows, keep=keep, model_index=i) for i in range(n)]
    beta = np.where(np.stack(kept), beta, 0.0)
    divisor = np.sum(beta, axis=0)
    return np.asarray(b + lambda_ * np.sum(beta * d, axis=0) / np.where(divisor > 0.0, divisor, 1.0))


def _norm(values: Array) -> Array:
    low, high = values.min(axis=-1, keepdims=True), values.max(axis=-1, keepdims=True)
    moved = high > low
    return np.where(moved, (values - low) / np.where(moved, high - low, 1.0), 0.0)


def _softmax(norm: Array, factor: int) -> Array:
    """Of factor times numbers up to 1; along rows."""
    powers = np.exp(factor * (norm - 1.0))
    return np.asarray(powers / np.sum(powers, axis=-1, keepdims=True))
