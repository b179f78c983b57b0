"""sma, wma, ema: averages of checkpoints by their place; expo: beyond the last one; geometric_median."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from reference.inputs import Array, Base, Models, deltas64, models64, only, per_model, rows, tensor64
from reference.keep import Keep


def sma(models: Models, base: Base = None, *, keep: Keep | None = None) -> Array:
    """mean_i(x_i)."""
    return np.asarray(np.mean(models64(models), axis=0))


def wma(models: Models, base: Base = None, *, keep: Keep | None = None) -> Array:
    """sum_i i x_i / sum_i i, i = 1 ... n."""
    return np.asarray(np.average(models64(models), axis=0, weights=np.arange(1, len(models) + 1)))


def ema(models: Models, base: Base = None, *, keep: Keep | None = None, alpha: float = 0.2) -> Array:
    """a_1 = x_1, a_i = alpha x_i + (1 - alpha) a_(i-1); the last one."""
    first, *later = models64(models)
    average = first
    for x in later:
        average = alpha * x + (1.0 - alpha) * average
    return np.asarray(average)


def expo(models: Models, base: Base, *, keep: Keep | None = None, alpha: float) -> Array:
    """x + alpha (x - b)."""
    only(models, "expo")
    return np.asarray(tensor64(base, "expo") + (1.0 + alpha) * deltas64(models, base, "expo")[0])


def geometric_median(
    models: Models,
    base: Base = None,
    *,
    keep: Keep | None = None,
    weight: Sequence[float] | None = None,
    max_iter: int = 100,
    tol: float = 1e-9,
    granularity: str = "tensor",
) -> Array:
    """argmin_z sum_i w_i |z - x_i| by Weiszfeld's steps, for the tensor or for each row along the last dimension.

    A distance counts as 1e-6 of the largest distance between two models at least. ValueError for negative weights, and
    where all are 0.
    """
    x = models64(models)
    w = np.asarray(per_model(weight, 1.0, len(x), "weight"))
    if w.min() < 0 or w.sum() == 0:
        raise ValueError("geometric_median: weights of 0 or more, not all 0")
    vectors = np.stack([rows(v) if granularity == "row" else v.reshape(1, v.size) for v in x])  # [n, rows, row length]
    found = [_median(vectors[:, r], w / w.sum(), max_iter, tol) for r in range(vectors.shape[1])]
    return np.asarray(found).reshape(x.shape[1:])


def _median(points: Array, weight: Array, max_iter: int, tol: float) -> Array:
    """The weighted geometric median of points [n, k]."""
    shares = weight
    spread = max(float(np.sqrt(np.sum((a - b) ** 2))) for a in points for b in points)
    for _ in range(max_iter if spread > 0 else 0):
        here = shares @ points
        distance = np.sqrt(np.sum((points - here) ** 2, axis=1))
        pull = weight / np.maximum(distance, 1e-6 * spread)
        step = pull / np.sum(pull)
        moved = np.max(np.abs(step - shares))
        shares = step
        if moved <= tol:
            break
    return np.asarray(shares @ points)
