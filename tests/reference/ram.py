"""ram and ramplus_tl: deltas that only one model touched are taken whole, shared ones are averaged."""

from __future__ import annotations

import numpy as np

from reference.inputs import Array, Base, Models, column, deltas64, tensor64
from reference.keep import Keep


def ram(models: Models, base: Base, *, keep: Keep | None = None, epsilon: float = 1e-5) -> Array:
    """b + the mean of the active d_i, where model i is active where |d_i| > epsilon; b where none is."""
    d = deltas64(models, base, "ram")
    active = np.abs(d) > epsilon
    count = np.sum(active, axis=0)
    return np.asarray(tensor64(base, "ram") + np.sum(np.where(active, d, 0.0), axis=0) / np.maximum(count, 1))


def ramplus_tl(
    models: Models,
    base: Base,
    *,
    keep: Keep | None = None,
    r: float = 0.1,
    alpha: float = 0.2,
    epsilon: float = 1e-5,
    granularity: str = "tensor",
) -> Array:
    """ram, with what only model i touched times 1 + r clamp(shared_i / max(unique_i, epsilon), 0, alpha).

    unique_i counts the entries of the tensor where only model i is active, shared_i those where it is active
    among others.
    """
    d = deltas64(models, base, "ramplus_tl")
    active = np.abs(d) > epsilon
    count = np.sum(active, axis=0)
    entries = tuple(range(1, d.ndim))
    unique = np.sum(active & (count == 1), axis=entries)
    shared = np.sum(active & (count > 1), axis=entries)
    boost = 1.0 + r * np.clip(shared / np.maximum(unique, epsilon), 0.0, alpha)
    total = np.sum(np.where(active, np.where(count == 1, column(list(boost), d.ndim - 1), 1.0) * d, 0.0), axis=0)
    return np.asarray(tensor64(base, "ramplus_tl") + total / np.maximum(count, 1))
